//! Unlinked fifos, with data, open in every mode, in two tasks; one whose name is a file's now.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, fstat};

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let path = ctl.work("fifo");
    nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o624))?;
    let open = |path: &std::path::Path, flags| -> Outcome<OwnedFd> { Ok(open(path, flags, Mode::empty())?) };
    let both = open(&path, OFlag::O_RDWR)?;
    let reader = open(&path, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
    let named = open(&path, OFlag::O_PATH)?;
    sys::write(&both, b"from both ")?;
    let child = ctl.child("writer", |ctl| {
        let writer = open(&path, OFlag::O_WRONLY)?;
        sys::write(&writer, b"from the child ")?;
        ctl.wait_as("writer")?;
        sys::write(&writer, b"later").map(drop).map_err(Into::into)
    })?;
    ctl.await_ready("writer")?;
    let lonely_path = ctl.work("lonely");
    nix::unistd::mkfifo(&lonely_path, Mode::from_bits_truncate(0o600))?;
    let lonely = open(&lonely_path, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
    fs::remove_file(&path)?;
    fs::remove_file(&lonely_path)?;
    fs::write(&lonely_path, "in the place of the fifo")?;

    if ctl.wait()? {
        sys::read(&both, 1)?;
    }

    let stat = fstat(&named)?;
    same("mode and links", (stat.st_mode, stat.st_nlink), (libc::S_IFIFO | 0o624, 0))?;
    same("the same fifo", (fstat(&reader)?.st_ino, fstat(&both)?.st_ino), (stat.st_ino, stat.st_ino))?;
    ensure(!path.exists(), "the name has come back")?;
    same("the file in its place", fs::read_to_string(&lonely_path)?.as_str(), "in the place of the fifo")?;
    same("its size", fs::metadata(&lonely_path)?.size(), 24)?;
    same("data", sys::read(&reader, 25)?, b"from both from the child ".to_vec())?;
    child.join()?;
    same("data of the child", sys::read(&reader, 100)?, b"later".to_vec())?;
    same("nobody writes to the other", sys::read(&lonely, 1)?, Vec::new())
}
