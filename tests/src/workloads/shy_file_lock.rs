//! A whole-file lock (flock(2)) and a record lock (fcntl(2)).

use std::fs;
use std::os::fd::AsRawFd;

use crate::ctl::{Ctl, Outcome, ensure};
use crate::sys::{cvt, errno_of};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let path = ctl.work("locked");
    fs::write(&path, "0123456789")?;
    let file = fs::OpenOptions::new().read(true).write(true).open(&path)?;
    let mut region: libc::flock = libc::flock { l_type: 1, l_whence: 0, l_start: 2, l_len: 3, l_pid: 0 };
    // SAFETY: numbers, and a struct that lives through the call.
    unsafe {
        cvt(libc::flock(file.as_raw_fd(), libc::LOCK_EX))?;
        cvt(libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &mut region))?;
    }

    if ctl.wait()? {
        // SAFETY: numbers.
        unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) };
    }

    let other = fs::OpenOptions::new().read(true).write(true).open(&path)?;
    // SAFETY: numbers.
    let attempt = cvt(unsafe { libc::flock(other.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) });
    ensure(errno_of(&attempt) == libc::EWOULDBLOCK, "the file is no longer locked")?;
    let child = ctl.child("asker", |_| {
        let mut ask = libc::flock { l_type: 1, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
        // SAFETY: the struct lives through the call.
        unsafe { cvt(libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &mut ask))? };
        ensure(ask.l_type == 1 && ask.l_start == 2 && ask.l_len == 3, "the record lock is gone")
    })?;
    child.join()
}
