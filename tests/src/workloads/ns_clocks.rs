//! A time namespace whose clocks are far from those of the machine: they go on where they were.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use nix::time::{ClockId, clock_gettime};

use crate::ctl::{Ctl, Outcome, ensure, pause};
use crate::sys::cvt;

/// Seconds that the clocks are ahead.
const AHEAD: u64 = 5_000_000;

fn now(clock: ClockId) -> Outcome<Duration> {
    Ok(clock_gettime(clock)?.into())
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let machine = now(ClockId::CLOCK_BOOTTIME)?;
    unshare(CloneFlags::from_bits_retain(libc::CLONE_NEWTIME))?;
    std::fs::write("/proc/self/timens_offsets", format!("monotonic {AHEAD} 0\nboottime {AHEAD} 7\n"))?;
    let children = File::open("/proc/self/ns/time_for_children")?;
    // SAFETY: integer arguments; this process has one thread.
    cvt(unsafe { libc::setns(children.as_raw_fd(), libc::CLONE_NEWTIME) })?;
    drop(children);
    let before = [now(ClockId::CLOCK_MONOTONIC)?, now(ClockId::CLOCK_BOOTTIME)?];
    ensure(before[1] > machine + Duration::from_secs(AHEAD - 1), "no time namespace")?;
    let sleeper = ctl.child("sleeper", |ctl| {
        let began = now(ClockId::CLOCK_MONOTONIC)?;
        ctl.announce("ready.sleeper", b"")?;
        for _ in 0..10 {
            pause(Duration::from_millis(100));
        }
        ensure(now(ClockId::CLOCK_MONOTONIC)? >= began + Duration::from_millis(900), "time ran backwards")
    })?;
    ctl.await_ready("sleeper")?;

    if ctl.wait()? {
        return ensure(now(ClockId::CLOCK_BOOTTIME)? < machine, "spoilt");
    }

    for (clock, before) in [ClockId::CLOCK_MONOTONIC, ClockId::CLOCK_BOOTTIME].into_iter().zip(before) {
        let after = now(clock)?;
        ensure(after >= before, "a clock ran backwards")?;
        ensure(after < before + Duration::from_secs(600), "a clock has jumped")?;
    }
    sleeper.join()
}
