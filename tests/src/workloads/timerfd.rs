//! Timerfds of all clocks: armed once, with an interval, expired and unread, unarmed, absolute.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::ctl::{Ctl, Outcome, ensure, pause, same};
use crate::sys::{self, errno_of};

const CLOCKS: [i32; 3] = [libc::CLOCK_MONOTONIC, libc::CLOCK_REALTIME, libc::CLOCK_BOOTTIME];

fn create(clock: i32) -> Outcome<OwnedFd> {
    // SAFETY: makes a new descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(sys::cvt(libc::timerfd_create(clock, libc::TFD_NONBLOCK))?) })
}

fn spec(first: Duration, interval: Duration) -> libc::itimerspec {
    let ts = |d: Duration| libc::timespec { tv_sec: d.as_secs() as i64, tv_nsec: i64::from(d.subsec_nanos()) };
    libc::itimerspec { it_interval: ts(interval), it_value: ts(first) }
}

fn set(fd: &OwnedFd, flags: i32, first: Duration, interval: Duration) -> Outcome {
    // SAFETY: the value lives through the call.
    sys::cvt(unsafe {
        libc::timerfd_settime(fd.as_raw_fd(), flags, &spec(first, interval), std::ptr::null_mut())
    })?;
    Ok(())
}

/// (time left, interval).
fn get(fd: &OwnedFd) -> Outcome<(Duration, Duration)> {
    let mut now = spec(Duration::ZERO, Duration::ZERO);
    // SAFETY: the value lives through the call.
    sys::cvt(unsafe { libc::timerfd_gettime(fd.as_raw_fd(), &mut now) })?;
    let d = |ts: libc::timespec| Duration::new(ts.tv_sec as u64, ts.tv_nsec as u32);
    Ok((d(now.it_value), d(now.it_interval)))
}

fn expirations(fd: &OwnedFd) -> Outcome<u64> {
    Ok(u64::from_le_bytes(sys::read(fd, 8)?.try_into().unwrap_or_default()))
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let (zero, hour) = (Duration::ZERO, Duration::from_secs(3600));
    let (mut far, mut done, mut idle) = (Vec::new(), Vec::new(), Vec::new());
    let armed = Instant::now();
    for clock in CLOCKS {
        far.push(create(clock)?);
        set(&far[far.len() - 1], 0, hour, Duration::from_millis(1500))?;
        done.push(create(clock)?);
        set(&done[done.len() - 1], 0, Duration::from_millis(1), zero)?;
        idle.push(create(clock)?);
    }
    let ticking = create(libc::CLOCK_MONOTONIC)?;
    set(&ticking, 0, Duration::from_millis(10), Duration::from_millis(10))?;
    let soon = create(libc::CLOCK_MONOTONIC)?;
    set(&soon, 0, Duration::from_millis(900), zero)?;
    let past = create(libc::CLOCK_REALTIME)?;
    set(&past, libc::TFD_TIMER_ABSTIME, Duration::from_secs(4_000_000_000), zero)?;
    pause(Duration::from_millis(30));

    if ctl.wait()? {
        expirations(&done[1])?;
    }

    for fd in &far {
        let (left, interval) = get(fd)?;
        let passed = armed.elapsed();
        ensure(
            left < hour && left + passed + Duration::from_secs(5) > hour,
            &format!("an hour's timer has {left:?} left after {passed:?}"),
        )?;
        same("interval", interval, Duration::from_millis(1500))?;
        same("not expired", errno_of(&sys::read(fd, 8)), libc::EAGAIN)?;
    }
    for fd in &done {
        same("expirations of one that is over", expirations(fd)?, 1)?;
        same("left", get(fd)?, (zero, zero))?;
    }
    for fd in &idle {
        same("unarmed", get(fd)?, (zero, zero))?;
        same("unarmed", errno_of(&sys::read(fd, 8)), libc::EAGAIN)?;
    }
    ensure(expirations(&ticking)? >= 3, "expirations have been lost")?;
    pause(Duration::from_millis(25));
    ensure(expirations(&ticking)? >= 1, "the interval timer has stopped")?;
    let (left, _) = get(&past)?;
    // SAFETY: no place is given.
    let now = unsafe { libc::time(std::ptr::null_mut()) } as u64;
    ensure(left.as_secs().abs_diff(4_000_000_000 - now) < 5, &format!("absolute timer: {left:?} left"))?;
    let (left, _) = get(&soon)?;
    ensure(left <= Duration::from_millis(900), "a timer went backwards")?;
    pause(left + Duration::from_millis(20));
    same("a timer that ran out meanwhile", expirations(&soon)?, 1)
}
