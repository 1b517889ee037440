//! Socket options that are kept: one table.

use crate::{record::stasis::unix::v1::Option as Saved, sys};
use stasis_plugin_api::{HookError, Result};
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

/// Options of SOL_SOCKET (asm-generic/socket.h) with their size, in the order in which they are put back. SO_BUF_LOCK
/// says which buffer sizes were set by hand, and setting a size changes it, so it is after them.
#[rustfmt::skip]
const OPTIONS: &[(i32, &str, usize)] = &[
    (libc::SO_DEBUG, "SO_DEBUG", 4),
    (libc::SO_REUSEADDR, "SO_REUSEADDR", 4),
    (libc::SO_DONTROUTE, "SO_DONTROUTE", 4),
    (libc::SO_BROADCAST, "SO_BROADCAST", 4),
    (libc::SO_SNDBUF, "SO_SNDBUF", 4),
    (libc::SO_RCVBUF, "SO_RCVBUF", 4),
    (72, "SO_BUF_LOCK", 4),
    (libc::SO_KEEPALIVE, "SO_KEEPALIVE", 4),
    (libc::SO_OOBINLINE, "SO_OOBINLINE", 4),
    (libc::SO_PRIORITY, "SO_PRIORITY", 4),
    (libc::SO_LINGER, "SO_LINGER", 8),
    (libc::SO_REUSEPORT, "SO_REUSEPORT", 4),
    (libc::SO_PASSCRED, "SO_PASSCRED", 4),
    (libc::SO_RCVLOWAT, "SO_RCVLOWAT", 4),
    (66, "SO_RCVTIMEO_NEW", 16),
    (67, "SO_SNDTIMEO_NEW", 16),
    (29, "SO_TIMESTAMP_OLD", 4),
    (35, "SO_TIMESTAMPNS_OLD", 4),
    (63, "SO_TIMESTAMP_NEW", 4),
    (64, "SO_TIMESTAMPNS_NEW", 4),
    (34, "SO_PASSSEC", 4),
    (libc::SO_MARK, "SO_MARK", 4),
    (libc::SO_RXQ_OVFL, "SO_RXQ_OVFL", 4),
    (43, "SO_NOFCS", 4),
    (45, "SO_SELECT_ERR_QUEUE", 4),
    (76, "SO_PASSPIDFD", 4),
    (83, "SO_PASSRIGHTS", 4),
    (84, "SO_INQ", 4),
    (libc::SO_PEEK_OFF, "SO_PEEK_OFF", 4),
];

/// SO_GET_FILTER is SO_ATTACH_FILTER.
const SO_GET_FILTER: i32 = 26;
const SO_LOCK_FILTER: i32 = 44;

pub(crate) fn read(fd: BorrowedFd<'_>, name: &str) -> Result<Vec<Saved>> {
    if has_filter(fd) || sys::get_int(fd, SO_LOCK_FILTER).is_ok_and(|locked| locked != 0) {
        return Err(HookError::unsupported(name, "a packet filter is attached", ""));
    }
    let mut saved = Vec::new();
    for &(option, label, size) in OPTIONS {
        match sys::get_option(fd, option, size) {
            Ok(value) => saved.push(Saved { name: option, value }),
            // This kernel or this kind of socket does not have it.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP)) => {}
            Err(error) => return Err(HookError::failed(format!("reading {label}"), error)),
        }
    }
    Ok(saved)
}

/// Asked with length 0, the kernel gives the number of instructions. An eBPF program cannot be read back: EACCES
/// (net/core/filter.c, sk_get_filter).
fn has_filter(fd: BorrowedFd<'_>) -> bool {
    let mut length: libc::socklen_t = 0;
    // SAFETY: with length 0 the kernel only writes the length.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_GET_FILTER,
            std::ptr::null_mut(),
            std::ptr::from_mut(&mut length),
        )
    };
    match result {
        0 => length != 0,
        _ => io::Error::last_os_error().raw_os_error() == Some(libc::EACCES),
    }
}

/// Puts back what differs from what the socket has.
pub(crate) fn write(fd: BorrowedFd<'_>, saved: &[Saved]) -> Result<()> {
    for &(option, label, size) in OPTIONS {
        let Some(wanted) = saved.iter().find(|saved| saved.name == option) else { continue };
        if sys::get_option(fd, option, size).is_ok_and(|value| value == wanted.value) {
            continue;
        }
        let set = match option {
            libc::SO_SNDBUF => set_buffer(fd, option, libc::SO_SNDBUFFORCE, &wanted.value),
            libc::SO_RCVBUF => set_buffer(fd, option, libc::SO_RCVBUFFORCE, &wanted.value),
            _ => sys::set_option(fd, option, &wanted.value),
        };
        set.map_err(|error| HookError::failed(format!("setting {label}"), error))?;
        match sys::get_option(fd, option, size) {
            Ok(value) if value == wanted.value => {}
            _ => {
                return Err(HookError::invalid(format!("{label} did not take the value {:?}", wanted.value)));
            }
        }
    }
    Ok(())
}

/// What is read is twice what is set (socket(7)).
fn set_buffer(fd: BorrowedFd<'_>, option: i32, force: i32, value: &[u8]) -> io::Result<()> {
    let value: [u8; 4] = value.try_into().map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let half = (i32::from_ne_bytes(value) / 2).to_ne_bytes();
    sys::set_option(fd, force, &half).or_else(|_| sys::set_option(fd, option, &half))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        os::{fd::AsFd, unix::net::UnixStream},
        time::Duration,
    };

    #[test]
    fn options_are_put_back() {
        let (a, _peer) = UnixStream::pair().unwrap();
        a.set_read_timeout(Some(Duration::from_millis(1250))).unwrap();
        for (option, value) in [
            (libc::SO_PASSCRED, 1),
            (libc::SO_SNDBUF, 50_000),
            (libc::SO_PEEK_OFF, 7),
            (libc::SO_RCVLOWAT, 3),
        ] {
            sys::set_option(a.as_fd(), option, &i32::to_ne_bytes(value)).unwrap();
        }
        let saved = read(a.as_fd(), "a").unwrap();
        let (b, _peer) = UnixStream::pair().unwrap();
        assert_ne!(read(b.as_fd(), "b").unwrap(), saved);
        write(b.as_fd(), &saved).unwrap();
        assert_eq!(read(b.as_fd(), "b").unwrap(), saved);
        assert_eq!(sys::get_int(b.as_fd(), libc::SO_SNDBUF).unwrap(), 100_000);
    }

    #[test]
    fn filters_are_refused_by_name() {
        let (a, _peer) = UnixStream::pair().unwrap();
        let mut program = [libc::sock_filter { code: 6, jt: 0, jf: 0, k: u32::MAX }];
        let filter = libc::sock_fprog { len: 1, filter: program.as_mut_ptr() };
        // SAFETY: sock_fprog is plain data.
        let bytes = unsafe {
            std::slice::from_raw_parts(std::ptr::from_ref(&filter).cast::<u8>(), size_of_val(&filter))
        };
        sys::set_option(a.as_fd(), libc::SO_ATTACH_FILTER, bytes).unwrap();
        assert!(read(a.as_fd(), "socket:[1]").unwrap_err().what.contains("packet filter"));
    }
}
