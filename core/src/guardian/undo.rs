//! Putting everything back, in the order in which it must be done; and the other ways a dump can end.

use super::{
    GuardianError,
    journal::Journal,
    protocol::Outcome,
    restore, snapshot,
    tree::{Process, Thread, Tree},
    wait::Waiter,
    waits,
};
use crate::{
    inject::run::Patience,
    ptrace::{Stop, Tracee, who},
};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// How long killed tasks may take to go.
const DYING_TIME: Duration = Duration::from_secs(30);
/// How long orphans of the tree may wait for init to reap them before their pids are given up on.
const REAPING_TIME: Duration = Duration::from_secs(2);
/// How long a task may take to stop so that it can be let go.
const STOPPING_TIME: Duration = Duration::from_secs(5);

/// Everything as it was: tasks run on. What cannot be undone (a task that died) is left out.
pub fn release(tree: &mut Tree, journal: &mut Journal, waiter: &mut Waiter) {
    let _ = snapshot::reap(tree, waiter);
    clean(tree, journal, waiter);
    detach(tree, waiter);
    tree.processes.clear();
    refreeze(journal);
    journal.unlink();
}

/// Removes what was brought into the tasks, and puts registers back.
pub fn clean(tree: &mut Tree, journal: &mut Journal, waiter: &mut Waiter) {
    stop_running(tree, waiter);
    for (_, thread) in tree.threads_mut() {
        let _ = thread.put_back();
    }
    let close = |&(pid, number): &(i32, i32)| (pid, libc::SYS_close as u64, [number as u64, 0, 0, 0, 0, 0]);
    for call in journal.descriptors.drain(..).map(|entry| close(&entry)) {
        let _ = tree.syscalls(&[call], waiter);
    }
    let pids: Vec<i32> = tree.processes.keys().copied().collect();
    if tree.eject(&pids, waiter).is_err() {
        // One of them died: the others each for itself.
        for pid in pids {
            let _ = tree.eject(&[pid], waiter);
        }
    }
    journal.undo_steps();
}

/// Threads that run (a call in flight, a seize that failed half way) must stop before they can be let go.
fn stop_running(tree: &mut Tree, waiter: &mut Waiter) {
    let deadline = Instant::now() + STOPPING_TIME;
    for (_, thread) in tree.threads_mut() {
        if let Tracee::Running(running) = &thread.tracee {
            running.interrupt();
        }
    }
    loop {
        let mut running = false;
        for (_, thread) in tree.threads_mut() {
            if !matches!(thread.tracee, Tracee::Running(_)) {
                continue;
            }
            thread.tracee.poll();
            let Tracee::Stopped(stopped) = &thread.tracee else {
                // One inside vfork cannot stop: it is let go with the guardian's end, or by the loop in `seize`.
                running |= matches!(thread.tracee, Tracee::Running(_)) && !is_stuck(thread.tracee.id().tid);
                continue;
            };
            let signal = match stopped.stop() {
                // Code of ours is in it: whatever stopped it goes with that code.
                _ if thread.touched => continue,
                Stop::Interrupted | Stop::Group(_) => continue,
                Stop::Signal(signal) => signal,
                Stop::Event(_) | Stop::Syscall => 0,
            };
            stopped.interrupt();
            thread.tracee.resume(|stopped| stopped.cont(signal));
            running = true;
        }
        if !running || !waiter.wait(deadline) {
            return;
        }
    }
}

fn is_stuck(tid: i32) -> bool {
    who::Stat::read(tid).is_none_or(|stat| stat.state == b'D' || stat.is_zombie())
}

/// Lets every stopped thread go; tells which could not be. A detached thread restarts the system call that its stop interrupted.
pub fn detach_process(pid: i32, process: &mut Process, waiter: &mut Waiter) -> Vec<Thread> {
    let threads = std::mem::take(&mut process.threads);
    let (mut killed, mut stuck) = (Vec::new(), Vec::new());
    for (_, thread) in threads {
        match thread.tracee {
            Tracee::Stopped(stopped) => killed.extend(stopped.detach(0).err().map(Tracee::Running)),
            Tracee::Running(_) => stuck.push(thread),
            Tracee::Gone(..) => {}
        }
    }
    see_off(killed, waiter);
    for (tid, info) in process.deferred.drain(..) {
        send_again(pid, tid, &info);
    }
    stuck
}

/// Lets threads go that have stopped only now.
pub fn free_stragglers(tree: &mut Tree) {
    for mut thread in std::mem::take(&mut tree.stragglers) {
        thread.tracee.poll();
        match thread.tracee {
            Tracee::Stopped(stopped) => {
                let signal = if let Stop::Signal(signal) = stopped.stop() { signal } else { 0 };
                let killed = stopped.detach(signal).err().map(Tracee::Running);
                tree.stragglers.extend(killed.map(Thread::new));
            }
            Tracee::Running(_) => tree.stragglers.push(thread),
            Tracee::Gone(..) => {}
        }
    }
}

/// Waits for the end of tasks that were killed.
pub fn see_off(mut killed: Vec<Tracee>, waiter: &mut Waiter) {
    let deadline = Instant::now() + STOPPING_TIME;
    loop {
        killed.retain_mut(|tracee| {
            tracee.resume(|stopped| stopped.cont(0));
            tracee.poll()
        });
        if killed.is_empty() || !waiter.wait(deadline) {
            return;
        }
    }
}

fn detach(tree: &mut Tree, waiter: &mut Waiter) {
    // Where it fails, a thread is gone, or its time begins anew.
    let _ = waits::go_on(tree.processes.values_mut(), waiter);
    let mut stopped = Vec::new();
    for (&pid, process) in &mut tree.processes {
        let stuck = detach_process(pid, process, waiter);
        tree.stragglers.extend(stuck);
        stopped.extend(process.group_stop.map(|_| pid));
    }
    see_stopped(&stopped, waiter);
}

/// A thread of a stopped group is awake for a moment when it is let go, and stops by itself: waits until that is seen.
pub fn see_stopped(pids: &[i32], waiter: &mut Waiter) {
    // Not longer: somebody may have continued it.
    let deadline = Instant::now() + Duration::from_millis(200);
    let awake = |pid: i32| who::Stat::read(pid).is_some_and(|stat| matches!(stat.state, b'R' | b'S' | b'D'));
    for &pid in pids {
        while awake(pid) && Instant::now() < deadline {
            waiter.wait(Instant::now() + Duration::from_micros(100));
        }
    }
}

/// A signal that was taken out of the queue while code was injected. The kernel lets nobody forge one of its own or of kill(2), so
/// those are sent anew from here.
fn send_again(pid: i32, tid: i32, info: &[u8]) {
    let word = |at: usize| info.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
    let (signal, code) = (word(0), word(8));
    // SAFETY: siginfo_t is 128 bytes, which the kernel wrote.
    unsafe {
        match code {
            libc::SI_USER => libc::kill(pid, signal),
            libc::SI_TKILL => libc::syscall(libc::SYS_tgkill, pid, tid, signal) as i32,
            _ => libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, info.as_ptr()) as i32,
        };
    }
}

/// The cgroup as it was.
pub fn refreeze(journal: &mut Journal) {
    if let Some(freezer) = journal.freezer.take() {
        let _ = freezer.put_back();
    }
}

/// Ends a dump.
pub fn finish(
    outcome: Outcome,
    tree: &mut Tree,
    journal: &mut Journal,
    waiter: &mut Waiter,
) -> Result<(), GuardianError> {
    match outcome {
        Outcome::Run => {
            let reaped = snapshot::reap(tree, waiter);
            release(tree, journal, waiter);
            reaped
        }
        Outcome::Stopped => {
            let reaped = snapshot::reap(tree, waiter);
            clean(tree, journal, waiter);
            let mut stopped = Ok(());
            for (&pid, process) in &mut tree.processes {
                stopped = stopped.and(group_stop(pid, process, waiter));
            }
            release(tree, journal, waiter);
            reaped.and(stopped)
        }
        Outcome::Kill => {
            let pids: Vec<i32> = tree.processes.keys().copied().collect();
            let result = kill(tree, waiter);
            journal.tree_was_killed();
            refreeze(journal);
            result.and_then(|()| wait_until_gone(&pids, waiter))
        }
    }
}

/// Leaves a process in a group stop, unless it is in one.
fn group_stop(pid: i32, process: &mut Process, waiter: &mut Waiter) -> Result<(), GuardianError> {
    if process.group_stop.is_some() || process.zombie {
        return Ok(());
    }
    let main = process.main(pid)?;
    if let Some(thread) = process.threads.get_mut(&main) {
        restore::group_stop(&mut thread.tracee, libc::SIGSTOP, waiter)?;
    }
    process.group_stop = Some(libc::SIGSTOP);
    Ok(())
}

/// SIGKILL for all, and waits as their tracer.
fn kill(tree: &mut Tree, waiter: &mut Waiter) -> Result<(), GuardianError> {
    let _ = snapshot::kill_copies(tree, waiter);
    for (&pid, process) in &tree.processes {
        if !process.zombie {
            // SAFETY: takes numbers only. The process is stopped by us, so the number is still its own.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
    let deadline = Instant::now() + DYING_TIME;
    loop {
        let mut left = None;
        for (_, thread) in tree.threads_mut() {
            // A stopped thread that was killed reports its end to whoever waits for it.
            thread.tracee.resume(|stopped| stopped.cont(0));
            if thread.tracee.poll() {
                left = Some(thread.tracee.id());
            }
        }
        let Some(id) = left else { break };
        if !waiter.wait(deadline) {
            return Err(GuardianError::NotGone { pid: id.pid, name: who::name(id.pid) });
        }
    }
    tree.processes.clear();
    Ok(())
}

/// Waits until the pids are free, or held by a zombie that only a process outside the tree can reap.
fn wait_until_gone(pids: &[i32], waiter: &mut Waiter) -> Result<(), GuardianError> {
    let start = Instant::now();
    let mut pause = Duration::from_micros(200);
    let mut left: BTreeSet<i32> = pids.iter().copied().collect();
    loop {
        left.retain(|&pid| {
            who::Stat::read(pid).is_some_and(|stat| {
                let orphan = stat.parent == 1 && start.elapsed() < REAPING_TIME;
                !stat.is_zombie() || orphan || pids.contains(&stat.parent)
            })
        });
        let Some(&pid) = left.first() else { return Ok(()) };
        if start.elapsed() > DYING_TIME {
            return Err(GuardianError::NotGone { pid, name: who::name(pid) });
        }
        waiter.wait(Instant::now() + pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}
