//! An interval timer (setitimer(2)) that ticks.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::ctl::{Ctl, Outcome, poll_until};
use crate::sys::cvt;

static TICKS: AtomicU32 = AtomicU32::new(0);

extern "C" fn tick(_signal: i32) {
    TICKS.fetch_add(1, Ordering::SeqCst);
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let every = libc::timeval { tv_sec: 0, tv_usec: 20_000 };
    let spec = libc::itimerval { it_interval: every, it_value: every };
    // SAFETY: the handler touches an atomic; the value lives through the call.
    unsafe {
        libc::signal(libc::SIGALRM, tick as *const () as usize);
        cvt(libc::setitimer(libc::ITIMER_REAL, &spec, std::ptr::null_mut()))?;
    }

    if ctl.wait()? {
        // SAFETY: as above; zero disarms.
        unsafe { libc::setitimer(libc::ITIMER_REAL, &std::mem::zeroed(), std::ptr::null_mut()) };
    }

    let now = TICKS.load(Ordering::SeqCst);
    poll_until("the timer ticks on", || TICKS.load(Ordering::SeqCst) > now + 3)
}
