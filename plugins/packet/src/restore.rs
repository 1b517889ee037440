//! From a record to a live socket.

use crate::{
    OPTIONS, SOL_PACKET,
    record::stasis::packet::v1::{self, Membership, Socket},
};
use stasis_plugin_api::{
    HookError, Host, ObjectInfo, Result,
    socket::{self, filter, options},
};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

const PACKET_ADD_MEMBERSHIP: i32 = 1;

/// A `sockaddr_ll`.
pub(crate) fn address(protocol: u16, interface: u32) -> Vec<u8> {
    let family = (libc::AF_PACKET as u16).to_ne_bytes();
    let mut address = [&family[..], &protocol.to_be_bytes(), &interface.to_ne_bytes()].concat();
    address.resize(20, 0);
    address
}

/// PACKET_ADD_MEMBERSHIP, once.
pub(crate) fn join(fd: BorrowedFd<'_>, membership: &Membership) -> Result<()> {
    let bad = || HookError::invalid("a membership that is none");
    let length = u16::try_from(membership.address.len()).map_err(|_| bad())?;
    let kind = u16::try_from(membership.kind).map_err(|_| bad())?;
    // struct packet_mreq_max: index, type, length of the address, address.
    let mut request = membership.interface.to_ne_bytes().to_vec();
    request.extend(kind.to_ne_bytes());
    request.extend(length.to_ne_bytes());
    request.extend(&membership.address);
    request.resize(40.max(request.len()), 0);
    socket::set_option(fd, SOL_PACKET, PACKET_ADD_MEMBERSHIP, &request).map_err(|error| {
        HookError::failed(format!("joining a group of interface {}", membership.interface), error)
    })
}

/// Everything but the protocol: without, it hears nothing.
pub(crate) fn create(record: &Socket) -> Result<OwnedFd> {
    let owned = socket::socket(libc::AF_PACKET, record.kind & 15, 0)
        .map_err(|error| HookError::failed("socket", error).remedy("needs CAP_NET_RAW"))?;
    let fd = owned.as_fd();
    let one = |o: &v1::Option| options::Saved { level: o.level, name: o.name, value: o.value.clone() };
    let saved: Vec<_> = record.options.iter().map(one).collect();
    options::write(fd, &[options::SOCKET, OPTIONS], &saved)?;
    // The kernel lists the last one first.
    for membership in record.memberships.iter().rev() {
        // More often than anybody means it is damage.
        for _ in 0..membership.count.min(1 << 16) {
            join(fd, membership)?;
        }
    }
    filter::write(fd, &record.filter, record.filter_locked)?;
    Ok(owned)
}

/// It hears the network from here on.
pub(crate) fn settle(host: &Host<'_>, object: &ObjectInfo, record: &Socket) -> Result<()> {
    let protocol =
        u16::try_from(record.protocol).map_err(|_| HookError::invalid("a protocol that is none"))?;
    if protocol == 0 && record.interface == 0 {
        return Ok(());
    }
    let owned = host.open_handle(socket::only_handle(object)?.id)?;
    socket::bind(owned.as_fd(), &address(protocol, record.interface)).map_err(|error| {
        HookError::failed(format!("binding to interface {}", record.interface), error)
            .remedy("the interface must have the same index as at the dump")
    })
}
