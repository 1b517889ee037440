//! Copy-on-write children: forked inside the stopped tasks, read while the originals run on.

use super::{
    GuardianError,
    inspect::simple,
    journal::Journal,
    survey,
    tree::{CALL_TIME, Copy, Process, Thread, Tree, answer},
    undo,
    wait::Waiter,
    waits,
};
use crate::{
    inject::{
        InjectError,
        parasite::command,
        run::{Patience, Progress, Way},
        space::Space,
    },
    ptrace::{Error, Options, Running, Stop, TaskId, Tracee, who},
};
use std::time::{Duration, Instant};

/// How long a second stop, to reap a child, may take.
const STOPPING_TIME: Duration = Duration::from_secs(5);

/// Forks one child in each of these processes; tells original and copy. On an error no copy stays.
pub fn take(tree: &mut Tree, pids: &[i32], waiter: &mut Waiter) -> Result<Vec<(i32, i32)>, GuardianError> {
    let result = fork_all(tree, pids, waiter);
    if result.is_err() {
        let _ = reap(tree, waiter);
    }
    result
}

fn fork_all(tree: &mut Tree, pids: &[i32], waiter: &mut Waiter) -> Result<Vec<(i32, i32)>, GuardianError> {
    tree.inject(pids, waiter)?;
    let mut copies = Vec::with_capacity(pids.len());
    let mut first_error = None;
    for (pid, (result, forked)) in simple(tree, pids, command::SNAPSHOT, [0; 4], waiter)? {
        // A child that exists is noted before anything else, so that it is killed and reaped in any case.
        if let Some(child) = forked {
            adopt(tree, pid, child)?;
            copies.push((pid, child));
        }
        let failed = match result {
            Ok(call) => answer("clone", pid, call.result).err().map(GuardianError::from),
            Err(error) => Some(error),
        };
        first_error = first_error.or(failed);
    }
    if let Some(error) = first_error {
        return Err(error);
    }
    settle(tree, waiter)?;
    copies.sort_by_key(|&(pid, _)| pids.iter().position(|&other| other == pid));
    Ok(copies)
}

/// Takes over a child, which is traced from birth.
fn adopt(tree: &mut Tree, pid: i32, child: i32) -> Result<(), GuardianError> {
    let main = tree.process(pid)?.main(pid)?;
    let saved = tree.saved(pid, main)?.clone();
    let space = tree.space(pid).ok_or(GuardianError::Unknown { pid })?.of_copy(child)?;
    let tracee = Tracee::Running(Running::inherited(TaskId { pid: child, tid: child }));
    let thread = Thread { saved: Some(saved), ..Thread::new(tracee) };
    tree.process_mut(pid)?.copy = Some(Copy { thread, space });
    Ok(())
}

/// Runs the children to where their descriptors are gone, all at once.
fn settle(tree: &mut Tree, waiter: &mut Waiter) -> Result<(), GuardianError> {
    let way = |space: &Space| if space.ignores_trap { Way::WatchedCall } else { Way::Call };
    let copies = tree.processes.values_mut().filter_map(|process| process.copy.as_mut());
    let mut running: Vec<(Progress, &mut Copy)> =
        copies.map(|copy| (Progress::under_way(way(&copy.space)), copy)).collect();
    let deadline = Instant::now() + CALL_TIME;
    loop {
        let mut pending = false;
        for (progress, copy) in &mut running {
            pending |= !progress.poll(&mut copy.thread.tracee);
        }
        if !pending {
            break;
        }
        if !waiter.wait(deadline) {
            for (progress, copy) in running.iter_mut().filter(|(progress, _)| progress.outcome.is_none()) {
                progress.give_up(&mut copy.thread.tracee, waiter);
            }
            break;
        }
    }
    for (progress, copy) in running {
        if let Some(Err(error)) = progress.outcome {
            return Err(error.into());
        }
        copy.thread.tracee.stopped()?.set_exit_kill()?;
        let mut result = [0u8; 8];
        copy.space.read(&mut result, copy.space.main_slot().0 + 8)?;
        answer("close_range", copy.space.pid(), i64::from_ne_bytes(result))?;
    }
    Ok(())
}

/// Lets the originals run on; copies stay stopped.
pub fn resume_originals(tree: &mut Tree, journal: &mut Journal, waiter: &mut Waiter) {
    undo::clean(tree, journal, waiter);
    // As in `undo::release`.
    let _ = waits::go_on(tree.processes.values_mut(), waiter);
    for (&pid, process) in &mut tree.processes {
        let stuck = undo::detach_process(pid, process, waiter);
        tree.stragglers.extend(stuck);
        process.space = None;
        process.resumed = true;
    }
    undo::refreeze(journal);
}

/// Kills the copies and waits for their end.
pub fn kill_copies(tree: &mut Tree, waiter: &mut Waiter) -> Result<Vec<(i32, i32)>, GuardianError> {
    let mut copies: Vec<(i32, Copy)> = Vec::new();
    for (&pid, process) in &mut tree.processes {
        copies.extend(process.copy.take().map(|copy| (pid, copy)));
    }
    for (_, copy) in &copies {
        // SAFETY: takes numbers only; we are its tracer and have not waited for its end, so the number is its own.
        unsafe { libc::kill(copy.space.pid(), libc::SIGKILL) };
    }
    let deadline = Instant::now() + STOPPING_TIME;
    let mut children = Vec::with_capacity(copies.len());
    for (pid, mut copy) in copies {
        let child = copy.space.pid();
        copy.thread.tracee.resume(|stopped| stopped.cont(0));
        while copy.thread.tracee.poll() {
            if !waiter.wait(deadline) {
                return Err(GuardianError::NotGone { pid: child, name: who::name(child) });
            }
            copy.thread.tracee.resume(|stopped| stopped.cont(0));
        }
        children.push((pid, child));
    }
    Ok(children)
}

/// Kills the copies, and has each original reap its own: with exit signal 0 it never learns of it otherwise.
pub fn reap(tree: &mut Tree, waiter: &mut Waiter) -> Result<(), GuardianError> {
    let children = kill_copies(tree, waiter)?;
    let is_resumed = |pid: i32| tree.processes.get(&pid).is_some_and(|process| process.resumed);
    let (resumed, held): (Vec<_>, Vec<_>) = children.into_iter().partition(|&(pid, _)| is_resumed(pid));
    let mut result = wait_for_children(tree, &held, waiter);
    for pair in resumed {
        // Each by itself: so each is stopped but for a moment.
        let one = reap_one(tree, pair, waiter);
        result = result.and(one);
    }
    match result {
        // Gone, and its copy with it to init.
        Err(GuardianError::Ptrace(Error::Absent { .. } | Error::Zombie { .. } | Error::Died { .. })) => {
            Ok(())
        }
        result => result,
    }
}

fn reap_one(tree: &mut Tree, pair: (i32, i32), waiter: &mut Waiter) -> Result<(), GuardianError> {
    let pid = pair.0;
    let thread = choose(tree, pid)?;
    let stopped = stop_again(tree.process_mut(pid)?, thread, waiter);
    let result = stopped.and_then(|()| wait_for_children(tree, &[pair], waiter));
    let process = tree.process_mut(pid)?;
    for thread in process.threads.values_mut() {
        let _ = thread.put_back();
    }
    let _ = waits::go_on(std::iter::once(&mut *process), waiter);
    let stuck = undo::detach_process(pid, process, waiter);
    process.space = None;
    tree.stragglers.extend(stuck);
    result
}

/// The thread that is to be stopped again: one that nothing is known of that a stop would disturb, if there is one.
fn choose(tree: &mut Tree, pid: i32) -> Result<Thread, GuardianError> {
    let alive = |tid: &i32| who::Stat::read(*tid).is_some_and(|stat| !stat.is_zombie());
    let mut tids: Vec<i32> = who::threads(pid).into_iter().filter(alive).collect();
    let straggler = |tid: i32| tree.stragglers.iter().position(|thread| thread.tracee.id().tid == tid);
    tids.sort_by_key(|&tid| (straggler(tid).is_some(), tid != pid, tid));
    let &tid = tids.first().ok_or(Error::Absent { pid })?;
    let (tracee, wait) = match straggler(tid) {
        Some(index) => {
            let thread = tree.stragglers.swap_remove(index);
            (thread.tracee, thread.wait)
        }
        None => (Tracee::Running(Running::seize(TaskId { pid, tid }, Options::DUMP)?), None),
    };
    let begun = survey::survey_thread(TaskId { pid, tid }, wait);
    Ok(Thread { begun, ..Thread::new(tracee) })
}

/// One thread, for a moment.
fn stop_again(process: &mut Process, thread: Thread, waiter: &mut Waiter) -> Result<(), GuardianError> {
    let (TaskId { pid, tid }, mut thread) = (thread.tracee.id(), thread);
    if let Tracee::Running(running) = &thread.tracee {
        running.interrupt();
    }
    let deadline = Instant::now() + STOPPING_TIME;
    loop {
        while thread.tracee.poll() {
            if !waiter.wait(deadline) {
                return Err(InjectError::Late { pid, tid, name: who::name(tid) }.into());
            }
        }
        let stopped = thread.tracee.stopped()?;
        let signal = match stopped.stop() {
            Stop::Interrupted | Stop::Group(_) => break,
            Stop::Signal(signal) => signal,
            Stop::Event(_) | Stop::Syscall => 0,
        };
        stopped.interrupt();
        thread.tracee.resume(|stopped| stopped.cont(signal));
    }
    super::collect::capture_thread(pid, &mut thread, &mut Vec::new())?;
    process.threads.insert(tid, thread);
    process.space = Some(Space::open(pid, tid)?);
    Ok(())
}

/// wait4(2) in each original, for its copy.
fn wait_for_children(
    tree: &mut Tree,
    pairs: &[(i32, i32)],
    waiter: &mut Waiter,
) -> Result<(), GuardianError> {
    let arguments = |child: i32| {
        // The original may be in a pid namespace of its own; 0 would mean any child of its group.
        let (_, inner) = super::restore::inner(child);
        let number = if inner > 0 { inner } else { child };
        [number as u64, 0, libc::__WALL as u64, 0, 0, 0]
    };
    let calls: Vec<_> =
        pairs.iter().map(|&(pid, child)| (pid, libc::SYS_wait4 as u64, arguments(child))).collect();
    let mut outcome = Ok(());
    for (pid, result) in tree.syscalls(&calls, waiter)? {
        // ECHILD: the program waits for children of every kind and was faster.
        let checked = result.and_then(|value| match value {
            value if value == -i64::from(libc::ECHILD) => Ok(0),
            value => answer("wait4", pid, value),
        });
        outcome = outcome.and(checked.map(drop).map_err(GuardianError::from));
    }
    outcome
}
