//! The guardian process itself: one thread, one loop.

use super::{
    GuardianError,
    channel::Channel,
    collect, inspect,
    journal::Journal,
    pages::{self, Job},
    protocol::{Reply, Request, ToCommand, Written},
    restore::Nursery,
    seize, snapshot,
    tree::{Thread, Tree},
    undo,
    wait::{Waiter, block_child_signals},
};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::{
        prctl::set_name,
        resource::{Resource, getrlimit, setrlimit},
        signal::{SigHandler, Signal, signal},
        stat::Mode,
    },
    unistd::{dup2_stdin, dup2_stdout, setsid},
};
use std::{fs::File, io::Write, os::fd::OwnedFd, sync::atomic::AtomicU32, time::Duration};

/// Everything the guardian holds.
#[derive(Debug)]
struct Server {
    channel: Channel,
    waiter: Waiter,
    tree: Tree,
    journal: Journal,
    jobs: Vec<Job>,
    nursery: Nursery,
}

/// Runs until the channel closes. Tells the exit code.
pub fn run(channel: Channel, hold: Option<&'static AtomicU32>) -> i32 {
    if prepare(&channel).is_err() {
        return 1;
    }
    let waiter = Waiter::new(channel.raw());
    let (tree, journal, nursery) = (Tree::default(), Journal::default(), Nursery::new(hold));
    let mut server = Server { channel, waiter, tree, journal, jobs: Vec::new(), nursery };
    while server.turn().is_ok() {}
    server.undo();
    0
}

/// Nothing of the command's surroundings may end us, and we hold nothing of them but stderr.
fn prepare(channel: &Channel) -> Result<(), Errno> {
    // Fails if we lead a process group already, which a fresh fork never does.
    setsid()?;
    set_name(c"stasis-guardian")?;
    for number in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGPIPE, Signal::SIGQUIT] {
        // SAFETY: no handler is installed.
        unsafe { signal(number, SigHandler::SigIgn) }?;
    }
    block_child_signals()?;
    let null = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    drop(null);
    let keep = channel.raw() as u32;
    for (first, last) in [(3, keep.saturating_sub(1)), (keep + 1, u32::MAX)] {
        if first <= last {
            // SAFETY: whatever these numbers are, the objects that own them were the parent's and are never used here.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
    // One descriptor per process of the tree.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    Ok(())
}

impl Server {
    /// Waits for something to do, and does it. An error ends the guardian.
    fn turn(&mut self) -> Result<(), GuardianError> {
        pages::advance(&mut self.jobs, &mut self.tree);
        undo::free_stragglers(&mut self.tree);
        self.report_deaths()?;
        self.waiter.poll(libc::POLLIN | libc::POLLRDHUP, None);
        if self.waiter.command_gone {
            return Err(GuardianError::CommandEnded);
        }
        if !self.readable() {
            return Ok(());
        }
        let (request, fds) = self.channel.receive::<Request>()?;
        let reply = self.answer(request, fds);
        self.report_deaths()?;
        self.channel.send(&ToCommand::Reply(reply), &[])
    }

    fn readable(&self) -> bool {
        let mut fd = libc::pollfd { fd: self.channel.raw(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd.
        unsafe { libc::poll(&mut fd, 1, 0) == 1 }
    }

    fn report_deaths(&mut self) -> Result<(), GuardianError> {
        if !self.nursery.is_empty() {
            self.nursery.pump();
        }
        for died in self.nursery.take_died() {
            self.channel.send(&ToCommand::Died(died), &[])?;
        }
        Ok(())
    }

    fn answer(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<Reply, GuardianError> {
        let Self { waiter, tree, journal, jobs, nursery, .. } = self;
        match request {
            Request::Seize { root, timeout_ms, freeze_cgroup, command } => {
                waiter.watch(command);
                let timeout = Duration::from_millis(timeout_ms);
                let order = seize::Order { root, timeout, freeze_cgroup, command };
                seize::seize(&order, tree, journal, waiter).map(Reply::Seized)
            }
            Request::Collect => collect::collect(tree, waiter).map(Reply::Collected),
            Request::Inspect(pids) => inspect::inspect(tree, &pids, waiter).map(Reply::Inspected),
            Request::Syscall { pid, number, arguments } => {
                tree.open(&[pid])?;
                let mut results = tree.syscalls(&[(pid, number, arguments)], waiter)?;
                Ok(Reply::Result(results.remove(&pid).ok_or(GuardianError::Unknown { pid })??))
            }
            Request::Undo(steps) => {
                journal.undo.extend(fds.into_iter().map(|fd| (fd, steps.clone())));
                Ok(Reply::Done)
            }
            Request::StartWrite(orders) => {
                for (order, shard) in orders.into_iter().zip(fds) {
                    let mut job = Job::new(order, shard, tree)?;
                    if let Err(error) = pages::install(tree, &mut job, journal, waiter) {
                        job.fail(error);
                    }
                    jobs.push(job);
                }
                pages::advance(jobs, tree);
                Ok(Reply::Done)
            }
            Request::FinishWrite => {
                pages::complete(jobs, tree, journal, waiter)?;
                let written: Vec<Written> = jobs.drain(..).map(Job::into_written).collect();
                Ok(Reply::Written(written))
            }
            Request::Snapshot(pids) => snapshot::take(tree, &pids, waiter).map(Reply::Snapshots),
            Request::ResumeOriginals => {
                snapshot::resume_originals(tree, journal, waiter);
                Ok(Reply::Done)
            }
            Request::ReapSnapshots => snapshot::reap(tree, waiter).map(|()| Reply::Done),
            Request::Link { name } => {
                let mut fds = fds.into_iter();
                let (Some(file), Some(directory)) = (fds.next(), fds.next()) else {
                    return Err(GuardianError::Malformed { what: "number of descriptors".into() });
                };
                journal.link(&file, directory, name).map(|()| Reply::Done)
            }
            Request::KeepLinks => {
                journal.links.clear();
                Ok(Reply::Done)
            }
            Request::Finish(outcome) => {
                jobs.clear();
                undo::finish(outcome, tree, journal, waiter).map(|()| Reply::Done)
            }
            Request::Adopt { root, command } => {
                waiter.watch(command);
                nursery.adopt(root)?;
                // The gate opens only now that all it forks is ours.
                for gate in fds {
                    let _ = File::from(gate).write_all(&[1]);
                }
                Ok(Reply::Done)
            }
            Request::WaitArrived { expected, timeout_ms } => nursery
                .wait_arrived(expected, Duration::from_millis(timeout_ms), waiter)
                .map(|()| Reply::Done),
            Request::Finalize(tasks) => nursery.finalize(&tasks, waiter).map(|()| Reply::Done),
            Request::Release => {
                tree.stragglers.extend(nursery.release(waiter)?.into_iter().map(Thread::new));
                journal.undo.clear();
                Ok(Reply::Done)
            }
            Request::Abort => {
                let gone = nursery.abort(waiter);
                journal.undo_steps();
                gone.map(|()| Reply::Done)
            }
        }
    }

    /// The command is gone: all as it was, and nothing of a restore.
    fn undo(&mut self) {
        self.waiter.command_gone = true;
        // A call in flight is ended by the release, which interrupts and resets its thread.
        self.jobs.clear();
        // First: steps of the journal may need that restored tasks are gone.
        let _ = self.nursery.abort(&mut self.waiter);
        undo::release(&mut self.tree, &mut self.journal, &mut self.waiter);
    }
}
