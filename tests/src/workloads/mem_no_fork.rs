//! A process that is not allowed to fork, with more memory than is copied without a snapshot.

use std::os::unix::fs::chown;

use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{ForkResult, fork, setresgid, setresuid};

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::{Map, PAGE};

/// nobody.
const NOBODY: u32 = 65534;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let map = Map::anon(3000 * PAGE)?;
    map.fill(77);
    // It has to leave its verdict there.
    chown(ctl.dir(), Some(NOBODY), Some(NOBODY))?;
    // Root is exempt from the limit (setrlimit(2)).
    setrlimit(Resource::RLIMIT_NPROC, 1, 1)?;
    setresgid(NOBODY.into(), NOBODY.into(), NOBODY.into())?;
    setresuid(NOBODY.into(), NOBODY.into(), NOBODY.into())?;
    must_not_fork()?;

    if ctl.wait()? {
        map.put(800, 3);
    }

    map.check("memory", 77)?;
    must_not_fork()
}

fn must_not_fork() -> Outcome {
    // SAFETY: a child, should there be one, ends at once.
    match unsafe { fork() } {
        // SAFETY: as above.
        Ok(ForkResult::Child) => unsafe { libc::_exit(0) },
        result => same("fork", result.map(|_| ()), Err(nix::errno::Errno::EAGAIN)),
    }
}
