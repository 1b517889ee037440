//! Eventfds: a counter, one at its limit, a semaphore, one shared with a child; flags.

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::{self, errno_of};

fn value(fd: &EventFd) -> Outcome<u64> {
    let raw = sys::read(fd_of(fd), 8)?;
    Ok(u64::from_le_bytes(raw.try_into().unwrap_or_default()))
}

fn fd_of(fd: &EventFd) -> std::os::fd::BorrowedFd<'_> {
    std::os::fd::AsFd::as_fd(fd)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let counter = EventFd::from_value_and_flags(5, EfdFlags::EFD_NONBLOCK)?;
    let full = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK)?;
    full.write(u64::MAX - 1)?;
    let semaphore = EventFd::from_value_and_flags(3, EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK)?;
    let zero = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?;
    let shared = EventFd::from_value_and_flags(0, EfdFlags::empty())?;
    let child = ctl.child("sharer", |ctl| {
        ctl.wait_as("sharer")?;
        shared.write(77).map(drop).map_err(Into::into)
    })?;
    ctl.await_ready("sharer")?;

    if ctl.wait()? {
        counter.write(1)?;
    }

    same("counter", value(&counter)?, 5)?;
    same("counter is empty now", errno_of(&sys::read(fd_of(&counter), 8)), libc::EAGAIN)?;
    same("full", errno_of(&sys::write(fd_of(&full), &1u64.to_le_bytes())), libc::EAGAIN)?;
    same("limit", value(&full)?, u64::MAX - 1)?;
    for _ in 0..3 {
        same("semaphore", value(&semaphore)?, 1)?;
    }
    same("semaphore is empty now", errno_of(&sys::read(fd_of(&semaphore), 8)), libc::EAGAIN)?;
    same("zero", sys::readiness(fd_of(&zero), libc::POLLIN | libc::POLLOUT)?, libc::POLLOUT)?;
    same("from the child", value(&shared)?, 77)?;
    child.join()
}
