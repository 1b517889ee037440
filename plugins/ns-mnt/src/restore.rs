//! Turns a copy of stasis's mount namespace into the recorded one: takes away what it has too much, adds what is
//! missing, and compares at the end.

use crate::{
    MountNamespace, contents,
    mountinfo::{self, Line, join},
    record::stasis::ns_mnt::v1::{Class, Mount},
};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::{chdir, pivot_root},
};
use stasis_plugin_api::{HookError, Host, Result};
use std::{
    ffi::CString,
    fs::{self, File},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

const NONE: Option<&str> = None;

pub(crate) fn enter(host: &Host<'_>, record: &MountNamespace) -> Result<()> {
    // From here on nothing propagates back to the namespace that this is a copy of.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
        .map_err(|errno| HookError::failed("making the copied mounts private", errno))?;
    let Some(root) = record.mounts.first() else {
        return Err(HookError::invalid("a mount namespace without mounts"));
    };
    let current = current()?;
    // Sources first: what follows may take away the way to them.
    let sources = record
        .mounts
        .iter()
        .map(|mount| (mount.class() == Class::External).then(|| clone_tree(&mount.host_path)).transpose())
        .collect::<Result<Vec<_>>>()?;
    let pivot = root.class() != Class::Inherited;
    let base = if pivot { root.host_path.as_str() } else { "/" };
    let kept = if pivot { vec![None; record.mounts.len()] } else { strip(&current, record)? };
    for (index, (mount, source)) in record.mounts.iter().zip(&sources).enumerate() {
        let target = join(base, &mount.mountpoint);
        if kept[index].is_none() {
            make(host, record, index, &target, base, source.as_ref())?;
        }
        set_flags(mount, &target)?;
    }
    if pivot {
        let steps = chdir(base)
            .and_then(|()| pivot_root(".", "."))
            .and_then(|()| umount2(".", MntFlags::MNT_DETACH))
            .and_then(|()| chdir("/"));
        steps.map_err(|errno| HookError::failed(format!("making {base} the root"), errno))?;
    }
    compare(&self::current()?, &record.mounts)
}

fn current() -> Result<Vec<Line>> {
    let text = fs::read_to_string("/proc/self/mountinfo")
        .map_err(|error| HookError::failed("reading /proc/self/mountinfo", error))?;
    mountinfo::parse(&text)
}

/// Unmounts what the image lacks; says which mount of ours each inherited one is.
fn strip(current: &[Line], record: &MountNamespace) -> Result<Vec<Option<u32>>> {
    let mut kept: Vec<Option<u32>> = Vec::new();
    for mount in &record.mounts {
        let parent = usize::try_from(mount.parent).ok().map(|index| kept.get(index).copied().flatten());
        let same = current.iter().find(|line| {
            let place = match parent {
                None => !current.iter().any(|other| other.id == line.parent),
                Some(parent) => Some(line.parent) == parent && line.mountpoint == mount.mountpoint,
            };
            place && (&line.root, &line.fstype, &line.source) == (&mount.root, &mount.fstype, &mount.source)
        });
        if mount.class() != Class::Inherited {
            kept.push(None);
            continue;
        }
        let same = same.ok_or_else(|| {
            HookError::invalid(format!(
                "stasis's namespace has no mount of {} ({}) at {} any more",
                mount.source, mount.fstype, mount.mountpoint
            ))
            .remedy("mount it again, or restore where it is mounted")
        })?;
        kept.push(Some(same.id));
    }
    // Children come after their parents, so the topmost goes first.
    for line in current.iter().rev().filter(|line| !kept.contains(&Some(line.id))) {
        umount2(line.mountpoint.as_str(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).map_err(
            |errno| {
                let error =
                    HookError::failed(format!("unmounting {} ({})", line.mountpoint, line.fstype), errno);
                match errno {
                    // CL_UNPRIVILEGED copies are locked (mount_namespaces(7)).
                    Errno::EINVAL => {
                        error.remedy("unmount it outside; in a user namespace it cannot be taken away")
                    }
                    _ => error,
                }
            },
        )?;
    }
    Ok(kept)
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| HookError::invalid("the image has a path with a NUL byte"))
}

/// A detached copy of what is mounted at a path, without mounts below it.
fn clone_tree(path: &str) -> Result<OwnedFd> {
    const OPEN_TREE_CLONE: u32 = 1;
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as u32;
    let c_path = c_string(path)?;
    // SAFETY: the path is NUL-terminated and lives through the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, c_path.as_ptr(), flags) };
    if fd < 0 {
        let error = std::io::Error::last_os_error();
        return Err(HookError::failed(format!("taking a bind mount of {path}"), error));
    }
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn attach(tree: &OwnedFd, target: &str) -> Result<()> {
    const MOVE_MOUNT_F_EMPTY_PATH: u32 = 4;
    let c_target = c_string(target)?;
    // SAFETY: both paths are NUL-terminated and live through the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            c_target.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(HookError::failed(format!("mounting at {target}"), std::io::Error::last_os_error())),
    }
}

fn make(
    host: &Host<'_>,
    record: &MountNamespace,
    index: usize,
    target: &str,
    base: &str,
    source: Option<&OwnedFd>,
) -> Result<()> {
    let saved = &record.mounts[index];
    match (saved.class(), source) {
        (Class::External, Some(source)) => attach(source, target),
        (Class::Internal, _) => {
            let of = record.mounts.get(saved.of as usize).filter(|_| (saved.of as usize) < index);
            let of = of.ok_or_else(|| HookError::invalid("the image has a mount of a later mount"))?;
            attach(&clone_tree(&join(&join(base, &of.mountpoint), &saved.within))?, target)
        }
        (Class::Fresh | Class::Contents, _) => {
            let data = data(saved);
            mount(
                Some(saved.source.as_str()),
                target,
                Some(saved.fstype.as_str()),
                MsFlags::empty(),
                Some(data.as_str()),
            )
            .map_err(|errno| HookError::failed(format!("mounting {} at {target}", saved.fstype), errno))?;
            if saved.class() == Class::Contents {
                let root = File::open(target)
                    .map_err(|error| HookError::failed(format!("opening {target}"), error))?;
                let blob = contents::blob(record.id, index);
                contents::load(&root.into(), &saved.mountpoint, &mut host.blob_reader(&blob))?;
            }
            Ok(())
        }
        (Class::Inherited | Class::External, _) => {
            Err(HookError::invalid(format!("the image's mount {} has no source", saved.mountpoint)))
        }
    }
}

/// Options of the file system. Owner and mode of a tmpfs come with its contents, in ids of the right namespace.
fn data(saved: &Mount) -> String {
    const NOT_DATA: &[&str] = &["rw", "ro"];
    const OF_CONTENTS: &[&str] = &["uid", "gid"];
    let keep = |option: &&str| {
        let name = option.split('=').next().unwrap_or_default();
        let elsewhere = saved.fstype == "tmpfs" && OF_CONTENTS.contains(&name);
        !NOT_DATA.contains(option) && !elsewhere
    };
    let mut options: Vec<&str> = saved.super_options.split(',').filter(keep).collect();
    if saved.fstype == "devpts" {
        options.push("newinstance");
    }
    options.join(",")
}

fn set_flags(saved: &Mount, target: &str) -> Result<()> {
    let wanted = mountinfo::flags(&saved.options)
        .map_err(|option| HookError::invalid(format!("the image has the mount option {option}")))?;
    let failed = |errno| HookError::failed(format!("setting {} of {target}", saved.options), errno);
    let stat = nix::sys::statvfs::statvfs(target).map_err(failed)?;
    // Flags of statvfs(3) and mount(2) have the same bits up to MS_NOEXEC.
    let simple = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let has = MsFlags::from_bits_truncate(stat.flags().bits()) & simple;
    if saved.class() != Class::Inherited || has != wanted & simple {
        mount(NONE, target, NONE, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | wanted, NONE).map_err(failed)?;
    }
    if saved.super_options.split(',').any(|option| option == "ro")
        && matches!(saved.class(), Class::Fresh | Class::Contents)
    {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | wanted;
        mount(NONE, target, NONE, flags, Some(data(saved).as_str())).map_err(failed)?;
    }
    if saved.shared {
        mount(NONE, target, NONE, MsFlags::MS_SHARED, NONE)
            .map_err(|errno| HookError::failed(format!("sharing {target}"), errno))?;
    }
    Ok(())
}

/// What a mount is known by, in messages too.
fn shown(mountpoint: &str, fstype: &str, root: &str, options: &str) -> String {
    let mut options: Vec<&str> = options.split(',').collect();
    options.sort_unstable();
    format!("{mountpoint} ({fstype}, {root}, {})", options.join(","))
}

/// Every mount must be there, with its flags, and no other.
fn compare(current: &[Line], wanted: &[Mount]) -> Result<()> {
    let mut is: Vec<String> =
        current.iter().map(|line| shown(&line.mountpoint, &line.fstype, &line.root, &line.options)).collect();
    for mount in wanted {
        let name = shown(&mount.mountpoint, &mount.fstype, &mount.root, &mount.options);
        match is.iter().position(|other| *other == name) {
            Some(at) => drop(is.swap_remove(at)),
            None => return Err(HookError::invalid(format!("mount {name} could not be made as it was"))),
        }
    }
    match is.first() {
        None => Ok(()),
        Some(other) => {
            Err(HookError::invalid(format!("mount {other} is left, which the image does not have")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_file_systems() {
        let saved = |fstype: &str, options: &str| Mount {
            fstype: fstype.into(),
            super_options: options.into(),
            ..Mount::default()
        };
        assert_eq!(data(&saved("tmpfs", "rw,size=4k,mode=755,uid=1000,gid=5")), "size=4k,mode=755");
        assert_eq!(data(&saved("devpts", "rw,gid=5,mode=620")), "gid=5,mode=620,newinstance");
        assert_eq!(data(&saved("proc", "rw")), "");
    }

    #[test]
    fn differences_are_named() {
        let line = "27 1 254:0 / / relatime,rw - ext4 /dev/vda rw";
        let wanted = Mount {
            mountpoint: "/".into(),
            root: "/".into(),
            fstype: "ext4".into(),
            options: "rw,relatime".into(),
            ..Mount::default()
        };
        let one = mountinfo::parse(line).unwrap();
        compare(&one, std::slice::from_ref(&wanted)).unwrap();
        assert!(compare(&one, &[]).unwrap_err().what.contains("/ (ext4"));
        assert!(compare(&[], &[wanted]).unwrap_err().what.contains("could not be made"));
    }
}
