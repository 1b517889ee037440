//! UTS namespaces: uts_namespaces(7). Its host name and its NIS domain name.

use nix::sys::utsname::uname;
use stasis_plugin_api::{
    DumpedNamespace, HookError, Host, Namespace, NamespaceInfo, Result, export_plugin, namespace, register,
};
use std::os::unix::ffi::OsStrExt;

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::ns_uts::v1::UtsNamespace;

struct Uts;

/// The names of the namespace that this thread is in.
fn names() -> Result<UtsNamespace> {
    let names = uname().map_err(|errno| HookError::failed("uname", errno))?;
    Ok(UtsNamespace {
        nodename: names.nodename().as_bytes().to_vec(),
        domainname: names.domainname().as_bytes().to_vec(),
    })
}

impl Namespace for Uts {
    type Record = UtsNamespace;
    const KIND: &'static str = "uts";
    const CLONE_FLAG: u64 = libc::CLONE_NEWUTS as u64;

    fn after(&self) -> Vec<&'static str> {
        vec!["user"]
    }

    fn dump(&self, host: &Host<'_>, namespace: &NamespaceInfo) -> Result<DumpedNamespace<UtsNamespace>> {
        let record = namespace::within(&namespace::member(host, namespace)?, "uts", names)?;
        Ok(DumpedNamespace { record, version: 1 })
    }

    fn enter(&self, _: &Host<'_>, record: &UtsNamespace) -> Result<()> {
        let set = |name: &[u8], what: &str, call: unsafe extern "C" fn(*const libc::c_char, usize) -> i32| {
            // SAFETY: the kernel reads as many bytes as it is told (sethostname(2), setdomainname(2)).
            let result = unsafe { call(name.as_ptr().cast(), name.len()) };
            nix::errno::Errno::result(result).map_err(|errno| HookError::failed(what, errno))
        };
        set(&record.nodename, "sethostname", libc::sethostname)?;
        set(&record.domainname, "setdomainname", libc::setdomainname).map(drop)
    }
}

register!(namespace: Uts);
export_plugin! { name: "ns-uts", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }
