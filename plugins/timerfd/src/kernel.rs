//! The system calls, in nanoseconds.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

const SECOND: u64 = 1_000_000_000;

/// `TFD_IOC_SET_TICKS` (include/uapi/linux/timerfd.h): `_IOW('T', 0, __u64)`.
const TFD_IOC_SET_TICKS: libc::Ioctl = 0x4008_5400;

/// To the next expiration (0: none), and between expirations (0: only one).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    pub value: u64,
    pub interval: u64,
}

fn spec(nanoseconds: u64) -> libc::timespec {
    // Both parts fit: 2^64 nanoseconds are 584 years.
    libc::timespec {
        tv_sec: (nanoseconds / SECOND).cast_signed(),
        tv_nsec: (nanoseconds % SECOND).cast_signed(),
    }
}

pub fn nanoseconds(seconds: u64, rest: u64) -> u64 {
    seconds.saturating_mul(SECOND).saturating_add(rest)
}

fn from_spec(spec: libc::timespec) -> u64 {
    nanoseconds(spec.tv_sec.cast_unsigned(), spec.tv_nsec.cast_unsigned())
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// clock_gettime(2). Of an alarm clock, the time is that of the clock behind it.
pub fn now(clock: i32) -> io::Result<u64> {
    let clock = match clock {
        libc::CLOCK_REALTIME_ALARM => libc::CLOCK_REALTIME,
        libc::CLOCK_BOOTTIME_ALARM => libc::CLOCK_BOOTTIME,
        other => other,
    };
    let mut time = spec(0);
    // SAFETY: `time` is a timespec to be filled.
    check(unsafe { libc::clock_gettime(clock, &raw mut time) })?;
    Ok(from_spec(time))
}

/// timerfd_create(2).
pub fn create(clock: i32) -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    let fd = check(unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK) })?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// timerfd_gettime(2).
pub fn get(timer: &OwnedFd) -> io::Result<Setting> {
    let mut setting = libc::itimerspec { it_interval: spec(0), it_value: spec(0) };
    // SAFETY: `setting` is an itimerspec to be filled.
    check(unsafe { libc::timerfd_gettime(timer.as_raw_fd(), &raw mut setting) })?;
    Ok(Setting { value: from_spec(setting.it_value), interval: from_spec(setting.it_interval) })
}

/// timerfd_settime(2).
pub fn set(timer: &OwnedFd, flags: u32, setting: Setting) -> io::Result<()> {
    let new = libc::itimerspec { it_interval: spec(setting.interval), it_value: spec(setting.value) };
    // SAFETY: `new` is a complete itimerspec, and the old setting is not asked for.
    check(unsafe {
        libc::timerfd_settime(timer.as_raw_fd(), flags.cast_signed(), &raw const new, std::ptr::null_mut())
    })?;
    Ok(())
}

/// Sets the number of expirations not yet read; not 0.
pub fn set_ticks(timer: &OwnedFd, ticks: u64) -> io::Result<()> {
    // SAFETY: the request reads a u64.
    check(unsafe { libc::ioctl(timer.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) })?;
    Ok(())
}
