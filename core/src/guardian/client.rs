//! The command's side.

use super::{
    GuardianError,
    channel::Channel,
    protocol::{
        CollectedTask, FinalTask, Outcome, PageRange, ProcessState, Reply, Request, SeizedTask, TaskDied,
        ToCommand, UndoStep, WriteOrder, Written,
    },
    server,
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    unistd::{ForkResult, fork},
};
use std::{
    collections::VecDeque,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    sync::atomic::AtomicU32,
    time::Duration,
};

/// Pages of one task to write to one file.
#[derive(Debug)]
pub struct WriteJob<'a> {
    /// A task of the tree, or a snapshot's child.
    pub pid: i32,
    /// The file.
    pub shard: BorrowedFd<'a>,
    /// Where in the file to begin.
    pub offset: u64,
    /// What to write, in this order.
    pub ranges: Vec<PageRange>,
}

/// The guardian, as the command sees it. When every process that holds this has dropped it, or the process that asked to seize or
/// adopt is gone, the guardian undoes everything that is not finished.
#[derive(Debug)]
pub struct Guardian {
    channel: Channel,
    pid: i32,
    deaths: VecDeque<TaskDied>,
}

impl Guardian {
    /// Forks the guardian. The calling process must have a single thread, and no plugin loaded.
    pub fn spawn() -> Result<Self, GuardianError> {
        Self::spawn_holding(None)
    }

    /// The same. Restored tasks are not killed as long as `hold`, in memory shared with them, is not 0 (within reason).
    pub fn spawn_holding(hold: Option<&'static AtomicU32>) -> Result<Self, GuardianError> {
        let (ours, theirs) = Channel::pair()?;
        // SAFETY: the process has one thread (the caller's duty), so the child may do anything.
        match unsafe { fork() }.map_err(|errno| GuardianError::channel("fork", errno))? {
            ForkResult::Child => {
                drop(ours);
                // A panic must not unwind into the caller's frames, which belong to the parent.
                let code = std::panic::catch_unwind(|| server::run(theirs, hold)).unwrap_or(2);
                // SAFETY: ends this process without running what the parent registered for its own exit.
                unsafe { libc::_exit(code) }
            }
            ForkResult::Parent { child } => {
                Ok(Self { channel: ours, pid: child.as_raw(), deaths: VecDeque::new() })
            }
        }
    }

    /// The guardian's process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    fn ask(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply, GuardianError> {
        self.channel.send(request, fds)?;
        loop {
            match self.channel.receive::<ToCommand>()?.0 {
                ToCommand::Reply(reply) => return reply,
                ToCommand::Died(died) => self.deaths.push_back(died),
            }
        }
    }

    fn done(&mut self, request: &Request) -> Result<(), GuardianError> {
        match self.ask(request, &[])? {
            Reply::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// Stops the tree below `root`: every thread of every process, until nothing new appears. On an error, and until
    /// [`Self::finish`], the guardian can put everything back.
    ///
    /// With `freeze_cgroup` (a cgroup directory, version 1 or 2) the cgroup is frozen while the tasks are being found, and thawed again as soon
    /// as every task has a stop pending.
    pub fn seize(
        &mut self,
        root: i32,
        timeout: Duration,
        freeze_cgroup: Option<PathBuf>,
    ) -> Result<Vec<SeizedTask>, GuardianError> {
        let (timeout_ms, command) = (timeout.as_millis() as u64, std::process::id() as i32);
        match self.ask(&Request::Seize { root, timeout_ms, freeze_cgroup, command }, &[])? {
            Reply::Seized(tasks) => Ok(tasks),
            _ => Err(unexpected()),
        }
    }

    /// What ptrace tells of all threads. Ask before anything is injected: remaining sleeps can be found only then.
    pub fn collect(&mut self) -> Result<Vec<CollectedTask>, GuardianError> {
        match self.ask(&Request::Collect, &[])? {
            Reply::Collected(tasks) => Ok(tasks),
            _ => Err(unexpected()),
        }
    }

    /// What these processes and their threads must be asked themselves.
    pub fn inspect(&mut self, pids: &[i32]) -> Result<Vec<ProcessState>, GuardianError> {
        match self.ask(&Request::Inspect(pids.to_vec()), &[])? {
            Reply::Inspected(states) => Ok(states),
            _ => Err(unexpected()),
        }
    }

    /// Makes a system call in the leader of a stopped process: a value, or a negative errno.
    pub fn syscall(&mut self, pid: i32, number: i64, arguments: [u64; 6]) -> Result<i64, GuardianError> {
        match self.ask(&Request::Syscall { pid, number: number as u64, arguments }, &[])? {
            Reply::Result(value) => Ok(value),
            _ => Err(unexpected()),
        }
    }

    /// Has a duplicate of `fd` kept, and these steps done with it before the tree runs on; the last ones first. If the
    /// tree is killed, the duplicate is closed when it is gone.
    pub fn undo(&mut self, fd: BorrowedFd<'_>, steps: Vec<UndoStep>) -> Result<(), GuardianError> {
        match self.ask(&Request::Undo(steps), &[fd])? {
            Reply::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// Starts writing pages from inside the tasks; those of different tasks at the same time. Meanwhile the memory of other
    /// tasks can be read from outside. Nothing but [`Self::finish_write`] (or giving up) may follow.
    pub fn start_write(&mut self, jobs: &[WriteJob<'_>]) -> Result<(), GuardianError> {
        let order =
            |job: &WriteJob<'_>| WriteOrder { pid: job.pid, offset: job.offset, ranges: job.ranges.clone() };
        let orders = jobs.iter().map(order).collect();
        let shards: Vec<BorrowedFd<'_>> = jobs.iter().map(|job| job.shard).collect();
        match self.ask(&Request::StartWrite(orders), &shards)? {
            Reply::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// Waits for the writes; one answer for each job, in the same order. A job with an error has written all before `stopped_at`; the
    /// rest is to be read from outside.
    pub fn finish_write(&mut self) -> Result<Vec<Written>, GuardianError> {
        match self.ask(&Request::FinishWrite, &[])? {
            Reply::Written(written) => Ok(written),
            _ => Err(unexpected()),
        }
    }

    /// [`Self::start_write`] and [`Self::finish_write`].
    pub fn write_pages(&mut self, jobs: &[WriteJob<'_>]) -> Result<Vec<Written>, GuardianError> {
        self.start_write(jobs)?;
        self.finish_write()
    }

    /// Forks a copy-on-write child in each of these processes: pairs of original and copy. On an error there is none.
    pub fn snapshot(&mut self, pids: &[i32]) -> Result<Vec<(i32, i32)>, GuardianError> {
        match self.ask(&Request::Snapshot(pids.to_vec()), &[])? {
            Reply::Snapshots(pairs) => Ok(pairs),
            _ => Err(unexpected()),
        }
    }

    /// Lets the tree run on as it was; the copies stay stopped, to be read or written out.
    pub fn resume_originals(&mut self) -> Result<(), GuardianError> {
        self.done(&Request::ResumeOriginals)
    }

    /// Kills the copies and, in a short stop of each original, reaps them.
    pub fn reap_snapshots(&mut self) -> Result<(), GuardianError> {
        self.done(&Request::ReapSnapshots)
    }

    /// Makes a hard link to `file` in `directory`, which is taken away again unless [`Self::keep_links`] follows.
    pub fn link(
        &mut self,
        file: BorrowedFd<'_>,
        directory: BorrowedFd<'_>,
        name: &str,
    ) -> Result<(), GuardianError> {
        match self.ask(&Request::Link { name: name.into() }, &[file, directory])? {
            Reply::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// The image is complete, and needs the links.
    pub fn keep_links(&mut self) -> Result<(), GuardianError> {
        self.done(&Request::KeepLinks)
    }

    /// Ends the dump.
    pub fn finish(&mut self, outcome: Outcome) -> Result<(), GuardianError> {
        self.done(&Request::Finish(outcome))
    }

    /// Takes over the root of a tree that is being restored: it and all it forks from now on are traced, and die with the
    /// guardian. Then one byte is written to `gate`, which is closed.
    pub fn adopt(&mut self, root: i32, gate: Option<OwnedFd>) -> Result<(), GuardianError> {
        let gates: Vec<BorrowedFd<'_>> = gate.iter().map(AsFd::as_fd).collect();
        match self.ask(&Request::Adopt { root, command: std::process::id() as i32 }, &gates)? {
            Reply::Done => Ok(()),
            _ => Err(unexpected()),
        }
    }

    /// Waits until so many threads stand at the restorer's int3. A task killed by a signal is an error at once.
    pub fn wait_arrived(&mut self, expected: usize, timeout: Duration) -> Result<(), GuardianError> {
        self.done(&Request::WaitArrived { expected, timeout_ms: timeout.as_millis() as u64 })
    }

    /// Gives every thread its final registers and signal mask, re-arms interrupted sleeps, and unmaps the restorer. All stay stopped.
    pub fn finalize(&mut self, tasks: Vec<FinalTask>) -> Result<(), GuardianError> {
        self.done(&Request::Finalize(tasks))
    }

    /// Lets the restored tree run.
    pub fn release(&mut self) -> Result<(), GuardianError> {
        self.done(&Request::Release)
    }

    /// Kills everything that was adopted, and waits until it is gone.
    pub fn abort(&mut self) -> Result<(), GuardianError> {
        self.done(&Request::Abort)
    }

    /// An adopted task that has ended, if one has; does not wait. Helpers and zombies that end as they should are among
    /// them. [`AsFd`] is readable when there may be one.
    pub fn try_died(&mut self) -> Result<Option<TaskDied>, GuardianError> {
        loop {
            if let Some(died) = self.deaths.pop_front() {
                return Ok(Some(died));
            }
            let mut fds = [PollFd::new(self.channel.stream().as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::ZERO) {
                Ok(0) | Err(Errno::EINTR) => return Ok(None),
                Ok(_) => {}
                Err(errno) => return Err(GuardianError::channel("poll", errno)),
            }
            match self.channel.receive::<ToCommand>()?.0 {
                ToCommand::Died(died) => self.deaths.push_back(died),
                ToCommand::Reply(_) => return Err(unexpected()),
            }
        }
    }
}

impl AsFd for Guardian {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.stream().as_fd()
    }
}

fn unexpected() -> GuardianError {
    GuardianError::Malformed { what: "answer".into() }
}
