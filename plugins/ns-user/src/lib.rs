//! User namespaces: user_namespaces(7). One level below the namespace that stasis runs in.

mod dump;
mod restore;

use stasis_plugin_api::{DumpedNamespace, Host, Namespace, NamespaceInfo, Result, export_plugin, register};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::ns_user::v1::{Extent, UserNamespace};

struct User;

impl Namespace for User {
    type Record = UserNamespace;
    const KIND: &'static str = "user";
    const CLONE_FLAG: u64 = libc::CLONE_NEWUSER as u64;

    fn dump(&self, host: &Host<'_>, namespace: &NamespaceInfo) -> Result<DumpedNamespace<UserNamespace>> {
        dump::dump(host, namespace)
    }

    fn prepare(&self, _: &Host<'_>, record: &UserNamespace, host_pid: i32) -> Result<()> {
        restore::prepare(record, host_pid)
    }
}

register!(namespace: User);
export_plugin! { name: "ns-user", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }
