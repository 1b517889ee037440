//! Timers that are cancelled when the clock is set (TFD_TIMER_CANCEL_ON_SET), and ones that are not.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime, clock_settime};

use crate::ctl::{Ctl, Fail, Outcome, same};
use crate::sys::{self, errno_of};

fn timer(flags: i32) -> Outcome<OwnedFd> {
    let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let when = libc::itimerspec { it_interval: zero, it_value: libc::timespec { tv_sec: 4_000_000_000, ..zero } };
    // SAFETY: makes a new descriptor; the time lives through the call.
    unsafe {
        let fd = sys::cvt(libc::timerfd_create(libc::CLOCK_REALTIME, libc::TFD_NONBLOCK))?;
        let fd = OwnedFd::from_raw_fd(fd);
        let flags = flags | libc::TFD_TIMER_ABSTIME;
        sys::cvt(libc::timerfd_settime(fd.as_raw_fd(), flags, &when, std::ptr::null_mut()))?;
        Ok(fd)
    }
}

/// Sets the clock to what it shows: a jump of a microsecond.
fn jump() -> Result<(), Errno> {
    clock_settime(ClockId::CLOCK_REALTIME, clock_gettime(ClockId::CLOCK_REALTIME)?)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    match jump() {
        Err(Errno::EPERM) => return Err(Fail::Absent("the clock may not be set here".into())),
        result => result?,
    }
    let cancelled = timer(libc::TFD_TIMER_CANCEL_ON_SET)?;
    let stays = timer(0)?;
    same("before the clock is set", errno_of(&sys::read(&cancelled, 8)), libc::EAGAIN)?;

    let sabotage = ctl.wait()?;

    // The scenarios of other timers may set the clock, too: a cancellation that is there already is one.
    if sabotage {
        sys::dup_to(&stays, cancelled.as_raw_fd()).map(std::mem::forget)?;
    }
    jump()?;
    same("when the clock is set", errno_of(&sys::read(&cancelled, 8)), libc::ECANCELED)?;
    same("once", errno_of(&sys::read(&cancelled, 8)), libc::EAGAIN)?;
    same("the other one", errno_of(&sys::read(&stays, 8)), libc::EAGAIN)
}
