//! From the live mount namespaces of a tree to a record.

use crate::{
    MountNamespace, contents,
    external::External,
    inside::Space,
    mountinfo::{self, Line},
    plan::Scene,
    record::stasis::ns_mnt::v1::{Class, Mount},
    types::{self, Treatment},
};
use stasis_plugin_api::{DumpedNamespace, HookError, Host, NamespaceInfo, Result, namespace::IdMap};
use std::{
    collections::HashMap,
    fs::{self, File},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

pub(crate) fn dump(host: &Host<'_>, namespace: &NamespaceInfo) -> Result<DumpedNamespace<MountNamespace>> {
    let spaces = spaces(host)?;
    let mut record = MountNamespace { id: namespace.id, mounts: Vec::new() };
    // All are in the record of the first: their mounts are parts of each other.
    if spaces.first().is_some_and(|first| first.ino == namespace.ino) {
        let ours = mountinfo::parse(&read("/proc/self/mountinfo")?)?;
        record.mounts = all(host, namespace.id, &spaces, &ours)?;
    }
    Ok(DumpedNamespace { record, version: 2 })
}

/// The mount namespaces of the tree that are not stasis's own, that of the root task first.
fn spaces(host: &Host<'_>) -> Result<Vec<Space>> {
    let own = fs::metadata("/proc/self/ns/mnt")
        .map_err(|error| HookError::failed("stat of /proc/self/ns/mnt", error))?
        .ino();
    let mut spaces: Vec<Space> = Vec::new();
    for task in host.tasks() {
        let proc = File::from(host.open_proc(task.pid)?);
        // A zombie has no namespaces any more.
        let Ok(stat) = fs::metadata(format!("/proc/self/fd/{}/ns/mnt", proc.as_raw_fd())) else { continue };
        let ino = stat.ino();
        if ino != own && !spaces.iter().any(|space| space.ino == ino) {
            spaces.push(Space { proc, ino });
        }
    }
    Ok(spaces)
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).map_err(|error| HookError::failed(format!("reading {path}"), error))
}

/// The mounts of all namespaces; `ours` are those of stasis's own.
pub(crate) fn all(host: &Host<'_>, id: u32, spaces: &[Space], ours: &[Line]) -> Result<Vec<Mount>> {
    let mut external = External::of(host);
    let mut theirs = Vec::new();
    for (number, space) in spaces.iter().enumerate() {
        let asked = std::mem::take(&mut external.pairs);
        let (lines, found) = space.run(|own| Ok((space.mounts(own)?, resolved(asked))))?;
        external.pairs = found;
        theirs.extend(lines.into_iter().map(|line| Line { namespace: number, ..line }));
    }
    let on_devices = types::on_devices(&read("/proc/filesystems")?);
    let visible = |path: &str, line: &Line| {
        let place = crate::kernel::open_place(path);
        place.and_then(|place| crate::kernel::mount_id(place.as_fd())).is_ok_and(|id| id == line.id)
    };
    let scene =
        Scene { theirs: &theirs, ours, external: &external, on_devices: &on_devices, visible: &visible };
    let mut mounts = scene.plan()?;
    for (number, space) in spaces.iter().enumerate() {
        save(host, id, number, space, &theirs, &mut mounts, &external.enabled)?;
    }
    if mounts.iter().any(|mount| mount.class() == Class::External && mount.host_path.is_empty()) {
        host.warn(
            "the root of the tree's mounts cannot be seen from here: the restore needs --root DIRECTORY",
        );
    }
    Ok(mounts)
}

/// Mountpoints as the kernel shows them, for the user may name them through links.
fn resolved(pairs: Vec<(String, String)>) -> Vec<(String, String)> {
    let resolve = |(place, key): (String, String)| {
        let path = format!("/{}", place.trim_start_matches('/'));
        let found = fs::canonicalize(&path).map_or(path, |path| path.to_string_lossy().into_owned());
        (found, key)
    };
    pairs.into_iter().map(resolve).collect()
}

/// Writes the contents of one namespace's mounts.
fn save(
    host: &Host<'_>,
    id: u32,
    number: usize,
    space: &Space,
    theirs: &[Line],
    mounts: &mut [Mount],
    enabled: &[String],
) -> Result<()> {
    let has_files = |mount: &Mount| match mount.class() {
        Class::Contents => true,
        Class::Fresh => types::find(&mount.fstype, enabled, &[]).treatment == Treatment::Empty,
        _ => mount.removed != 0,
    };
    let wanted: Vec<&Line> = theirs
        .iter()
        .zip(&*mounts)
        .filter(|(line, mount)| line.namespace == number && has_files(mount))
        .map(|(line, _)| line)
        .collect();
    let trees: HashMap<u32, OwnedFd> = space.open_mounts(&wanted)?;
    let maps =
        contents::Maps { uids: IdMap::of(&space.proc, "uid_map")?, gids: IdMap::of(&space.proc, "gid_map")? };
    for (index, (line, mount)) in theirs.iter().zip(mounts).enumerate() {
        if line.namespace == number && matches!(mount.class(), Class::Fresh | Class::Contents) {
            mount.super_options = types::inside(&mount.super_options, &maps.uids, &maps.gids);
        }
        let Some(tree) = trees.get(&line.id).filter(|_| line.namespace == number) else { continue };
        let blob = match mount.class() {
            Class::Contents => contents::blob(id, index),
            Class::Fresh => {
                refuse_files(tree, line, types::find(&line.fstype, &[], &[]).own_files)?;
                continue;
            }
            _ => {
                let stat = nix::sys::stat::fstat(tree);
                mount.removed = stat.map_err(|errno| HookError::failed("fstat of a mount", errno))?.st_mode;
                contents::removed_blob(id, index)
            }
        };
        if !host.is_dry_run() {
            contents::save(tree, &line.mountpoint, &maps, &mut host.blob_writer(&blob))?;
        }
    }
    // Each mount that goes waits for all processors, for which the frozen tree need not wait.
    std::thread::spawn(move || drop(trees));
    Ok(())
}

/// Of this type only an empty one can be made.
fn refuse_files(tree: &OwnedFd, line: &Line, own: &[&str]) -> Result<()> {
    let files = fs::read_dir(contents::path_of(tree))
        .map_err(|error| HookError::failed(format!("reading {}", line.mountpoint), error))?;
    match files.flatten().find(|file| !own.iter().any(|name| file.file_name() == *name)) {
        None => Ok(()),
        Some(file) => Err(HookError::unsupported(
            line.label(),
            format!("it has files ({}), which are not kept for this type", file.file_name().display()),
            format!("remove them, or give --enable-fs={} if an empty new one will do", line.fstype),
        )),
    }
}
