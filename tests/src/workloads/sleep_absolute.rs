//! Sleeps until a point in time: it stays where it was, however long the freeze.

use std::time::Duration;

use crate::ctl::{Ctl, Outcome, changed, ensure};

const CLOCKS: [i32; 3] = [libc::CLOCK_MONOTONIC, libc::CLOCK_REALTIME, libc::CLOCK_BOOTTIME];

fn now(clock: i32) -> Duration {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `ts` lives through the call.
    unsafe { libc::clock_gettime(clock, &mut ts) };
    Duration::new(ts.tv_sec as u64, ts.tv_nsec as u32)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let threads = CLOCKS.map(|clock| {
        let until = now(clock) + Duration::from_millis(1500);
        std::thread::spawn(move || {
            let ts = libc::timespec { tv_sec: until.as_secs() as i64, tv_nsec: i64::from(until.subsec_nanos()) };
            // SAFETY: `ts` lives through the call.
            let result = unsafe { libc::clock_nanosleep(clock, libc::TIMER_ABSTIME, &ts, std::ptr::null_mut()) };
            (clock, result, until, now(clock))
        })
    });
    crate::ctl::pause(Duration::from_millis(100));

    let sabotage = ctl.wait()?;

    for thread in threads {
        let (clock, result, until, woke) = thread.join().map_err(|_| changed("a thread panicked".into()))?;
        let until = until + Duration::from_secs(u64::from(sabotage));
        ensure(result == 0, &format!("clock {clock}: errno {result}"))?;
        let latest = until + ctl.longest_gap() + Duration::from_millis(700);
        ensure(woke >= until && woke <= latest, &format!("clock {clock}: until {until:?}, woke at {woke:?}"))?;
    }
    Ok(())
}
