//! Removed directories: open, read half, as working directory of a child, inside one another, and with unlinked files in
//! them.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let outer = ctl.work("outer");
    let inner = outer.join("inner");
    fs::create_dir_all(&inner)?;
    fs::set_permissions(&inner, fs::Permissions::from_mode(0o2710))?;
    let directory = File::open(&inner)?;
    let anchor = nix::fcntl::open(&outer, OFlag::O_PATH | OFlag::O_DIRECTORY, Mode::empty())?;
    fs::write(inner.join("file"), "in a removed directory")?;
    let file = File::open(inner.join("file"))?;
    fs::create_dir_all(ctl.work("gone"))?;
    fs::write(ctl.work("gone/file"), "its directory is held by nobody")?;
    let lost = File::open(ctl.work("gone/file"))?;
    let child = ctl.child("inside", |ctl| {
        std::env::set_current_dir(&inner)?;
        ctl.wait_as("inside")?;
        same("working directory", fs::metadata(".")?.nlink(), 0)?;
        same("its mode", fs::metadata(".")?.mode() & 0o7777, 0o2710)?;
        same("the very same directory", fs::metadata(".")?.ino(), directory.metadata()?.ino())?;
        ensure(File::create("new").is_err(), "a file can be made in a removed directory")?;
        std::env::set_current_dir("..")?;
        let fd = fs::metadata(format!("/proc/self/fd/{}", anchor.as_raw_fd()))?;
        same("the directory above", fs::metadata(".")?.ino(), fd.ino())
    })?;
    ctl.await_ready("inside")?;
    fs::remove_dir_all(&outer)?;
    fs::remove_dir_all(ctl.work("gone"))?;

    if ctl.wait()? {
        fs::create_dir(&outer)?;
    }

    ensure(!outer.exists() && !ctl.work("gone").exists(), "a directory has come back")?;
    same("file in a removed directory", sys::read(&file, 100)?, b"in a removed directory".to_vec())?;
    same("file of a lost directory", sys::read(&lost, 100)?, b"its directory is held by nobody".to_vec())?;
    let opened = openat(&anchor, "inner", OFlag::O_RDONLY, Mode::empty()).map(drop);
    same("what was in the removed directory", opened, Err(Errno::ENOENT))?;
    child.join()
}
