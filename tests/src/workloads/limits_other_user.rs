//! Resource limits of a process of another user, every one of them lowered, soft below hard.

use std::os::unix::fs::chown;

use nix::unistd::{setresgid, setresuid};

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::cvt;

/// nobody.
const NOBODY: u32 = 65534;

/// All limits: soft and hard.
fn limits() -> Outcome<Vec<(u64, u64)>> {
    (0..16)
        .map(|which| {
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: the kernel writes one rlimit.
            cvt(unsafe { libc::getrlimit(which, &raw mut limit) })?;
            Ok((limit.rlim_cur, limit.rlim_max))
        })
        .collect()
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    // Large enough to live with.
    let lowered = [
        (libc::RLIMIT_CPU, 10_000, 20_000),
        (libc::RLIMIT_FSIZE, 1 << 40, 1 << 41),
        (libc::RLIMIT_DATA, 1 << 42, 1 << 43),
        (libc::RLIMIT_STACK, 4 << 20, 6 << 20),
        (libc::RLIMIT_CORE, 0, 1 << 20),
        (libc::RLIMIT_RSS, 1 << 30, 1 << 31),
        (libc::RLIMIT_NPROC, 3000, 4000),
        (libc::RLIMIT_NOFILE, 100, 200),
        (libc::RLIMIT_MEMLOCK, 4096, 8192),
        (libc::RLIMIT_LOCKS, 7, 8),
        (libc::RLIMIT_SIGPENDING, 50, 60),
        (libc::RLIMIT_MSGQUEUE, 5000, 6000),
        (libc::RLIMIT_NICE, 0, 0),
        (libc::RLIMIT_RTPRIO, 0, 0),
        (libc::RLIMIT_RTTIME, 100_000_000, 200_000_000),
    ];
    for (which, soft, hard) in lowered {
        let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
        // SAFETY: the kernel reads one rlimit.
        cvt(unsafe { libc::setrlimit(which, &raw const limit) })?;
    }
    // It has to leave its verdict there.
    chown(ctl.dir(), Some(NOBODY), Some(NOBODY))?;
    setresgid(NOBODY.into(), NOBODY.into(), NOBODY.into())?;
    setresuid(NOBODY.into(), NOBODY.into(), NOBODY.into())?;
    let before = limits()?;

    if ctl.wait()? {
        let limit = libc::rlimit { rlim_cur: 6, rlim_max: 8 };
        // SAFETY: as above.
        cvt(unsafe { libc::setrlimit(libc::RLIMIT_LOCKS, &raw const limit) })?;
    }

    same("limits", limits()?, before)
}
