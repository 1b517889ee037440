//! Socket options that are kept: one table.

use crate::{
    record::stasis::unix::v1::{End, Instruction, Option as Saved},
    sys,
};
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

/// Options and filter of a socket, put into its record.
pub(crate) fn read(fd: BorrowedFd<'_>, end: &mut End, label: &str) -> Result<()> {
    for &(option, name, size) in OPTIONS {
        match sys::get_option(fd, option, size) {
            Ok(value) => end.options.push(Saved { name: option, value }),
            // This kernel or this kind of socket does not have it.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP)) => {}
            Err(error) => return Err(HookError::failed(format!("reading {name}"), error)),
        }
    }
    end.filter = filter(fd, label)?;
    end.filter_locked = sys::get_int(fd, SO_LOCK_FILTER).is_ok_and(|locked| locked != 0);
    Ok(())
}

/// SO_GET_FILTER: lengths are in instructions, and with length 0 it gives that of the filter. An eBPF program cannot be
/// read back: EACCES (net/core/filter.c, sk_get_filter).
fn filter(fd: BorrowedFd<'_>, label: &str) -> Result<Vec<Instruction>> {
    let mut program: Vec<libc::sock_filter> = Vec::new();
    for room in [false, true] {
        let mut length = program.len() as libc::socklen_t;
        let to = if room { program.as_mut_ptr() } else { std::ptr::null_mut() };
        // SAFETY: the kernel writes at most `length` instructions.
        let result = unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_GET_FILTER,
                to.cast(),
                std::ptr::from_mut(&mut length),
            )
        };
        match (result, io::Error::last_os_error()) {
            (0, _) if length == 0 => return Ok(Vec::new()),
            // BPF_MAXINSNS
            (0, _) => {
                let none = libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 };
                program.resize((length as usize).min(4096), none);
            }
            (_, error) if error.raw_os_error() == Some(libc::EACCES) => {
                let why = "an eBPF program is attached, which cannot be read back";
                return Err(HookError::unsupported(
                    label,
                    why,
                    "let the program detach it (SO_DETACH_FILTER)",
                ));
            }
            (_, error) => return Err(HookError::failed("SO_GET_FILTER", error)),
        }
    }
    let instruction =
        |i: &libc::sock_filter| Instruction { code: i.code.into(), jt: i.jt.into(), jf: i.jf.into(), k: i.k };
    Ok(program.iter().map(instruction).collect())
}

fn attach(fd: BorrowedFd<'_>, filter: &[Instruction]) -> Result<()> {
    let whole = |i: &Instruction| {
        Some(libc::sock_filter {
            code: i.code.try_into().ok()?,
            jt: i.jt.try_into().ok()?,
            jf: i.jf.try_into().ok()?,
            k: i.k,
        })
    };
    let bad = || HookError::invalid("the image's packet filter is no filter");
    let mut program = filter.iter().map(whole).collect::<Option<Vec<_>>>().ok_or_else(bad)?;
    let length = program.len().try_into().map_err(|_| bad())?;
    let filter = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: sock_fprog is plain data of that size.
    let bytes =
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(&filter).cast::<u8>(), size_of_val(&filter)) };
    sys::set_option(fd, libc::SO_ATTACH_FILTER, bytes)
        .map_err(|error| HookError::failed("attaching a packet filter", error))
}

/// Puts back what differs from what the socket has; the filter last, since it can be locked.
pub(crate) fn write(fd: BorrowedFd<'_>, end: &End) -> Result<()> {
    for &(option, label, size) in OPTIONS {
        let Some(wanted) = end.options.iter().find(|saved| saved.name == option) else { continue };
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
    if !end.filter.is_empty() {
        attach(fd, &end.filter)?;
    }
    if end.filter_locked {
        sys::set_option(fd, SO_LOCK_FILTER, &1i32.to_ne_bytes())
            .map_err(|error| HookError::failed("setting SO_LOCK_FILTER", error))?;
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
        let saved = ask(a.as_fd()).unwrap();
        let (b, _peer) = UnixStream::pair().unwrap();
        assert_ne!(ask(b.as_fd()).unwrap(), saved);
        write(b.as_fd(), &saved).unwrap();
        assert_eq!(ask(b.as_fd()).unwrap(), saved);
        assert_eq!(sys::get_int(b.as_fd(), libc::SO_SNDBUF).unwrap(), 100_000);
    }

    fn ask(fd: BorrowedFd<'_>) -> Result<End> {
        let mut end = End::default();
        read(fd, &mut end, "socket:[1]").map(|()| end)
    }

    #[test]
    fn filters_are_put_back_and_locked() {
        let (a, _peer) = UnixStream::pair().unwrap();
        let filter = vec![
            Instruction { code: 0x80, jt: 0, jf: 0, k: 0 }, // length of the packet
            Instruction { code: 0x16, jt: 0, jf: 0, k: 0 }, // accept as much
        ];
        attach(a.as_fd(), &filter).unwrap();
        sys::set_option(a.as_fd(), SO_LOCK_FILTER, &1i32.to_ne_bytes()).unwrap();
        let saved = ask(a.as_fd()).unwrap();
        assert_eq!((&saved.filter, saved.filter_locked), (&filter, true));
        let (b, _peer) = UnixStream::pair().unwrap();
        write(b.as_fd(), &saved).unwrap();
        assert_eq!(ask(b.as_fd()).unwrap(), saved);
    }
}
