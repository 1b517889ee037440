//! The mount API of mount_setattr(2), fsopen(2) and their like: mounts are descriptors, and paths matter only where a mount
//! is attached.

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx},
    mount::{
        FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags,
        fsconfig_create, fsconfig_reconfigure, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
        fspick, move_mount, open_tree,
    },
};
use stasis_plugin_api::{HookError, Result};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

/// A detached copy of one mount, without the mounts below it.
pub(crate) fn clone_mount(directory: BorrowedFd<'_>, path: &str) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(open_tree(directory, path, flags | OpenTreeFlags::AT_EMPTY_PATH)?)
}

/// The same, of what a path of this process leads to.
pub(crate) fn clone_path(path: &str) -> Result<OwnedFd> {
    clone_mount(CWD, path).map_err(|error| HookError::failed(format!("taking a bind mount of {path}"), error))
}

/// What is at a path, which is not followed if it is a link (O_PATH).
pub(crate) fn open_place(path: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// What is at a relative path inside of a mount (O_PATH), not of one that lies over it.
pub(crate) fn open_within(mount: BorrowedFd<'_>, relative: &str) -> io::Result<OwnedFd> {
    if relative.is_empty() {
        return mount.try_clone_to_owned();
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat2(mount, relative, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_XDEV)?)
}

/// Attaches a detached mount.
pub(crate) fn attach(mount: &OwnedFd, place: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, "", place, "", flags)?)
}

/// Makes `to`, which is private, a member of whatever groups `from` is in.
pub(crate) fn join_groups(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_SET_GROUP
        | MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH
        | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(from, "", to, "", flags)?)
}

fn set_attributes(mount: &OwnedFd, attributes: &libc::mount_attr) -> io::Result<()> {
    // SAFETY: an empty path, and a struct of the size that is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives a mount these flags (`MOUNT_ATTR_*`) and no others.
pub(crate) fn set_flags(mount: &OwnedFd, flags: u64) -> io::Result<()> {
    const ALL: u64 = libc::MOUNT_ATTR_RDONLY
        | libc::MOUNT_ATTR_NOSUID
        | libc::MOUNT_ATTR_NODEV
        | libc::MOUNT_ATTR_NOEXEC
        | libc::MOUNT_ATTR__ATIME
        | libc::MOUNT_ATTR_NODIRATIME
        | libc::MOUNT_ATTR_NOSYMFOLLOW;
    set_attributes(mount, &libc::mount_attr { attr_set: flags, attr_clr: ALL, propagation: 0, userns_fd: 0 })
}

/// Sets the propagation of a mount (`MS_PRIVATE`, ...).
pub(crate) fn set_propagation(mount: &OwnedFd, propagation: u64) -> io::Result<()> {
    set_attributes(mount, &libc::mount_attr { attr_set: 0, attr_clr: 0, propagation, userns_fd: 0 })
}

/// A detached mount of a new instance of a file system. Options are those of mountinfo: `NAME` or `NAME=VALUE`.
pub(crate) fn new_filesystem(fstype: &str, source: &str, options: &[&str]) -> Result<OwnedFd> {
    let failed = |what: &str| {
        let what = format!("{what} of a new {fstype}");
        move |errno: rustix::io::Errno| HookError::failed(what, io::Error::from(errno))
    };
    let context = fsopen(fstype, FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen"))?;
    if !source.is_empty() {
        fsconfig_set_string(context.as_fd(), "source", source).map_err(failed("the source"))?;
    }
    for option in options {
        let set = match option.split_once('=') {
            Some((name, value)) => fsconfig_set_string(context.as_fd(), name, value),
            None => fsconfig_set_flag(context.as_fd(), *option),
        };
        set.map_err(failed(&format!("option {option}")))?;
    }
    fsconfig_create(context.as_fd()).map_err(failed("the instance"))?;
    let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty());
    mount.map_err(failed("the mount"))
}

/// Makes a file system read-only, not only its mount.
pub(crate) fn make_read_only(mount: &OwnedFd) -> io::Result<()> {
    let context = fspick(mount, "", FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC)?;
    fsconfig_set_flag(context.as_fd(), "ro")?;
    Ok(fsconfig_reconfigure(context.as_fd())?)
}

/// The number by which mountinfo knows the mount that a descriptor is on.
pub(crate) fn mount_id(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let found = statx(fd, "", AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT, StatxFlags::MNT_ID)?;
    Ok(u32::try_from(found.stx_mnt_id).unwrap_or(u32::MAX))
}
