//! Signalfds with their masks, signals pending behind them, and one watched by an epoll set.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollFlags};

use super::epoll_basic::{add, ready};
use crate::ctl::{Ctl, Outcome, same};
use crate::sys::{self, errno_of};

fn set_of(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: a plain set of bits.
    unsafe {
        let mut set = std::mem::zeroed();
        for signal in signals {
            libc::sigaddset(&mut set, *signal);
        }
        set
    }
}

fn create(signals: &[i32]) -> Outcome<OwnedFd> {
    // SAFETY: makes a new descriptor; the set lives through the call.
    Ok(unsafe { OwnedFd::from_raw_fd(sys::cvt(libc::signalfd(-1, &set_of(signals), libc::SFD_NONBLOCK))?) })
}

/// (signal, value) of the next entry (signalfd_siginfo in signalfd(2)).
fn next(fd: &OwnedFd) -> std::io::Result<(u32, u32)> {
    let raw = sys::read(fd, 128)?;
    let at = |n: usize| u32::from_le_bytes([raw[n], raw[n + 1], raw[n + 2], raw[n + 3]]);
    Ok((at(0), at(44)))
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let rt = libc::SIGRTMIN() + 7;
    // SAFETY: a valid set.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set_of(&[libc::SIGUSR1, libc::SIGUSR2, rt]), std::ptr::null_mut()) };
    let one = create(&[libc::SIGUSR1])?;
    let two = create(&[libc::SIGUSR2, rt])?;
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    add(&epoll, &two, EpollFlags::EPOLLIN, 5)?;
    add(&epoll, &one, EpollFlags::EPOLLIN, 6)?;
    for value in [8, 9] {
        // SAFETY: signals to ourselves, which are blocked.
        unsafe { libc::sigqueue(libc::getpid(), rt, libc::sigval { sival_ptr: value as *mut _ }) };
    }

    if ctl.wait()? {
        next(&two)?;
    }

    same("ready", ready(&epoll)?, vec![(5, 1)])?;
    same("first", next(&two)?, (rt as u32, 8))?;
    same("second", next(&two)?, (rt as u32, 9))?;
    same("no more", errno_of(&next(&two)), libc::EAGAIN)?;
    // SAFETY: as above.
    unsafe { libc::raise(libc::SIGUSR1) };
    same("ready", ready(&epoll)?, vec![(6, 1)])?;
    same("mask of the other", errno_of(&next(&two)), libc::EAGAIN)?;
    same("by its own mask", next(&one)?.0, libc::SIGUSR1 as u32)?;
    // SAFETY: changes the set of an existing signalfd.
    sys::cvt(unsafe { libc::signalfd(one.as_raw_fd(), &set_of(&[libc::SIGUSR2]), 0) }).map(drop).map_err(Into::into)
}
