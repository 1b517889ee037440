//! TCP sockets over IPv4 and IPv6: tcp(7). Listening, bound and closed ones always; connections with
//! `--tcp-established` (through `TCP_REPAIR`) or, ended, with `--tcp-close`.

mod connection;
mod dump;
mod kernel;
mod lock;
mod nft;
mod restore;

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, Host, ObjectInfo, OptionDeclaration, Result, Selector,
    export_plugin, register, socket,
};
use std::os::fd::{BorrowedFd, OwnedFd};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::tcp::v1::Socket;

/// Keep connections.
const ESTABLISHED: &str = "tcp-established";
/// End connections.
const CLOSE: &str = "tcp-close";
/// Leave out connections that nobody has accepted.
const SKIP_IN_FLIGHT: &str = "skip-in-flight";

struct Tcp;

impl Descriptor for Tcp {
    type Record = Socket;
    const KIND: &'static str = "tcp";

    fn selectors(&self) -> Vec<Selector> {
        let tcp = |domain| Selector::Socket { domain, kind: libc::SOCK_STREAM, protocol: libc::IPPROTO_TCP };
        [libc::AF_INET, libc::AF_INET6].map(tcp).to_vec()
    }

    fn describe(&self, host: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
        lock::note(host, handle, fd)?;
        Ok(socket::describe::<Self>(handle))
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Socket>> {
        dump::dump(host, object)
    }

    fn commit(&self, host: &Host<'_>, _: &ObjectInfo) -> Result<()> {
        lock::keep(host)
    }

    fn create(&self, host: &Host<'_>, object: &ObjectInfo, record: &Socket) -> Result<Vec<OwnedFd>> {
        restore::create(host, object, record).map(|fd| vec![fd])
    }

    fn link(&self, host: &Host<'_>, object: &ObjectInfo, record: &Socket) -> Result<()> {
        restore::link(host, object, record)
    }

    fn settle(&self, host: &Host<'_>, object: &ObjectInfo, record: &Socket) -> Result<()> {
        restore::settle(host, object, record)
    }
}

register!(descriptor: Tcp);
register!(lifecycle: lock::NetworkLock);
export_plugin! {
    name: "tcp",
    records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")),
    options: [
        OptionDeclaration::switch(ESTABLISHED, "keep TCP connections"),
        OptionDeclaration::switch(CLOSE, "end TCP connections instead of keeping them"),
        OptionDeclaration::switch(SKIP_IN_FLIGHT, "leave out TCP connections that wait to be accepted"),
    ]
}
