//! Making a timer and setting it.

use crate::{
    kernel::{self, Setting},
    records::stasis::timerfd::v1::Timer,
};
use stasis_plugin_api::{HookError, Result};
use std::{io, os::fd::OwnedFd};

const ABSOLUTE: u32 = libc::TFD_TIMER_ABSTIME.cast_unsigned();

/// The timer, not armed.
pub fn create(record: &Timer) -> Result<OwnedFd> {
    kernel::create(record.clock).map_err(|error| {
        let remedy = match (record.clock, error.raw_os_error()) {
            (libc::CLOCK_REALTIME_ALARM | libc::CLOCK_BOOTTIME_ALARM, Some(libc::EPERM)) => {
                "alarm clocks need CAP_WAKE_ALARM"
            }
            _ => "",
        };
        HookError::failed(format!("timerfd_create of clock {}", record.clock), error).remedy(remedy)
    })
}

/// The delay given to a timer that expires while it is being set.
const GRACE: u64 = 1_000_000;

/// Sets the timer as it was.
pub fn arm(timer: &OwnedFd, record: &Timer) -> Result<()> {
    let now = clock(record)?;
    // The end as a time of the timer's own clock; 0 if it is not armed.
    let end = match (record.moment, record.remaining) {
        (0, 0) => 0,
        (0, remaining) => now.saturating_add(remaining),
        (moment, _) => moment,
    };
    // 0 would disarm it: an end that has passed is at least 1.
    let value = match (end, record.settime_flags & ABSOLUTE) {
        (0, _) => 0,
        (end, 0) => end.saturating_sub(now).max(1),
        (end, _) => end,
    };
    let setting = Setting { value, interval: record.interval };
    kernel::set(timer, record.settime_flags, setting).map_err(failed("timerfd_settime"))?;
    if record.ticks == 0 {
        return Ok(());
    }
    // Setting the timer has put its count to 0; setting the count now can hide an expiration in between.
    kernel::set_ticks(timer, record.ticks).map_err(|error| {
        failed("TFD_IOC_SET_TICKS")(error).remedy("needs a kernel with CONFIG_CHECKPOINT_RESTORE")
    })?;
    if end == 0 || clock(record)? < end {
        return Ok(());
    }
    // It has expired meanwhile: once more, a moment from now, so that the expiration is counted.
    arm(timer, &Timer { remaining: GRACE, moment: 0, ..*record })
}

fn clock(record: &Timer) -> Result<u64> {
    kernel::now(record.clock).map_err(failed("clock_gettime"))
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}
