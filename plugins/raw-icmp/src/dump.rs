//! From a live socket to a record.

use crate::{
    record::stasis::rawicmp::v1::{self, Option as Saved, Socket},
    tables,
};
use stasis_plugin_api::{
    Dumped, HookError, Host, ObjectInfo, Result,
    socket::{self, filter, multicast, options},
};
use std::{
    fs, io,
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

/// Files below /proc/PID/net that list such sockets.
const TABLES: [&str; 4] = ["raw", "raw6", "icmp", "icmp6"];
/// In those tables: connected (TCP_ESTABLISHED in net/tcp_states.h).
const CONNECTED: u32 = 1;

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}

pub(crate) fn dump(host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Socket>> {
    let handle = socket::only_handle(object)?;
    let label = object.description.as_str();
    let (owned, proc) = socket::open(host, object)?;
    let fd = owned.as_fd();
    let refuse = |why: &str, remedy: &str| Err(HookError::unsupported(label, why, remedy));
    let state = socket::poll(fd, libc::POLLIN | libc::POLLRDHUP).map_err(failed("poll"))?;
    if state & libc::POLLERR != 0 {
        return refuse("an error waits to be read from it", "let the program read the error first");
    }
    let ended = state & (libc::POLLRDHUP | libc::POLLHUP) != 0;
    if state & libc::POLLIN != 0 && !ended {
        let why = "packets wait to be read from it, of which only the first could be seen";
        return refuse(why, "let the program read them first");
    }
    let number = |name| socket::get_int(fd, libc::SOL_SOCKET, name).map_err(failed("a socket option"));
    let (domain, kind) = (number(libc::SO_DOMAIN)?, number(libc::SO_TYPE)?);
    let protocol = number(libc::SO_PROTOCOL)?;
    if kind == libc::SOCK_RAW && [libc::IPPROTO_IGMP, libc::IPPROTO_ICMPV6].contains(&protocol) {
        refuse_router(&proc, label)?;
    }
    let saved = options::read(fd, tables(domain))?;
    let option = |o: options::Saved| Saved { level: o.level, name: o.name, value: o.value };
    let memberships = multicast::read(fd, &proc, label)?;
    Ok(Dumped::new(Socket {
        domain,
        kind,
        protocol,
        local: socket::local_address(fd).map_err(failed("getsockname"))?,
        peer: peer(&proc, handle.ino),
        options: saved.into_iter().map(option).collect(),
        filter: filter::read(fd, label)?,
        filter_locked: filter::is_locked(fd),
        memberships: memberships.into_iter().map(membership).collect(),
        shutdown: if state & libc::POLLHUP != 0 { 3 } else { u32::from(ended) },
    }))
}

/// Interfaces of a multicast router belong to its socket (MRT_INIT, linux/mroute.h).
fn refuse_router(proc: &OwnedFd, label: &str) -> Result<()> {
    for name in ["ip_mr_vif", "ip6_mr_vif"] {
        let text = fs::read_to_string(format!("/proc/self/fd/{}/net/{name}", proc.as_raw_fd()));
        if text.is_ok_and(|text| text.lines().count() > 1) {
            let why = "its net namespace routes multicasts, perhaps by this socket";
            return Err(HookError::unsupported(label, why, "stop the multicast router first"));
        }
    }
    Ok(())
}

/// Whom it is connected to: getpeername(2) wants a port, which such peers rarely have.
fn peer(proc: &OwnedFd, ino: u64) -> Vec<u8> {
    let entries = TABLES.iter().find_map(|name| {
        let text = fs::read_to_string(format!("/proc/self/fd/{}/net/{name}", proc.as_raw_fd())).ok()?;
        socket::table_entry(&text, ino)
    });
    entries.filter(|entry| entry.state == CONNECTED).map(|entry| entry.remote).unwrap_or_default()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn membership(found: multicast::Membership) -> v1::Membership {
    v1::Membership {
        interface: found.interface,
        group: octets(found.group),
        mode: found.mode,
        sources: found.sources.into_iter().map(octets).collect(),
    }
}
