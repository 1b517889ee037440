//! How long waits have lasted, looked up before the tree is stopped.
//!
//! A wait that a stop ends with EINTR takes its timer with it, and the kernel keeps no note of when it began. So threads in such
//! waits are looked at while they still sleep: when a thread last ran is when its wait began, on the clock of its processor;
//! the timers of the machine say it exactly. In a wait that goes on after an earlier dump it ends before the limit that the call
//! names; such timers are known by their slack, which we chose.

use super::{
    collect::transfer,
    restart::{self, MONOTONIC_BASE, Timer},
    waits::LimitedWait,
};
use crate::{
    arch::{Registers, Timeout, slack_is_part_of_limit, socket_wait, timeout_of_uninterruptible_wait},
    ptrace::{
        TaskId,
        who::{self, Scheduled, Syscall},
    },
};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity, sched_yield},
    time::{ClockId, clock_gettime},
    unistd::Pid,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// A timer this near to where one is expected is the one: the clocks of processors stand still for what a hypervisor takes away.
const NEAR_NS: i64 = 2_000_000;
/// And this part of the time since then.
const NEAR_PART: i64 = 50;
/// What is left of a wait kept by [`Keeper::Proportional`] is that many times the slack of its timer, if it is long (fs/select.c,
/// select_estimate_accuracy).
const LIMIT_PER_SLACK: i64 = 1000;

/// A wait that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Begun {
    /// The call.
    call: Syscall,
    /// How often the thread had gone to sleep.
    switches: u64,
    /// When its time is over (CLOCK_MONOTONIC).
    pub deadline_ns: i64,
}

impl Begun {
    /// Whether the thread has been in that wait ever since: a stop wakes it once.
    pub fn lasted_until_stop(&self, tid: i32) -> bool {
        who::syscall(tid) == Some(self.call)
            && Scheduled::read(tid).is_some_and(|now| now.switches <= self.switches + 1)
    }
}

/// The present time of CLOCK_MONOTONIC.
pub fn now_ns() -> i64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| time.tv_sec() * 1_000_000_000 + time.tv_nsec())
}

/// Looks at every thread of the tree, which runs on.
pub fn survey(root: i32) -> HashMap<i32, Begun> {
    let mut seen = Vec::new();
    let mut queue = vec![root];
    let mut known = BTreeSet::new();
    while let Some(pid) = queue.pop() {
        if !known.insert(pid) {
            continue;
        }
        for tid in who::threads(pid) {
            seen.extend(look(pid, tid));
            queue.extend(who::children(pid, tid));
        }
    }
    conclude(&seen)
}

/// Looks at one thread. When the time of its wait is over may be known already.
pub fn survey_thread(id: TaskId, known: Option<LimitedWait>) -> Option<Begun> {
    let mut begun = conclude(&[look(id.pid, id.tid)?]).remove(&id.tid)?;
    if let Some(known) = known.filter(|known| known.syscall == begun.call.number) {
        begun.deadline_ns = known.deadline_ns;
    }
    Some(begun)
}

fn conclude(seen: &[Wait]) -> HashMap<i32, Begun> {
    if seen.is_empty() {
        return HashMap::new();
    }
    let timers: Vec<Timer> =
        restart::timers().into_iter().filter(|timer| timer.base == MONOTONIC_BASE).collect();
    let lags = lags(&seen.iter().map(|wait| wait.processor).collect());
    let now = now_ns();
    let begun = |wait: &Wait| {
        let began = wait.last_ran_ns + lags.get(&wait.processor)?;
        let near = NEAR_NS + (now - began).max(0) / NEAR_PART;
        let expiry = expiry(&timers, wait, began, near).unwrap_or(began.saturating_add(wait.limit_ns));
        let deadline_ns = expiry.clamp(now, now.saturating_add(wait.limit_ns));
        Some((wait.tid, Begun { call: wait.call, switches: wait.switches, deadline_ns }))
    };
    seen.iter().filter_map(begun).collect()
}

/// The expiry of the wait's timer; `began` is known up to `near`.
fn expiry(timers: &[Timer], wait: &Wait, began: i64, near: i64) -> Option<i64> {
    let latest = began.saturating_add(wait.limit_ns);
    let nearest = |expected: &dyn Fn(&Timer) -> i64| {
        let off = |timer: &Timer| timer.expiry.abs_diff(expected(timer));
        timers
            .iter()
            .filter(|timer| off(timer) <= near.unsigned_abs())
            .min_by_key(|timer| off(timer))
            .map(|timer| timer.expiry)
    };
    let signed = |slack: i64| {
        let mut own =
            timers.iter().filter(|timer| timer.slack == slack && timer.expiry <= latest.saturating_add(near));
        own.next().filter(|_| own.next().is_none()).map(|timer| timer.expiry)
    };
    match wait.keeper {
        Keeper::Socket => None,
        Keeper::Thread { signature } => signed(signature).or_else(|| nearest(&|_| latest)),
        Keeper::Proportional => nearest(&|_| latest)
            .or_else(|| nearest(&|timer| began.saturating_add(timer.slack.saturating_mul(LIMIT_PER_SLACK)))),
    }
}

/// A thread that waits.
#[derive(Debug)]
struct Wait {
    tid: i32,
    call: Syscall,
    limit_ns: i64,
    keeper: Keeper,
    processor: usize,
    last_ran_ns: i64,
    switches: u64,
}

fn look(pid: i32, tid: i32) -> Option<Wait> {
    let call = who::syscall(tid)?;
    let (limit_ns, keeper) =
        limit_of(pid, tid, &Registers::in_syscall(call.number, call.arguments), call.at[0])?;
    let stat = who::Stat::read(tid).filter(|stat| stat.state == b'S')?;
    let Scheduled { last_ran_ns, switches } = Scheduled::read(tid)?;
    Some(Wait { tid, call, limit_ns, keeper, processor: stat.processor, last_ran_ns, switches })
}

/// What keeps the time of a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keeper {
    /// A high resolution timer with the slack of its thread, in nanoseconds, if [`sign`] has changed it to this.
    Thread { signature: i64 },
    /// A high resolution timer whose slack is a part of what is left.
    Proportional,
    /// A timer that /proc/timer_list does not show.
    Socket,
}

/// Slack of a thread's timers, in nanoseconds.
pub fn timer_slack(tid: i32) -> Option<i64> {
    who::read_text(&format!("/proc/{tid}/timerslack_ns")).trim().parse().ok()
}

/// The slack by which a thread's timer is known afterwards, nearly always by no other: of its number in its own namespace and its stack
/// pointer, which a restore keeps.
pub fn signature(tid: i32, stack: u64, slack: i64) -> i64 {
    /// What a timer is late by at most, in nanoseconds; a prime number.
    const DIFFERENT: u64 = 9973;
    let number = who::namespace_ids(tid).last().map_or(0, |&number| number as u64);
    slack + 1 + (number.wrapping_mul(31).wrapping_add(stack / 16) % DIFFERENT) as i64
}

/// For how long the call waits at most, if it is one that a stop ends.
fn limit_of(pid: i32, tid: i32, registers: &Registers, stack: u64) -> Option<(i64, Keeper)> {
    let wait = timeout_of_uninterruptible_wait(registers);
    let ns = match wait {
        Some(Timeout::Infinite) => return None,
        Some(Timeout::Milliseconds(milliseconds)) => i64::from(milliseconds) * 1_000_000,
        Some(Timeout::Timespec(address)) => {
            let mut bytes = [0u8; 16];
            if !transfer(tid, &mut bytes, address, false) {
                return None;
            }
            let [seconds, nanoseconds] = [0, 8]
                .map(|at: usize| bytes[at..at + 8].iter().rev().fold(0, |n, &byte| n << 8 | i64::from(byte)));
            seconds.checked_mul(1_000_000_000)?.checked_add(nanoseconds)?
        }
        None => {
            let wait = socket_wait(registers)?;
            socket_timeout(&descriptor_of(pid, wait.fd)?, wait.sends)?
        }
    };
    let keeper = match registers.syscall() {
        _ if wait.is_none() => Keeper::Socket,
        Some(call) if slack_is_part_of_limit(call) => Keeper::Proportional,
        _ => Keeper::Thread { signature: timer_slack(tid).map_or(0, |slack| signature(tid, stack, slack)) },
    };
    (ns > 0).then_some((ns, keeper))
}

/// A duplicate of a task's descriptor.
pub fn descriptor_of(pid: i32, fd: u32) -> Option<OwnedFd> {
    let new = |number: i64| {
        // SAFETY: a descriptor that the kernel has just made for us, or an error.
        (number >= 0).then(|| unsafe { OwnedFd::from_raw_fd(number as i32) })
    };
    // SAFETY: takes numbers only.
    let process = new(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: takes numbers only.
    new(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) })
}

/// Which option holds the timeout.
fn option(sends: bool) -> i32 {
    if sends { libc::SO_SNDTIMEO } else { libc::SO_RCVTIMEO }
}

/// SO_RCVTIMEO or SO_SNDTIMEO, in nanoseconds; `None` if there is none, or this is no socket.
pub fn socket_timeout(socket: &OwnedFd, sends: bool) -> Option<i64> {
    let mut time = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let mut len = size_of::<libc::timeval>() as u32;
    let (fd, place) = (socket.as_raw_fd(), (&raw mut time).cast());
    // SAFETY: room for one timeval, and its length.
    let result = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, option(sends), place, &mut len) };
    let ns = time.tv_sec.checked_mul(1_000_000_000)?.checked_add(time.tv_usec * 1000)?;
    (result == 0 && ns > 0).then_some(ns)
}

/// Sets it; true if that worked. Shorter than a microsecond would mean for ever.
pub fn set_socket_timeout(socket: &OwnedFd, sends: bool, ns: i64) -> bool {
    let us = ns.saturating_add(999) / 1000;
    let time = libc::timeval { tv_sec: us / 1_000_000, tv_usec: us % 1_000_000 };
    let (fd, place, len) = (socket.as_raw_fd(), (&raw const time).cast(), size_of::<libc::timeval>() as u32);
    // SAFETY: one timeval of that length.
    unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, option(sends), place, len) == 0 }
}

/// By how much CLOCK_MONOTONIC is ahead of the clocks of these processors.
fn lags(processors: &BTreeSet<usize>) -> BTreeMap<usize, i64> {
    let ourselves = Pid::from_raw(0);
    let mut lags = BTreeMap::new();
    let Ok(allowed) = sched_getaffinity(ourselves) else { return lags };
    for &processor in processors {
        let mut only = CpuSet::new();
        // Where we may not run, the clock of another processor must do.
        let moved = only.set(processor).and_then(|()| sched_setaffinity(ourselves, &only));
        let _ = moved.and_then(|()| sched_yield());
        if let Some(own) = Scheduled::read(std::process::id() as i32) {
            lags.insert(processor, now_ns() - own.last_ran_ns);
        }
    }
    let _ = sched_setaffinity(ourselves, &allowed);
    lags
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::net::UnixStream, thread, time::Duration};

    #[test]
    fn which_timer_is_whose() {
        let timer = |expiry, slack| Timer { base: MONOTONIC_BASE, expiry, slack };
        let timers = [timer(5_000, 50), timer(7_000, 61), timer(90_000, 80), timer(100_000, 50)];
        let wait = |keeper| Wait {
            tid: 1,
            call: Syscall { number: 0, arguments: [0; 6], at: [0; 2] },
            limit_ns: 100_000,
            keeper,
            processor: 0,
            last_ran_ns: 0,
            switches: 0,
        };
        let found = |keeper, began| expiry(&timers, &wait(keeper), began, 100);
        assert_eq!(found(Keeper::Thread { signature: 61 }, 0), Some(7_000), "by its slack");
        assert_eq!(found(Keeper::Thread { signature: 62 }, 10), Some(100_000), "by its time");
        assert_eq!(found(Keeper::Proportional, 10_000), Some(90_000), "80,000 are left since 10,000");
        assert_eq!(found(Keeper::Proportional, 30), Some(100_000), "nothing is over yet");
        assert_eq!(found(Keeper::Proportional, 52_000), None);
        assert_eq!(found(Keeper::Socket, 0), None);
        let for_ever = Wait { limit_ns: i64::MAX, ..wait(Keeper::Thread { signature: 62 }) };
        assert_eq!(expiry(&timers, &for_ever, 10, 100), None, "later than any timer");
    }

    #[test]
    fn socket_timeouts_come_back_as_they_were_set() {
        let (socket, _other) = UnixStream::pair().unwrap();
        let socket = OwnedFd::from(socket);
        assert_eq!(socket_timeout(&socket, true), None);
        assert!(set_socket_timeout(&socket, true, 1_500_000_000));
        assert_eq!(
            (socket_timeout(&socket, true), socket_timeout(&socket, false)),
            (Some(1_500_000_000), None)
        );
    }

    #[test]
    fn a_wait_is_seen_with_its_time() {
        const LIMIT_NS: i64 = 1_000_000_000_000;
        let (send, receive) = std::sync::mpsc::channel();
        // It sleeps until the test ends.
        thread::spawn(move || {
            let limit = libc::timespec { tv_sec: LIMIT_NS / 1_000_000_000, tv_nsec: 0 };
            // SAFETY: an empty set and a limit that outlive the call; no information is asked for.
            unsafe {
                send.send(libc::syscall(libc::SYS_gettid) as i32).unwrap();
                let none: libc::sigset_t = std::mem::zeroed();
                libc::sigtimedwait(&none, std::ptr::null_mut(), &limit);
            }
        });
        let (tid, began) = (receive.recv().unwrap(), now_ns());
        let begun = (0..1000).find_map(|_| {
            thread::sleep(Duration::from_millis(10));
            survey(std::process::id() as i32).get(&tid).copied()
        });
        // Its timer is known to the nanosecond; without /proc/timer_list the clocks still tell.
        let off = begun.unwrap().deadline_ns - (began + LIMIT_NS);
        assert!(off.abs() < 1_000_000_000, "{off}");
        assert!(!begun.unwrap().lasted_until_stop(std::process::id() as i32));
    }
}
