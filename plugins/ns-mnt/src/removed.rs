//! Mounts of what was removed since. It is made again for the moment, since only what has a name can be attached
//! (do_move_mount, fs/namespace.c), and removed when all mounts are in place.

use crate::{
    contents,
    kernel::{clone_mount, open_within},
    make::{Source, checked, failed, prepare},
    record::stasis::ns_mnt::v1::Mount,
};
use rustix::fs::{AtFlags, Timespec, Timestamps, fstat, unlinkat, utimensat};
use stasis_plugin_api::Result;
use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
};

/// A name that is there for the moment; it goes when this is dropped.
pub(crate) struct Name {
    /// Its directory.
    directory: OwnedFd,
    name: String,
    is_directory: bool,
    times: Timestamps,
}

impl Drop for Name {
    fn drop(&mut self) {
        let flags = if self.is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        let removed = unlinkat(&self.directory, &self.name, flags);
        // The user's directory is as it was; a user namespace may forbid that, which is no reason to fail.
        let _ = removed.and_then(|()| utimensat(&self.directory, "", &self.times, AtFlags::EMPTY_PATH));
    }
}

/// A mount of something that is made at `path` of the mount `within`.
pub(crate) fn make(
    mount: &Mount,
    source: &Source<'_, '_>,
    within: &OwnedFd,
    path: &str,
) -> Result<(OwnedFd, Name)> {
    let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
    checked(name)?;
    let directory =
        open_within(within.as_fd(), above).map_err(failed(mount, "the directory of the source"))?;
    let base = contents::path_of(&directory).join(".");
    let others = (0..1000).map(|n| format!(".stasis-mount.{}.{n}", source.index));
    let free = |name: &String| fs::symlink_metadata(base.join(name)).is_err();
    let name = std::iter::once(name.to_owned()).chain(others).find(free);
    let name =
        name.ok_or_else(|| failed(mount, "a name for the source")(io::ErrorKind::AlreadyExists.into()))?;
    let stat = fstat(&directory).map_err(|errno| failed(mount, "the source's directory")(errno.into()))?;
    let time = |tv_sec: i64, nanoseconds: u64| Timespec { tv_sec, tv_nsec: nanoseconds as i64 };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    let is_directory = mount.removed & libc::S_IFMT == libc::S_IFDIR;
    if is_directory {
        fs::create_dir(base.join(&name)).map_err(failed(mount, "the source"))?;
    }
    let made = Name { directory, name, is_directory, times };
    let blob = contents::removed_blob(source.id, source.index);
    contents::load(&base.join(&made.name), &mount.mountpoint, &mut source.host.blob_reader(&blob))?;
    let part = open_within(made.directory.as_fd(), &made.name).map_err(failed(mount, "the source"))?;
    let tree = clone_mount(part.as_fd(), "").map_err(failed(mount, "the source"))?;
    prepare(mount, &tree)?;
    Ok((tree, made))
}
