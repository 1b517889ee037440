//! Sleeps for a length of time: the rest of it goes on, and no call shows an interruption.

use std::io;
use std::time::{Duration, Instant};

use crate::ctl::{Ctl, Outcome, changed, ensure};
use crate::sys::errno_of;

/// Long enough to be frozen in.
const LENGTH: Duration = Duration::from_millis(1500);
/// How much longer a call may take on a busy machine.
const SLACK: Duration = Duration::from_millis(700);

/// A call that sleeps for [`LENGTH`].
type Call = fn() -> io::Result<()>;

const CALLS: [(&str, Call); 5] = [
    ("nanosleep", || {
        let ts = length();
        // SAFETY: `ts` lives through the call; the remainder goes to a place of its own.
        zero(unsafe { libc::nanosleep(&ts, &mut length()) })
    }),
    ("clock_nanosleep", || {
        let ts = length();
        // SAFETY: as above.
        match unsafe { libc::clock_nanosleep(libc::CLOCK_BOOTTIME, 0, &ts, &mut length()) } {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }),
    // SAFETY: no descriptors.
    ("poll", || zero(unsafe { libc::poll(std::ptr::null_mut(), 0, LENGTH.as_millis() as i32) })),
    ("futex", || {
        let word = 0u32;
        // SAFETY: the word and the timeout live through the call.
        let result =
            unsafe { libc::syscall(libc::SYS_futex, &word, libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, 0, &length(), 0usize, 0) };
        match crate::sys::cvt_long(result) {
            Err(error) if error.raw_os_error() == Some(libc::ETIMEDOUT) => Ok(()),
            other => other.map(drop),
        }
    }),
    ("select", || {
        let mut tv = libc::timeval { tv_sec: 0, tv_usec: 0 };
        tv.tv_sec = LENGTH.as_secs() as i64;
        tv.tv_usec = i64::from(LENGTH.subsec_micros());
        // SAFETY: no descriptors; the timeout lives through the call.
        zero(unsafe {
            libc::select(0, std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut(), &mut tv)
        })
    }),
];

fn length() -> libc::timespec {
    libc::timespec { tv_sec: LENGTH.as_secs() as i64, tv_nsec: i64::from(LENGTH.subsec_nanos()) }
}

fn zero(result: i32) -> io::Result<()> {
    crate::sys::cvt(result).map(drop)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let threads: Vec<_> = CALLS
        .into_iter()
        .map(|(name, call)| {
            std::thread::spawn(move || {
                let began = Instant::now();
                let result = call();
                (name, result, began.elapsed())
            })
        })
        .collect();
    crate::ctl::pause(Duration::from_millis(100));

    let sabotage = ctl.wait()?;

    for thread in threads {
        let (name, result, took) = thread.join().map_err(|_| changed("a thread panicked".into()))?;
        ensure(errno_of(&result) == 0, &format!("{name} failed: {result:?}"))?;
        // What this thread missed while it looked for the request is what all of us missed.
        let frozen = ctl.longest_gap();
        // Frozen time counts in a tree that runs on, as it does for whoever is stopped; after a restore it does not.
        let least = LENGTH.saturating_sub(Duration::from_millis(20));
        let least = if sabotage { least + SLACK } else { least };
        ensure(
            took >= least && took <= LENGTH + frozen + SLACK,
            &format!("{name}: asked for {LENGTH:?}, was frozen for {frozen:?}, slept {took:?}"),
        )?;
    }
    Ok(())
}
