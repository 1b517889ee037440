//! Netlink sockets: bound to a port of their own and of the kernel's choice, with groups, options and filters, and with nothing.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use libc::SOL_SOCKET;

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::net;
use crate::sys::{self, cvt, cvt_long};

const SOL_NETLINK: i32 = 270;
const ADD_MEMBERSHIP: i32 = 1;
const LIST_MEMBERSHIPS: i32 = 9;
const EXT_ACK: i32 = 11;

fn open(kind: i32, protocol: i32) -> Outcome<OwnedFd> {
    Ok(net::socket(libc::AF_NETLINK, kind, protocol)?)
}

fn bind(fd: &OwnedFd, port: u32) -> Outcome {
    // SAFETY: zeros are valid.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    (address.nl_family, address.nl_pid) = (libc::AF_NETLINK as u16, port);
    // SAFETY: the kernel reads one address.
    cvt(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32) })?;
    Ok(())
}

/// Its port id.
fn port(fd: impl AsFd) -> Outcome<u32> {
    // SAFETY: zeros are valid.
    let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&address) as u32;
    // SAFETY: the kernel writes at most `length` bytes.
    cvt(unsafe { libc::getsockname(fd.as_fd().as_raw_fd(), (&raw mut address).cast(), &raw mut length) })?;
    Ok(address.nl_pid)
}

fn groups(fd: impl AsFd) -> Outcome<u32> {
    Ok(net::get(fd, SOL_NETLINK, LIST_MEMBERSHIPS)?.cast_unsigned())
}

/// Asks for all links, and reads the answer: its first message's kind.
fn links(fd: &OwnedFd) -> Outcome<u16> {
    let mut request = 32u32.to_ne_bytes().to_vec();
    request.extend(18u16.to_ne_bytes());
    request.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    request.resize(32, 0);
    // SAFETY: the kernel reads the vector.
    cvt_long(unsafe { libc::send(fd.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) } as i64)?;
    let answer = sys::read(fd, 1 << 16)?;
    // The end of the list may be a message of its own.
    while sys::readiness(fd, libc::POLLIN)? != 0 {
        sys::read(fd, 1 << 16)?;
    }
    Ok(u16::from_ne_bytes([answer[4], answer[5]]))
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let route = open(libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
    bind(&route, 0)?;
    let chosen = open(libc::SOCK_DGRAM, libc::NETLINK_ROUTE)?;
    bind(&chosen, 3_000_000_000)?;
    net::set(&chosen, SOL_NETLINK, EXT_ACK, 1)?;
    net::set(&chosen, SOL_SOCKET, libc::SO_RCVBUF, 50_000)?;
    // Links and IPv4 addresses.
    net::set(&chosen, SOL_NETLINK, ADD_MEMBERSHIP, 1)?;
    net::set(&chosen, SOL_NETLINK, ADD_MEMBERSHIP, 5)?;
    let events = open(libc::SOCK_DGRAM | libc::SOCK_NONBLOCK, libc::NETLINK_KOBJECT_UEVENT)?;
    bind(&events, 0)?;
    let generic = open(libc::SOCK_RAW, libc::NETLINK_GENERIC)?;
    let diag = open(libc::SOCK_RAW, libc::NETLINK_SOCK_DIAG)?;
    same("links", links(&route)?, 16)?;
    let all = [&route, &chosen, &events, &generic, &diag];
    let state = || -> Outcome<Vec<(u32, u32)>> {
        all.iter().map(|fd| Ok((port(fd)?, groups(fd)?))).collect()
    };
    let before = state()?;
    ensure(before[0].0 != 0 && before[1] == (3_000_000_000, 0b1_0001) && before[3] == (0, 0), "the setup is wrong")?;

    if ctl.wait()? {
        net::set(&route, SOL_NETLINK, ADD_MEMBERSHIP, 1)?;
    }

    same("ports and groups", state()?, before)?;
    same("option", net::get(&chosen, SOL_NETLINK, EXT_ACK)?, 1)?;
    same("buffer", net::get(&chosen, SOL_SOCKET, libc::SO_RCVBUF)?, 100_000)?;
    for fd in all {
        ensure(sys::readiness(fd, libc::POLLIN)? == 0, "something was heard of the restore")?;
    }
    same("links", links(&route)?, 16)?;
    same("links", links(&chosen)?, 16)
}
