//! Descriptors that no plugin of the project claims: two mount contexts; the tests' own plugin claims them.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::ctl::{Ctl, Outcome, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut held = Vec::new();
    for number in [77, 78] {
        // SAFETY: a name that ends with NUL; the descriptor is new.
        let context = unsafe {
            let fd = sys::cvt_long(libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), 0))?;
            OwnedFd::from_raw_fd(fd as i32)
        };
        held.push(sys::dup_to(&context, number)?);
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
