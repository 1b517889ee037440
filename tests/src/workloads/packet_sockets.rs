//! Packet sockets: bound to an interface and to all, with memberships, options and a filter; and one that hears nothing.

use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::ctl::{Ctl, Fail, Outcome, ensure, poll_until, same};
use crate::net;
use crate::sys::{self, cvt};

const SOL_PACKET: i32 = 263;
const ADD_MEMBERSHIP: i32 = 1;
const AUXDATA: i32 = 8;
const ETH_P_IP: u16 = 0x800;

fn address(protocol: u16) -> libc::sockaddr_ll {
    // SAFETY: zeros are valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    // The loopback device is the first of every namespace.
    (address.sll_family, address.sll_protocol, address.sll_ifindex) = (libc::AF_PACKET as u16, protocol.to_be(), 1);
    address
}

fn bind(fd: &OwnedFd, protocol: u16) -> Outcome {
    let address = address(protocol);
    // SAFETY: the kernel reads one address.
    cvt(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32) })?;
    Ok(())
}

/// Protocol and interface.
fn bound(fd: impl AsFd) -> Outcome<(u16, i32)> {
    let mut address = address(0);
    let mut length = size_of_val(&address) as u32;
    // SAFETY: the kernel writes at most `length` bytes.
    cvt(unsafe { libc::getsockname(fd.as_fd().as_raw_fd(), (&raw mut address).cast(), &raw mut length) })?;
    Ok((u16::from_be(address.sll_protocol), address.sll_ifindex))
}

/// The column of memberships and the like in /proc/net/packet: those of all our sockets.
fn listed() -> Outcome<Vec<String>> {
    let text = std::fs::read_to_string("/proc/net/packet")?;
    // Type, protocol, interface, running.
    let mut lines: Vec<String> = text
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().skip(2).take(4).collect::<Vec<_>>().join(" "))
        .collect();
    lines.sort();
    Ok(lines)
}

/// Sends a datagram through the loopback device, and waits until the socket has heard of it.
fn hears(fd: &OwnedFd) -> Outcome {
    let (one, other) = (UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?);
    one.send_to(b"through the wire", other.local_addr()?)?;
    poll_until("a frame is heard", || sys::readiness(fd, libc::POLLIN).is_ok_and(|ready| ready != 0))?;
    ensure(sys::read(fd, 999)?.ends_with(b"through the wire"), "another frame came")?;
    // Once going out and once coming in.
    while sys::readiness(fd, libc::POLLIN)? != 0 {
        sys::read(fd, 999)?;
    }
    Ok(())
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let open = |kind| net::socket(libc::AF_PACKET, kind | libc::SOCK_NONBLOCK, 0);
    let raw = open(libc::SOCK_RAW).map_err(|error| Fail::Absent(format!("a packet socket: {error}")))?;
    let cooked = open(libc::SOCK_DGRAM)?;
    let deaf = open(libc::SOCK_RAW)?;
    net::set(&raw, SOL_PACKET, AUXDATA, 1)?;
    net::set(&deaf, libc::SOL_SOCKET, libc::SO_RCVBUF, 40_000)?;
    // struct packet_mreq: index, PACKET_MR_ALLMULTI, no address.
    let mut request = 1i32.to_ne_bytes().to_vec();
    request.extend(2u16.to_ne_bytes());
    request.resize(16, 0);
    net::set_bytes(&deaf, SOL_PACKET, ADD_MEMBERSHIP, &request)?;
    bind(&raw, ETH_P_IP)?;
    bind(&cooked, ETH_P_IP)?;
    for fd in [&raw, &cooked] {
        hears(fd)?;
    }
    // Each heard what the other one's look sent, too.
    while sys::readiness(&raw, libc::POLLIN)? != 0 {
        sys::read(&raw, 999)?;
    }
    let before = (listed()?, bound(&raw)?, bound(&cooked)?, bound(&deaf)?);

    if ctl.wait()? {
        bind(&deaf, ETH_P_IP)?;
    }

    same("packet sockets", (listed()?, bound(&raw)?, bound(&cooked)?, bound(&deaf)?), before)?;
    same("auxiliary data", net::get(&raw, SOL_PACKET, AUXDATA)?, 1)?;
    same("buffer", net::get(&deaf, libc::SOL_SOCKET, libc::SO_RCVBUF)?, 80_000)?;
    for fd in [&raw, &cooked] {
        while sys::readiness(fd, libc::POLLIN)? != 0 {
            sys::read(fd, 999)?;
        }
        hears(fd)?;
    }
    same("what the deaf one hears", sys::readiness(&deaf, libc::POLLIN)?, 0)
}
