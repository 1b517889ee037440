//! O_TMPFILE: files that never had a name. One is given a name after the restore, another had one for a while.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::linkat;

use crate::ctl::{Ctl, Fail, Outcome, same};
use crate::sys;

fn name(file: &File, path: &std::path::Path) -> nix::Result<()> {
    let source = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(AT_FDCWD, source.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let make = || -> Outcome<File> {
        let flags = OFlag::O_TMPFILE | OFlag::O_RDWR;
        match open(&ctl.work(""), flags, Mode::from_bits_truncate(0o640)) {
            Ok(fd) => Ok(File::from(fd)),
            Err(Errno::EOPNOTSUPP) => Err(Fail::Absent("O_TMPFILE on this file system".into())),
            Err(errno) => Err(errno.into()),
        }
    };
    let (nameless, was_named) = (make()?, make()?);
    nameless.write_all_at(b"never had a name", 0)?;
    was_named.write_all_at(b"had a name", 0)?;
    name(&was_named, &ctl.work("name"))?;
    fs::remove_file(ctl.work("name"))?;
    sys::read(&nameless, 6)?;

    if ctl.wait()? {
        nameless.set_len(3)?;
    }

    same("link counts", (nameless.metadata()?.nlink(), was_named.metadata()?.nlink()), (0, 0))?;
    same("mode", nameless.metadata()?.mode() & 0o777, 0o640)?;
    same("rest", sys::read(&nameless, 100)?, b"had a name".to_vec())?;
    same("contents of the other", sys::read(&was_named, 100)?, b"had a name".to_vec())?;
    name(&nameless, &ctl.work("named"))?;
    same("by its new name", fs::read_to_string(ctl.work("named"))?.as_str(), "never had a name")?;
    // A restored copy is asked again.
    Ok(fs::remove_file(ctl.work("named"))?)
}
