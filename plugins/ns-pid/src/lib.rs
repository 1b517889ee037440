//! Pid namespaces: pid_namespaces(7). One level below the namespace that stasis runs in, with its init as the root of
//! the tree; the pids themselves are core's.

mod dump;
mod restore;

use stasis_plugin_api::{DumpedNamespace, Host, Namespace, NamespaceInfo, Result, export_plugin, register};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::ns_pid::v1::PidNamespace;

struct Pid;

impl Namespace for Pid {
    type Record = PidNamespace;
    const KIND: &'static str = "pid";
    const CLONE_FLAG: u64 = libc::CLONE_NEWPID as u64;

    fn after(&self) -> Vec<&'static str> {
        vec!["user", "mnt"]
    }

    fn dump(&self, host: &Host<'_>, namespace: &NamespaceInfo) -> Result<DumpedNamespace<PidNamespace>> {
        dump::dump(host, namespace)
    }

    fn prepare(&self, _: &Host<'_>, record: &PidNamespace, host_pid: i32) -> Result<()> {
        restore::prepare(record, host_pid)
    }
}

register!(namespace: Pid);
export_plugin! { name: "ns-pid", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }
