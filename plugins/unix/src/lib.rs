//! Unix sockets: unix(7). Connected pairs with what is queued in them, ends whose peer is gone, unconnected and
//! listening sockets. Connections made through a listener, and peers outside the tree, are refused by name.

mod diag;
mod dump;
mod options;
mod queue;
mod restore;
mod sys;

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, Host, ObjectInfo, Result, Selector, export_plugin, register,
};
use std::os::fd::{BorrowedFd, OwnedFd};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::unix::v1::Sockets;

struct Unix;

impl Descriptor for Unix {
    type Record = Sockets;
    const KIND: &'static str = "unix";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::Socket { domain: libc::AF_UNIX, kind: -1, protocol: -1 }]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
        dump::describe(handle, fd)
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Sockets>> {
        dump::dump(host, object)
    }

    fn create(&self, host: &Host<'_>, object: &ObjectInfo, record: &Sockets) -> Result<Vec<OwnedFd>> {
        restore::create(host, object, record)
    }

    fn link(&self, host: &Host<'_>, object: &ObjectInfo, record: &Sockets) -> Result<()> {
        restore::link(host, object, record)
    }
}

register!(descriptor: Unix);
export_plugin! { name: "unix", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }
