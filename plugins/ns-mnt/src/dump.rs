//! From a live mount namespace to a record.

use crate::{
    MountNamespace, contents,
    mountinfo::{self, Line, below, join},
    record::stasis::ns_mnt::v1::{Class, Mount},
};
use stasis_plugin_api::{DumpedNamespace, HookError, Host, NamespaceInfo, Result, namespace::IdMap};
use std::{
    fs::{self, File},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// File systems of which a new instance is as good as the old.
const FRESH: &[&str] = &["proc", "sysfs", "devpts", "mqueue"];

pub(crate) fn dump(host: &Host<'_>, namespace: &NamespaceInfo) -> Result<DumpedNamespace<MountNamespace>> {
    let Some(&pid) = namespace.members.first() else {
        return Err(HookError::invalid("a mount namespace without tasks"));
    };
    if namespace.members.len() != host.tasks().len() {
        return Err(HookError::unsupported(
            format!("mnt:[{}]", namespace.ino),
            "only a part of the tree is in it",
            "nested mount namespaces are not supported yet",
        ));
    }
    let proc = File::from(host.open_proc(pid)?);
    let base = format!("/proc/self/fd/{}", proc.as_raw_fd());
    if fs::read_link(format!("{base}/root")).is_ok_and(|root| root.as_os_str() != "/") {
        return Err(HookError::unsupported(
            format!("mnt:[{}]", namespace.ino),
            format!("task {pid} has another root directory, so its mounts are not all visible"),
            "",
        ));
    }
    let read = |path: String| {
        fs::read_to_string(&path).map_err(|error| HookError::failed(format!("reading {path}"), error))
    };
    let theirs = mountinfo::parse(&read(format!("{base}/mountinfo"))?)?;
    let ours = mountinfo::parse(&read("/proc/self/mountinfo".into())?)?;
    let mounts = classify(&theirs, &ours)?;
    let maps = contents::Maps { uids: IdMap::of(&proc, "uid_map")?, gids: IdMap::of(&proc, "gid_map")? };
    for (index, (mount, line)) in mounts.iter().zip(&theirs).enumerate() {
        if mount.class() == Class::Contents {
            let tree = open_tree(&proc, line)?;
            let blob = contents::blob(namespace.id, index);
            let mut writer = host.blob_writer(&blob);
            contents::save(&tree, &line.mountpoint, &maps, &mut writer)?;
        }
    }
    Ok(DumpedNamespace { record: MountNamespace { mounts, id: namespace.id }, version: 1 })
}

/// How each mount is to be made again.
pub(crate) fn classify(theirs: &[Line], ours: &[Line]) -> Result<Vec<Mount>> {
    // Which mount of ours is the same.
    let mut same: Vec<Option<u32>> = Vec::new();
    let mut mounts: Vec<Mount> = Vec::new();
    for line in theirs {
        let label = format!("mount {} ({})", line.mountpoint, line.fstype);
        let refuse = |why: String, remedy: &str| Err(HookError::unsupported(label.clone(), why, remedy));
        if let Err(option) = mountinfo::flags(&line.options) {
            return refuse(format!("it has the option {option}"), "");
        }
        let parent = theirs.iter().position(|other| other.id == line.parent && other.id != line.id);
        let twin = match parent {
            None => ours.iter().find(|our| !ours.iter().any(|other| other.id == our.parent)),
            Some(parent) => same[parent].and_then(|id| {
                ours.iter()
                    .find(|our| our.parent == id && our.mountpoint == line.mountpoint && our.dev == line.dev)
            }),
        }
        .filter(|our| our.dev == line.dev && our.root == line.root && our.fstype == line.fstype);
        same.push(twin.map(|our| our.id));

        let mut shared = false;
        for tag in &line.propagation {
            let group = tag.strip_prefix("shared:");
            let peers = theirs.iter().chain(ours).filter(|other| other.propagation.contains(tag)).count();
            match group {
                Some(_) if peers == 1 => shared = true,
                _ => {
                    let remedy = "make it private (mount --make-rprivate /) before the dump";
                    return refuse(format!("its propagation is {tag}, with mounts beyond itself"), remedy);
                }
            }
        }
        let host_path = host_path(line, ours);
        let internal = theirs[..mounts.len()].iter().enumerate().find_map(|(index, other)| {
            let within = (other.dev == line.dev).then(|| below(&line.root, &other.root)).flatten()?;
            Some((index as u32, within.to_owned()))
        });
        let mut mount = Mount {
            parent: parent.map_or(-1, |index| index as i32),
            mountpoint: line.mountpoint.clone(),
            root: line.root.clone(),
            fstype: line.fstype.clone(),
            source: line.source.clone(),
            options: line.options.clone(),
            super_options: line.super_options.clone(),
            shared,
            ..Mount::default()
        };
        let class = match (twin, host_path, internal) {
            (Some(_), ..) => Class::Inherited,
            (None, Some(path), _) => {
                mount.host_path = path;
                Class::External
            }
            (None, None, Some((of, within))) => {
                (mount.of, mount.within) = (of, within);
                Class::Internal
            }
            _ if line.root != "/" => {
                return refuse(
                    format!("it shows {} of a file system that is mounted nowhere else", line.root),
                    "",
                );
            }
            _ if parent.is_none() => {
                return refuse("the root is a file system that stasis cannot see".into(), "");
            }
            _ if FRESH.contains(&line.fstype.as_str()) => Class::Fresh,
            _ if line.fstype == "tmpfs" => Class::Contents,
            _ => {
                return refuse(
                    "this type is not supported yet".into(),
                    "unmount it, or mount it on the host too",
                );
            }
        };
        mount.set_class(class);
        mounts.push(mount);
    }
    Ok(mounts)
}

/// Where our own namespace shows the same directory or file.
fn host_path(line: &Line, ours: &[Line]) -> Option<String> {
    ours.iter().filter(|our| our.dev == line.dev && our.fstype == line.fstype).find_map(|our| {
        let path = join(&our.mountpoint, below(&line.root, &our.root)?);
        // Another mount on the way there hides it.
        let hidden = ours.iter().any(|other| {
            other.id > our.id
                && below(&path, &other.mountpoint).is_some()
                && below(&other.mountpoint, &our.mountpoint).is_some()
        });
        (!hidden).then_some(path)
    })
}

/// The file system of a mount, without what is mounted on it: a detached copy, made by a thread inside the namespace.
pub(crate) fn open_tree(proc: &File, line: &Line) -> Result<OwnedFd> {
    const OPEN_TREE_CLONE: u32 = 1;
    let failed = |what: &str| {
        HookError::failed(format!("{what} for {}", line.mountpoint), std::io::Error::last_os_error())
    };
    let path = format!("/proc/self/fd/{}/ns/mnt", proc.as_raw_fd());
    let namespace = File::open(&path).map_err(|error| HookError::failed(format!("opening {path}"), error))?;
    let mountpoint = std::ffi::CString::new(line.mountpoint.as_str())
        .map_err(|_| HookError::invalid("a mountpoint with a NUL byte"))?;
    let tree = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: changes this thread alone, which ends below.
            if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
                return Err(failed("unshare"));
            }
            // SAFETY: likewise.
            if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS) } < 0 {
                return Err(failed("setns"));
            }
            let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as u32;
            // SAFETY: the path is NUL-terminated and lives through the call.
            let fd =
                unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, mountpoint.as_ptr(), flags) };
            if fd < 0 {
                return Err(failed("open_tree"));
            }
            // SAFETY: the kernel just gave us this descriptor.
            Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
        });
        thread.join().unwrap_or_else(|_| Err(HookError::invalid("the thread inside the namespace panicked")))
    })?;
    let stat = nix::sys::stat::fstat(&tree).map_err(|errno| HookError::failed("fstat of a mount", errno))?;
    let dev = format!("{}:{}", nix::sys::stat::major(stat.st_dev), nix::sys::stat::minor(stat.st_dev));
    if dev != line.dev {
        let label = format!("mount {} ({})", line.mountpoint, line.fstype);
        return Err(HookError::unsupported(label, "another mount hides it", "unmount it"));
    }
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
22 27 0:21 / /proc rw,relatime - proc proc rw
24 27 0:6 / /dev rw,relatime - devtmpfs devtmpfs rw
31 24 0:23 / /dev/shm rw,relatime - tmpfs tmpfs rw
";

    fn classes(theirs: &str) -> Result<Vec<Class>> {
        let mounts = classify(&mountinfo::parse(theirs)?, &mountinfo::parse(OURS)?)?;
        Ok(mounts.iter().map(Mount::class).collect())
    }

    #[test]
    fn a_copy_with_its_own_proc_is_mostly_inherited() {
        let theirs = "127 1 254:0 / / rw,relatime - ext4 /dev/vda rw
122 127 0:21 / /proc rw,relatime - proc proc rw
124 127 0:6 / /dev rw,relatime - devtmpfs devtmpfs rw
131 124 0:23 / /dev/shm rw,relatime - tmpfs tmpfs rw
140 122 0:50 / /proc rw,nosuid - proc proc rw
141 127 0:51 / /tmp rw,relatime shared:9 - tmpfs tmpfs rw
142 127 254:0 /etc /mnt ro,relatime - ext4 /dev/vda rw
143 141 0:51 /x /tmp/y rw,relatime - tmpfs tmpfs rw
";
        use Class::{Contents, External, Fresh, Inherited, Internal};
        let expected = [Inherited, Inherited, Inherited, Inherited, Fresh, Contents, External, Internal];
        assert_eq!(classes(theirs).unwrap(), expected);
    }

    #[test]
    fn what_is_not_covered_is_refused_by_name() {
        let root = "127 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n";
        for (line, why) in [
            ("130 127 0:60 / /x rw,relatime - overlay overlay rw", "overlay"),
            ("130 127 0:60 / /x rw,relatime master:4 - tmpfs tmpfs rw", "master:4"),
            ("130 127 0:60 / /x rw,idmapped - tmpfs tmpfs rw", "idmapped"),
            ("130 127 0:60 /sub /x rw - tmpfs tmpfs rw", "/sub"),
        ] {
            let error = classes(&format!("{root}{line}\n")).unwrap_err();
            assert!(error.what.contains(why) && error.what.contains("mount /x"), "{error}");
        }
    }
}
