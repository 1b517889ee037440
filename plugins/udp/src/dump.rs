//! From a live socket to a record.

use crate::{
    record::stasis::udp::v1::{self, Option as Saved, Socket},
    tables,
};
use stasis_plugin_api::{
    Dumped, HookError, Host, ObjectInfo, Result,
    socket::{
        self,
        datagrams::{self, Datagram},
        diag, filter, multicast,
        options::{self, REUSE},
    },
};
use std::{
    io::Write,
    net::IpAddr,
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

/// How long a datagram that was sent may take to leave the machine.
const LEAVING_TIME: Duration = Duration::from_millis(200);
const UDP_GRO: i32 = 104;

pub(crate) fn dump(host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Socket>> {
    let handle = socket::only_handle(object)?;
    let label = object.description.as_str();
    let (owned, proc) = socket::open(host, object)?;
    let fd = owned.as_fd();
    let failed = |what: &'static str| move |error| HookError::failed(what, error);
    let domain = socket::get_int(fd, libc::SOL_SOCKET, libc::SO_DOMAIN).map_err(failed("SO_DOMAIN"))?;
    let protocol = socket::get_int(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL).map_err(failed("SO_PROTOCOL"))?;
    let state = socket::poll(fd, libc::POLLIN | libc::POLLRDHUP).map_err(failed("poll"))?;
    refuse_unseen(fd, state, label)?;

    let queue = match state & libc::POLLIN {
        // A look changes an option of the socket for a moment.
        _ if host.is_dry_run() => Vec::new(),
        0 => Vec::new(),
        _ => datagrams::peek_all(fd)?,
    };
    check_queue(fd, protocol, &queue, label)?;
    if queue.iter().any(|datagram| datagram.data.is_empty()) {
        // The kernel marks it as seen (include/net/udp.h, net/core/datagram.c).
        host.warn(&format!("{label}: an empty datagram is in its queue, which a later dump will not see"));
    }
    let name = blob(object.id);
    let mut writer = host.blob_writer(&name);
    for datagram in &queue {
        writer.write_all(&datagram.data).map_err(failed("writing queued datagrams"))?;
    }
    let mut saved = options::read(fd, tables(domain))?;
    saved.extend(options::read(fd, &[REUSE])?);
    let option = |o: options::Saved| Saved { level: o.level, name: o.name, value: o.value };
    let memberships = multicast::read(fd, &proc, label)?;
    let local = socket::local_address(fd).map_err(failed("getsockname"))?;
    // Without a port it is in no table of the kernel's.
    let told = match socket::port(&local) {
        0 => None,
        _ => diag::inet(fd, domain, protocol, handle.ino)?,
    };
    Ok(Dumped::new(Socket {
        domain,
        protocol,
        local,
        peer: socket::peer_address(fd).map_err(failed("getpeername"))?.unwrap_or_default(),
        options: saved.into_iter().map(option).collect(),
        filter: filter::read(fd, label)?,
        filter_locked: filter::is_locked(fd),
        uid: socket::owner(fd, &proc)?,
        shutdown: shutdown(state) | told.map_or(0, |told| told.shutdown),
        queue: queue.into_iter().map(record).collect(),
        memberships: memberships.into_iter().map(membership).collect(),
    }))
}

/// Both directions show as a hang-up; the sending one alone is for sock_diag to tell.
fn shutdown(state: i16) -> u32 {
    match state {
        state if state & libc::POLLHUP != 0 => 3,
        state if state & libc::POLLRDHUP != 0 => 1,
        _ => 0,
    }
}

/// Refuses what a look would take away, and what cannot be looked at.
fn refuse_unseen(fd: BorrowedFd<'_>, state: i16, label: &str) -> Result<()> {
    if state & libc::POLLERR != 0 {
        let why = "an error waits to be read from it";
        return Err(HookError::unsupported(label, why, "let the program read the error first"));
    }
    let began = Instant::now();
    loop {
        let unsent = socket::ioctl_int(fd, libc::TIOCOUTQ).map_err(|e| HookError::failed("SIOCOUTQ", e))?;
        if unsent == 0 {
            return Ok(());
        }
        if began.elapsed() > LEAVING_TIME {
            let why = format!("{unsent} bytes of a corked datagram are not sent yet");
            return Err(HookError::unsupported(label, why, "let the program uncork it first"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What could not be put back.
fn check_queue(fd: BorrowedFd<'_>, protocol: i32, queue: &[Datagram], label: &str) -> Result<()> {
    if queue.is_empty() {
        return Ok(());
    }
    let refuse = |why: &str| Err(HookError::unsupported(label, why, "let the program read its queue first"));
    if protocol != libc::IPPROTO_UDP {
        return refuse("UDP-lite datagrams are in its queue");
    }
    if socket::get_int(fd, libc::IPPROTO_UDP, UDP_GRO).is_ok_and(|on| on != 0) {
        return refuse("coalesced datagrams (UDP_GRO) are in its queue");
    }
    let link_local = |datagram: &Datagram| match socket::host(&datagram.sender) {
        Some(IpAddr::V6(sender)) => sender.is_unicast_link_local(),
        _ => false,
    };
    if queue.iter().any(link_local) {
        return refuse("datagrams from link-local addresses are in its queue");
    }
    Ok(())
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn record(datagram: Datagram) -> v1::Datagram {
    v1::Datagram {
        sender: datagram.sender,
        destination: datagram.destination.map(octets).unwrap_or_default(),
        length: datagram.data.len() as u64,
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

/// Where the data of a queue are.
pub(crate) fn blob(object: u32) -> String {
    format!("queue/{object}")
}
