//! A POSIX timer (timer_create(2)) with a signal and a value.

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys::cvt;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let hour = libc::timespec { tv_sec: 3600, tv_nsec: 0 };
    let mut id: libc::timer_t = std::ptr::null_mut();
    // SAFETY: all places live through the calls.
    unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = libc::SIGUSR1;
        cvt(libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut id))?;
        cvt(libc::timer_settime(id, 0, &libc::itimerspec { it_interval: hour, it_value: hour }, std::ptr::null_mut()))?;
    }

    if ctl.wait()? {
        // SAFETY: a timer of ours.
        unsafe { libc::timer_delete(id) };
    }

    // SAFETY: the place lives through the call.
    let left = unsafe {
        let mut left: libc::itimerspec = std::mem::zeroed();
        cvt(libc::timer_gettime(id, &mut left))?;
        left
    };
    same("interval", left.it_interval.tv_sec, 3600)?;
    ensure(left.it_value.tv_sec > 3500, "the timer is not armed as it was")
}
