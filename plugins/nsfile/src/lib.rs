//! Namespaces held open by descriptors: files of `/proc/PID/ns` (namespaces(7)).
//!
//! A namespace is found again through a task that is in it, or whose children will be. One that only a descriptor (or a
//! bind mount) keeps alive is refused: nothing in the image makes it anew.

use nix::{
    fcntl::{OFlag, open},
    sys::stat::{Mode, fstatat},
};
use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, Selector, TaskInfo,
    export_plugin, register,
};
use std::os::fd::{BorrowedFd, OwnedFd};

mod records {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use records::stasis::nsfile::v1::NamespaceFile;

/// `NSFS_MAGIC` (include/uapi/linux/magic.h).
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// Files of `/proc/PID/ns` by the type that the link of a descriptor shows (`net:[4026531840]`).
const FILES: &[(&str, &[&str])] = &[
    ("pid", &["pid", "pid_for_children"]),
    ("time", &["time", "time_for_children"]),
    ("user", &["user"]),
    ("mnt", &["mnt"]),
    ("net", &["net"]),
    ("ipc", &["ipc"]),
    ("uts", &["uts"]),
    ("cgroup", &["cgroup"]),
];

struct NamespaceFiles;

/// The files in which a namespace with this link may be found.
fn files(link: &str) -> &'static [&'static str] {
    let kind = link.split_once(':').map_or(link, |(kind, _)| kind);
    FILES.iter().find(|(name, _)| *name == kind).map_or(&[], |(_, files)| files)
}

/// Whether the file of the task leads to the namespace.
fn leads(host: &Host<'_>, task: &TaskInfo, file: &str, handle: &HandleInfo) -> Result<bool> {
    let proc = host.open_proc(task.pid)?;
    // A task without such a file (a dead one, an older kernel) is in no namespace of this type.
    let found = fstatat(&proc, format!("ns/{file}").as_str(), nix::fcntl::AtFlags::empty());
    Ok(found.is_ok_and(|stat| (stat.st_dev, stat.st_ino) == (handle.dev, handle.ino)))
}

impl Descriptor for NamespaceFiles {
    type Record = NamespaceFile;
    const KIND: &'static str = "nsfile";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::Filesystem(NSFS_MAGIC)]
    }

    fn describe(&self, host: &Host<'_>, handle: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
        let tasks = host.tasks();
        for file in files(&handle.link) {
            for task in &tasks {
                if leads(host, task, file, handle)? {
                    return Ok(Described {
                        identity: format!("{file} {}", task.pid).into(),
                        description: handle.link.clone(),
                        ..Described::default()
                    });
                }
            }
        }
        let why = "no task of the tree is in this namespace, so that nothing would make it anew";
        let remedy = "close the descriptor, or dump a tree with a task in the namespace";
        Err(HookError::unsupported(handle.link.as_str(), why, remedy))
    }

    fn dump(&self, _: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<NamespaceFile>> {
        let (name, pid) = object.identity.split_once(' ').unwrap_or_default();
        let pid = pid.parse().map_err(|_| HookError::invalid("an identity that is none of ours"))?;
        Ok(Dumped::new(NamespaceFile { name: name.into(), pid }))
    }

    fn create(&self, host: &Host<'_>, object: &ObjectInfo, record: &NamespaceFile) -> Result<Vec<OwnedFd>> {
        let known = FILES.iter().flat_map(|(_, files)| *files).any(|file| *file == record.name);
        if !known {
            return Err(HookError::invalid(format!("the image names a namespace file {:?}", record.name)));
        }
        let path = if record.pid == host.current_task() {
            format!("/proc/self/ns/{}", record.name)
        } else {
            format!("/proc/{}/ns/{}", record.pid, record.name)
        };
        let open = |handle: &HandleInfo| {
            let named = OFlag::from_bits_truncate(handle.status_flags.cast_signed()) & OFlag::O_PATH;
            open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC | named, Mode::empty())
                .map_err(|errno| HookError::failed(format!("open of {path}"), errno))
        };
        object.handles.iter().map(open).collect()
    }
}

register!(descriptor: NamespaceFiles);
export_plugin! { name: "nsfile", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_plugin_api::testing::Kit;
    use std::{fs::File, os::fd::AsFd};

    #[test]
    fn namespaces_are_known_by_their_links() {
        assert_eq!(files("net:[4026531840]"), ["net"]);
        assert_eq!(files("pid:[1]"), ["pid", "pid_for_children"]);
        assert!(files("pipe:[1]").is_empty());
    }

    #[test]
    fn the_namespace_of_a_task_is_found_again() {
        let mut kit = Kit::new();
        kit.plugin(NamespaceFiles);
        let file = File::open("/proc/self/ns/uts").unwrap();
        let before = nix::sys::stat::fstat(file.as_fd()).unwrap().st_ino;
        let number = kit.hold(OwnedFd::from(file), NamespaceFiles::KIND).unwrap();
        assert_eq!(kit.dump().unwrap(), 1);
        kit.restore().unwrap();
        assert_eq!(nix::sys::stat::fstat(kit.fd(number)).unwrap().st_ino, before);
    }
}
