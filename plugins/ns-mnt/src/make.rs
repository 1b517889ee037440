//! One mount, made from its record and not attached yet.

use crate::{
    contents,
    external::External,
    kernel::{clone_mount, make_read_only, new_filesystem, open_within, set_flags, set_propagation},
    mountinfo,
    record::stasis::ns_mnt::v1::{Class, Mount},
    types::{self, Treatment},
};
use stasis_plugin_api::{HookError, Host, Result};
use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

/// From what a mount is made.
pub(crate) struct Source<'a, 'h> {
    pub host: &'a Host<'h>,
    /// Of the namespace, part of the blobs' names.
    pub id: u32,
    /// Of the mount, likewise.
    pub index: usize,
    /// A copy of what the host has.
    pub given: Option<&'a OwnedFd>,
}

/// The place on the host of what a mount shows.
pub(crate) fn host_path(mount: &Mount) -> Result<String> {
    match mount.host_path.as_str() {
        "" => Err(HookError::invalid(format!(
            "the {} file system at {} was not mounted on the host of the dump",
            mount.fstype, mount.mountpoint
        ))
        .remedy("mount it somewhere and give that directory: --root DIRECTORY")),
        path => Ok(path.to_owned()),
    }
}

/// What the user gives for an external mount.
pub(crate) fn named_source(mount: &Mount, external: &External) -> Result<String> {
    match external.find(&mount.key) {
        Some(source) if !source.is_empty() => Ok(source.to_owned()),
        _ => Err(HookError::invalid(format!("mount {} was external at the dump", mount.mountpoint))
            .remedy(format!("--external mnt[{key}]:SOURCE says what to mount there", key = mount.key))),
    }
}

/// Whether a mount can be made before any other is in place.
pub(crate) fn is_early(mount: &Mount) -> bool {
    match mount.class() {
        Class::Inherited | Class::Internal => false,
        Class::Fresh => types::find(&mount.fstype, &[], &[]).treatment != Treatment::Late,
        Class::External | Class::Named | Class::Contents => true,
    }
}

/// The flags of a mount.
pub(crate) fn flags(mount: &Mount) -> Result<u64> {
    mountinfo::flags(&mount.options)
        .map_err(|option| HookError::invalid(format!("the image has the mount option {option}")))
}

pub(crate) fn failed(mount: &Mount, what: &str) -> impl Fn(io::Error) -> HookError {
    let what = format!("{what} of {} ({})", mount.mountpoint, mount.fstype);
    move |error| HookError::failed(what.clone(), error)
}

/// Gives a new mount its flags. It belongs to no group yet.
pub(crate) fn prepare(mount: &Mount, tree: &OwnedFd) -> Result<()> {
    set_propagation(tree, libc::MS_PRIVATE).map_err(failed(mount, "the propagation"))?;
    set_flags(tree, flags(mount)?).map_err(failed(mount, &format!("the options {}", mount.options)))
}

/// Makes a mount that is no part of another one.
pub(crate) fn make(mount: &Mount, source: &Source<'_, '_>) -> Result<OwnedFd> {
    let tree = match (mount.class(), source.given) {
        (Class::External | Class::Named | Class::Contents, Some(given)) => {
            given.try_clone().map_err(failed(mount, "the source"))?
        }
        (Class::Fresh | Class::Contents, _) => new_instance(mount, source)?,
        _ => return Err(HookError::invalid(format!("the image's mount {} has no source", mount.mountpoint))),
    };
    prepare(mount, &tree)?;
    Ok(tree)
}

/// A new file system, or the part of it that the mount shows.
fn new_instance(mount: &Mount, source: &Source<'_, '_>) -> Result<OwnedFd> {
    let options = types::options(&mount.super_options);
    let read_only = mount.super_options.split(',').any(|option| option == "ro");
    let contents = mount.class() == Class::Contents;
    // A shared one, as sysfs is, would not be made writable for our sake.
    let early: Vec<&str> = options.into_iter().chain((read_only && !contents).then_some("ro")).collect();
    let whole = new_filesystem(&mount.fstype, &mount.source, &early)?;
    let inner = mount.root.trim_start_matches('/');
    if contents {
        let base = contents::path_of(&whole);
        let place = if inner.is_empty() { base } else { base.join(checked(inner)?) };
        fs::create_dir_all(&place).map_err(failed(mount, "the directories"))?;
        let blob = contents::blob(source.id, source.index);
        contents::load(&place, &mount.mountpoint, &mut source.host.blob_reader(&blob))?;
        if read_only {
            make_read_only(&whole).map_err(failed(mount, "the read-only file system"))?;
        }
    }
    if inner.is_empty() {
        return Ok(whole);
    }
    let part = open_within(whole.as_fd(), inner).map_err(failed(mount, "the root"))?;
    clone_mount(part.as_fd(), "").map_err(failed(mount, "the root"))
}

/// A path of the image must stay below the root that it is joined to.
pub(crate) fn checked(path: &str) -> Result<&Path> {
    let path = Path::new(path);
    let plain = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    let wrong = || HookError::invalid(format!("the image has the path {}", path.display()));
    plain.then_some(path).ok_or_else(wrong)
}
