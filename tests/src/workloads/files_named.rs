//! Descriptors that only name something (O_PATH): a file, a directory, a symbolic link, one that was removed, a dangling
//! one, a socket, a fifo, a device.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

use nix::fcntl::{OFlag, open, readlinkat};
use nix::sys::stat::{Mode, fstat};

use crate::ctl::{Ctl, Outcome, same};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    fs::write(ctl.work("file"), "contents")?;
    std::os::unix::fs::symlink("file", ctl.work("link"))?;
    std::os::unix::fs::symlink("/nowhere/at/all", ctl.work("removed"))?;
    std::os::unix::fs::symlink("/nowhere", ctl.work("dangling"))?;
    drop(std::os::unix::net::UnixListener::bind(ctl.work("socket"))?);
    nix::unistd::mkfifo(&ctl.work("fifo"), Mode::from_bits_truncate(0o600))?;
    let open = |name: &str| -> Outcome<OwnedFd> {
        let path = if name.starts_with('/') { name.into() } else { ctl.work(name) };
        Ok(open(&path, OFlag::O_PATH | OFlag::O_NOFOLLOW, Mode::empty())?)
    };
    let names = ["file", "", "link", "removed", "dangling", "socket", "fifo", "/dev/null"];
    let fds: Vec<OwnedFd> = names.iter().map(|name| open(name)).collect::<Outcome<_>>()?;
    fs::remove_file(ctl.work("removed"))?;
    let facts = |fd: &OwnedFd| -> Outcome<(u32, u64)> {
        let stat = fstat(fd)?;
        Ok((stat.st_mode, stat.st_nlink))
    };
    let before: Vec<_> = fds.iter().map(facts).collect::<Outcome<_>>()?;

    if ctl.wait()? {
        fs::remove_file(ctl.work("link"))?;
        fs::remove_file(ctl.work("dangling"))?;
    }

    for ((fd, was), name) in fds.iter().zip(before).zip(names) {
        same(&format!("type and links of {name:?}"), facts(fd)?, was)?;
    }
    let target = |n: usize| -> Outcome<Vec<u8>> { Ok(readlinkat(&fds[n], "")?.into_vec()) };
    same("target", target(2)?, b"file".to_vec())?;
    same("target of the removed one", target(3)?, b"/nowhere/at/all".to_vec())?;
    same("target of the dangling one", target(4)?, b"/nowhere".to_vec())?;
    same("still there", fs::symlink_metadata(ctl.work("dangling")).is_ok(), true)?;
    let text = fs::read_to_string(format!("/proc/self/fd/{}", fds[0].as_raw_fd()))?;
    same("opened by the descriptor", text.as_str(), "contents")
}
