//! Descriptors that no plugin of the project claims: two inotify instances; the tests' own plugin claims them.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::ctl::{Ctl, Outcome, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut held = Vec::new();
    for number in [77, 78] {
        // SAFETY: makes a new descriptor.
        let instance = unsafe { OwnedFd::from_raw_fd(sys::cvt(libc::inotify_init1(0))?) };
        held.push(sys::dup_to(&instance, number)?);
    }
    let links = || -> Outcome<Vec<std::path::PathBuf>> {
        Ok(held
            .iter()
            .map(|fd| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())))
            .collect::<Result<_, _>>()?)
    };
    let before = links()?;

    if ctl.wait()? {
        std::mem::forget(sys::dup_to(&std::fs::File::open("/")?, 77)?);
    }

    same("descriptors", links()?, before)
}
