//! Unix sockets: unix(7). What is one object: the two ends of a socketpair(2); any other socket by itself.
//!
//! Connections made through a listener come back through one: SO_PEERCRED of a client is that of who called listen(2), that
//! of the accepted socket is who called connect(2), and both have the listener's name. So a client's `create` runs as the
//! former and makes, besides the client, a private listener of that name (an auxiliary descriptor); the accepted
//! socket's `create` runs as the latter, connects and accepts. Files of private listeners live in a mount that nobody
//! else sees (see [`sandbox`]). Abstract names have no such place; there the tree's own listener does it.

mod census;
mod credentials;
mod diag;
mod dump;
mod name;
mod namespace;
mod options;
mod queue;
mod receive;
mod restore;
mod sandbox;
mod sys;
mod waiting;

use census::Census;
use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, Host, ObjectInfo, OptionDeclaration, Result, Selector,
    export_plugin, register,
};
use std::{
    os::fd::{BorrowedFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::unix::v1::Sockets;

/// Switch: peers outside the tree are left behind, datagram sockets connect again to their names.
const EXTERNAL_SOCKETS: &str = "ext-unix-sk";

#[derive(Default)]
struct Unix {
    /// Every socket that `describe` has seen.
    census: Mutex<Census>,
}

impl Unix {
    fn census(&self) -> MutexGuard<'_, Census> {
        // Entries are made whole; a panic elsewhere leaves none half done.
        self.census.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Descriptor for Unix {
    type Record = Sockets;
    const KIND: &'static str = "unix";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::Socket { domain: libc::AF_UNIX, kind: -1, protocol: -1 }]
    }

    fn describe(&self, host: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
        dump::describe(host, &mut self.census(), handle, fd)
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Sockets>> {
        dump::dump(host, &self.census(), object)
    }

    fn commit(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<()> {
        waiting::commit(host, &self.census(), object)
    }

    fn create(&self, host: &Host<'_>, object: &ObjectInfo, record: &Sockets) -> Result<Vec<OwnedFd>> {
        restore::create(host, object, record)
    }

    fn link(&self, host: &Host<'_>, object: &ObjectInfo, record: &Sockets) -> Result<()> {
        restore::link(host, object, record)
    }

    fn settle(&self, host: &Host<'_>, object: &ObjectInfo, record: &Sockets) -> Result<()> {
        restore::settle(host, object, record)
    }
}

register!(descriptor: Unix::default());
export_plugin! {
    name: "unix",
    records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")),
    options: [OptionDeclaration::switch(
        EXTERNAL_SOCKETS,
        "dump unix sockets that have to do with processes outside of the tree: datagram sockets connect again by name"
    )],
}

#[cfg(test)]
mod tests;
