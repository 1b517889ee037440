//! Packets that arrive at a restored socket as if its peer had sent them, by way of the loopback device: datagrams that
//! were in its queue, and the segments that bring a TCP connection where it was.

use super::{family, host, port, set_int, socket};
use crate::{HookError, Result};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

/// The mark of injected packets, by which a network lock lets them pass.
pub const MARK: u32 = 0x5741_5315;

/// From where to where a packet goes.
#[derive(Debug, Clone, Copy)]
pub struct Path {
    /// Host and port of the sender.
    pub from: (IpAddr, u16),
    /// Host and port of the receiver, an address of this machine.
    pub to: (IpAddr, u16),
}

impl Path {
    /// Between two internet `sockaddr`; IPv4 addresses mapped into IPv6 are unpacked.
    pub fn new(from: &[u8], to: &[u8]) -> Option<Self> {
        let end = |address: &[u8]| Some((host(address)?.to_canonical(), port(address)));
        Some(Self { from: end(from)?, to: end(to)? })
    }
}

/// The TCP header of a segment without data.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
    /// FIN besides ACK.
    pub fin: bool,
    /// Not scaled.
    pub window: u16,
}

/// Injects a datagram.
pub fn datagram(path: &Path, data: &[u8]) -> Result<()> {
    let length = u16::try_from(8 + data.len()).map_err(|_| HookError::invalid("a datagram is too long"))?;
    let mut packet = Vec::with_capacity(usize::from(length));
    packet.extend(path.from.1.to_be_bytes());
    packet.extend(path.to.1.to_be_bytes());
    packet.extend(length.to_be_bytes());
    packet.extend([0; 2]);
    packet.extend(data);
    send(path, libc::IPPROTO_UDP as u8, packet, 6)
}

/// Injects a segment.
pub fn segment(path: &Path, segment: &Segment) -> Result<()> {
    let mut packet = Vec::with_capacity(20);
    packet.extend(path.from.1.to_be_bytes());
    packet.extend(path.to.1.to_be_bytes());
    packet.extend(segment.sequence.to_be_bytes());
    packet.extend(segment.acknowledgement.to_be_bytes());
    // Five words of header; ACK, FIN.
    packet.extend([5 << 4, 0x10 | u8::from(segment.fin)]);
    packet.extend(segment.window.to_be_bytes());
    packet.extend([0; 4]);
    send(path, libc::IPPROTO_TCP as u8, packet, 16)
}

/// `checksum` is where in the packet the checksum belongs.
fn send(path: &Path, protocol: u8, mut packet: Vec<u8>, checksum: usize) -> Result<()> {
    let sum = match internet_checksum(&pseudo_header(path, protocol, packet.len()), &packet) {
        // 0 means that there is none (RFC 768).
        0 => 0xffff,
        sum => sum,
    };
    packet[checksum..checksum + 2].copy_from_slice(&sum.to_be_bytes());
    let (whole, to) = match (path.from.0, path.to.0) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (ipv4(from, to, protocol, &packet), address_v4(to)),
        (IpAddr::V6(from), IpAddr::V6(to)) => (ipv6(from, to, protocol, &packet), address_v6(to)),
        (from, to) => return Err(HookError::invalid(format!("a packet from {from} to {to}"))),
    };
    let failed = |error: io::Error| {
        let what = format!("putting back a packet from {} to {}", path.from.0, path.to.0);
        HookError::failed(what, error).remedy("needs CAP_NET_RAW in the network namespace")
    };
    let socket = raw_socket(family(&to)).map_err(failed)?;
    let length = to.len() as libc::socklen_t;
    // SAFETY: the kernel reads both slices.
    let sent = unsafe {
        let data = whole.as_ptr().cast();
        libc::sendto(socket.as_raw_fd(), data, whole.len(), 0, to.as_ptr().cast(), length)
    };
    if sent < 0 { Err(failed(io::Error::last_os_error())) } else { Ok(()) }
}

fn raw_socket(family: i32) -> io::Result<OwnedFd> {
    let socket = socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    set_int(socket.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, MARK as i32)?;
    Ok(socket)
}

fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, packet: &[u8]) -> Vec<u8> {
    let mut whole = Vec::with_capacity(20 + packet.len());
    // The kernel fills in length, identification and checksum (raw(7)).
    whole.extend([0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0]);
    whole.extend(from.octets());
    whole.extend(to.octets());
    whole.extend(packet);
    whole
}

fn ipv6(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, packet: &[u8]) -> Vec<u8> {
    let mut whole = Vec::with_capacity(40 + packet.len());
    whole.extend([0x60, 0, 0, 0]);
    whole.extend((packet.len() as u16).to_be_bytes());
    whole.extend([protocol, 64]);
    whole.extend(from.octets());
    whole.extend(to.octets());
    whole.extend(packet);
    whole
}

fn address_v4(to: Ipv4Addr) -> Vec<u8> {
    let mut address = (libc::AF_INET as u16).to_ne_bytes().to_vec();
    address.extend([0; 2]);
    address.extend(to.octets());
    address.extend([0; 8]);
    address
}

fn address_v6(to: Ipv6Addr) -> Vec<u8> {
    let mut address = (libc::AF_INET6 as u16).to_ne_bytes().to_vec();
    address.extend([0; 6]);
    address.extend(to.octets());
    address.extend([0; 4]);
    address
}

fn pseudo_header(path: &Path, protocol: u8, length: usize) -> Vec<u8> {
    let mut header = Vec::with_capacity(40);
    for (host, _) in [path.from, path.to] {
        match host {
            IpAddr::V4(host) => header.extend(host.octets()),
            IpAddr::V6(host) => header.extend(host.octets()),
        }
    }
    header.extend((length as u32).to_be_bytes());
    header.extend([0, 0, 0, protocol]);
    header
}

/// RFC 1071.
fn internet_checksum(header: &[u8], packet: &[u8]) -> u16 {
    let words = |bytes: &[u8]| -> u64 {
        bytes.chunks(2).map(|word| u64::from(word[0]) << 8 | u64::from(*word.get(1).unwrap_or(&0))).sum()
    };
    let mut sum = words(header) + words(packet);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn a_datagram_arrives_from_a_stranger() {
        for (here, stranger) in [
            ("127.0.0.1:0", "192.0.2.7:4711"),
            ("[::1]:0", "[2001:db8::7]:4711"),
            ("127.0.0.1:0", "127.0.0.9:9"),
        ] {
            let Ok(socket) = UdpSocket::bind(here) else { continue };
            let stranger: std::net::SocketAddr = stranger.parse().unwrap();
            let to = socket.local_addr().unwrap();
            let path = Path { from: (stranger.ip(), stranger.port()), to: (to.ip(), to.port()) };
            for data in [&b"odd"[..], b"", &[7; 60_000]] {
                datagram(&path, data).unwrap();
                let mut buffer = vec![0; 65_536];
                socket.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
                let (length, from) = socket.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..length], from), (data, stranger));
            }
        }
    }

    #[test]
    fn checksum_of_rfc_1071() {
        assert_eq!(internet_checksum(&[], &[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }
}
