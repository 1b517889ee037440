//! From a record to a live socket.

use crate::{
    dump::blob,
    record::stasis::udp::v1::{self, Socket},
    tables,
};
use stasis_plugin_api::{
    HookError, Host, ObjectInfo, Result,
    socket::{
        self, filter, inject,
        multicast::{self, Membership},
        options::{self, REUSE, Saved},
    },
};
use std::{
    io::Read,
    net::IpAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

/// How long a datagram may take through the loopback device.
const ARRIVAL_TIME: Duration = Duration::from_secs(5);
/// Room for a queue while it is filled.
const WIDE: i32 = 256 << 20;

fn saved(record: &Socket) -> Vec<Saved> {
    let one = |o: &v1::Option| Saved { level: o.level, name: o.name, value: o.value.clone() };
    record.options.iter().map(one).collect()
}

/// Bound. Until all sockets have their ports they may share them.
pub(crate) fn create(record: &Socket) -> Result<OwnedFd> {
    if !matches!(record.domain, libc::AF_INET | libc::AF_INET6) {
        return Err(HookError::invalid(format!("{} is no domain of UDP", record.domain)));
    }
    let owned = socket::socket(record.domain, libc::SOCK_DGRAM, record.protocol)
        .map_err(|error| HookError::failed("socket", error))?;
    let fd = owned.as_fd();
    options::write(fd, tables(record.domain), &saved(record))?;
    multicast::write(fd, &memberships(record)?)?;
    set_shared(fd, true)?;
    if is_bound(&record.local) {
        socket::bind(fd, &record.local).map_err(|error| {
            HookError::failed(format!("binding to UDP {}", socket::shown(&record.local)), error)
        })?;
    }
    Ok(owned)
}

fn is_bound(local: &[u8]) -> bool {
    socket::port(local) != 0 || socket::host(local).is_some_and(|host| !host.is_unspecified())
}

fn set_shared(fd: BorrowedFd<'_>, on: bool) -> Result<()> {
    socket::set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, on.into())
        .map_err(|error| HookError::failed("setting SO_REUSEADDR", error))
}

fn memberships(record: &Socket) -> Result<Vec<Membership>> {
    let one = |m: &v1::Membership| Membership::from_octets(m.interface, &m.group, m.mode, &m.sources);
    record.memberships.iter().map(one).collect()
}

/// Queue, connection, and what must come after them.
pub(crate) fn link(host: &Host<'_>, object: &ObjectInfo, record: &Socket) -> Result<()> {
    let owned = host.open_handle(socket::only_handle(object)?.id)?;
    let fd = owned.as_fd();
    if !record.queue.is_empty() {
        fill(host, object, record, fd)?;
        // The room that was made for the queue is given back.
        options::write(fd, &[options::SOCKET], &saved(record))?;
    }
    if !record.peer.is_empty() {
        socket::connect(fd, &record.peer).map_err(|error| {
            HookError::failed(format!("connecting to UDP {}", socket::shown(&record.peer)), error)
        })?;
    }
    for (bit, how) in [(1, libc::SHUT_RD), (2, libc::SHUT_WR)] {
        if record.shutdown & bit != 0 {
            // ENOTCONN of an unconnected socket, which is shut down all the same (net/ipv4/af_inet.c).
            let _ = socket::shutdown(fd, how);
        }
    }
    filter::write(fd, &record.filter, record.filter_locked)
}

/// Every port is taken.
pub(crate) fn settle(host: &Host<'_>, object: &ObjectInfo, record: &Socket) -> Result<()> {
    let owned = host.open_handle(socket::only_handle(object)?.id)?;
    options::write(owned.as_fd(), &[REUSE], &saved(record))?;
    match record.uid {
        Some(uid) => socket::give_to(owned.as_fd(), uid),
        None => Ok(()),
    }
}

/// Sends the datagrams of the queue again.
fn fill(host: &Host<'_>, object: &ObjectInfo, record: &Socket, fd: BorrowedFd<'_>) -> Result<()> {
    // Without the privilege the size stays, which suffices unless the queue is nearly full.
    let _ = socket::set_int(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, WIDE);
    let name = blob(object.id);
    let mut reader = host.blob_reader(&name);
    for saved in &record.queue {
        let mut data = Vec::new();
        let read = reader.by_ref().take(saved.length.min(1 << 16)).read_to_end(&mut data);
        read.map_err(|error| HookError::failed("reading queued datagrams", error))?;
        if data.len() as u64 != saved.length {
            return Err(HookError::invalid("the image has less queued data than its record says"));
        }
        let destination = match socket::ip_address(&saved.destination) {
            Some(destination) => destination,
            None => destination(record, &saved.sender)?,
        };
        let before = queue_memory(fd)?;
        send(record, fd, &saved.sender, destination, &data)?;
        await_arrival(fd, before, &saved.sender)?;
    }
    Ok(())
}

/// To which of our addresses the sender would send.
fn destination(record: &Socket, sender: &[u8]) -> Result<IpAddr> {
    let local = socket::host(&record.local).filter(|host| !host.is_unspecified());
    if let Some(local) = local {
        return Ok(local.to_canonical());
    }
    let sender_host = socket::host(sender).map(|host| host.to_canonical());
    let any = if matches!(sender_host, Some(IpAddr::V6(_))) { "[::]:0" } else { "0.0.0.0:0" };
    let loopback = if matches!(sender_host, Some(IpAddr::V6(_))) {
        IpAddr::from(std::net::Ipv6Addr::LOCALHOST)
    } else {
        IpAddr::from(std::net::Ipv4Addr::LOCALHOST)
    };
    let probe =
        std::net::UdpSocket::bind(any).map_err(|error| HookError::failed("looking for a route", error))?;
    let routed = sender_host
        .and_then(|host| probe.connect((host, 9)).ok())
        .and_then(|()| probe.local_addr().ok())
        .map(|address| address.ip());
    Ok(routed.unwrap_or(loopback))
}

fn send(record: &Socket, fd: BorrowedFd<'_>, sender: &[u8], destination: IpAddr, data: &[u8]) -> Result<()> {
    let invalid = || HookError::invalid("a datagram whose sender has no address");
    let from = socket::host(sender).ok_or_else(invalid)?.to_canonical();
    let path =
        inject::Path { from: (from, socket::port(sender)), to: (destination, socket::port(&record.local)) };
    // Of several sockets that share the port, the connected one gets it.
    let shared = record.options.iter().any(|option| {
        option.level == libc::SOL_SOCKET
            && matches!(option.name, libc::SO_REUSEADDR | libc::SO_REUSEPORT)
            && option.value.iter().any(|byte| *byte != 0)
    });
    let connected = shared && socket::connect(fd, sender).is_ok();
    let result = match inject::datagram(&path, data) {
        Err(error) if error.errno == libc::EPERM => send_as(&path, data).map_err(|_| error),
        result => result,
    };
    if connected {
        socket::connect(fd, &[0; 16]).map_err(|error| HookError::failed("dissolving a connection", error))?;
    }
    result
}

/// Without the privilege for raw packets: from a socket that shares the sender's port, if that is one of ours.
fn send_as(path: &inject::Path, data: &[u8]) -> std::io::Result<()> {
    let domain = if path.from.0.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let owned = socket::socket(domain, libc::SOCK_DGRAM, 0)?;
    socket::set_int(owned.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    let mut address = (domain as u16).to_ne_bytes().to_vec();
    address.extend(path.from.1.to_be_bytes());
    match path.from.0 {
        IpAddr::V4(host) => address.extend(host.octets()),
        IpAddr::V6(host) => {
            address.extend([0; 4]);
            address.extend(host.octets());
        }
    }
    address.resize(28, 0);
    socket::bind(owned.as_fd(), &address)?;
    std::net::UdpSocket::from(owned).send_to(data, path.to).map(drop)
}

/// Bytes of memory that the queue takes: `SO_MEMINFO`, the first number of which is `SK_MEMINFO_RMEM_ALLOC`
/// (linux/sock_diag.h).
fn queue_memory(fd: BorrowedFd<'_>) -> Result<u32> {
    let bytes = socket::get_option(fd, libc::SOL_SOCKET, 55, 36);
    let bytes = bytes.map_err(|error| HookError::failed("reading SO_MEMINFO", error))?;
    Ok(bytes.first_chunk().map_or(0, |word| u32::from_ne_bytes(*word)))
}

/// The loopback device delivers at once, unless the machine is busy. A look at the queue itself would mark empty
/// datagrams as seen, and the next dump would not find them.
fn await_arrival(fd: BorrowedFd<'_>, before: u32, sender: &[u8]) -> Result<()> {
    let began = Instant::now();
    while queue_memory(fd)? <= before {
        if began.elapsed() > ARRIVAL_TIME {
            let what = format!("a queued datagram from {} could not be put back", socket::shown(sender));
            return Err(HookError::invalid(what).remedy("a packet filter on the loopback device?"));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}
