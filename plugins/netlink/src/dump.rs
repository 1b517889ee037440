//! From a live socket to a record.

use crate::{
    OPTIONS, PROTOCOLS, SOL_NETLINK,
    record::stasis::netlink::v1::{Option as Saved, Socket},
};
use stasis_plugin_api::{
    Dumped, HookError, Host, ObjectInfo, Result,
    socket::{self, filter, options},
};
use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

const NETLINK_LIST_MEMBERSHIPS: i32 = 9;
/// Bytes of the longest bitmap of groups: no family of the kernel has more.
const BITMAP: usize = 4096;

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}

fn protocol(fd: BorrowedFd<'_>) -> Result<i32> {
    socket::get_int(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL).map_err(failed("SO_PROTOCOL"))
}

/// What a socket's protocol is called.
pub(crate) fn name_of(fd: BorrowedFd<'_>) -> &'static str {
    let number = protocol(fd).unwrap_or(-1);
    PROTOCOLS.iter().find(|protocol| protocol.number == number).map_or("netlink", |protocol| protocol.name)
}

/// Refuses sockets on which something in the kernel depends.
pub(crate) fn refuse_protocol(fd: BorrowedFd<'_>, label: &str) -> Result<()> {
    let number = protocol(fd)?;
    let (name, why) = match PROTOCOLS.iter().find(|protocol| protocol.number == number) {
        Some(known) => match known.refused {
            Some(why) => (known.name.to_owned(), why),
            None => return Ok(()),
        },
        None => (format!("protocol {number} of netlink"), "it is not known"),
    };
    let remedy = "let the program close it, and open it again afterwards";
    Err(HookError::unsupported(label, format!("it is of {name}: {why}"), remedy))
}

pub(crate) fn dump(host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Socket>> {
    let label = object.description.as_str();
    let (owned, _) = socket::open(host, object)?;
    let fd = owned.as_fd();
    let state = socket::poll(fd, libc::POLLIN).map_err(failed("poll"))?;
    if state & libc::POLLERR != 0 {
        let why = "an error waits to be read from it (messages were lost, ENOBUFS)";
        return Err(HookError::unsupported(label, why, "let the program read the error first"));
    }
    if state & libc::POLLIN != 0 {
        let why = "messages wait to be read from it, which nobody but the kernel could send again";
        return Err(HookError::unsupported(label, why, "let the program read them first"));
    }
    let saved = options::read(fd, &[options::SOCKET, OPTIONS])?;
    let option = |o: options::Saved| Saved { level: o.level, name: o.name, value: o.value };
    let local = socket::local_address(fd).map_err(failed("getsockname"))?;
    let peer = socket::peer_address(fd).map_err(failed("getpeername"))?.unwrap_or_default();
    Ok(Dumped::new(Socket {
        kind: socket::get_int(fd, libc::SOL_SOCKET, libc::SO_TYPE).map_err(failed("SO_TYPE"))?,
        protocol: protocol(fd)?,
        port: word(&local, 4),
        groups: groups(fd)?,
        peer: if word(&peer, 4) == 0 && word(&peer, 8) == 0 { Vec::new() } else { peer },
        options: saved.into_iter().map(option).collect(),
        filter: filter::read(fd, label)?,
        filter_locked: filter::is_locked(fd),
    }))
}

/// Of a `sockaddr_nl`: the port id is at 4, the mask of groups at 8.
fn word(address: &[u8], at: usize) -> u32 {
    address.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

/// The groups that a socket has joined.
pub(crate) fn groups(fd: BorrowedFd<'_>) -> Result<Vec<u32>> {
    let bitmap = socket::get_option(fd, SOL_NETLINK, NETLINK_LIST_MEMBERSHIPS, BITMAP);
    Ok(of_bitmap(&bitmap.map_err(failed("NETLINK_LIST_MEMBERSHIPS"))?))
}

/// Bit n of the words of 32 bits is group n + 1.
pub(crate) fn of_bitmap(bitmap: &[u8]) -> Vec<u32> {
    let words = bitmap.as_chunks::<4>().0.iter().map(|word| u32::from_ne_bytes(*word));
    let mut groups = Vec::new();
    for (index, word) in (0..).zip(words) {
        groups.extend((0..32).filter(|bit| word & 1 << bit != 0).map(|bit| index * 32 + bit + 1));
    }
    groups
}
