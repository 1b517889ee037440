//! Socket options that are kept: tables of (level, name, size), read and put back by one piece of code.

use super::{get_option, set_option};
use crate::{HookError, Result};
use std::{io, os::fd::BorrowedFd};

/// One line of a table: an option and how many bytes its value has at most.
#[derive(Debug, Clone, Copy)]
pub struct Spec {
    /// e.g. `SOL_SOCKET`
    pub level: i32,
    /// Its number.
    pub name: i32,
    /// Its name, for messages.
    pub label: &'static str,
    /// Bytes.
    pub size: usize,
}

/// An option with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// As in [`Spec`].
    pub level: i32,
    /// As in [`Spec`].
    pub name: i32,
    /// As getsockopt(2) gave it.
    pub value: Vec<u8>,
}

macro_rules! table {
    ($(#[$doc:meta])* $name:ident, $level:expr, $($option:expr, $label:literal, $size:literal;)*) => {
        $(#[$doc])*
        pub const $name: &[Spec] =
            &[$(Spec { level: $level, name: $option, label: $label, size: $size }),*];
    };
}

// In the order in which they are put back, these after those of IP: IP_TOS changes SO_PRIORITY. SO_BUF_LOCK says which buffer sizes were set by hand, and setting a size
// changes it, so it is after them. SO_REUSEADDR is put back last (see `REUSE`).
table! {
    /// Options of every socket (asm-generic/socket.h).
    SOCKET, libc::SOL_SOCKET,
    libc::SO_DEBUG, "SO_DEBUG", 4;
    libc::SO_REUSEPORT, "SO_REUSEPORT", 4;
    libc::SO_DONTROUTE, "SO_DONTROUTE", 4;
    libc::SO_BROADCAST, "SO_BROADCAST", 4;
    libc::SO_BINDTODEVICE, "SO_BINDTODEVICE", 16;
    libc::SO_SNDBUF, "SO_SNDBUF", 4;
    libc::SO_RCVBUF, "SO_RCVBUF", 4;
    72, "SO_BUF_LOCK", 4;
    libc::SO_KEEPALIVE, "SO_KEEPALIVE", 4;
    libc::SO_OOBINLINE, "SO_OOBINLINE", 4;
    libc::SO_PRIORITY, "SO_PRIORITY", 4;
    libc::SO_LINGER, "SO_LINGER", 8;
    libc::SO_PASSCRED, "SO_PASSCRED", 4;
    libc::SO_RCVLOWAT, "SO_RCVLOWAT", 4;
    66, "SO_RCVTIMEO_NEW", 16;
    67, "SO_SNDTIMEO_NEW", 16;
    29, "SO_TIMESTAMP_OLD", 4;
    35, "SO_TIMESTAMPNS_OLD", 4;
    63, "SO_TIMESTAMP_NEW", 4;
    64, "SO_TIMESTAMPNS_NEW", 4;
    37, "SO_TIMESTAMPING_OLD", 8;
    34, "SO_PASSSEC", 4;
    libc::SO_MARK, "SO_MARK", 4;
    libc::SO_RXQ_OVFL, "SO_RXQ_OVFL", 4;
    libc::SO_BUSY_POLL, "SO_BUSY_POLL", 4;
    47, "SO_MAX_PACING_RATE", 8;
    60, "SO_ZEROCOPY", 4;
    61, "SO_TXTIME", 8;
    69, "SO_PREFER_BUSY_POLL", 4;
    70, "SO_BUSY_POLL_BUDGET", 4;
    74, "SO_TXREHASH", 4;
    75, "SO_RCVMARK", 4;
    82, "SO_RCVPRIORITY", 4;
    43, "SO_NOFCS", 4;
    45, "SO_SELECT_ERR_QUEUE", 4;
    76, "SO_PASSPIDFD", 4;
    83, "SO_PASSRIGHTS", 4;
    84, "SO_INQ", 4;
    libc::SO_PEEK_OFF, "SO_PEEK_OFF", 4;
}

table! {
    /// What a restored socket has set while others take their ports, and gets back last.
    REUSE, libc::SOL_SOCKET,
    libc::SO_REUSEADDR, "SO_REUSEADDR", 4;
}

table! {
    /// ip(7), linux/in.h. Also for IPv6 sockets, which have them for mapped addresses.
    IPV4, libc::IPPROTO_IP,
    libc::IP_TOS, "IP_TOS", 4;
    libc::IP_TTL, "IP_TTL", 4;
    4, "IP_OPTIONS", 40;
    libc::IP_RECVOPTS, "IP_RECVOPTS", 4;
    libc::IP_RETOPTS, "IP_RETOPTS", 4;
    libc::IP_PKTINFO, "IP_PKTINFO", 4;
    libc::IP_MTU_DISCOVER, "IP_MTU_DISCOVER", 4;
    libc::IP_RECVERR, "IP_RECVERR", 4;
    libc::IP_RECVTTL, "IP_RECVTTL", 4;
    libc::IP_RECVTOS, "IP_RECVTOS", 4;
    libc::IP_FREEBIND, "IP_FREEBIND", 4;
    18, "IP_PASSSEC", 4;
    libc::IP_TRANSPARENT, "IP_TRANSPARENT", 4;
    20, "IP_RECVORIGDSTADDR", 4;
    21, "IP_MINTTL", 4;
    23, "IP_CHECKSUM", 4;
    24, "IP_BIND_ADDRESS_NO_PORT", 4;
    25, "IP_RECVFRAGSIZE", 4;
    26, "IP_RECVERR_RFC4884", 4;
    libc::IP_MULTICAST_IF, "IP_MULTICAST_IF", 4;
    libc::IP_MULTICAST_TTL, "IP_MULTICAST_TTL", 4;
    libc::IP_MULTICAST_LOOP, "IP_MULTICAST_LOOP", 4;
    49, "IP_MULTICAST_ALL", 4;
    50, "IP_UNICAST_IF", 4;
    51, "IP_LOCAL_PORT_RANGE", 4;
}

table! {
    /// ipv6(7), linux/in6.h.
    IPV6, libc::IPPROTO_IPV6,
    libc::IPV6_V6ONLY, "IPV6_V6ONLY", 4;
    libc::IPV6_UNICAST_HOPS, "IPV6_UNICAST_HOPS", 4;
    libc::IPV6_MULTICAST_IF, "IPV6_MULTICAST_IF", 4;
    libc::IPV6_MULTICAST_HOPS, "IPV6_MULTICAST_HOPS", 4;
    libc::IPV6_MULTICAST_LOOP, "IPV6_MULTICAST_LOOP", 4;
    29, "IPV6_MULTICAST_ALL", 4;
    libc::IPV6_MTU_DISCOVER, "IPV6_MTU_DISCOVER", 4;
    libc::IPV6_RECVERR, "IPV6_RECVERR", 4;
    31, "IPV6_RECVERR_RFC4884", 4;
    33, "IPV6_FLOWINFO_SEND", 4;
    libc::IPV6_RECVPKTINFO, "IPV6_RECVPKTINFO", 4;
    libc::IPV6_RECVHOPLIMIT, "IPV6_RECVHOPLIMIT", 4;
    libc::IPV6_RECVHOPOPTS, "IPV6_RECVHOPOPTS", 4;
    libc::IPV6_RECVRTHDR, "IPV6_RECVRTHDR", 4;
    libc::IPV6_RECVDSTOPTS, "IPV6_RECVDSTOPTS", 4;
    60, "IPV6_RECVPATHMTU", 4;
    62, "IPV6_DONTFRAG", 4;
    66, "IPV6_RECVTCLASS", 4;
    67, "IPV6_TCLASS", 4;
    70, "IPV6_AUTOFLOWLABEL", 4;
    72, "IPV6_ADDR_PREFERENCES", 4;
    73, "IPV6_MINHOPCOUNT", 4;
    74, "IPV6_RECVORIGDSTADDR", 4;
    75, "IPV6_TRANSPARENT", 4;
    76, "IPV6_UNICAST_IF", 4;
    77, "IPV6_RECVFRAGSIZE", 4;
    78, "IPV6_FREEBIND", 4;
}

/// What getsockopt(2) says of an option that this kernel or this kind of socket does not have.
const ABSENT: [i32; 4] = [libc::ENOPROTOOPT, libc::EOPNOTSUPP, libc::EINVAL, libc::ENOTCONN];

/// Reads all options of the tables that the socket has.
pub fn read(fd: BorrowedFd<'_>, tables: &[&[Spec]]) -> Result<Vec<Saved>> {
    let mut saved = Vec::new();
    for spec in tables.iter().copied().flatten() {
        match get_option(fd, spec.level, spec.name, spec.size) {
            Ok(value) => saved.push(Saved { level: spec.level, name: spec.name, value }),
            Err(error) if error.raw_os_error().is_some_and(|errno| ABSENT.contains(&errno)) => {}
            Err(error) => return Err(HookError::failed(format!("reading {}", spec.label), error)),
        }
    }
    Ok(saved)
}

/// Puts back what differs from what the socket has, and sees that it took it. What is in no table is ignored.
pub fn write(fd: BorrowedFd<'_>, tables: &[&[Spec]], saved: &[Saved]) -> Result<()> {
    // Saved in the order of the tables, so the search goes on where the last one ended.
    let mut rest = saved;
    for spec in tables.iter().copied().flatten() {
        let is = |saved: &Saved| (saved.level, saved.name) == (spec.level, spec.name);
        let Some(at) = rest.iter().position(is) else { continue };
        let wanted = &rest[at];
        rest = &rest[at + 1..];
        put(fd, spec, &wanted.value)?;
    }
    Ok(())
}

fn put(fd: BorrowedFd<'_>, spec: &Spec, wanted: &[u8]) -> Result<()> {
    let has = || get_option(fd, spec.level, spec.name, spec.size);
    if has().is_ok_and(|value| value == wanted) {
        return Ok(());
    }
    let failed = |error| HookError::failed(format!("setting {}", spec.label), error);
    let force = match (spec.level, spec.name) {
        (libc::SOL_SOCKET, libc::SO_SNDBUF) => libc::SO_SNDBUFFORCE,
        (libc::SOL_SOCKET, libc::SO_RCVBUF) => libc::SO_RCVBUFFORCE,
        _ => {
            set_option(fd, spec.level, spec.name, wanted).map_err(failed)?;
            let value = has().map_err(failed)?;
            if value == wanted {
                return Ok(());
            }
            let what = format!("{} is {value:?}, did not take the value {wanted:?}", spec.label);
            return Err(HookError::invalid(what));
        }
    };
    set_buffer(fd, spec.name, force, wanted).map_err(failed)
}

/// What is read is twice what is set (socket(7)); what the kernel itself chose may be odd.
fn set_buffer(fd: BorrowedFd<'_>, name: i32, force: i32, value: &[u8]) -> io::Result<()> {
    let value: [u8; 4] = value.try_into().map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let wanted = i32::from_ne_bytes(value);
    let half = (wanted / 2 + wanted % 2).to_ne_bytes();
    set_option(fd, libc::SOL_SOCKET, force, &half)
        .or_else(|_| set_option(fd, libc::SOL_SOCKET, name, &half))?;
    match super::get_int(fd, libc::SOL_SOCKET, name)? {
        has if has >= wanted => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EPERM)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{net::UdpSocket, os::fd::AsFd, time::Duration};

    const ALL: &[&[Spec]] = &[IPV4, IPV6, SOCKET, REUSE];

    #[test]
    fn options_are_put_back() {
        for address in ["127.0.0.1:0", "[::]:0"] {
            let Ok(a) = UdpSocket::bind(address) else { continue };
            a.set_read_timeout(Some(Duration::from_millis(1250))).unwrap();
            a.set_ttl(7).unwrap();
            for (option, value) in
                [(libc::SO_REUSEADDR, 1), (libc::SO_SNDBUF, 50_000), (libc::SO_PEEK_OFF, 7)]
            {
                super::super::set_int(a.as_fd(), libc::SOL_SOCKET, option, value).unwrap();
            }
            let saved = read(a.as_fd(), ALL).unwrap();
            let b = UdpSocket::bind(address).unwrap();
            assert_ne!(read(b.as_fd(), ALL).unwrap(), saved);
            write(b.as_fd(), ALL, &saved).unwrap();
            assert_eq!(read(b.as_fd(), ALL).unwrap(), saved);
        }
    }

    #[test]
    fn a_value_that_is_not_taken_is_an_error() {
        let a = UdpSocket::bind("127.0.0.1:0").unwrap();
        let level = libc::SOL_SOCKET;
        let saved = [Saved { level, name: libc::SO_BINDTODEVICE, value: b"nosuchdevice\0".to_vec() }];
        assert!(write(a.as_fd(), ALL, &saved).unwrap_err().what.contains("SO_BINDTODEVICE"));
    }
}
