//! Calls that wait with a signal mask of their own: sigsuspend, ppoll, pselect, epoll_pwait. The mask for the wait holds on
//! after a restore, and the one from before is back when the wait is over.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::time::Duration;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, kill, sigaction};

use crate::ctl::{Ctl, Outcome, ensure, pause, same};
use crate::sys::cvt_long;

static CAME: [AtomicI32; 2] = [AtomicI32::new(0), AtomicI32::new(0)];

extern "C" fn count(signal: i32) {
    CAME[usize::from(signal == libc::SIGUSR2)].fetch_add(1, Relaxed);
}

/// A wait that lets in what is not in the mask, as the kernel takes it: eight bytes.
type Wait = fn(i32, *const u64) -> i64;

const HOUR: libc::timespec = libc::timespec { tv_sec: 3600, tv_nsec: 0 };

/// struct sigset_argpack of fs/select.c.
fn packed(mask: *const u64) -> [u64; 2] {
    [mask as u64, 8]
}

const WAITS: &[(&str, Wait)] = &[
    // SAFETY: here and below: the mask, and what else the calls are given, outlives them.
    ("sigsuspend", |_, mask| unsafe { libc::syscall(libc::SYS_rt_sigsuspend, mask, 8) }),
    ("ppoll", |_, mask| {
        let entries: [libc::pollfd; 0] = [];
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_ppoll, entries.as_ptr(), 0, 0, mask, 8) }
    }),
    ("ppoll for an hour", |_, mask| {
        let (entries, mut time): ([libc::pollfd; 0], _) = ([], HOUR);
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_ppoll, entries.as_ptr(), 0, &raw mut time, mask, 8) }
    }),
    ("pselect", |_, mask| {
        let mask = packed(mask);
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_pselect6, 0, 0, 0, 0, 0, mask.as_ptr()) }
    }),
    ("pselect for an hour", |_, mask| {
        let (mask, mut time) = (packed(mask), HOUR);
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_pselect6, 0, 0, 0, 0, &raw mut time, mask.as_ptr()) }
    }),
    ("epoll_pwait", |epoll, mask| {
        let mut events = [0_u8; 12];
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_epoll_pwait, epoll, events.as_mut_ptr(), 1, -1, mask, 8) }
    }),
    ("epoll_pwait for an hour", |epoll, mask| {
        let mut events = [0_u8; 12];
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_epoll_pwait, epoll, events.as_mut_ptr(), 1, 3_600_000, mask, 8) }
    }),
];

fn bits(signals: &[Signal]) -> u64 {
    signals.iter().map(|&signal| 1 << (signal as u64 - 1)).sum()
}

/// In the child: waits, and is ended by the one signal that is let in.
fn wait_masked(ctl: &Ctl, number: usize, wait: Wait) -> Outcome {
    let action = SigAction::new(SigHandler::Handler(count), SaFlags::empty(), SigSet::empty());
    let before: SigSet = [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGHUP].into_iter().collect();
    before.thread_set_mask()?;
    for signal in [Signal::SIGUSR1, Signal::SIGUSR2] {
        // SAFETY: the handler only counts.
        unsafe { sigaction(signal, &action) }?;
    }
    // SAFETY: an integer argument.
    let epoll = cvt_long(unsafe { libc::syscall(libc::SYS_epoll_create1, libc::EPOLL_CLOEXEC) })? as i32;
    // SAFETY: new.
    let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
    let during = bits(&[Signal::SIGUSR2]);
    ctl.announce(&format!("ready.wait{number}"), b"")?;
    let result = cvt_long(wait(epoll.as_raw_fd(), &during));
    same("the result", result.map_err(|error| error.raw_os_error()), Err(Some(libc::EINTR)))?;
    same("handlers run", CAME.each_ref().map(|came| came.load(Relaxed)), [1, 0])?;
    ensure(SigSet::thread_get_mask()? == before, "the mask from before the wait is not back")?;
    let mut pending = 0_u64;
    // SAFETY: eight bytes of room.
    cvt_long(unsafe { libc::syscall(libc::SYS_rt_sigpending, &raw mut pending, 8) })?;
    same("pending signals", pending, during)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut children = Vec::new();
    for (number, &(name, wait)) in WAITS.iter().enumerate() {
        children.push(ctl.child(name, |ctl| wait_masked(ctl, number, wait))?);
        ctl.await_ready(&format!("wait{number}"))?;
    }
    pause(Duration::from_millis(50));

    let sabotage = ctl.wait()?;

    // Both masks hold this one back.
    if !sabotage {
        children.iter().try_for_each(|child| kill(child.pid, Signal::SIGUSR2))?;
    }
    pause(Duration::from_millis(10));
    children.iter().try_for_each(|child| kill(child.pid, Signal::SIGUSR1))?;
    children.into_iter().try_for_each(|child| child.join())
}
