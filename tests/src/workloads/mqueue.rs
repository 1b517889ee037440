//! A message queue with messages of several priorities, opened for reading and for writing. The queue is the machine's, as
//! a file would be, so what is taken out is put back.

use std::ffi::CString;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::{cvt_long, errno_of, fcntl};

fn open(name: &CString, flags: i32, attributes: Option<&libc::mq_attr>) -> Outcome<OwnedFd> {
    let attributes = attributes.map_or(std::ptr::null(), std::ptr::from_ref);
    let flags = flags | libc::O_CLOEXEC;
    // SAFETY: a name that ends with NUL, attributes or none; the descriptor is new.
    unsafe {
        let fd = cvt_long(libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0o600, attributes))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

fn send(queue: &OwnedFd, text: &str, priority: u32) -> std::io::Result<i64> {
    let none = std::ptr::null::<libc::timespec>();
    let number = libc::SYS_mq_timedsend;
    // SAFETY: a message of that length, and no time.
    cvt_long(unsafe { libc::syscall(number, queue.as_raw_fd(), text.as_ptr(), text.len(), priority, none) })
}

fn receive(queue: &OwnedFd) -> Outcome<(String, u32)> {
    let (mut text, mut priority) = ([0_u8; 64], 0_u32);
    let none = std::ptr::null::<libc::timespec>();
    let number = libc::SYS_mq_timedreceive;
    // SAFETY: room for the longest message, and no time.
    let got = unsafe {
        libc::syscall(number, queue.as_raw_fd(), text.as_mut_ptr(), text.len(), &raw mut priority, none)
    };
    let got = cvt_long(got)? as usize;
    Ok((String::from_utf8_lossy(&text[..got]).into_owned(), priority))
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut hasher = DefaultHasher::new();
    ctl.dir().hash(&mut hasher);
    let name = CString::new(format!("stasis-test-{:x}", hasher.finish())).unwrap_or_default();
    // SAFETY: a name that ends with NUL.
    unsafe { libc::syscall(libc::SYS_mq_unlink, name.as_ptr()) };
    // SAFETY: a zeroed mq_attr is one.
    let mut attributes: libc::mq_attr = unsafe { std::mem::zeroed() };
    (attributes.mq_maxmsg, attributes.mq_msgsize) = (3, 64);
    let reader = open(&name, libc::O_CREAT | libc::O_RDONLY | libc::O_NONBLOCK, Some(&attributes))?;
    let writer = open(&name, libc::O_WRONLY, None)?;
    let messages = [("first", 1), ("urgent", 9), ("second", 1)];
    for (text, priority) in messages {
        send(&writer, text, priority)?;
    }

    if ctl.wait()? {
        receive(&reader)?;
    }

    same("flags", fcntl(&reader, libc::F_GETFL, 0)? & (libc::O_ACCMODE | libc::O_NONBLOCK), libc::O_NONBLOCK)?;
    same("flags", fcntl(&writer, libc::F_GETFL, 0)? & (libc::O_ACCMODE | libc::O_NONBLOCK), libc::O_WRONLY)?;
    same("a reader sends", errno_of(&send(&reader, "x", 1)), libc::EBADF)?;
    let order = [("urgent", 9), ("first", 1), ("second", 1)].map(|(text, n)| (text.to_owned(), n));
    let mut found = Vec::new();
    for _ in 0..3 {
        found.push(receive(&reader)?);
    }
    same("messages", found, order.to_vec())?;
    same("no more", receive(&reader).is_err(), true)?;
    for (text, priority) in messages {
        send(&writer, text, priority)?;
    }
    Ok(())
}
