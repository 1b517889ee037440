//! Waits with a time limit, dumped half way: they end by it, when they would have ended without a dump.
//!
//! Sleeps that begin with them, one shorter and one longer, tell early and late without a clock.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use nix::sys::time::TimeVal;

use crate::ctl::{Ctl, Fail, Outcome, ensure, pause, same};
use crate::sys::{cvt_long, pipe, write};

const LIMIT_MS: i64 = 1600;
/// How much earlier and later the sleeps are over; a limit that begins anew is later than that.
const MARGIN_MS: i64 = 500;
/// When the dump may come.
const READY_MS: u64 = 800;

const LIMIT: libc::timespec = libc::timespec { tv_sec: LIMIT_MS / 1000, tv_nsec: LIMIT_MS % 1000 * 1_000_000 };

/// What the waits are made on.
#[derive(Debug)]
pub struct Things {
    epoll: OwnedFd,
    event: EventFd,
    pipe: (OwnedFd, OwnedFd),
    socket: (OwnedFd, OwnedFd),
    semaphore: i64,
    aio: u64,
    /// Shared by several waits, and not to be changed by them.
    limit: libc::timespec,
}

/// Makes a call that lasts until its limit.
pub type Wait = fn(&Things) -> i64;

/// Name, call, what it gives at the end.
pub type Entry = (&'static str, Wait, Result<i64, i32>);

const WAITS: &[Entry] = &[
    ("epoll_wait", |things| {
        let mut event = [0u8; 12];
        // SAFETY: room for one event.
        unsafe { libc::syscall(libc::SYS_epoll_wait, things.epoll.as_raw_fd(), event.as_mut_ptr(), 1, LIMIT_MS) }
    }, Ok(0)),
    ("epoll_pwait", |things| {
        let (mut event, mask) = ([0u8; 12], 0u64);
        let place = event.as_mut_ptr();
        // SAFETY: room for one event, and a mask of 8 bytes.
        unsafe { libc::syscall(libc::SYS_epoll_pwait, things.epoll.as_raw_fd(), place, 1, LIMIT_MS, &raw const mask, 8) }
    }, Ok(0)),
    ("epoll_pwait2", |things| {
        let (mut event, limit) = ([0u8; 12], &raw const things.limit);
        // SAFETY: room for one event, and a timespec.
        unsafe { libc::syscall(libc::SYS_epoll_pwait2, things.epoll.as_raw_fd(), event.as_mut_ptr(), 1, limit, 0, 8) }
    }, Ok(0)),
    ("rt_sigtimedwait", |things| {
        let (set, limit) = (1u64 << (libc::SIGUSR1 - 1), &raw const things.limit);
        // SAFETY: a set of 8 bytes and a timespec.
        unsafe { libc::syscall(libc::SYS_rt_sigtimedwait, &raw const set, 0, limit, 8) }
    }, Err(libc::EAGAIN)),
    ("semtimedop", |things| {
        let mut operation = libc::sembuf { sem_num: 0, sem_op: -1, sem_flg: 0 };
        // SAFETY: one operation and a timespec.
        unsafe { libc::syscall(libc::SYS_semtimedop, things.semaphore, &raw mut operation, 1, &raw const things.limit) }
    }, Err(libc::EAGAIN)),
    ("io_getevents", |things| {
        let mut event = [0u64; 4];
        // SAFETY: room for one event, and a timespec.
        unsafe { libc::syscall(libc::SYS_io_getevents, things.aio, 1, 1, event.as_mut_ptr(), &raw const things.limit) }
    }, Ok(0)),
    ("ppoll", |things| {
        let mut entry = libc::pollfd { fd: things.pipe.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut limit = LIMIT;
        // SAFETY: one entry and a timespec.
        unsafe { libc::syscall(libc::SYS_ppoll, &raw mut entry, 1, &raw mut limit, 0, 8) }
    }, Ok(0)),
];

/// Of a socket with a timeout.
pub const SOCKET_WAITS: &[Entry] = &[
    ("recv", |things| {
        let mut byte = 0u8;
        // SAFETY: one byte of room.
        unsafe { libc::recv(things.socket.0.as_raw_fd(), (&raw mut byte).cast(), 1, 0) as i64 }
    }, Err(libc::EAGAIN)),
];

fn things() -> Outcome<Things> {
    let event = EventFd::new()?;
    // SAFETY: an integer argument.
    let epoll = cvt_long(unsafe { libc::syscall(libc::SYS_epoll_create1, libc::EPOLL_CLOEXEC) })? as i32;
    // SAFETY: new.
    let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
    let mut entry = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 1 };
    let (instance, added) = (epoll.as_raw_fd(), event.as_fd().as_raw_fd());
    // SAFETY: the event outlives the call.
    cvt_long(i64::from(unsafe { libc::epoll_ctl(instance, libc::EPOLL_CTL_ADD, added, &mut entry) }))?;
    let socket = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::empty())?;
    setsockopt(&socket.0, sockopt::ReceiveTimeout, &TimeVal::new(LIMIT_MS / 1000, LIMIT_MS % 1000 * 1000))?;
    // SAFETY: takes numbers only.
    let semaphore = cvt_long(unsafe { libc::syscall(libc::SYS_semget, libc::IPC_PRIVATE, 1, 0o600) })?;
    let mut aio = 0u64;
    // SAFETY: the kernel writes one number.
    cvt_long(unsafe { libc::syscall(libc::SYS_io_setup, 4, &raw mut aio) })
        .map_err(|error| Fail::Absent(format!("io_setup: {error}")))?;
    Ok(Things { epoll, event, pipe: pipe(libc::O_CLOEXEC)?, socket, semaphore, aio, limit: LIMIT })
}

/// Who has ended, with what, and when: for messages, in ms.
type End = (&'static str, Result<i64, i32>, u128);

/// In the order of their ends.
#[derive(Debug, Default)]
struct Ended {
    list: Mutex<Vec<End>>,
    more: Condvar,
}

impl Ended {
    fn add(&self, name: &'static str, result: Result<i64, i32>, ms: u128) {
        self.list.lock().unwrap_or_else(PoisonError::into_inner).push((name, result, ms));
        self.more.notify_all();
    }

    fn wait_for(&self, count: usize) -> Vec<End> {
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let list = self.more.wait_while(list, |list| list.len() < count).unwrap_or_else(PoisonError::into_inner);
        list.clone()
    }
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    play(ctl, WAITS)
}

/// The same with these waits.
pub fn play(ctl: &Ctl, waits: &'static [Entry]) -> Outcome {
    SigSet::from(Signal::SIGUSR1).thread_block()?;
    let things = Arc::new(things()?);
    let (ended, began) = (Arc::new(Ended::default()), Instant::now());
    // Threads stay when their waits are over: who compares the tree finds the same ones.
    let stay = |ended: &Ended| drop(ended.wait_for(usize::MAX));
    for (name, ms) in [("early", LIMIT_MS - MARGIN_MS), ("late", LIMIT_MS + MARGIN_MS)] {
        let ended = Arc::clone(&ended);
        std::thread::spawn(move || {
            pause(Duration::from_millis(ms as u64));
            ended.add(name, Ok(0), began.elapsed().as_millis());
            stay(&ended);
        });
    }
    for &(name, wait, _) in waits {
        let (things, ended) = (Arc::clone(&things), Arc::clone(&ended));
        std::thread::spawn(move || {
            let result = cvt_long(wait(&things)).map_err(|error| error.raw_os_error().unwrap_or(0));
            ended.add(name, result, began.elapsed().as_millis());
            stay(&ended);
        });
    }
    pause(Duration::from_millis(READY_MS));

    let sabotage = ctl.wait()?;

    if sabotage {
        things.event.write(1)?;
        write(&things.socket.1, b"x")?;
    }
    let list = ended.wait_for(waits.len() + 2);
    let names: Vec<&str> = list.iter().map(|entry| entry.0).collect();
    let in_order = (names.first(), names.last()) == (Some(&"early"), Some(&"late"));
    ensure(in_order, &format!("the waits ended in another order: {list:?}"))?;
    for &(name, _, result) in waits {
        let got = list.iter().find(|entry| entry.0 == name).map(|entry| entry.1);
        same(name, got, Some(result))?;
    }
    same("the limit in memory", (things.limit.tv_sec, things.limit.tv_nsec), (LIMIT.tv_sec, LIMIT.tv_nsec))?;
    let timeout = nix::sys::socket::getsockopt(&things.socket.0, sockopt::ReceiveTimeout)?;
    let us = timeout.tv_sec() * 1_000_000 + timeout.tv_usec();
    same("the socket's timeout, in ms", us / 1000, LIMIT_MS)?;
    // The semaphore goes with its namespace: the original and what was restored may have the same one.
    Ok(())
}
