//! POSIX timers (timer_create(2)): what they do is in /proc/PID/timers, their times are what the process said.

use super::TaskError;
use crate::{clocks, guardian::protocol::PosixTimer, image::records, proc::ProcError, tree::Process};

/// A timer of /proc/PID/timers (proc_pid_timers(5)); numbers of tasks as stasis sees them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Listed {
    id: i64,
    signal: i32,
    value: u64,
    notify: i32,
    target: i32,
    clock: i32,
}

/// The timers of a process, ascending by id.
pub fn describe(process: &Process, times: &[PosixTimer]) -> Result<Vec<records::PosixTimer>, TaskError> {
    let text = process.proc.read_text("timers")?;
    let format = || ProcError::Format { pid: process.host_pid, file: "timers", what: text.clone() };
    let mut timers = Vec::new();
    for listed in parse(&text).ok_or_else(format)? {
        let time = times.iter().find(|time| time.id == listed.id).ok_or_else(format)?;
        timers.push(record(process, listed, time)?);
    }
    timers.sort_by_key(|timer| timer.id);
    Ok(timers)
}

fn record(process: &Process, listed: Listed, time: &PosixTimer) -> Result<records::PosixTimer, TaskError> {
    let inner = |tid: i32| process.threads.iter().find(|thread| thread.0 == tid).map(|thread| thread.1);
    let mut clock = listed.clock;
    if clocks::is_own_thread(clock) {
        // Another thread than the first makes it again, so the clock must say whose it is (clock_getcpuclockid(3)).
        let owner = time.owner.and_then(inner).ok_or_else(|| TaskError::Unsupported {
            pid: process.host_pid,
            name: process.name.clone(),
            what: format!("has a timer ({}) on the CPU time of a thread that cannot be found out", listed.id),
        })?;
        let alone = process.threads.len() == 1 && !process.has_dead_leader();
        clock = if alone { clock } else { clocks::of_thread(owner, clock) };
    }
    let (mut notify, mut tid) = (listed.notify, 0);
    if notify & libc::SIGEV_THREAD_ID != 0 {
        match inner(listed.target) {
            Some(found) => tid = found,
            // Its thread has exited: it goes on, and nobody hears of it.
            None => notify = libc::SIGEV_NONE,
        }
    }
    Ok(records::PosixTimer {
        id: listed.id as i32,
        clock,
        notify,
        signal: listed.signal,
        value: listed.value,
        tid,
        interval_ns: time.interval_ns.max(0) as u64,
        value_ns: time.value_ns.max(0) as u64,
    })
}

fn parse(text: &str) -> Option<Vec<Listed>> {
    let mut timers: Vec<Listed> = Vec::new();
    for line in text.lines() {
        let (name, value) = line.split_once(':')?;
        let value = value.trim();
        if name == "ID" {
            timers.push(Listed { id: value.parse().ok()?, ..Listed::default() });
            continue;
        }
        let timer = timers.last_mut()?;
        match name {
            "signal" => {
                let (signal, pointer) = value.split_once('/')?;
                timer.signal = signal.parse().ok()?;
                timer.value = u64::from_str_radix(pointer.trim_start_matches("0x"), 16).ok()?;
            }
            "notify" => {
                let (how, whom) = value.split_once('/')?;
                let (kind, number) = whom.split_once('.')?;
                timer.target = number.parse().ok()?;
                timer.notify = match how {
                    "signal" => libc::SIGEV_SIGNAL,
                    "none" => libc::SIGEV_NONE,
                    "thread" => libc::SIGEV_THREAD,
                    _ => return None,
                };
                if kind == "tid" {
                    timer.notify |= libc::SIGEV_THREAD_ID;
                }
            }
            "ClockID" => timer.clock = value.parse().ok()?,
            _ => {}
        }
    }
    Some(timers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_of_proc() {
        let text = "ID: 4\nsignal: 10/00000000000000ff\nnotify: signal/tid.13497\nClockID: -6\nID: 3\nsignal: 0/0\nnotify: none/pid.7\nClockID: 1\n";
        let first =
            Listed { id: 4, signal: 10, value: 255, notify: libc::SIGEV_THREAD_ID, target: 13497, clock: -6 };
        let second = Listed { id: 3, signal: 0, value: 0, notify: libc::SIGEV_NONE, target: 7, clock: 1 };
        assert_eq!(parse(text), Some(vec![first, second]));
        assert_eq!(parse("ID: x\n"), None);
    }
}
