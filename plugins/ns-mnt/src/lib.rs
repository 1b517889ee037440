//! Mount namespaces: mount_namespaces(7). What the namespace has in common with stasis's own is left alone; only the
//! difference is recorded and made again.

mod contents;
mod dump;
mod mountinfo;
mod restore;

use stasis_plugin_api::{DumpedNamespace, Host, Namespace, NamespaceInfo, Result, export_plugin, register};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::ns_mnt::v1::MountNamespace;

struct Mnt;

impl Namespace for Mnt {
    type Record = MountNamespace;
    const KIND: &'static str = "mnt";
    const CLONE_FLAG: u64 = libc::CLONE_NEWNS as u64;

    fn after(&self) -> Vec<&'static str> {
        vec!["user", "net", "ipc"]
    }

    fn dump(&self, host: &Host<'_>, namespace: &NamespaceInfo) -> Result<DumpedNamespace<MountNamespace>> {
        dump::dump(host, namespace)
    }

    fn enter(&self, host: &Host<'_>, record: &MountNamespace) -> Result<()> {
        restore::enter(host, record)
    }
}

register!(namespace: Mnt);
export_plugin! { name: "ns-mnt", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }
