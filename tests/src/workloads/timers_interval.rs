//! Interval timers: what remains of all three, and one whose signal is pending.

use std::time::{Duration, Instant};

use crate::ctl::{Ctl, Outcome, ensure, pause, same};
use crate::sys::cvt;

fn set(which: i32, interval_us: i64, value_us: i64) -> Outcome {
    let time = |us: i64| libc::timeval { tv_sec: us / 1_000_000, tv_usec: us % 1_000_000 };
    let timer = libc::itimerval { it_interval: time(interval_us), it_value: time(value_us) };
    // SAFETY: the kernel reads one itimerval.
    cvt(unsafe { libc::setitimer(which as _, &timer, std::ptr::null_mut()) })?;
    Ok(())
}

fn get(which: i32) -> Outcome<(i64, i64)> {
    // SAFETY: zeroes are valid; the kernel writes one itimerval.
    let timer = unsafe {
        let mut timer: libc::itimerval = std::mem::zeroed();
        cvt(libc::getitimer(which as _, &mut timer))?;
        timer
    };
    let us = |time: libc::timeval| time.tv_sec * 1_000_000 + time.tv_usec;
    Ok((us(timer.it_interval), us(timer.it_value)))
}

/// Takes SIGALRM.
fn take(wait: Duration) -> bool {
    // SAFETY: all places live through the call.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut set, libc::SIGALRM);
        let wait = libc::timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
        libc::sigtimedwait(&set, std::ptr::null_mut(), &wait) == libc::SIGALRM
    }
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    const LONG: i64 = 1_000_000_000;
    let child = ctl.child("pending", |ctl| {
        // SAFETY: a set of this frame.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&mut set, libc::SIGALRM);
            libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        }
        set(libc::ITIMER_REAL, 30_000, 1000)?;
        pause(Duration::from_millis(10));
        ctl.wait_as("pending")?;
        same("the interval", get(libc::ITIMER_REAL)?.0, 30_000)?;
        ensure(take(Duration::ZERO), "no SIGALRM is pending")?;
        for _ in 0..2 {
            ensure(take(Duration::from_secs(10)), "the timer has stopped")?;
        }
        Ok(())
    })?;
    ctl.await_ready("pending")?;
    let began = Instant::now();
    set(libc::ITIMER_REAL, 77, LONG)?;
    set(libc::ITIMER_VIRTUAL, 0, LONG)?;
    set(libc::ITIMER_PROF, 5_000_000, LONG)?;

    if ctl.wait()? {
        set(libc::ITIMER_PROF, 0, 0)?;
    }

    for (which, interval) in [(libc::ITIMER_REAL, 77), (libc::ITIMER_PROF, 5_000_000), (libc::ITIMER_VIRTUAL, 0)] {
        let (now, value) = get(which)?;
        // The kernel rounds the interval of CPU timers to its ticks.
        ensure((now - interval).abs() < 20_000, &format!("the interval of {which} is {now}, was {interval}"))?;
        let least = LONG - began.elapsed().as_micros() as i64 - 1_000_000;
        // One tick is added to a CPU timer when it is set, and no more by any restore.
        ensure(value <= LONG + 10_000 && value >= least, &format!("of timer {which} remain {value}, at least {least}"))?;
    }
    set(libc::ITIMER_REAL, 0, 0)?;
    child.join()
}
