//! Copy-on-write children: forked inside the stopped tasks, read while the originals run on.

use super::{
    GuardianError,
    inspect::simple,
    journal::Journal,
    tree::{CALL_TIME, Copy, Process, Thread, Tree, answer},
    undo,
    wait::Waiter,
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
            adopt(tree, pid, child, waiter)?;
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
    copies.sort_by_key(|&(pid, _)| pids.iter().position(|&other| other == pid));
    Ok(copies)
}

/// Takes over a child, which is traced from birth, and runs it to where its descriptors are gone.
fn adopt(tree: &mut Tree, pid: i32, child: i32, waiter: &mut Waiter) -> Result<(), GuardianError> {
    let main = tree.process(pid)?.main(pid)?;
    let saved = tree.saved(pid, main)?.clone();
    let space = tree.space(pid).ok_or(GuardianError::Unknown { pid })?.of_copy(child)?;
    let tracee = Tracee::Running(Running::inherited(TaskId { pid: child, tid: child }));
    let way = if space.ignores_trap { Way::WatchedCall } else { Way::Call };
    let thread = Thread { saved: Some(saved), ..Thread::new(tracee) };
    let process = tree.process_mut(pid)?;
    let copy = process.copy.insert(Copy { thread, space });
    let mut progress = Progress::under_way(way);
    let deadline = Instant::now() + CALL_TIME;
    while !progress.poll(&mut copy.thread.tracee) {
        if !waiter.wait(deadline) {
            progress.give_up(&mut copy.thread.tracee, waiter);
        }
    }
    if let Some(Err(error)) = progress.outcome {
        return Err(error.into());
    }
    copy.thread.tracee.stopped()?.set_exit_kill()?;
    let mut result = [0u8; 8];
    copy.space.read(&mut result, copy.space.main_slot().0 + 8)?;
    answer("close_range", child, i64::from_ne_bytes(result))?;
    Ok(())
}

/// Lets the originals run on; copies stay stopped.
pub fn resume_originals(tree: &mut Tree, journal: &mut Journal, waiter: &mut Waiter) {
    undo::clean(tree, journal, waiter);
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
    let mut children = Vec::new();
    let mut stuck = None;
    for (&pid, process) in &mut tree.processes {
        let Some(mut copy) = process.copy.take() else { continue };
        let child = copy.thread.tracee.id().pid;
        // SAFETY: takes numbers only; we are its tracer and have not waited for its end, so the number is its own.
        unsafe { libc::kill(child, libc::SIGKILL) };
        copy.thread.tracee.resume(|stopped| stopped.cont(0));
        let deadline = Instant::now() + STOPPING_TIME;
        while copy.thread.tracee.poll() {
            if !waiter.wait(deadline) {
                stuck = Some(GuardianError::NotGone { pid: child, name: who::name(child) });
                break;
            }
            copy.thread.tracee.resume(|stopped| stopped.cont(0));
        }
        children.push((pid, child));
    }
    stuck.map_or(Ok(children), Err)
}

/// Kills the copies, and has each original reap its own: with exit signal 0 it never learns of it otherwise.
pub fn reap(tree: &mut Tree, waiter: &mut Waiter) -> Result<(), GuardianError> {
    let children = kill_copies(tree, waiter)?;
    let mut first_error = None;
    for (pid, child) in children {
        match reap_one(tree, pid, child, waiter) {
            // Gone, and its copy with it to init.
            Ok(())
            | Err(GuardianError::Ptrace(Error::Absent { .. } | Error::Zombie { .. } | Error::Died { .. })) => {
            }
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    first_error.map_or(Ok(()), Err)
}

fn reap_one(tree: &mut Tree, pid: i32, child: i32, waiter: &mut Waiter) -> Result<(), GuardianError> {
    let resumed = tree.process(pid)?.resumed;
    if resumed {
        stop_again(tree.process_mut(pid)?, pid, waiter)?;
    }
    let result = wait_for_child(tree, pid, child, waiter);
    if resumed {
        for (_, thread) in tree.threads_mut() {
            let _ = thread.put_back();
        }
        let process = tree.process_mut(pid)?;
        let stuck = undo::detach_process(pid, process, waiter);
        process.space = None;
        tree.stragglers.extend(stuck);
    }
    result
}

/// One thread, for a moment.
fn stop_again(process: &mut Process, pid: i32, waiter: &mut Waiter) -> Result<(), GuardianError> {
    let alive = |tid: &i32| who::Stat::read(*tid).is_some_and(|stat| !stat.is_zombie());
    let mut tids = who::threads(pid);
    tids.sort_by_key(|&tid| (tid != pid, tid));
    let tid = tids.into_iter().find(alive).ok_or(Error::Absent { pid })?;
    let running = Running::seize(TaskId { pid, tid }, Options::DUMP)?;
    running.interrupt();
    let mut thread = Thread::new(Tracee::Running(running));
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

fn wait_for_child(tree: &mut Tree, pid: i32, child: i32, waiter: &mut Waiter) -> Result<(), GuardianError> {
    let arguments = [child as u64, 0, libc::__WALL as u64, 0, 0, 0];
    for (_, result) in tree.syscalls(&[(pid, libc::SYS_wait4 as u64, arguments)], waiter)? {
        let value = result?;
        // ECHILD: the program waits for children of every kind and was faster.
        if value != -i64::from(libc::ECHILD) {
            answer("wait4", pid, value)?;
        }
    }
    Ok(())
}
