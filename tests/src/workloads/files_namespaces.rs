//! Namespaces held open by descriptors: of the task itself, of a child, of a thread's children.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

use crate::ctl::{Ctl, Outcome, same};

const KINDS: [&str; 8] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "pid_for_children"];

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let child = ctl.child("other", |ctl| {
        ctl.wait_as("other")?;
        crate::ctl::poll_until("the parent has looked", || ctl.dir().join("looked").exists())
    })?;
    ctl.await_ready("other")?;
    let path = |pid: i32, kind: &str| format!("/proc/{pid}/ns/{kind}");
    let own = std::process::id() as i32;
    let mut files = Vec::new();
    for kind in KINDS {
        files.push((kind, File::open(path(own, kind))?));
    }
    let twin = files[3].1.try_clone()?;
    let second = File::open(path(child.pid.as_raw(), "net"))?;

    if ctl.wait()? {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUTS)?;
    }

    for (kind, file) in &files {
        same(kind, file.metadata()?.ino(), fs::metadata(path(own, kind))?.ino())?;
    }
    same("by a duplicate", twin.metadata()?.ino(), second.metadata()?.ino())?;
    // SAFETY: takes numbers.
    let entered = unsafe { libc::setns(std::os::fd::AsRawFd::as_raw_fd(&files[5].1), libc::CLONE_NEWUTS) };
    // In a user namespace of its own the task has no power over it.
    if let Err(error) = crate::sys::cvt(entered) {
        same("error", error.raw_os_error(), Some(libc::EPERM))?;
    }
    ctl.announce("looked", b"")?;
    child.join()?;
    // A restored copy is asked again.
    Ok(fs::remove_file(ctl.dir().join("looked"))?)
}
