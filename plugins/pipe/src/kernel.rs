//! System calls on pipes.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// Read end and write end.
pub struct Ends {
    pub read: OwnedFd,
    pub write: OwnedFd,
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn count(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// pipe2(2), not blocking.
pub fn pipe() -> io::Result<Ends> {
    let mut fds = [0; 2];
    // SAFETY: two integers are filled.
    check(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) })?;
    // SAFETY: both are new, and nobody else has them.
    Ok(unsafe { Ends { read: OwnedFd::from_raw_fd(fds[0]), write: OwnedFd::from_raw_fd(fds[1]) } })
}

/// A pipe of the given capacity.
pub fn pipe_of(capacity: usize) -> io::Result<Ends> {
    let ends = pipe()?;
    set_capacity(ends.write.as_fd(), capacity)?;
    Ok(ends)
}

pub fn capacity(fd: BorrowedFd<'_>) -> io::Result<usize> {
    // SAFETY: no argument.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETPIPE_SZ) }).map(|size| size.unsigned_abs() as usize)
}

/// Sets the capacity if it is another.
pub fn set_capacity(fd: BorrowedFd<'_>, size: usize) -> io::Result<()> {
    if capacity(fd)? != size {
        let size = i32::try_from(size).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        // SAFETY: an integer argument.
        check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETPIPE_SZ, size) })?;
    }
    Ok(())
}

/// Bytes in the pipe (`FIONREAD`); works on either end.
pub fn available(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut n = 0i32;
    // SAFETY: the request fills an int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut n) })?;
    Ok(n.unsigned_abs() as usize)
}

/// poll(2), at once; the events that are there without being asked for as well.
pub fn poll(fd: BorrowedFd<'_>) -> io::Result<i16> {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one entry, as the count says.
    check(unsafe { libc::poll(&raw mut entry, 1, 0) })?;
    Ok(entry.revents)
}

/// Copies up to `n` bytes' worth of buffers without consuming them (tee(2)).
pub fn tee(from: BorrowedFd<'_>, to: BorrowedFd<'_>, n: usize) -> io::Result<usize> {
    // SAFETY: integers only.
    count(unsafe { libc::tee(from.as_raw_fd(), to.as_raw_fd(), n, libc::SPLICE_F_NONBLOCK) })
}

/// Moves buffers from one pipe to another (splice(2)).
pub fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, n: usize) -> io::Result<usize> {
    let (none, flags) = (std::ptr::null_mut(), libc::SPLICE_F_NONBLOCK);
    // SAFETY: no offsets are given, as pipes have none.
    count(unsafe { libc::splice(from.as_raw_fd(), none, to.as_raw_fd(), none, n, flags) })
}

pub fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is as long as said.
    count(unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) })
}

pub fn write(fd: BorrowedFd<'_>, data: &[u8]) -> io::Result<usize> {
    // SAFETY: the buffer is as long as said.
    count(unsafe { libc::write(fd.as_raw_fd(), data.as_ptr().cast(), data.len()) })
}

/// Switches packet mode of a write end that is not blocking.
pub fn set_packets(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let flags = libc::O_NONBLOCK | if on { libc::O_DIRECT } else { 0 };
    // SAFETY: an integer argument.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags) }).map(drop)
}

/// open(2), with `O_CLOEXEC`.
pub fn open(path: &CStr, flags: i32) -> io::Result<OwnedFd> {
    // SAFETY: a C string.
    let fd = check(unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) })?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Another open file description of the same pipe. Never blocks for a pipe of pipe(2) (fs/pipe.c, fifo_open).
pub fn reopen(fd: BorrowedFd<'_>, flags: i32) -> io::Result<OwnedFd> {
    let path = std::ffi::CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    let nonblock = if flags & libc::O_PATH != 0 { 0 } else { libc::O_NONBLOCK };
    open(&path, flags | nonblock)
}
