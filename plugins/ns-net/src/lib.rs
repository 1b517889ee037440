//! Network namespaces: network_namespaces(7). One of the whole tree, with its devices, addresses, routes, rules, neighbours
//! and settings. A new one is filled from outside ([`restore`]) before anybody is in it.

mod devices;
mod dump;
mod external;
mod late;
mod netfilter;
mod netlink;
mod refusals;
mod restore;
mod sysctls;
mod tables;
mod tun;

use stasis_plugin_api::{
    DumpedNamespace, Host, Namespace, NamespaceInfo, OptionDeclaration, Result, export_plugin, register,
};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::ns_net::v1::NetNamespace;

/// Namespaces of these types are made anew, but stay empty.
const EMPTY: &str = "empty-ns";
/// A namespace that is entered instead of making one.
const JOIN: &str = "join-ns";

struct Net;

impl Namespace for Net {
    type Record = NetNamespace;
    const KIND: &'static str = "net";
    const CLONE_FLAG: u64 = libc::CLONE_NEWNET as u64;

    fn after(&self) -> Vec<&'static str> {
        vec!["user"]
    }

    fn dump(&self, host: &Host<'_>, namespace: &NamespaceInfo) -> Result<DumpedNamespace<NetNamespace>> {
        dump::dump(host, namespace)
    }

    fn prepare(&self, host: &Host<'_>, record: &NetNamespace, host_pid: i32) -> Result<()> {
        restore::prepare(host, record, host_pid)
    }

    fn enter(&self, host: &Host<'_>, record: &NetNamespace) -> Result<()> {
        restore::enter(host, record)
    }
}

register!(namespace: Net);
register!(descriptor: tun::Tuns);
register!(lifecycle: late::Connecting);
export_plugin! {
    name: "ns-net",
    records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")),
    options: [
        OptionDeclaration::value(EMPTY, "make a namespace of this type (net) anew, but fill it with nothing"),
        OptionDeclaration::value(JOIN, "enter a namespace instead of making one: net:PATH (restore)"),
    ]
}
