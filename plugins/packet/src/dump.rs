//! From a live socket to a record.

use crate::{
    OPTIONS, diag,
    record::stasis::packet::v1::{Option as Saved, Socket},
};
use stasis_plugin_api::{
    Dumped, HookError, Host, ObjectInfo, Result,
    socket::{self, filter, options},
};
use std::{io, os::fd::AsFd};

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}

pub(crate) fn dump(host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Socket>> {
    let handle = socket::only_handle(object)?;
    let label = object.description.as_str();
    let (owned, _) = socket::open(host, object)?;
    let fd = owned.as_fd();
    let refuse = |why: &str, remedy: &str| Err(HookError::unsupported(label, why, remedy));
    let ino = handle.ino as u32;
    let told = socket::in_namespace(&socket::namespace(fd)?, move || diag::ask(ino)).map_err(|error| {
        HookError::failed("asking packet_diag", error).remedy("needs a kernel with CONFIG_PACKET_DIAG")
    })?;
    let Some(told) = told else { return refuse("the kernel does not list it", "") };
    if told.has_ring {
        return refuse(
            "it has a ring of packets (PACKET_RX_RING, PACKET_TX_RING)",
            "run the program without rings",
        );
    }
    if told.has_fanout {
        return refuse("it is in a fanout group (PACKET_FANOUT)", "run the program without fanout");
    }
    let state = socket::poll(fd, libc::POLLIN).map_err(failed("poll"))?;
    if state & libc::POLLERR != 0 {
        return refuse("an error waits to be read from it", "let the program read the error first");
    }
    if state & libc::POLLIN != 0 {
        host.warn(&format!("{label}: frames wait to be read from it, which the image does not have"));
    }
    let saved = options::read(fd, &[options::SOCKET, OPTIONS])?;
    let option = |o: options::Saved| Saved { level: o.level, name: o.name, value: o.value };
    // struct sockaddr_ll: family, protocol in network byte order, index of the interface.
    let local = socket::local_address(fd).map_err(failed("getsockname"))?;
    let protocol = local.get(2..4).map_or(0, |bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
    let interface = local.get(4..8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes);
    Ok(Dumped::new(Socket {
        kind: socket::get_int(fd, libc::SOL_SOCKET, libc::SO_TYPE).map_err(failed("SO_TYPE"))?,
        protocol: protocol.into(),
        interface,
        options: saved.into_iter().map(option).collect(),
        filter: filter::read(fd, label)?,
        filter_locked: filter::is_locked(fd),
        memberships: told.memberships,
    }))
}
