//! What becomes of each type of file system.

use stasis_plugin_api::namespace::IdMap;

/// How a mount of a type is made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Treatment {
    /// A new instance is as good as the old: it shows a namespace or the kernel, or is filled by other plugins.
    Instance,
    /// A new instance, with its files from the image.
    Contents,
    /// A new instance, if the old one has no files.
    Empty,
    /// A new instance, when the paths in its options lead where they led.
    Late,
    /// It cannot be made again, for this reason.
    Refused(&'static str),
}
use Treatment::{Contents, Empty, Instance, Late, Refused};

/// One type.
pub(crate) struct FsType {
    name: &'static str,
    pub treatment: Treatment,
    /// Files that every new instance has.
    pub own_files: &'static [&'static str],
}

const fn of(name: &'static str, treatment: Treatment) -> FsType {
    FsType { name, treatment, own_files: &[] }
}

#[rustfmt::skip]
const TYPES: &[FsType] = &[
    of("proc", Instance),
    of("sysfs", Instance),
    of("devpts", Instance),
    of("mqueue", Instance),
    of("cgroup", Instance),
    of("cgroup2", Instance),
    of("devtmpfs", Instance),
    of("binfmt_misc", Instance),
    of("configfs", Instance),
    of("debugfs", Instance),
    of("efivarfs", Instance),
    of("fusectl", Instance),
    of("pstore", Instance),
    of("securityfs", Instance),
    of("tracefs", Instance),
    of("tmpfs", Contents),
    of("ramfs", Contents),
    of("hugetlbfs", Empty),
    FsType { name: "bpf", treatment: Empty, own_files: &["maps.debug", "progs.debug"] },
    of("overlay", Late),
    of("autofs", Refused("its automounter holds a pipe that the kernel knows")),
    of("nsfs", Refused("it keeps a namespace alive")),
];

const OTHER: FsType = of("", Refused("this type is not supported"));
/// A file system on a block device: mounting it again shows the same.
const OF_DEVICE: FsType = of("", Instance);

/// What is known of a type. `enabled`: types that the user declares to be fine as new instances. `on_devices`: types that
/// live on block devices.
pub(crate) fn find(fstype: &str, enabled: &[String], on_devices: &[String]) -> &'static FsType {
    match TYPES.iter().find(|known| known.name == fstype) {
        Some(FsType { treatment: Refused(_) | Empty, .. }) if enabled.iter().any(|name| name == fstype) => {
            &OF_DEVICE
        }
        Some(known) => known,
        None if enabled.iter().chain(on_devices).any(|name| name == fstype) => &OF_DEVICE,
        None => &OTHER,
    }
}

/// Types that /proc/filesystems (filesystems(5)) does not call "nodev".
pub(crate) fn on_devices(filesystems: &str) -> Vec<String> {
    let lines = filesystems.lines().filter(|line| !line.starts_with("nodev"));
    lines.map(|line| line.trim().to_owned()).collect()
}

/// The options with which a new instance is made, out of those of mountinfo. "ro" is set last.
pub(crate) fn options(shown: &str) -> Vec<&str> {
    shown.split(',').filter(|option| !["", "rw", "ro"].contains(option)).collect()
}

/// Options with users and groups as the tree's user namespace calls them; those whom it does not know are left out.
pub(crate) fn inside(shown: &str, uids: &IdMap, gids: &IdMap) -> String {
    let translated = |option: &str| {
        let map = match option.split_once('=') {
            Some(("uid", id)) => Some(("uid", uids, id)),
            Some(("gid", id)) => Some(("gid", gids, id)),
            _ => None,
        };
        match map {
            None => Some(option.to_owned()),
            Some((name, map, id)) => Some(format!("{name}={}", map.inside(id.parse().ok()?)?)),
        }
    };
    shown.split(',').filter_map(translated).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_and_their_options() {
        let devices = on_devices("nodev\tproc\n\text4\nnodev\tfuse\n\txfs\n");
        assert_eq!(devices, ["ext4", "xfs"]);
        let treatment = |fstype| find(fstype, &["fuse.x".to_owned(), "bpf".to_owned()], &devices).treatment;
        assert_eq!(
            ["tmpfs", "ext4", "fuse.x", "bpf"].map(treatment),
            [Contents, Instance, Instance, Instance]
        );
        assert!(matches!(treatment("nfs"), Refused(_)));
        assert_eq!(
            options("rw,size=4k,mode=755,uid=1000,gid=5"),
            ["size=4k", "mode=755", "uid=1000", "gid=5"]
        );
        assert!(options("ro").is_empty());
        let map = IdMap::parse("0 1000 10");
        assert_eq!(inside("rw,uid=1003,gid=5,size=4k", &map, &map), "rw,uid=3,size=4k");
    }
}
