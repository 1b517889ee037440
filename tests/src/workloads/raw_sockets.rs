//! Raw sockets and those for echo requests, over IPv4 and IPv6: addresses, peers, filters, options.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use crate::ctl::{Ctl, Fail, Outcome, ensure, pause, poll_until, same};
use crate::net;
use crate::sys::{self, cvt_long};

const SOL_RAW: i32 = 255;
const ICMP_FILTER: i32 = 1;
/// For experiments (RFC 3692).
const PROTOCOL: i32 = 253;

fn send(fd: &OwnedFd, data: &[u8]) -> Outcome {
    // SAFETY: the kernel reads the slice.
    cvt_long(unsafe { libc::send(fd.as_raw_fd(), data.as_ptr().cast(), data.len(), 0) } as i64)?;
    Ok(())
}

/// An echo request, for the sequence number.
fn ping(fd: &OwnedFd, number: u8) -> Outcome {
    send(fd, &[8, 0, 0, 0, 0, 0, 0, number, b'h', b'i'])?;
    poll_until("the answer comes", || sys::readiness(fd, libc::POLLIN).is_ok_and(|ready| ready != 0))?;
    let answer = sys::read(fd, 99)?;
    same("echo reply", (answer[0], answer[7], &answer[8..]), (0, number, &b"hi"[..]))
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let local: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    let raw = |domain, protocol| net::socket(domain, libc::SOCK_RAW | libc::SOCK_NONBLOCK, protocol);
    let one = raw(libc::AF_INET, PROTOCOL).map_err(|error| Fail::Absent(format!("a raw socket: {error}")))?;
    net::bind(&one, local)?;
    net::connect(&one, local)?;
    let six = raw(libc::AF_INET6, PROTOCOL)?;
    net::set(&six, libc::IPPROTO_IPV6, 7, 4)?;
    let filtered = raw(libc::AF_INET, libc::IPPROTO_ICMP)?;
    // Nothing but redirects.
    net::set(&filtered, SOL_RAW, ICMP_FILTER, !(1 << 5))?;
    let header = raw(libc::AF_INET, libc::IPPROTO_RAW)?;
    // Without privilege, if the machine allows it.
    let _ = std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 1000000");
    let echo = net::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_NONBLOCK, libc::IPPROTO_ICMP).ok();
    if let Some(echo) = &echo {
        net::bind(echo, (Ipv4Addr::LOCALHOST, 4711).into())?;
        net::connect(echo, local)?;
        ping(echo, 1)?;
    }

    if ctl.wait()? {
        net::set(&filtered, SOL_RAW, ICMP_FILTER, 0)?;
    }

    same("filter", net::get(&filtered, SOL_RAW, ICMP_FILTER)?, !(1 << 5))?;
    same("checksum", net::get(&six, libc::IPPROTO_IPV6, 7)?, 4)?;
    same("header", net::get(&header, libc::IPPROTO_IP, libc::IP_HDRINCL)?, 1)?;
    // It still has a peer, and hears itself.
    send(&one, b"to myself")?;
    poll_until("the packet comes", || sys::readiness(&one, libc::POLLIN).is_ok_and(|ready| ready != 0))?;
    ensure(sys::read(&one, 99)?.ends_with(b"to myself"), "another packet came")?;
    if let Some(echo) = &echo {
        ping(echo, 2)?;
    }
    pause(Duration::from_millis(5));
    ensure(sys::readiness(&filtered, libc::POLLIN)? == 0, "the filter lets echoes pass")
}
