//! From a record to a live socket.

use crate::{OPTIONS, PROTOCOLS, SOL_NETLINK, record::stasis::netlink::v1::Socket};
use stasis_plugin_api::{
    HookError, Host, ObjectInfo, Result,
    socket::{
        self, filter,
        options::{self, Saved},
    },
};
use std::os::fd::{AsFd, OwnedFd};

const NETLINK_ADD_MEMBERSHIP: i32 = 1;

/// A `sockaddr_nl`.
pub(crate) fn address(port: u32, groups: u32) -> Vec<u8> {
    let family = (libc::AF_NETLINK as u16).to_ne_bytes();
    [&family[..], &[0; 2], &port.to_ne_bytes(), &groups.to_ne_bytes()].concat()
}

/// Bound, with its options.
pub(crate) fn create(record: &Socket) -> Result<OwnedFd> {
    let known = PROTOCOLS.iter().find(|protocol| protocol.number == record.protocol);
    if known.is_none_or(|protocol| protocol.refused.is_some()) {
        return Err(HookError::invalid(format!("{} is no netlink protocol that is kept", record.protocol)));
    }
    let owned = socket::socket(libc::AF_NETLINK, record.kind & 15, record.protocol)
        .map_err(|error| HookError::failed("socket", error))?;
    let fd = owned.as_fd();
    let one = |o: &crate::record::stasis::netlink::v1::Option| Saved {
        level: o.level,
        name: o.name,
        value: o.value.clone(),
    };
    let saved: Vec<Saved> = record.options.iter().map(one).collect();
    options::write(fd, &[options::SOCKET, OPTIONS], &saved)?;
    if record.port != 0 {
        socket::bind(fd, &address(record.port, 0)).map_err(|error| {
            HookError::failed(format!("binding to netlink port {}", record.port), error)
                .remedy("another program may have it")
        })?;
    }
    Ok(owned)
}

/// Groups come last, so that nothing is heard of what the restore does.
pub(crate) fn link(host: &Host<'_>, object: &ObjectInfo, record: &Socket) -> Result<()> {
    let owned = host.open_handle(socket::only_handle(object)?.id)?;
    let fd = owned.as_fd();
    filter::write(fd, &record.filter, record.filter_locked)?;
    if !record.peer.is_empty() {
        socket::connect(fd, &record.peer)
            .map_err(|error| HookError::failed("connecting a netlink socket", error))?;
    }
    for group in &record.groups {
        let number = i32::try_from(*group).map_err(|_| HookError::invalid("a group that is none"))?;
        socket::set_int(fd, SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, number)
            .map_err(|error| HookError::failed(format!("joining netlink group {group}"), error))?;
    }
    Ok(())
}
