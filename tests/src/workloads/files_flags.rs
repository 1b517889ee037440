//! Open flags of regular files: append, read-only, write-only, non-blocking, O_PATH, O_NOFOLLOW, O_DIRECT, sync.

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys;

const FLAGS: [i32; 10] = [
    libc::O_RDONLY,
    libc::O_WRONLY,
    libc::O_RDWR | libc::O_APPEND,
    libc::O_WRONLY | libc::O_NONBLOCK,
    libc::O_PATH,
    libc::O_RDONLY | libc::O_NOFOLLOW,
    libc::O_RDWR | libc::O_SYNC,
    libc::O_RDWR | libc::O_DSYNC | libc::O_NOATIME,
    libc::O_RDONLY | libc::O_CLOEXEC,
    libc::O_RDWR | libc::O_DIRECT,
];

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let path = ctl.work("data");
    fs::write(&path, "content")?;
    let mut files: Vec<OwnedFd> = Vec::new();
    for flags in FLAGS {
        files.push(nix::fcntl::open(&path, OFlag::from_bits_retain(flags), Mode::empty())?);
    }
    let settings = |file: &OwnedFd| -> Outcome<(i32, i32)> {
        Ok((sys::fcntl(file, libc::F_GETFL, 0)?, sys::fcntl(file, libc::F_GETFD, 0)?))
    };
    let before: Vec<_> = files.iter().map(settings).collect::<Outcome<_>>()?;
    let number = files[0].as_raw_fd();

    if ctl.wait()? {
        sys::fcntl(&files[3], libc::F_SETFL, 0)?;
    }

    for (file, was) in files.iter().zip(before) {
        same("flags", settings(file)?, was)?;
    }
    same("content", sys::read(&files[0], 100)?, b"content".to_vec())?;
    sys::write(&files[2], b"+more")?;
    same("after appending", fs::read_to_string(&path)?.as_str(), "content+more")?;
    ensure(sys::read(&files[1], 1).is_err(), "a write-only file can be read")?;
    ensure(sys::write(&files[0], b"x").is_err(), "a read-only file can be written")?;
    // SAFETY: opens by a number that is ours; the result is new.
    let reopened = unsafe {
        let path = format!("/proc/self/fd/{number}\0");
        sys::cvt(libc::open(path.as_ptr().cast(), libc::O_RDONLY)).map(|fd| OwnedFd::from_raw_fd(fd))
    }?;
    same("opened again", sys::read(&reopened, 7)?, b"content".to_vec())
}
