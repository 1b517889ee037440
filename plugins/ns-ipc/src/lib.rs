//! IPC namespaces: ipc_namespaces(7), sysvipc(7). One of the whole tree, with its limits and all System V objects: segments
//! with their contents, semaphores, queues with every message, each under its old number, key, owner and mode.
//!
//! Not kept, because nothing sets it: the times of the last operations and the pids that did them.

mod dump;
mod kernel;
mod restore;

use stasis_plugin_api::{DumpedNamespace, Host, Namespace, NamespaceInfo, Result, export_plugin, register};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::ns_ipc::v1::IpcNamespace;

struct Ipc;

impl Namespace for Ipc {
    type Record = IpcNamespace;
    const KIND: &'static str = "ipc";
    const CLONE_FLAG: u64 = libc::CLONE_NEWIPC as u64;

    fn after(&self) -> Vec<&'static str> {
        vec!["user"]
    }

    fn dump(&self, host: &Host<'_>, namespace: &NamespaceInfo) -> Result<DumpedNamespace<IpcNamespace>> {
        dump::dump(host, namespace)
    }

    fn enter(&self, host: &Host<'_>, record: &IpcNamespace) -> Result<()> {
        restore::enter(host, record)
    }

    fn finish(&self, _: &Host<'_>, record: &IpcNamespace) -> Result<()> {
        restore::finish(record)
    }
}

/// Blob with the contents of a segment.
fn blob(id: i32) -> String {
    format!("segment/{id}")
}

register!(namespace: Ipc);
export_plugin! { name: "ns-ipc", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }
