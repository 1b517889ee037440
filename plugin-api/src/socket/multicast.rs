//! Multicast memberships. The kernel lists the groups of a namespace, but not those of a socket: so the socket is asked
//! for its filter of every group there is (RFC 3678).

use super::{ip_address, set_option};
use crate::{HookError, Result};
use std::{
    fs,
    net::{IpAddr, Ipv6Addr},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

/// linux/in.h
const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_MSFILTER: i32 = 48;
const MCAST_EXCLUDE: u32 = 0;
/// Size of `sockaddr_storage`, and offsets in `struct group_filter`.
const STORAGE: usize = 128;
const MODE: usize = 8 + STORAGE;
const SOURCES: usize = MODE + 8;
/// net.ipv4.igmp_max_msf is 10 unless somebody raised it.
const MOST_SOURCES: usize = 256;

/// A group that a socket has joined.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// Index of the interface.
    pub interface: u32,
    /// The group.
    pub group: IpAddr,
    /// 1: only from `sources`; 0: from all but them.
    pub mode: u32,
    /// Senders.
    pub sources: Vec<IpAddr>,
}

impl Membership {
    /// Of a record, which has addresses as octets.
    pub fn from_octets(interface: u32, group: &[u8], mode: u32, sources: &[Vec<u8>]) -> Result<Self> {
        let address = |octets: &[u8]| {
            ip_address(octets).ok_or_else(|| HookError::invalid("a membership with an address that is none"))
        };
        let sources = sources.iter().map(|source| address(source)).collect::<Result<_>>()?;
        Ok(Self { interface, group: address(group)?, mode, sources })
    }
}

fn level(group: IpAddr) -> i32 {
    if group.is_ipv4() { libc::IPPROTO_IP } else { libc::IPPROTO_IPV6 }
}

fn storage(address: IpAddr) -> [u8; STORAGE] {
    let mut place = [0; STORAGE];
    match address {
        IpAddr::V4(address) => {
            place[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            place[4..8].copy_from_slice(&address.octets());
        }
        IpAddr::V6(address) => {
            place[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            place[8..24].copy_from_slice(&address.octets());
        }
    }
    place
}

/// The memberships of a socket of the task whose /proc/PID is `proc`.
pub fn read(fd: BorrowedFd<'_>, proc: &OwnedFd, label: &str) -> Result<Vec<Membership>> {
    let mut found = Vec::new();
    for (interface, group) in groups(proc) {
        let mut request = vec![0; SOURCES];
        request[..4].copy_from_slice(&interface.to_ne_bytes());
        request[8..MODE].copy_from_slice(&storage(group));
        request[MODE + 4..SOURCES].copy_from_slice(&(MOST_SOURCES as u32).to_ne_bytes());
        // The length must have room for as many sources as it asks for.
        request.resize(SOURCES + MOST_SOURCES * STORAGE, 0);
        let Ok(answer) = ask(fd, level(group), &mut request) else { continue };
        let word = |at: usize| {
            let bytes = answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u32::from_ne_bytes)
        };
        let count = word(MODE + 4) as usize;
        let places = answer.get(SOURCES..).unwrap_or_default().chunks_exact(STORAGE);
        let sources: Vec<IpAddr> = places.take(count).filter_map(super::host).collect();
        if sources.len() != count {
            return Err(HookError::unsupported(label, format!("its filter for {group} is too long"), ""));
        }
        found.push(Membership { interface, group, mode: word(MODE), sources });
    }
    Ok(found)
}

/// getsockopt(2) with a question in the buffer.
fn ask<'b>(fd: BorrowedFd<'_>, level: i32, buffer: &'b mut [u8]) -> std::io::Result<&'b [u8]> {
    let mut length = buffer.len() as libc::socklen_t;
    let place = buffer.as_mut_ptr().cast();
    // SAFETY: the kernel reads and writes at most `length` bytes of the buffer.
    super::check(unsafe { libc::getsockopt(fd.as_raw_fd(), level, MCAST_MSFILTER, place, &raw mut length) })?;
    Ok(&buffer[..(length as usize).min(buffer.len())])
}

/// Interface and group of all memberships in the namespace of a task (/proc/PID/net/igmp and igmp6).
fn groups(proc: &OwnedFd) -> Vec<(u32, IpAddr)> {
    let text = |name: &str| {
        fs::read_to_string(format!("/proc/self/fd/{}/net/{name}", proc.as_raw_fd())).unwrap_or_default()
    };
    let mut groups = parse_igmp(&text("igmp"));
    groups.extend(parse_igmp6(&text("igmp6")));
    groups
}

fn parse_igmp(text: &str) -> Vec<(u32, IpAddr)> {
    let mut interface = 0;
    let mut groups = Vec::new();
    for line in text.lines().skip(1) {
        let first = line.split_whitespace().next().unwrap_or_default();
        if !line.starts_with(['\t', ' ']) {
            interface = first.parse().unwrap_or(0);
        } else if let Ok(word) = u32::from_str_radix(first, 16) {
            groups.push((interface, IpAddr::from(word.to_ne_bytes())));
        }
    }
    groups
}

fn parse_igmp6(text: &str) -> Vec<(u32, IpAddr)> {
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let (interface, group) = (words.next()?.parse().ok()?, words.nth(1)?);
        let group = u128::from_str_radix(group, 16).ok()?;
        Some((interface, IpAddr::from(Ipv6Addr::from_bits(group))))
    };
    text.lines().filter_map(line).collect()
}

/// Joins the groups again.
pub fn write(fd: BorrowedFd<'_>, memberships: &[Membership]) -> Result<()> {
    for membership in memberships {
        let Membership { interface, group, mode, sources } = membership;
        let failed = |error| HookError::failed(format!("joining {group} on interface {interface}"), error);
        let mut request = vec![0; MODE];
        request[..4].copy_from_slice(&interface.to_ne_bytes());
        request[8..].copy_from_slice(&storage(*group));
        set_option(fd, level(*group), MCAST_JOIN_GROUP, &request).map_err(failed)?;
        if *mode == MCAST_EXCLUDE && sources.is_empty() {
            continue;
        }
        request.extend(mode.to_ne_bytes());
        request.extend((sources.len() as u32).to_ne_bytes());
        request.extend(sources.iter().flat_map(|source| storage(*source)));
        set_option(fd, level(*group), MCAST_MSFILTER, &request).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, net::UdpSocket, os::fd::AsFd};

    #[test]
    fn memberships_are_found_and_put_back() {
        let proc: OwnedFd = File::open("/proc/self").unwrap().into();
        let a = UdpSocket::bind("0.0.0.0:0").unwrap();
        let none = read(a.as_fd(), &proc, "a").unwrap();
        assert_eq!(none, []);
        let wanted = vec![
            Membership { interface: 1, group: "239.1.2.3".parse().unwrap(), mode: 0, sources: vec![] },
            Membership {
                interface: 1,
                group: "239.1.2.4".parse().unwrap(),
                mode: 1,
                sources: vec!["192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap()],
            },
        ];
        write(a.as_fd(), &wanted).unwrap();
        let mut found = read(a.as_fd(), &proc, "a").unwrap();
        found.sort_by_key(|membership| membership.group);
        assert_eq!(found, wanted);
    }

    #[test]
    fn tables_of_the_kernel() {
        let igmp = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n1\tlo        :     2      V3\n\t\t\t\t030201EF     1 0:00000000\t\t0\n";
        assert_eq!(parse_igmp(igmp), [(1, "239.1.2.3".parse().unwrap())]);
        let igmp6 = "1    lo              ff020000000000000000000000000001     1 0000000C 0\n";
        assert_eq!(parse_igmp6(igmp6), [(1, "ff02::1".parse().unwrap())]);
    }
}
