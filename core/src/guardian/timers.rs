//! Timers of a stopped process, together with the signals that are pending when they are read: clocks go on while the
//! process is stopped, so that a timer may fire at any moment.

use super::{
    GuardianError,
    inspect::{self, read_block},
    protocol::{Bytes, IntervalTimer, PendingSignals, PosixTimer, ProcessState},
    tree::{Tree, answer},
    wait::Waiter,
};
use crate::{
    clocks,
    inject::parasite::{self, ProcessQuery, Timers, command},
    ptrace::{Tracee, who},
};
use std::collections::HashMap;

/// Nothing is delivered while the process is stopped, so each timer fires at most once; more is for signals of others.
const ATTEMPTS: u32 = 20;

/// Reads interval timers, POSIX timers and pending signals, all of one moment. `state` has the interval timers of another.
pub fn read(tree: &mut Tree, state: &mut ProcessState, waiter: &mut Waiter) -> Result<(), GuardianError> {
    let pid = state.pid;
    let main = tree.process(pid)?.main(pid)?;
    let listed = list(&who::read_text(&format!("/proc/{main}/timers")));
    let armed = state.itimers.iter().any(|timer| timer.value_us != 0 || timer.interval_us != 0);
    if listed.is_empty() && !armed {
        // One that fired a moment ago left nothing but its signal.
        state.pending = Some(pending(tree, pid)?);
        return Ok(());
    }
    let ids: Vec<i64> = listed.iter().map(|timer| timer.id).collect();
    let mut before = pending(tree, pid)?;
    for _ in 0..ATTEMPTS {
        let query: ProcessQuery = {
            let answers = inspect::simple(tree, &[pid], command::PROCESS, [0; 4], waiter)?;
            answers.into_values().try_for_each(|(outcome, _)| outcome.map(drop))?;
            let space = tree.space(pid).ok_or(GuardianError::Unknown { pid })?;
            read_block(space, space.main_slot().0)?
        };
        state.itimers = query.timers.map(interval);
        state.posix_timers = posix(tree, pid, main, &ids, waiter)?;
        let after = pending(tree, pid)?;
        let same = after == before;
        before = after;
        if same {
            break;
        }
    }
    state.pending = Some(before);
    owners(tree, state, &listed, waiter)
}

/// In microseconds.
pub fn interval(timer: parasite::IntervalTimer) -> IntervalTimer {
    IntervalTimer {
        interval_us: timer.interval_seconds * 1_000_000 + timer.interval_microseconds,
        value_us: timer.value_seconds * 1_000_000 + timer.value_microseconds,
    }
}

fn pending(tree: &Tree, pid: i32) -> Result<PendingSignals, GuardianError> {
    let process = tree.process(pid)?;
    let bytes = |signals: Vec<Vec<u8>>| signals.into_iter().map(Bytes).collect();
    let shared = tree.stopped(pid, process.main(pid)?)?.pending(true)?;
    let mut threads = Vec::with_capacity(process.threads.len());
    for (&tid, thread) in &process.threads {
        if let Tracee::Stopped(stopped) = &thread.tracee {
            threads.push((tid, bytes(stopped.pending(false)?)));
        }
    }
    Ok(PendingSignals { shared: bytes(shared), threads })
}

/// A line group of /proc/PID/timers, as far as it matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Listed {
    id: i64,
    clock: i32,
}

fn list(text: &str) -> Vec<Listed> {
    let mut timers = Vec::new();
    for line in text.lines() {
        if let Some(id) = line.strip_prefix("ID: ").and_then(|id| id.trim().parse().ok()) {
            timers.push(Listed { id, clock: 0 });
        } else if let (Some(clock), Some(last)) = (line.strip_prefix("ClockID: "), timers.last_mut()) {
            last.clock = clock.trim().parse().unwrap_or(0);
        }
    }
    timers
}

/// The times of timers, asked by thread `tid`.
fn posix(
    tree: &mut Tree,
    pid: i32,
    tid: i32,
    ids: &[i64],
    waiter: &mut Waiter,
) -> Result<Vec<PosixTimer>, GuardianError> {
    let mut timers = Vec::with_capacity(ids.len());
    for group in ids.chunks(parasite::TIMERS_AT_ONCE) {
        let space = tree.space(pid).ok_or(GuardianError::Unknown { pid })?;
        let slot = space.main_slot();
        let mut words = vec![command::TIMERS as i64, 0, group.len() as i64];
        for &id in group {
            words.extend([id, 0, 0, 0, 0, 0, 0]);
        }
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        space.write(&bytes, slot.0)?;
        let plans = HashMap::from([(tid, inspect::plan(tree, pid, tid, slot)?)]);
        for (_, ran) in tree.run(&plans, waiter) {
            ran.outcome?;
        }
        let space = tree.space(pid).ok_or(GuardianError::Unknown { pid })?;
        let query: Timers = read_block(space, slot.0)?;
        for timer in &query.timers[..group.len()] {
            answer("timer_gettime", pid, timer.result)?;
            let nanoseconds = |[seconds, rest]: [i64; 2]| seconds * 1_000_000_000 + rest;
            timers.push(PosixTimer {
                id: timer.id,
                interval_ns: nanoseconds(timer.interval),
                value_ns: nanoseconds(timer.value),
                overrun: timer.overrun,
                owner: None,
            });
        }
    }
    Ok(timers)
}

/// The kernel does not tell whose CPU time a timer measures. But of all threads only one runs at a time now, and only when the
/// right one has run there is less time left.
fn owners(
    tree: &mut Tree,
    state: &mut ProcessState,
    listed: &[Listed],
    waiter: &mut Waiter,
) -> Result<(), GuardianError> {
    let pid = state.pid;
    let mut ids: Vec<i64> =
        listed.iter().filter(|timer| clocks::is_own_thread(timer.clock)).map(|timer| timer.id).collect();
    let tids: Vec<i32> = tree.process(pid)?.threads.keys().copied().collect();
    for &tid in &tids {
        if ids.is_empty() {
            break;
        }
        let (first, second) = match tids.len() {
            1 => (Vec::new(), Vec::new()),
            _ => (posix(tree, pid, tid, &ids, waiter)?, posix(tree, pid, tid, &ids, waiter)?),
        };
        let owned = |id: i64| {
            let value = |times: &[PosixTimer]| times.iter().find(|timer| timer.id == id).map(|t| t.value_ns);
            tids.len() == 1 || value(&first) > value(&second)
        };
        for timer in &mut state.posix_timers {
            if ids.contains(&timer.id) && owned(timer.id) {
                timer.owner = Some(tid);
                ids.retain(|id| *id != timer.id);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_of_proc() {
        let text =
            "ID: 4\nsignal: 10/0000000000000000\nnotify: signal/pid.13497\nClockID: -6\nID: 3\nClockID: 1\n";
        assert_eq!(list(text), [Listed { id: 4, clock: -6 }, Listed { id: 3, clock: 1 }]);
    }
}
