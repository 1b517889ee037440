//! Reading a timer.

use crate::{
    kernel::{self, Setting},
    records::stasis::timerfd::v1::Timer,
};
use stasis_plugin_api::{HandleInfo, HookError, Result};
use std::{
    fs,
    os::fd::{AsRawFd, OwnedFd},
};

/// An interval can be so short that it ends again while we look.
const ATTEMPTS: usize = 1000;

/// Reads the timer's state without changing what its owner will see.
pub fn timer(timer: OwnedFd) -> Result<Timer> {
    for _ in 0..ATTEMPTS {
        // An expired periodic timer stands still until it is looked at (fs/timerfd.c, timerfd_tmrproc): this makes it
        // count what it missed and run on, as a read would.
        kernel::get(&timer).map_err(|error| HookError::failed("timerfd_gettime", error))?;
        let fdinfo = fs::read_to_string(format!("/proc/self/fdinfo/{}", timer.as_raw_fd()))
            .map_err(|error| HookError::failed("read fdinfo of a timerfd", error))?;
        let record = parse(&fdinfo)?;
        if record.interval == 0 || record.remaining != 0 {
            return follow_wall_clock(record);
        }
        // Periodic and at 0: either it has just expired again, or it was set to an interval alone, hence disarmed.
        if kernel::get(&timer).map_err(|error| HookError::failed("timerfd_gettime", error))?.value == 0 {
            return Ok(record);
        }
    }
    let why = "its interval is too short to catch it between two expirations";
    Err(HookError::unsupported("timerfd", why, "give the timer a longer interval"))
}

/// A timer set for a moment of the wall clock keeps that moment.
fn follow_wall_clock(mut record: Timer) -> Result<Timer> {
    let wall = matches!(record.clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM);
    if wall && record.settime_flags & libc::TFD_TIMER_ABSTIME.cast_unsigned() != 0 && record.remaining != 0 {
        let now = kernel::now(record.clock).map_err(|error| HookError::failed("clock_gettime", error))?;
        record.moment = now.saturating_add(record.remaining);
        record.remaining = 0;
    }
    Ok(record)
}

/// Reads fdinfo (fs/timerfd.c, timerfd_show).
pub fn parse(fdinfo: &str) -> Result<Timer> {
    let info = HandleInfo { fdinfo: fdinfo.into(), ..HandleInfo::default() };
    let number = |name: &str, radix: u32| {
        u64::from_str_radix(info.field(name)?, radix)
            .map_err(|error| HookError::invalid(format!("fdinfo field {name}: {error}")))
    };
    let setting = Setting { value: pair(&info, "it_value")?, interval: pair(&info, "it_interval")? };
    Ok(Timer {
        clock: number("clockid", 10)? as i32,
        settime_flags: number("settime flags", 8)? as u32,
        ticks: number("ticks", 10)?,
        remaining: setting.value,
        interval: setting.interval,
        moment: 0,
    })
}

/// `(seconds, nanoseconds)`.
fn pair(info: &HandleInfo, name: &str) -> Result<u64> {
    let text = info.field(name)?;
    let inner = text.strip_prefix('(').and_then(|text| text.strip_suffix(')'));
    inner
        .and_then(|inner| inner.split_once(','))
        .and_then(|(seconds, rest)| {
            Some(kernel::nanoseconds(seconds.trim().parse().ok()?, rest.trim().parse().ok()?))
        })
        .ok_or_else(|| HookError::invalid(format!("fdinfo field {name}: {text:?} is no pair of numbers")))
}
