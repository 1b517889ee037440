//! Stopping a whole tree: every thread of every process, until nothing new appears.

use super::{
    GuardianError, NotStopping,
    journal::{Freezer, Journal},
    protocol::SeizedTask,
    survey::survey,
    tree::{Process, Thread, Tree},
    wait::Waiter,
};
use crate::{
    inject::run::Patience,
    ptrace::{Error, Options, Running, Stop, TaskId, Tracee, who},
};
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

/// A vforked parent gets this long before everything is let go for a moment: its child must run to set it free.
const ATTEMPT: Duration = Duration::from_millis(200);

/// Bits of the first argument of clone(2).
const CLONE_VFORK: u64 = 0x4000;

/// What to seize.
#[derive(Debug)]
pub struct Order {
    /// Root of the tree.
    pub root: i32,
    /// How long it may take.
    pub timeout: Duration,
    /// A cgroup to freeze meanwhile.
    pub freeze_cgroup: Option<PathBuf>,
    /// The command's process.
    pub command: i32,
}

/// Seizes the tree; on an error nothing stays seized.
pub fn seize(
    order: &Order,
    tree: &mut Tree,
    journal: &mut Journal,
    waiter: &mut Waiter,
) -> Result<Vec<SeizedTask>, GuardianError> {
    refuse(order)?;
    let deadline = Instant::now() + order.timeout;
    loop {
        let until = deadline.min(Instant::now() + ATTEMPT);
        let result = attempt(order, tree, journal, waiter, until, deadline);
        let Err(error) = result else { return result };
        super::undo::release(tree, journal, waiter);
        let vforked = matches!(error, GuardianError::NotStopping { why: NotStopping::Vfork, .. });
        if !vforked || Instant::now() >= deadline || waiter.command_gone {
            return Err(error);
        }
        waiter.wait(Instant::now() + Duration::from_millis(10));
    }
}

/// What no dump can be made of.
fn refuse(order: &Order) -> Result<(), GuardianError> {
    let pid = order.root;
    let name = || who::name(pid);
    let Some(stat) = who::Stat::read(pid) else { return Err(Error::Absent { pid }.into()) };
    for start in [std::process::id() as i32, order.command] {
        let mut ancestor = start;
        while ancestor > 0 {
            if ancestor == pid {
                return Err(Error::Ourselves { pid, name: name() }.into());
            }
            ancestor = who::Stat::read(ancestor).map_or(0, |stat| stat.parent);
        }
    }
    if stat.is_kernel_thread() {
        return Err(Error::KernelThread { pid, name: name() }.into());
    }
    // A leader that is dead while other threads live can be dumped.
    if stat.is_zombie() && who::threads(pid).len() < 2 {
        return Err(Error::Zombie { pid, name: name() }.into());
    }
    match who::process_of(pid) {
        Some(process) if process != pid => Err(Error::Absent { pid }.into()),
        _ => Ok(()),
    }
}

fn attempt(
    order: &Order,
    tree: &mut Tree,
    journal: &mut Journal,
    waiter: &mut Waiter,
    vfork_deadline: Instant,
    deadline: Instant,
) -> Result<Vec<SeizedTask>, GuardianError> {
    let mut begun = survey(order.root);
    if let Some(path) = &order.freeze_cgroup {
        journal.freezer = Some(Freezer::freeze(path, deadline, waiter)?);
        while attach(order.root, tree)? > 0 {}
        // Everything seized has a stop pending, which it takes before any instruction of its own.
        if let Some(freezer) = &journal.freezer {
            freezer.thaw()?;
        }
    }
    loop {
        let new = attach(order.root, tree)?;
        let unsettled = settle(tree, waiter, vfork_deadline, deadline)?;
        if new == 0 && !unsettled {
            break;
        }
        if waiter.command_gone {
            return Err(GuardianError::CommandEnded);
        }
    }
    for (_, thread) in tree.threads_mut() {
        thread.begun = begun.remove(&thread.tracee.id().tid);
    }
    let mut tasks = Vec::with_capacity(tree.processes.len());
    for (&pid, process) in &tree.processes {
        let mut tids: Vec<i32> = process.threads.keys().copied().collect();
        tids.sort_by_key(|&tid| (tid != pid, tid));
        tasks.push(SeizedTask { pid, tids, group_stop: process.group_stop, zombie: process.zombie });
    }
    Ok(tasks)
}

/// Seizes whatever of the tree is not yet seized; tells how many tasks that were.
fn attach(root: i32, tree: &mut Tree) -> Result<usize, GuardianError> {
    let (mut queue, mut new) = (vec![root], 0);
    while let Some(pid) = queue.pop() {
        for tid in who::threads(pid) {
            let known = tree.processes.get(&pid).is_some_and(|process| process.threads.contains_key(&tid));
            if !known {
                new += usize::from(attach_one(TaskId { pid, tid }, tree)?);
            }
            queue.extend(who::children(pid, tid));
        }
    }
    Ok(new)
}

/// True if the task is new to the tree.
fn attach_one(id: TaskId, tree: &mut Tree) -> Result<bool, GuardianError> {
    let ourselves = std::process::id() as i32;
    if id.pid == ourselves {
        return Err(Error::Ourselves { pid: id.pid, name: who::name(id.pid) }.into());
    }
    let running = match Running::seize(id, Options::DUMP) {
        Ok(running) => running,
        Err(Error::AlreadyTraced { tracer, .. }) if tracer == ourselves => {
            tree.stragglers.retain(|straggler| straggler.tracee.id() != id);
            Running::inherited(id)
        }
        Err(Error::Absent { .. }) => return Ok(false),
        Err(Error::Zombie { .. }) => {
            // A dead leader of live threads, or a dead process.
            let is_new = id.pid == id.tid && !tree.processes.contains_key(&id.pid);
            if is_new {
                let zombie = who::threads(id.pid).len() < 2;
                tree.processes.insert(id.pid, Process { zombie, ..Process::default() });
            }
            return Ok(is_new);
        }
        Err(error) => return Err(error.into()),
    };
    running.interrupt();
    let process = tree.processes.entry(id.pid).or_default();
    process.zombie = false;
    process.threads.insert(id.tid, Thread::new(Tracee::Running(running)));
    Ok(true)
}

/// Waits until every seized thread has stopped. True if something happened after which the tree must be looked at again.
fn settle(
    tree: &mut Tree,
    waiter: &mut Waiter,
    vfork_deadline: Instant,
    deadline: Instant,
) -> Result<bool, GuardianError> {
    let mut changed = false;
    loop {
        let mut running = None;
        for process in tree.processes.values_mut() {
            for thread in process.threads.values_mut() {
                if !matches!(thread.tracee, Tracee::Running(_)) || !thread.tracee.poll() {
                    changed |= note_stop(thread, &mut process.group_stop);
                }
                if matches!(thread.tracee, Tracee::Running(_)) {
                    running = Some(thread.tracee.id());
                }
            }
            let before = process.threads.len();
            process.threads.retain(|_, thread| !matches!(thread.tracee, Tracee::Gone(..)));
            changed |= process.threads.len() != before;
        }
        if changed {
            drop_dead(tree);
        }
        let Some(id) = running else { return Ok(changed) };
        if waiter.command_gone {
            return Err(GuardianError::CommandEnded);
        }
        let now = Instant::now();
        if !waiter.wait((now + Duration::from_millis(20)).min(deadline)) {
            let why = why_not_stopping(id.tid);
            if now >= deadline || (why == NotStopping::Vfork && now >= vfork_deadline) {
                return Err(GuardianError::NotStopping {
                    pid: id.pid,
                    tid: id.tid,
                    name: who::name(id.tid),
                    why,
                });
            }
        }
    }
}

/// Looks at a stop; lets the thread go on to the stop that was asked for, if it is another. True if a task was forked.
fn note_stop(thread: &mut Thread, group_stop: &mut Option<i32>) -> bool {
    let Tracee::Stopped(stopped) = &thread.tracee else { return false };
    // Any stop clears the interrupt that is pending, so it must be asked for again.
    match stopped.stop() {
        Stop::Interrupted => false,
        Stop::Group(signal) => {
            *group_stop = Some(signal);
            false
        }
        Stop::Signal(signal) => {
            stopped.interrupt();
            thread.tracee.resume(|stopped| stopped.cont(signal));
            false
        }
        Stop::Event(_) | Stop::Syscall => {
            stopped.interrupt();
            thread.tracee.resume(|stopped| stopped.cont(0));
            true
        }
    }
}

/// Forgets processes of which nothing is left.
fn drop_dead(tree: &mut Tree) {
    tree.processes.retain(|&pid, process| {
        if process.threads.is_empty() && !process.zombie {
            process.zombie = who::Stat::read(pid).is_some_and(|stat| stat.is_zombie());
            return process.zombie;
        }
        true
    });
}

fn why_not_stopping(tid: i32) -> NotStopping {
    let state = who::Stat::read(tid).map_or(b'?', |stat| stat.state);
    let syscall = who::syscall(tid).map(|call| (call.number, call.arguments[0]));
    match syscall {
        Some((number, _)) if number == libc::SYS_vfork as u64 => NotStopping::Vfork,
        Some((number, flags)) if number == libc::SYS_clone as u64 && flags & CLONE_VFORK != 0 => {
            NotStopping::Vfork
        }
        // The flags of clone3 are in memory; who waits for a child in it without a stop, waits for a vfork.
        Some((number, _)) if number == libc::SYS_clone3 as u64 => NotStopping::Vfork,
        _ if state == b'D' => NotStopping::Uninterruptible { syscall: syscall.map(|(number, _)| number) },
        _ => NotStopping::Busy { state: state.into() },
    }
}
