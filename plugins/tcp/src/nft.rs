//! The part of nf_tables that the network lock needs, as netlink messages: linux/netfilter/nf_tables.h, nfnetlink.h.

use stasis_plugin_api::socket::{self, inject};
use std::{
    io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

const NETLINK_NETFILTER: i32 = 12;
const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const NEW_TABLE: u16 = SUBSYSTEM;
const DELETE_TABLE: u16 = SUBSYSTEM | 2;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const NEW_SET: u16 = SUBSYSTEM | 9;
const NEW_ELEMENTS: u16 = SUBSYSTEM | 12;
const NFPROTO_INET: u8 = 1;
/// The table goes with the netlink socket that made it.
const OWNER: u32 = 2;
/// Before connection tracking, and whatever else the user has.
const PRIORITY: i32 = -390;
/// Hooks of the inet family, and the names of our chains there.
const CHAINS: [(&str, u32); 2] = [("input", 1), ("output", 3)];
/// So that a message stays well below 64 KiB, the limit of an attribute.
const ELEMENTS_AT_ONCE: usize = 500;

/// Where an address is in the IP header, and how large it is.
struct Family {
    set: &'static str,
    protocol: u8,
    source: u32,
    destination: u32,
    size: u32,
}

const FAMILIES: [Family; 2] = [
    Family { set: "v4", protocol: 2, source: 12, destination: 16, size: 4 },
    Family { set: "v6", protocol: 10, source: 8, destination: 24, size: 16 },
];

/// A socket to nf_tables, in the network namespace of the calling thread.
pub(crate) fn open() -> io::Result<OwnedFd> {
    let fd = socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_NETFILTER)?;
    // One message must hold a batch for ten thousand connections. Inside a user namespace there is less room.
    let room = [
        (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, 64 << 20),
        (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, 16 << 20),
    ];
    for (force, ask, bytes) in room {
        let set = |name| socket::set_int(fd.as_fd(), libc::SOL_SOCKET, name, bytes);
        set(force).or_else(|_| set(ask))?;
    }
    Ok(fd)
}

/// A table that drops all packets of these connections, in both directions, but injected ones. If `owned`, it goes with
/// the socket over which the batch is sent.
pub(crate) fn lock(table: &str, connections: &[inject::Path], owned: bool) -> Vec<u8> {
    let mut batch = Batch::new();
    let name = text(1, table);
    let flags = word(2, if owned { OWNER } else { 0 });
    batch.message(NEW_TABLE, &[name.clone(), flags]);
    for (chain, hook) in CHAINS {
        let place = nest(4, &[word(1, hook), word(2, PRIORITY as u32)]);
        batch.message(NEW_CHAIN, &[name.clone(), text(3, chain), place, text(7, "filter")]);
    }
    for (number, family) in FAMILIES.iter().enumerate() {
        let set = [
            name.clone(),
            text(2, family.set),
            word(3, 0),
            word(4, 0),
            word(5, 2 * (family.size + 4)),
            word(10, number as u32 + 1),
        ];
        batch.message(NEW_SET, &set);
        let keys: Vec<Vec<u8>> = connections.iter().filter_map(|path| key(path, family)).collect();
        for keys in keys.chunks(ELEMENTS_AT_ONCE) {
            let element = |key: &Vec<u8>| nest(1, &[nest(1, &[attribute(1, key)])]);
            let elements: Vec<Vec<u8>> = keys.iter().map(element).collect();
            batch.message(NEW_ELEMENTS, &[name.clone(), text(2, family.set), nest(3, &elements)]);
        }
        for (chain, _) in CHAINS {
            batch.message(NEW_RULE, &[name.clone(), text(2, chain), nest(4, &rule(family))]);
        }
    }
    batch.finish()
}

/// Removes a table.
pub(crate) fn unlock(table: &str) -> Vec<u8> {
    let mut batch = Batch::new();
    batch.message(DELETE_TABLE, &[text(1, table)]);
    batch.finish()
}

/// Source, source port, destination, destination port, each filled up to whole registers.
fn key(path: &inject::Path, family: &Family) -> Option<Vec<u8>> {
    let mut key = Vec::with_capacity(40);
    for (host, port) in [path.from, path.to] {
        match host {
            IpAddr::V4(host) if family.size == 4 => key.extend(host.octets()),
            IpAddr::V6(host) if family.size == 16 => key.extend(host.octets()),
            _ => return None,
        }
        key.extend(port.to_be_bytes());
        key.extend([0; 2]);
    }
    Some(key)
}

/// nfproto and l4proto fit, the packet is not an injected one, and its ends are in the set: drop.
fn rule(family: &Family) -> Vec<Vec<u8>> {
    let first = 8; // NFT_REG32_00
    let words = family.size / 4;
    let meta = |key: u32| expression("meta", &[word(1, first), word(2, key)]);
    let compare = |operation: u32, value: &[u8]| {
        expression("cmp", &[word(1, first), word(2, operation), nest(3, &[attribute(1, value)])])
    };
    let payload = |register: u32, base: u32, offset: u32, length: u32| {
        expression("payload", &[word(1, register), word(2, base), word(3, offset), word(4, length)])
    };
    vec![
        meta(15),
        compare(0, &[family.protocol]),
        meta(16),
        compare(0, &[libc::IPPROTO_TCP as u8]),
        meta(3),
        compare(1, &inject::MARK.to_ne_bytes()),
        payload(first, 1, family.source, family.size),
        payload(first + words, 2, 0, 2),
        payload(first + words + 1, 1, family.destination, family.size),
        payload(first + 2 * words + 1, 2, 2, 2),
        expression("lookup", &[text(1, family.set), word(2, first)]),
        expression("immediate", &[word(1, 0), nest(2, &[nest(2, &[word(1, 0)])])]),
    ]
}

fn expression(name: &str, data: &[Vec<u8>]) -> Vec<u8> {
    nest(1, &[text(1, name), nest(2, data)])
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = ((value.len() + 4) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn text(kind: u16, value: &str) -> Vec<u8> {
    attribute(kind, &[value.as_bytes(), &[0]].concat())
}

fn word(kind: u16, value: u32) -> Vec<u8> {
    attribute(kind, &value.to_be_bytes())
}

/// NLA_F_NESTED is the highest bit.
fn nest(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | 0x8000, &parts.concat())
}

struct Batch {
    bytes: Vec<u8>,
    sequence: u32,
}

impl Batch {
    fn new() -> Self {
        let mut batch = Self { bytes: Vec::new(), sequence: 0 };
        batch.append(BATCH_BEGIN, 0, [0, 0, 0, 10], &[]);
        batch
    }

    fn message(&mut self, kind: u16, parts: &[Vec<u8>]) {
        let creates = match kind {
            DELETE_TABLE => 0,
            // Nobody adds to a table that is there already.
            NEW_TABLE => libc::NLM_F_CREATE | libc::NLM_F_EXCL,
            _ => libc::NLM_F_CREATE,
        };
        self.append(kind, libc::NLM_F_ACK | creates, [NFPROTO_INET, 0, 0, 0], &parts.concat());
    }

    /// `nlmsghdr`, `nfgenmsg`, attributes.
    fn append(&mut self, kind: u16, flags: i32, header: [u8; 4], body: &[u8]) {
        self.sequence += 1;
        self.bytes.extend(((20 + body.len()) as u32).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((flags as u16 | libc::NLM_F_REQUEST as u16).to_ne_bytes());
        self.bytes.extend(self.sequence.to_ne_bytes());
        self.bytes.extend(0u32.to_ne_bytes());
        self.bytes.extend(header);
        self.bytes.extend(body);
    }

    fn finish(mut self) -> Vec<u8> {
        self.append(BATCH_END, 0, [0, 0, 0, 10], &[]);
        self.bytes
    }
}

/// Sends a batch; the kernel carries it out whole or not at all, and has answered when the call returns.
pub(crate) fn send(netlink: &OwnedFd, batch: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads the slice.
    let sent = unsafe { libc::send(netlink.as_raw_fd(), batch.as_ptr().cast(), batch.len(), 0) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut answered = false;
    let mut answer = vec![0u8; 1 << 16];
    loop {
        let place = answer.as_mut_ptr().cast();
        // SAFETY: the kernel writes at most the vector's length.
        let length = unsafe { libc::recv(netlink.as_raw_fd(), place, answer.len(), libc::MSG_DONTWAIT) };
        if length < 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock if answered => Ok(()),
                _ => Err(error),
            };
        }
        answered = true;
        if let Some(errno) = first_error(&answer[..length as usize]) {
            return Err(io::Error::from_raw_os_error(errno));
        }
    }
}

/// The first errno in a series of `nlmsgerr` that is not 0.
fn first_error(mut answer: &[u8]) -> std::option::Option<i32> {
    loop {
        let length = u32::from_ne_bytes(*answer.first_chunk()?) as usize;
        let error = i32::from_ne_bytes(answer.get(16..20)?.try_into().ok()?);
        if answer.get(4..6)? == 2u16.to_ne_bytes() && error != 0 {
            return Some(-error);
        }
        answer = answer.get(length.next_multiple_of(4).max(16)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_plugin_api::socket::inject::Path;
    use std::{
        io::{ErrorKind, Read, Write},
        net::{TcpListener, TcpStream},
        time::Duration,
    };

    /// Messages of a batch: kind and length.
    fn messages(mut batch: &[u8]) -> Vec<(u16, usize)> {
        let mut found = Vec::new();
        while let Some(head) = batch.first_chunk::<8>() {
            let length = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
            found.push((u16::from_ne_bytes([head[4], head[5]]), length));
            batch = &batch[length..];
        }
        assert!(batch.is_empty(), "{} bytes behind the last message", batch.len());
        found
    }

    #[test]
    fn batches_are_whole_and_attributes_stay_below_their_limit() {
        let path = |port| Path { from: ([127, 0, 0, 1].into(), port), to: ([127, 0, 0, 1].into(), 9) };
        let paths: Vec<Path> = (0..20_000).map(path).collect();
        let batch = lock("stasis-0", &paths, true);
        let kinds = messages(&batch);
        assert_eq!((kinds[0].0, kinds[kinds.len() - 1].0), (BATCH_BEGIN, BATCH_END));
        assert_eq!(kinds.iter().filter(|(kind, _)| *kind == NEW_ELEMENTS).count(), 40);
        assert!(kinds.iter().all(|(_, length)| *length < 1 << 16));
        assert_eq!(messages(&unlock("stasis-0")).len(), 3);
    }

    #[test]
    fn the_first_error_of_an_answer_is_found() {
        let answer = |kind: u16, error: i32| {
            let mut bytes = 20u32.to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend(error.to_ne_bytes());
            bytes
        };
        assert_eq!(first_error(&[answer(2, 0), answer(2, -libc::EPERM)].concat()), Some(libc::EPERM));
        assert_eq!(first_error(&[answer(2, 0), answer(3, -1)].concat()), None);
        assert_eq!(first_error(&[1, 2, 3]), None);
    }

    /// A net namespace of this thread's own, with a loopback device that is up.
    fn enter_namespace() -> bool {
        // SAFETY: changes this thread alone.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return false;
        }
        let Ok(socket) = socket::socket(libc::AF_INET, libc::SOCK_DGRAM, 0) else { return false };
        // SAFETY: zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        (request.ifr_name[0], request.ifr_name[1]) = (b'l' as libc::c_char, b'o' as libc::c_char);
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        // SAFETY: the kernel reads one ifreq.
        unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) == 0 }
    }

    fn passes(from: &mut TcpStream, to: &mut TcpStream) -> bool {
        from.write_all(b"x").unwrap();
        match to.read(&mut [0]) {
            Ok(length) => length == 1,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                false
            }
        }
    }

    #[test]
    fn a_lock_holds_for_its_connections_alone_and_goes_with_its_owner() {
        let play = || {
            if !enter_namespace() {
                eprintln!("skipped: needs CAP_NET_ADMIN");
                return;
            }
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let pair = || {
                let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                let other = listener.accept().unwrap().0;
                other.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
                (one, other)
            };
            let (mut one, mut other) = pair();
            let (mut free, mut free_peer) = pair();
            assert!(passes(&mut one, &mut other));
            let here = |address: std::net::SocketAddr| (address.ip(), address.port());
            let (local, peer) = (here(one.local_addr().unwrap()), here(one.peer_addr().unwrap()));
            let paths = [Path { from: local, to: peer }, Path { from: peer, to: local }];
            let owner = open().unwrap();
            send(&owner, &lock("stasis-1", &paths, true)).unwrap();
            assert!(!passes(&mut one, &mut other));
            assert!(passes(&mut free, &mut free_peer));
            // One that stays, beside it.
            let netlink = open().unwrap();
            send(&netlink, &lock("stasis-2", &paths, false)).unwrap();
            drop(owner);
            assert!(!passes(&mut one, &mut other));
            drop(netlink);
            assert!(!passes(&mut one, &mut other));
            let netlink = open().unwrap();
            send(&netlink, &unlock("stasis-2")).unwrap();
            other.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            // What was held back is sent once more.
            other.read_exact(&mut [0; 3]).unwrap();
            let gone = send(&netlink, &unlock("stasis-2")).unwrap_err();
            assert_eq!(gone.raw_os_error(), Some(libc::ENOENT));
        };
        std::thread::spawn(play).join().unwrap();
    }
}
