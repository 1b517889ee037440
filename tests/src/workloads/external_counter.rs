//! An event counter, which one of two plugins that claim it keeps.

use std::os::fd::{FromRawFd, OwnedFd};

use crate::ctl::{Ctl, Outcome, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    // SAFETY: two integers; the descriptor is new.
    let counter = unsafe { OwnedFd::from_raw_fd(sys::cvt(libc::eventfd(5, 0))?) };

    if ctl.wait()? {
        sys::write(&counter, &1u64.to_ne_bytes())?;
    }

    same("the count", sys::read(&counter, 8)?, 5u64.to_ne_bytes().to_vec())
}
