//! Waits with a time limit that a stop ended with EINTR: they are made once more, with the time that remains.
//!
//! How the kernel is told depends on where the call has its limit. A number in a register is changed for good: the register has no
//! other use after the call. A struct timespec in memory or the timeout of a socket is the program's own and may be used again, so
//! it is changed only until the thread sleeps: the kernel reads it once. Such a thread must not be stopped a
//! second time; it stays traced until it returns, or until its tracer ends, which lets it sleep on.

use super::{GuardianError, protocol::Restart, survey, tree::Process, wait::Waiter};
use crate::{
    arch::{Registers, Timeout, socket_wait, timeout_of_uninterruptible_wait},
    inject::run::Patience,
    ptrace::{Stop, Stopped, Tracee, who},
};
use std::{
    collections::BTreeSet,
    fs::File,
    os::{fd::OwnedFd, unix::fs::FileExt},
    time::{Duration, Instant},
};

/// How long a thread may take to fall asleep.
const MOMENT: Duration = Duration::from_millis(200);

/// A wait with a time limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LimitedWait {
    /// Number of the call.
    pub syscall: u64,
    /// When its time is over (CLOCK_MONOTONIC).
    pub deadline_ns: i64,
}

impl LimitedWait {
    /// What remains of it now.
    pub fn remaining(self) -> Restart {
        let remaining_ns = Some((self.deadline_ns - survey::now_ns()).max(0));
        Restart { syscall: self.syscall, clock: libc::CLOCK_MONOTONIC, remaining_ns }
    }
}

/// A stopped thread that is about to make its call.
#[derive(Debug)]
pub struct Again<'a> {
    /// The thread, its registers rewound.
    pub tracee: &'a mut Tracee,
    /// What remains of its limit.
    pub remaining_ns: i64,
}

/// What holds a limit, and what it was.
#[derive(Debug)]
enum Limit {
    Memory { memory: File, address: u64, was: [u8; 16], slack: Slack },
    Socket { socket: OwnedFd, sends: bool, was: i64 },
}

/// What two threads must not change at the same time.
type Place = (u64, u64);

/// Whether these are the registers of a call that has a limit of this kind, rather than a restart block in the kernel.
pub fn is_limited(registers: &Registers, syscall: u64) -> bool {
    let made = Registers { orig_rax: syscall, ..*registers };
    timeout_of_uninterruptible_wait(&made).is_some() || socket_wait(&made).is_some()
}

/// Gives these threads the rest of their time. Some sleep when this returns: they are left running, still traced. All others
/// stay stopped. A limit that cannot be changed begins anew.
pub fn begin_again(threads: Vec<Again<'_>>, waiter: &mut Waiter) -> Result<(), GuardianError> {
    let (mut waiting, mut signalled) = (Vec::new(), Vec::new());
    for again in threads {
        let Tracee::Stopped(stopped) = &again.tracee else { continue };
        let mut registers = stopped.registers()?;
        // Rewound, the number of the call is where the program had put it.
        let made = Registers { orig_rax: registers.rax, ..registers };
        if let Some(Timeout::Milliseconds(_)) = timeout_of_uninterruptible_wait(&made) {
            let milliseconds = again.remaining_ns.saturating_add(999_999) / 1_000_000;
            registers.set_milliseconds(milliseconds.clamp(0, i32::MAX.into()) as i32);
            stopped.set_registers(&registers)?;
        } else if let Some((place, limit)) = find(stopped, &made) {
            waiting.push((place, limit, again));
        }
    }
    while !waiting.is_empty() {
        let mut taken = BTreeSet::new();
        let (now, later): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|wait| taken.insert(wait.0));
        signalled.extend(enter(now.into_iter().map(|(_, limit, again)| (limit, again)).collect(), waiter));
        waiting = later;
    }
    // Only now: they run on.
    for tracee in signalled {
        tracee.detach_from_signal();
    }
    Ok(())
}

/// The same for processes of a tree that are about to run on. In a stopped group nobody waits.
pub fn go_on<'a>(
    processes: impl Iterator<Item = &'a mut Process>,
    waiter: &mut Waiter,
) -> Result<(), GuardianError> {
    let running = processes.filter(|process| process.group_stop.is_none());
    let threads = running.flat_map(|process| process.threads.values_mut()).filter_map(|thread| {
        let remaining_ns = thread.wait?.remaining().remaining_ns?;
        Some(Again { tracee: &mut thread.tracee, remaining_ns })
    });
    begin_again(threads.collect(), waiter)
}

/// Where the limit of a call is.
fn find(stopped: &Stopped, made: &Registers) -> Option<(Place, Limit)> {
    let id = stopped.id();
    if let Some(Timeout::Timespec(address)) = timeout_of_uninterruptible_wait(made) {
        let memory = File::options().read(true).write(true).open(format!("/proc/{}/mem", id.tid)).ok()?;
        let mut was = [0; 16];
        memory.read_exact_at(&mut was, address).ok()?;
        let limit = Limit::Memory { memory, address, was, slack: Slack::of(id.tid, made.rsp) };
        return Some(((id.pid as u64, address), limit));
    }
    let wait = socket_wait(made)?;
    let socket = survey::descriptor_of(id.pid, wait.fd)?;
    let was = survey::socket_timeout(&socket, wait.sends)?;
    let inode = nix::sys::stat::fstat(&socket).ok()?.st_ino;
    // No process has the number 0.
    Some(((0, inode), Limit::Socket { socket, sends: wait.sends, was }))
}

/// The slack of a thread's timers, by which the timer that it is about to set is known at the next dump.
#[derive(Debug)]
struct Slack {
    tid: i32,
    stack: u64,
    was: Option<i64>,
}

impl Slack {
    fn of(tid: i32, stack: u64) -> Self {
        Self { tid, stack, was: survey::timer_slack(tid) }
    }

    /// Where it cannot be changed, that timer is not known then.
    fn sign(&self) {
        self.set(self.was.map(|was| survey::signature(self.tid, self.stack, was)));
    }

    fn put_back(&self) {
        self.set(self.was);
    }

    fn set(&self, ns: Option<i64>) {
        // A thread under a real-time policy has none.
        if let Some(ns) = ns.filter(|_| self.was != Some(0)) {
            let _ = std::fs::write(format!("/proc/{}/timerslack_ns", self.tid), ns.to_string());
        }
    }
}

impl Limit {
    /// True if it could be changed.
    fn set(&self, ns: i64) -> bool {
        match self {
            Self::Memory { memory, address, slack, .. } => {
                slack.sign();
                let words = [ns / 1_000_000_000, ns % 1_000_000_000].map(i64::to_ne_bytes);
                memory.write_all_at(words.as_flattened(), *address).is_ok()
            }
            // 0 would mean for ever.
            Self::Socket { socket, sends, .. } => survey::set_socket_timeout(socket, *sends, ns.max(1)),
        }
    }

    fn put_back(&self) {
        match self {
            Self::Memory { memory, address, was, slack } => {
                slack.put_back();
                drop(memory.write_all_at(was, *address));
            }
            Self::Socket { socket, sends, was } => drop(survey::set_socket_timeout(socket, *sends, *was)),
        }
    }
}

/// Lets threads make their calls until they sleep, and puts their limits back. Tells which are about to get a signal instead.
fn enter<'a>(threads: Vec<(Limit, Again<'a>)>, waiter: &mut Waiter) -> Vec<&'a mut Tracee> {
    let mut entering = Vec::with_capacity(threads.len());
    for (limit, again) in threads {
        let ready = again.tracee.stopped().is_ok_and(|stopped| stopped.set_free_with_tracer().is_ok());
        if ready && limit.set(again.remaining_ns) {
            again.tracee.resume(Stopped::cont_to_syscall);
            entering.push((limit, again.tracee));
        }
    }
    let deadline = Instant::now() + MOMENT;
    for (_, tracee) in &mut entering {
        while tracee.poll() && waiter.wait(deadline) {}
        // A signal that came first is delivered before the call is made, which is then made after its handler.
        if matches!(tracee, Tracee::Stopped(stopped) if stopped.stop() == Stop::Syscall) {
            tracee.resume(Stopped::cont_to_syscall);
        }
    }
    for (_, tracee) in &mut entering {
        while tracee.poll() && !sleeps(tracee.id().tid) && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
    let is_signal = |stop| matches!(stop, Stop::Signal(_));
    entering.iter().for_each(|(limit, _)| limit.put_back());
    let tracees = entering.into_iter().map(|(_, tracee)| tracee);
    tracees.filter(|tracee| tracee.stopped().is_ok_and(|stopped| is_signal(stopped.stop()))).collect()
}

fn sleeps(tid: i32) -> bool {
    who::Stat::read(tid).is_none_or(|stat| matches!(stat.state, b'S' | b'D')) && who::syscall(tid).is_some()
}
