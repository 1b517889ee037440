//! A child whose root directory was removed.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::ctl::{Ctl, Outcome, ensure, pause, same};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let root = ctl.work("root");
    fs::create_dir(&root)?;
    let child = ctl.child("rooted", |_| {
        nix::unistd::chroot(&root)?;
        std::env::set_current_dir("/")?;
        // No file can tell it anything any more: it looks for a signal of its parent's.
        while fs::metadata("/")?.mode() & 0o777 != 0o700 {
            pause(std::time::Duration::from_millis(5));
        }
        same("links of the root directory", fs::metadata("/")?.nlink(), 0)?;
        ensure(!Path::new("/proc").exists(), "the old root can be seen")
    })?;
    let held = format!("/proc/{}/root", child.pid);
    crate::ctl::poll_until("the child has changed its root", || {
        fs::read_link(&held).is_ok_and(|link| link == root)
    })?;
    fs::remove_dir(&root)?;

    let spoil = ctl.wait()?;

    ensure(!root.exists(), "the root directory has come back")?;
    let mode = if spoil { 0o755 } else { 0o700 };
    same("links", fs::metadata(&held)?.nlink(), if spoil { 1 } else { 0 })?;
    fs::set_permissions(&held, std::os::unix::fs::PermissionsExt::from_mode(mode))?;
    child.join()
}
