//! From a record to a live socket.

use crate::{
    record::stasis::rawicmp::v1::{self, Socket},
    tables,
};
use stasis_plugin_api::{
    HookError, Host, ObjectInfo, Result,
    socket::{
        self, filter,
        multicast::{self, Membership},
        options,
    },
};
use std::os::fd::{AsFd, OwnedFd};

/// Bound and connected, so that it hears what the dumped one would; what arrives meanwhile is the network's.
pub(crate) fn create(record: &Socket) -> Result<OwnedFd> {
    if !matches!(record.domain, libc::AF_INET | libc::AF_INET6)
        || !matches!(record.kind, libc::SOCK_RAW | libc::SOCK_DGRAM)
    {
        return Err(HookError::invalid(format!(
            "no socket of domain {}, type {}",
            record.domain, record.kind
        )));
    }
    let owned = socket::socket(record.domain, record.kind, record.protocol).map_err(|error| {
        let remedy = match record.kind {
            libc::SOCK_RAW => "needs CAP_NET_RAW",
            _ => "see net.ipv4.ping_group_range",
        };
        HookError::failed(format!("socket for protocol {}", record.protocol), error).remedy(remedy)
    })?;
    let fd = owned.as_fd();
    let one = |o: &v1::Option| options::Saved { level: o.level, name: o.name, value: o.value.clone() };
    let saved: Vec<_> = record.options.iter().map(one).collect();
    options::write(fd, tables(record.domain), &saved)?;
    multicast::write(fd, &memberships(record)?)?;
    // The port of a raw socket is its protocol.
    let identified = record.kind == libc::SOCK_DGRAM && socket::port(&record.local) != 0;
    if identified || socket::host(&record.local).is_some_and(|host| !host.is_unspecified()) {
        socket::bind(fd, &record.local).map_err(|error| {
            HookError::failed(format!("binding to {}", socket::shown(&record.local)), error)
                .remedy("give this machine the address first")
        })?;
    }
    if !record.peer.is_empty() {
        socket::connect(fd, &record.peer).map_err(|error| {
            HookError::failed(format!("connecting to {}", socket::shown(&record.peer)), error)
                .remedy("give this machine a route to the peer first")
        })?;
    }
    Ok(owned)
}

fn memberships(record: &Socket) -> Result<Vec<Membership>> {
    let one = |m: &v1::Membership| Membership::from_octets(m.interface, &m.group, m.mode, &m.sources);
    record.memberships.iter().map(one).collect()
}

pub(crate) fn link(host: &Host<'_>, object: &ObjectInfo, record: &Socket) -> Result<()> {
    let owned = host.open_handle(socket::only_handle(object)?.id)?;
    let fd = owned.as_fd();
    for (bit, how) in [(1, libc::SHUT_RD), (2, libc::SHUT_WR)] {
        if record.shutdown & bit != 0 {
            // ENOTCONN of an unconnected socket, which is shut down all the same (net/ipv4/af_inet.c).
            let _ = socket::shutdown(fd, how);
        }
    }
    filter::write(fd, &record.filter, record.filter_locked)
}
