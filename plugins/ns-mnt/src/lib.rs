//! Mount namespaces: mount_namespaces(7).
//!
//! A namespace whose root is that of stasis's own is a changed copy of it: what both have is left alone, the rest is made. One
//! with another root (a container) is made as a whole. `types.rs` says what becomes of each type of file system,
//! `plan.rs` where each mount comes from, `propagation.rs` which mounts tell which others of changes.

mod compare;
mod contents;
mod dump;
mod external;
mod inside;
mod kernel;
mod make;
mod mountinfo;
mod plan;
mod propagation;
mod removed;
mod restore;
mod types;

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
        vec!["user", "net", "ipc", "cgroup"]
    }

    fn dump(&self, host: &Host<'_>, namespace: &NamespaceInfo) -> Result<DumpedNamespace<MountNamespace>> {
        dump::dump(host, namespace)
    }

    fn enter(&self, host: &Host<'_>, record: &MountNamespace) -> Result<()> {
        restore::enter(host, record)
    }
}

register!(namespace: Mnt);
export_plugin! {
    name: "ns-mnt",
    records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")),
    options: [external::MAP, external::SHARING, external::MASTERS, external::ENABLE, external::ROOT],
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
        sys::wait::{WaitStatus, waitpid},
        unistd::{ForkResult, fork},
    };
    use stasis_plugin_api::{
        prost::Message,
        register::namespace,
        testing::{FakeHost, Kit},
    };
    use std::{fs, path::Path};

    /// Runs `f` in a child, in new namespaces; an error's text is shown.
    fn in_child(flags: CloneFlags, f: impl FnOnce() -> std::result::Result<(), String>) {
        // SAFETY: the child uses the allocator, which glibc keeps usable after fork, and exits without unwinding.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => {
                assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0))
            }
            ForkResult::Child => {
                let result = unshare(flags).map_err(|errno| errno.to_string()).and_then(|()| {
                    if flags.contains(CloneFlags::CLONE_NEWUSER) {
                        fs::write("/proc/self/uid_map", "0 0 1").map_err(|error| error.to_string())?;
                        fs::write("/proc/self/setgroups", "deny").map_err(|error| error.to_string())?;
                        fs::write("/proc/self/gid_map", "0 0 1").map_err(|error| error.to_string())?;
                    }
                    f()
                });
                if let Err(text) = &result {
                    eprintln!("{text}");
                }
                // SAFETY: ends the child.
                unsafe { libc::_exit(i32::from(result.is_err())) }
            }
        }
    }

    fn round_trip(name: &str, flags: CloneFlags) {
        // SAFETY: takes no argument.
        if unsafe { libc::geteuid() } != 0 {
            eprintln!("skipped: needs root");
            return;
        }
        let directory = std::env::temp_dir().join(format!("stasis-{name}-{}", std::process::id()));
        let (t, etc, image) = (directory.join("t"), directory.join("etc"), directory.join("image"));
        [&t, &etc].iter().for_each(|path| fs::create_dir_all(path).unwrap());
        let ours = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let none: Option<&str> = None;
        in_child(flags, || {
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(none, "/", none, private, none).map_err(|e| format!("private: {e}"))?;
            mount(Some("mine"), &t, Some("tmpfs"), MsFlags::MS_NOSUID, Some("size=1m"))
                .map_err(|e| format!("tmpfs: {e}"))?;
            fs::create_dir(t.join("sub"))
                .and_then(|()| fs::write(t.join("file"), "kept"))
                .map_err(|e| e.to_string())?;
            mount(Some(&t.join("sub")), &etc, none, MsFlags::MS_BIND, none)
                .map_err(|e| format!("bind: {e}"))?;
            fs::write(t.join("bound"), "")
                .and_then(|()| fs::write(t.join("gone"), "gone"))
                .map_err(|e| e.to_string())?;
            mount(Some(&t.join("gone")), &t.join("bound"), none, MsFlags::MS_BIND, none)
                .map_err(|e| format!("bind: {e}"))?;
            fs::remove_file(t.join("gone")).map_err(|e| e.to_string())?;
            let proc = fs::File::open("/proc/self").map_err(|e| e.to_string())?;
            let kit = Kit::new();
            let ours = mountinfo::parse(&ours).map_err(|e| e.to_string())?;
            let spaces = [inside::Space { proc, ino: 0 }];
            let mounts = kit.with_host(|host| dump::all(host, 5, &spaces, &ours));
            let mounts = mounts.map_err(|e| e.to_string())?;
            let record = MountNamespace { mounts, id: 5 };
            fs::write(&image, record.encode_to_vec()).map_err(|e| e.to_string())?;
            let blobs = kit.host.blobs.borrow();
            blobs.iter().try_for_each(|(name, blob)| {
                fs::write(directory.join(name.replace('/', "_")), blob).map_err(|e| e.to_string())
            })
        });
        assert!(!t.join("file").exists());
        let record = fs::read(&image).unwrap();
        in_child(flags, || {
            let host = FakeHost::default();
            for index in 0..200 {
                for name in [contents::blob(5, index), contents::removed_blob(5, index)] {
                    if let Ok(blob) = fs::read(directory.join(name.replace('/', "_"))) {
                        host.blobs.borrow_mut().insert(name, blob);
                    }
                }
            }
            let hook = namespace(Mnt);
            host.call(|host| hook.enter(host, record.as_slice().into()).into_result())
                .map_err(|e| e.to_string())?;
            let kept = fs::read_to_string(t.join("file")).map_err(|e| e.to_string())?;
            let inside = Path::new(&t).join("sub/new");
            fs::write(etc.join("new"), "x").map_err(|e| e.to_string())?;
            let gone = fs::read_to_string(t.join("bound")).map_err(|e| e.to_string())?;
            if kept == "kept" && inside.exists() && gone == "gone" {
                Ok(())
            } else {
                Err("contents differ".into())
            }
        });
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_tmpfs_and_a_bind_mount_come_back() {
        round_trip("mnt", CloneFlags::CLONE_NEWNS);
    }

    #[test]
    fn likewise_in_a_user_namespace() {
        round_trip("user", CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUSER);
    }
}
