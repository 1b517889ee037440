//! Reading the maps of a user namespace.

use crate::{Extent, UserNamespace};
use stasis_plugin_api::{DumpedNamespace, HookError, Host, NamespaceInfo, Result};
use std::{
    fs::{self, File},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

/// ioctl_nsfs(2).
const NS_GET_PARENT: libc::c_ulong = 0xb702;
const NS_GET_OWNER_UID: libc::c_ulong = 0xb704;

pub(crate) fn dump(host: &Host<'_>, namespace: &NamespaceInfo) -> Result<DumpedNamespace<UserNamespace>> {
    let name = format!("user:[{}]", namespace.ino);
    let Some(&pid) = namespace.members.first() else {
        return Err(HookError::unsupported(name, "no task of the tree is in it", ""));
    };
    // The descriptor must outlive the paths below.
    let proc = host.open_proc(pid)?;
    let read = |file: &str| {
        fs::read_to_string(format!("/proc/self/fd/{}/{file}", proc.as_raw_fd()))
            .map_err(|error| HookError::failed(format!("reading {file} of task {pid}"), error))
    };
    let path = format!("/proc/self/fd/{}/ns/user", proc.as_raw_fd());
    let file = File::open(path).map_err(|error| HookError::failed(format!("opening {name}"), error))?;

    let ours = fs::metadata("/proc/self/ns/user")
        .map_err(|error| HookError::failed("stat of /proc/self/ns/user", error))?;
    if parent(&file, &name)?
        .metadata()
        .map_err(|error| HookError::failed("fstat of its parent", error))?
        .ino()
        != ours.ino()
    {
        return Err(HookError::unsupported(
            name,
            "it is not a direct child of the user namespace that stasis runs in",
            "run stasis in the parent of that namespace; trees with nested user namespaces are not supported yet",
        ));
    }
    let owner = owner(&file)?;
    // SAFETY: takes no argument and cannot fail.
    let euid = unsafe { libc::geteuid() };
    if owner != euid {
        return Err(HookError::unsupported(
            name,
            format!("it belongs to uid {owner}, and a restored one would belong to uid {euid}"),
            "start the container's user namespace as the user who runs stasis",
        ));
    }
    // The kernel shows `outside` as an id of the reader's namespace, which is the parent: what must be written again.
    let record = UserNamespace {
        uids: parse_map(&read("uid_map")?)?,
        gids: parse_map(&read("gid_map")?)?,
        projects: parse_map(&read("projid_map")?)?,
        setgroups_denied: read("setgroups")?.trim() == "deny",
        owner,
    };
    Ok(DumpedNamespace { record, version: 1 })
}

fn parent(file: &File, name: &str) -> Result<File> {
    // SAFETY: the ioctl takes no argument and gives a new descriptor.
    let fd = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_PARENT) };
    if fd < 0 {
        let error = std::io::Error::last_os_error();
        return Err(HookError::failed(format!("NS_GET_PARENT of {name}"), error)
            .remedy("stasis must run in the parent user namespace"));
    }
    // SAFETY: the kernel just gave us this descriptor.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// The uid that owns a user namespace.
pub(crate) fn owner(file: &File) -> Result<u32> {
    let mut uid: libc::uid_t = 0;
    // SAFETY: the ioctl writes one uid_t.
    if unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_OWNER_UID, &mut uid) } < 0 {
        return Err(HookError::failed("NS_GET_OWNER_UID", std::io::Error::last_os_error()));
    }
    Ok(uid)
}

/// Lines of `uid_map`, `gid_map` and `projid_map`: inside, outside, count.
pub(crate) fn parse_map(text: &str) -> Result<Vec<Extent>> {
    text.lines()
        .map(|line| {
            let mut numbers = line.split_whitespace().map(str::parse::<u32>);
            match (numbers.next(), numbers.next(), numbers.next(), numbers.next()) {
                (Some(Ok(inside)), Some(Ok(outside)), Some(Ok(count)), None) => {
                    Ok(Extent { inside, outside, count })
                }
                _ => Err(HookError::invalid(format!("id map has the line {line:?}"))),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_parsed() {
        let map = parse_map("         0       1000          1\n         1     100000 4294967295\n").unwrap();
        assert_eq!(map[0], Extent { inside: 0, outside: 1000, count: 1 });
        assert_eq!(map[1].count, u32::MAX);
        assert!(parse_map("").unwrap().is_empty());
        assert!(parse_map("0 1").is_err());
        assert!(parse_map("0 1 2 3").is_err());
        assert!(parse_map("0 x 2").is_err());
    }
}
