//! Leases: a read lease and a write lease, which others break by opening the file, after the restore.

use std::fs::{self, File, OpenOptions};

use nix::sys::signal::{SigSet, Signal};

use crate::ctl::{Ctl, Outcome, poll_until, same};
use crate::sys;

const F_SETLEASE: i32 = 1024;
const F_GETLEASE: i32 = 1025;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGIO);
    signals.thread_block()?;
    // The harness reads the files of others, which would break the leases.
    for name in [".read", ".write"] {
        fs::write(ctl.work(name), name)?;
    }
    let read = File::open(ctl.work(".read"))?;
    let write = OpenOptions::new().read(true).write(true).open(ctl.work(".write"))?;
    sys::fcntl(&read, F_SETLEASE, libc::F_RDLCK)?;
    sys::fcntl(&write, F_SETLEASE, libc::F_WRLCK)?;

    if ctl.wait()? {
        sys::fcntl(&write, F_SETLEASE, libc::F_UNLCK)?;
    }

    same("read lease", sys::fcntl(&read, F_GETLEASE, 0)?, libc::F_RDLCK)?;
    same("write lease", sys::fcntl(&write, F_GETLEASE, 0)?, libc::F_WRLCK)?;
    // Somebody opens the file, and waits until the lease is given up.
    let path = ctl.work(".write");
    let child = ctl.child("breaker", |_| {
        same("contents", fs::read_to_string(&path)?.as_str(), ".write")
    })?;
    same("signal", signals.wait()?, Signal::SIGIO)?;
    poll_until("the lease is being broken", || {
        sys::fcntl(&write, F_GETLEASE, 0).is_ok_and(|kind| kind != libc::F_WRLCK)
    })?;
    sys::fcntl(&write, F_SETLEASE, libc::F_UNLCK)?;
    child.join()
}
