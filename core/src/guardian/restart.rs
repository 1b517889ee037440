//! What remains of an interrupted sleep.
//!
//! A call that returned ERESTART_RESTARTBLOCK keeps its absolute expiry inside the kernel, where no interface shows it. But once
//! the thread sleeps on, its timer is in /proc/timer_list, and is gone when the thread is stopped again. With many such
//! threads, each is let sleep in those rounds that the bits of its number name; a timer that was there in just those rounds
//! is that thread's. No thread runs a user instruction: it is followed from system call stop to system call stop.

use super::{
    GuardianError,
    protocol::Restart,
    survey,
    tree::{Thread, Tree},
    wait::Waiter,
};
use crate::{
    arch::{ERESTART_RESTARTBLOCK, Registers, restartable},
    inject::run::Patience,
    ptrace::{Stop, Tracee, who},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// How often one thread is looked at, before its sleep has to begin anew.
const ATTEMPTS: usize = 4;
/// How long a thread may take to fall asleep again, or to stop.
const MOMENT: Duration = Duration::from_millis(200);

/// Number of the clock base of CLOCK_MONOTONIC (include/linux/hrtimer_defs.h).
pub(super) const MONOTONIC_BASE: u32 = 0;

/// A timer of a thread that sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Timer {
    /// Number of its clock base.
    pub base: u32,
    /// Absolute expiry on it, in nanoseconds.
    pub expiry: i64,
    /// How much later than that it may be.
    pub slack: i64,
}

/// Notes the remaining time of all interrupted sleeps in the tree, and updates the registers of those that are over.
pub fn find(tree: &mut Tree, waiter: &mut Waiter) -> Result<(), GuardianError> {
    let mut sleepers: Vec<&mut Thread> =
        tree.threads_mut().map(|(_, thread)| thread).filter(|thread| is_sleeper(thread)).collect();
    if sleepers.is_empty() {
        return Ok(());
    }
    let mut seen: BTreeMap<Timer, usize> = BTreeMap::new();
    let mut calls = BTreeMap::new();
    let bits = usize::BITS - sleepers.len().leading_zeros();
    // The last round has all of them: what appears only by chance is not in it.
    for round in 0..=bits {
        let takes_part = |index: usize| round == bits || (index + 1) >> round & 1 == 1;
        let before = timers();
        // A sleep that ended in an earlier round is over: going on from there would run the program.
        let chosen: Vec<&mut &mut Thread> = sleepers
            .iter_mut()
            .enumerate()
            .filter(|(index, thread)| takes_part(*index) && is_sleeper(thread))
            .map(|(_, thread)| thread)
            .collect();
        let during = sleep_on(chosen, &mut calls, waiter)?;
        for timer in during.difference(&before) {
            *seen.entry(*timer).or_default() |= 1 << round;
        }
    }
    let now = base_times();
    for (index, thread) in sleepers.iter_mut().enumerate() {
        let pattern = (index + 1) | 1 << bits;
        let own = seen.iter().filter(|(_, rounds)| **rounds == pattern).map(|(timer, _)| *timer);
        note(thread, &own.collect(), &calls, &now);
    }
    for mut thread in sleepers {
        // Others' timers come and go as well, and a busy machine lets threads wait: then each by itself.
        for _ in 0..ATTEMPTS {
            if !is_sleeper(thread) {
                break;
            }
            let before = timers();
            let during = sleep_on(vec![&mut thread], &mut calls, waiter)?;
            note(thread, &during.difference(&before).copied().collect(), &calls, &base_times());
        }
        if is_sleeper(thread) {
            let Some(saved) = &thread.saved else { continue };
            let (syscall, clock) = call_of(&saved.registers, calls.get(&thread.tracee.id().tid).copied());
            thread.restart = Some(Restart { syscall, clock, remaining_ns: None });
        }
    }
    Ok(())
}

/// Notes what remains of a sleep, if one of these timers must be its own, or if it has none.
fn note(thread: &mut Thread, timers: &BTreeSet<Timer>, calls: &BTreeMap<i32, u64>, now: &BTreeMap<u32, i64>) {
    let Some(saved) = thread.saved.as_ref().filter(|_| is_sleeper(thread)) else { return };
    let tid = thread.tracee.id().tid;
    let (syscall, clock) = call_of(&saved.registers, calls.get(&tid).copied());
    if syscall == restartable::POLL && (saved.registers.rdx as i32) < 0 {
        thread.restart = Some(Restart { syscall, clock, remaining_ns: None });
        return;
    }
    let left = |timer: &Timer| now.get(&timer.base).map(|now| (timer.expiry - now).max(0));
    // How late a timer may be is another thing for each call, when it goes on.
    let slack = survey::timer_slack(tid).unwrap_or(0);
    let fits = |timer: &&Timer| match syscall {
        restartable::POLL => {
            left(timer).is_some_and(|ns| timer.slack >= slack && timer.slack <= slack.max(ns / 100))
        }
        restartable::FUTEX => timer.slack == slack,
        _ => timer.slack == 0,
    };
    let own = only(timers.iter().collect()).or_else(|| only(timers.iter().filter(fits).collect()));
    if let Some(remaining_ns) = own.and_then(left) {
        thread.restart = Some(Restart { syscall, clock, remaining_ns: Some(remaining_ns) });
    }
}

fn only(mut timers: Vec<&Timer>) -> Option<&Timer> {
    timers.pop().filter(|_| timers.is_empty())
}

fn is_sleeper(thread: &Thread) -> bool {
    let interrupted = |saved: &crate::inject::run::Saved| saved.registers.result() == ERESTART_RESTARTBLOCK;
    // Only from the first stop the kernel restarts by itself; and once known, it is known.
    thread.restart.is_none()
        && thread.saved.as_ref().is_some_and(interrupted)
        && thread.tracee.stopped().is_ok_and(|stopped| stopped.stop() == Stop::Interrupted)
}

/// Which call it is, and by which clock it sleeps.
fn call_of(registers: &Registers, seen: Option<u64>) -> (u64, i32) {
    let syscall = match registers.orig_rax {
        restartable::RESTART_SYSCALL => seen.unwrap_or_else(|| sleep(registers)),
        number => number,
    };
    let clock =
        if syscall == restartable::CLOCK_NANOSLEEP { registers.rdi as i32 } else { libc::CLOCK_MONOTONIC };
    (syscall, clock)
}

/// A call that was interrupted before has lost its number. What the kernel does tells which it is, as long as the thread
/// sleeps: once it is stopped, its stack shows the stop.
fn sleeping_in(registers: &Registers, tid: i32) -> u64 {
    let stack = who::read_text(&format!("/proc/{tid}/stack"));
    if stack.contains("futex") {
        restartable::FUTEX
    } else if stack.contains("poll") {
        restartable::POLL
    } else {
        sleep(registers)
    }
}

/// The two sleeps look the same to the kernel, but a clock is a small number and a pointer is none.
fn sleep(registers: &Registers) -> u64 {
    if registers.rdi < 16 { restartable::CLOCK_NANOSLEEP } else { restartable::NANOSLEEP }
}

/// Lets the threads go on sleeping, and tells which timers there are meanwhile, and in which calls they sleep.
fn sleep_on(
    threads: Vec<&mut &mut Thread>,
    calls: &mut BTreeMap<i32, u64>,
    waiter: &mut Waiter,
) -> Result<BTreeSet<Timer>, GuardianError> {
    let mut threads = threads;
    for thread in &mut threads {
        // No signal is delivered meanwhile.
        thread.tracee.stopped()?.set_signal_mask(u64::MAX)?;
        thread.touched = true;
        thread.tracee.resume(|stopped| stopped.cont_to_syscall());
    }
    let deadline = Instant::now() + MOMENT;
    // To the entry of restart_syscall, and on.
    for thread in &mut threads {
        stop_at(thread, waiter, deadline);
        thread.tracee.resume(|stopped| stopped.cont_to_syscall());
    }
    for thread in &mut threads {
        let tid = thread.tracee.id().tid;
        while who::Stat::read(tid).is_some_and(|stat| stat.state == b'R') && Instant::now() < deadline {
            std::thread::yield_now();
        }
        if let Some(saved) = &thread.saved
            && saved.registers.orig_rax == restartable::RESTART_SYSCALL
        {
            calls.insert(tid, sleeping_in(&saved.registers, tid));
        }
    }
    let during = timers();
    for thread in &mut threads {
        if let Tracee::Running(running) = &thread.tracee {
            running.interrupt();
        }
    }
    for thread in threads {
        settle(thread, waiter)?;
    }
    Ok(during)
}

fn stop_at(thread: &mut Thread, waiter: &mut Waiter, deadline: Instant) {
    while thread.tracee.poll() && waiter.wait(deadline) {}
}

/// From the exit of the system call to a stop from which the kernel restarts it; notes the result.
fn settle(thread: &mut Thread, waiter: &mut Waiter) -> Result<(), GuardianError> {
    let deadline = Instant::now() + MOMENT;
    loop {
        stop_at(thread, waiter, deadline);
        let stopped = thread.tracee.stopped()?;
        if stopped.stop() == Stop::Interrupted {
            break;
        }
        stopped.interrupt();
        thread.tracee.resume(|stopped| stopped.cont(0));
    }
    let registers = thread.tracee.stopped()?.registers()?;
    if let Some(saved) = &mut thread.saved {
        // The kernel now calls it restart_syscall; we keep the number of the call itself.
        if registers.result() != ERESTART_RESTARTBLOCK {
            saved.registers = registers;
        }
        thread.tracee.stopped()?.set_signal_mask(saved.signal_mask)?;
    }
    Ok(())
}

/// The sleepers' timers of the whole machine.
pub(super) fn timers() -> BTreeSet<Timer> {
    parse_timers(&who::read_text("/proc/timer_list"))
}

fn parse_timers(text: &str) -> BTreeSet<Timer> {
    let (mut found, mut base, mut is_sleeper) = (BTreeSet::new(), 0, false);
    for line in text.lines().map(str::trim_start) {
        if let Some(rest) = line.strip_prefix("clock ") {
            base = rest.trim_end_matches(':').parse().unwrap_or(0);
        } else if let Some(rest) = line.strip_prefix("# expires at ") {
            let mut bounds = rest.split([' ', '-']).map_while(|number| number.parse::<i64>().ok());
            if let (true, Some(expiry), Some(latest)) = (is_sleeper, bounds.next(), bounds.next()) {
                found.insert(Timer { base, expiry, slack: latest - expiry });
            }
        } else if line.starts_with('#') {
            is_sleeper = line.contains("hrtimer_wakeup");
        }
    }
    found
}

/// The present time of every clock base.
fn base_times() -> BTreeMap<u32, i64> {
    parse_base_times(&who::read_text("/proc/timer_list"))
}

fn parse_base_times(text: &str) -> BTreeMap<u32, i64> {
    let (mut now, mut base, mut times) = (0i64, 0, BTreeMap::new());
    let number = |rest: &str| rest.split_ascii_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0);
    for line in text.lines().map(str::trim_start) {
        if let Some(rest) = line.strip_prefix("now at ") {
            now = number(rest);
        } else if let Some(rest) = line.strip_prefix("clock ") {
            base = rest.trim_end_matches(':').parse().unwrap_or(0);
        } else if let Some(rest) = line.strip_prefix(".offset:") {
            times.insert(base, now + number(rest));
        }
    }
    times
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str =
        "now at 100 nsecs\n\ncpu: 0\n clock 0:\n  .index:      0\n  .offset:     0 nsecs\nactive timers:
 #0: <000000001>, tick_nohz_handler, S:01
 # expires at 200-200 nsecs [in 100 to 100 nsecs]
 #1: <000000002>, hrtimer_wakeup, S:01
 # expires at 300-350 nsecs [in 200 to 250 nsecs]
 clock 2:\n  .index: 2\n  .offset:     7 nsecs\nactive timers:
 #0: <000000003>, hrtimer_wakeup, S:01
 # expires at 400-400 nsecs [in 293 to 293 nsecs]
";

    #[test]
    fn only_sleepers_count() {
        let timers = [Timer { base: 0, expiry: 300, slack: 50 }, Timer { base: 2, expiry: 400, slack: 0 }];
        assert_eq!(parse_timers(LIST), BTreeSet::from(timers));
        assert_eq!(parse_base_times(LIST), BTreeMap::from([(0, 100), (2, 107)]));
    }
}
