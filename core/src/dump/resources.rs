//! Step 7 and 8, resources: plugins write their records, core writes tables and handles.

use super::{Context, DumpError, claim, inventory::Claim, inventory::Inventory};
use crate::{
    files::table::{Entry, Handle},
    image::records,
    tree::NamespaceMap,
};
use nix::errno::Errno;
use stasis_plugin_api::{Actor, ActorKind, NamespaceInfo};
use std::{
    collections::HashSet,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

impl From<Actor> for records::Actor {
    fn from(actor: Actor) -> Self {
        let kind = match actor.kind {
            ActorKind::Any => records::ActorKind::Any,
            ActorKind::Task => records::ActorKind::Task,
            ActorKind::SessionLeader => records::ActorKind::SessionLeader,
            ActorKind::StandIn => records::ActorKind::StandIn,
        };
        Self {
            kind: kind as i32,
            pid: actor.pid,
            uid: u32::try_from(actor.uid).unwrap_or_default(),
            gid: u32::try_from(actor.gid).unwrap_or_default(),
            has_ids: actor.uid >= 0 || actor.gid >= 0,
        }
    }
}

/// Has every plugin write the records of its objects.
pub(super) fn objects(context: &Context<'_>) -> Result<(), DumpError> {
    let inventory = context.inventory.borrow();
    for (index, object) in inventory.objects.iter().enumerate() {
        context.check_interrupted()?;
        let Some(kind) = context.registry.descriptor_kind(&object.plugin, &object.kind) else {
            return Err(DumpError::NoSuchKind { plugin: object.plugin.clone(), kind: object.kind.clone() });
        };
        let info = inventory.object_info(index);
        let (task, name, resource) = whose(&inventory, index);
        let host = context.host(&kind.plugin);
        let dumped = context.call(&host, task, &name, &resource).dump(kind, &info);
        let dumped = dumped.map_err(|error| match object.handles.first() {
            Some(&handle) => claim::with_other_taker(context, &inventory, handle, error),
            None => error,
        })?;
        let named = dumped.uses.iter().chain(&dumped.after).copied();
        let mut named = named.chain(object.in_flight.iter().map(|&handle| Inventory::handle_id(handle)));
        if let Some(id) = named.find(|&id| inventory.is_left_out(id)) {
            let link = inventory.handle_info(id).map(|info| info.link.to_string()).unwrap_or_default();
            return Err(DumpError::LeftOut { object: object.description.clone(), link });
        }
        let object_of = |&handle: &u32| match inventory.claims.get((handle as usize).wrapping_sub(1)) {
            Some(Claim::Object { index, .. }) => Some(inventory.objects[*index].id),
            _ => None,
        };
        let mut after: Vec<u32> =
            dumped.after.iter().filter_map(object_of).filter(|&id| id != object.id).collect();
        after.sort_unstable();
        after.dedup();
        context.writer()?.write(&records::Object {
            id: object.id,
            plugin: object.plugin.clone(),
            kind: object.kind.clone(),
            message: kind.declaration.message.to_string(),
            record_version: dumped.version,
            record: dumped.record.into(),
            handles: object.handles.iter().map(|&handle| Inventory::handle_id(handle)).collect(),
            after,
            uses: dumped.uses.into(),
            create_as: Some(dumped.create_as.into()),
            link_as: Some(dumped.link_as.into()),
            settle_as: Some(dumped.settle_as.into()),
            description: object.description.clone(),
            auxiliaries: dumped.auxiliaries,
        })?;
    }
    Ok(())
}

/// Has every plugin take out what can only be read by consuming it.
pub(super) fn commit(context: &Context<'_>) -> Result<(), DumpError> {
    let inventory = context.inventory.borrow();
    for (index, object) in inventory.objects.iter().enumerate() {
        let Some(kind) = context.registry.descriptor_kind(&object.plugin, &object.kind) else { continue };
        let (task, name, resource) = whose(&inventory, index);
        let host = context.host(&kind.plugin);
        context.call(&host, task, &name, &resource).commit(kind, &inventory.object_info(index))?;
    }
    Ok(())
}

/// For messages: a task that holds the object, its name, and the object.
pub(super) fn whose(inventory: &Inventory, index: usize) -> (i32, String, String) {
    let object = &inventory.objects[index];
    let handle = object.handles.first().map(|&handle| &inventory.handles.all[handle]);
    let (pid, number) = handle.map_or((0, -1), |handle| handle.subject());
    let task = inventory.tree.processes.iter().find(|process| process.host_pid == pid);
    let name = task.map(|process| process.name.clone()).unwrap_or_default();
    let resource = match number {
        -1 => object.description.clone(),
        number => format!("descriptor {number}, {}", object.description),
    };
    (pid, name, resource)
}

/// Has every namespace that is not ours dumped by its plugin.
pub(super) fn namespaces(context: &Context<'_>, namespaces: &NamespaceMap) -> Result<(), DumpError> {
    for namespace in &namespaces.foreign {
        // The claims were checked before.
        let Some(kind) = context.registry.namespace(namespace.kind) else { continue };
        let info = NamespaceInfo {
            id: namespace.id,
            kind: namespace.kind.into(),
            ino: namespace.ino,
            members: namespace.members.iter().copied().collect(),
        };
        let resource = format!("namespace {}:[{}]", namespace.kind, namespace.ino);
        let pid = namespace.members.first().copied().unwrap_or_default();
        let host = context.host(&kind.plugin);
        let dumped = context.call(&host, pid, "", &resource).dump_namespace(kind, &info)?;
        let user = namespaces.foreign.iter().find(|other| {
            other.kind == "user" && other.members.iter().any(|member| namespace.members.contains(member))
        });
        context.writer()?.write(&records::NamespaceObject {
            id: namespace.id,
            kind: namespace.kind.into(),
            plugin: kind.plugin.to_string(),
            clone_flag: kind.declaration.clone_flag,
            inode: namespace.ino,
            owner: user.filter(|user| user.id != namespace.id).map_or(0, |user| user.id),
            record: dumped.record.into(),
            record_version: dumped.version,
        })?;
    }
    Ok(())
}

/// Has every plugin with Task hooks look at every task.
pub(super) fn tasks(context: &Context<'_>) -> Result<(), DumpError> {
    let tasks = context.inventory.borrow().tasks();
    for kind in context.registry.tasks() {
        for task in &tasks {
            let host = context.host(&kind.plugin);
            let record = context.call(&host, task.pid, &task.name, "").dump_task(kind, task)?;
            let Some(record) = record else { continue };
            context.writer()?.write(&records::TaskRecord {
                pid: task.pid,
                plugin: kind.plugin.to_string(),
                kind: kind.name().to_string(),
                record: record.into(),
            })?;
        }
    }
    Ok(())
}

/// Writes open file descriptions and descriptor tables. `ids` numbers the tables, by pid as stasis sees it; `uid` is how the
/// tree's user namespace calls a user.
pub(super) fn tables(
    context: &Context<'_>,
    ids: impl Fn(i32) -> u32,
    uid: impl Fn(u32) -> u32,
) -> Result<(), DumpError> {
    let inventory = context.inventory.borrow();
    // What the tree itself writes need not begin as it does now.
    let written: HashSet<(u64, u64)> = inventory.handles.all.iter().filter_map(written).collect();
    for (index, handle) in inventory.handles.all.iter().enumerate() {
        let claim = inventory.claims[index];
        let facts = &handle.facts;
        let (pid, number) = handle.subject();
        if claim == (Claim::LeftOut { null: false }) {
            continue;
        }
        let foreign = matches!(claim, Claim::External | Claim::LeftOut { .. });
        let (owner, signal) = match foreign || handle.holders.is_empty() && handle.in_flight.is_none() {
            true => (None, 0),
            false => signals(&inventory, index, &uid)?,
        };
        if claim == (Claim::LeftOut { null: true }) {
            context.writer()?.write(&null_device(&inventory, index)?)?;
            continue;
        }
        context.writer()?.write(&records::Handle {
            id: Inventory::handle_id(index),
            object: match claim {
                Claim::Object { index, .. } => inventory.objects[index].id,
                _ => 0,
            },
            status_flags: facts.status_flags,
            position: facts.position,
            owner,
            signal,
            path: inventory.paths.get(&index).cloned().map(|path| records::PathRef {
                head: path.head.filter(|_| !written.contains(&(path.dev, path.ino))),
                ..path
            }),
            locks: inventory.locks.get(&index).cloned().unwrap_or_default(),
            role: match claim {
                Claim::Object { role, .. } => role,
                _ => 0,
            },
            external: inventory.external.get(&index).cloned().unwrap_or_default(),
            first_pid: pid,
            first_fd: number as u32,
            in_flight: handle.holders.is_empty(),
        })?;
    }
    let kept = |entry: &&Entry| inventory.claims[entry.handle] != (Claim::LeftOut { null: false });
    let mut tables = HashSet::new();
    for (&pid, table) in inventory.tables.iter().filter(|(pid, _)| tables.insert(ids(**pid))) {
        let descriptors = table.iter().filter(kept).map(|entry| records::Descriptor {
            number: entry.number as u32,
            handle: Inventory::handle_id(entry.handle),
            cloexec: entry.cloexec,
        });
        context
            .writer()?
            .write(&records::DescriptorTable { id: ids(pid), descriptors: descriptors.collect() })?;
    }
    Ok(())
}

/// /dev/null in the place of a handle that is left out.
fn null_device(inventory: &Inventory, index: usize) -> Result<records::Handle, DumpError> {
    let root = &inventory.tree.root().proc;
    let stat = root.stat("root/dev/null")?;
    let (first_pid, number) = inventory.handles.all[index].subject();
    Ok(records::Handle {
        id: Inventory::handle_id(index),
        status_flags: libc::O_RDWR as u32,
        path: Some(records::PathRef {
            path: b"/dev/null".to_vec(),
            dev: stat.st_dev,
            ino: stat.st_ino,
            mode: stat.st_mode,
            ..records::PathRef::default()
        }),
        first_pid,
        first_fd: number as u32,
        ..records::Handle::default()
    })
}

/// The inode of a description that is open for writing.
fn written(handle: &Handle) -> Option<(u64, u64)> {
    let (flags, stat) = (handle.facts.status_flags as i32, &handle.facts.stat);
    let writes = flags & libc::O_PATH == 0 && flags & libc::O_ACCMODE != libc::O_RDONLY;
    writes.then_some((stat.st_dev, stat.st_ino))
}

/// F_GETOWN_EX, F_GETOWNER_UIDS and F_GETSIG (fcntl(2)), which only descriptors with O_ASYNC or an owner make use of. The
/// kernel translates pids into our namespace, and drops owners that are gone.
fn signals(
    inventory: &Inventory,
    index: usize,
    uid: &dyn Fn(u32) -> u32,
) -> Result<(Option<records::Owner>, i32), DumpError> {
    let handle = &inventory.handles.all[index];
    // O_PATH descriptors have neither.
    if handle.facts.status_flags & libc::O_PATH as u32 != 0 {
        return Ok((None, 0));
    }
    let (pid, number) = handle.subject();
    let link = || String::from_utf8_lossy(&handle.facts.link).into_owned();
    let duplicate = inventory
        .open_handle(Inventory::handle_id(index))
        .map_err(|errno| DumpError::Duplicate { pid, number, link: link(), errno })?;
    let fd: BorrowedFd<'_> = duplicate.as_fd();
    #[repr(C)]
    #[derive(Default)]
    struct OwnerEx {
        kind: i32,
        pid: i32,
    }
    const F_GETOWN_EX: i32 = 16;
    const F_GETSIG: i32 = 11;
    let mut owner = OwnerEx::default();
    // SAFETY: F_GETOWN_EX writes one struct f_owner_ex, which `owner` is.
    let got = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, &raw mut owner) };
    // SAFETY: F_GETSIG takes no pointer.
    let signal = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) }.max(0);
    if got < 0 || owner.pid == 0 {
        return Ok((None, signal));
    }
    let process = inventory.tree.processes.iter().find(|process| {
        process.host_pid == owner.pid || process.threads.iter().any(|&(tid, _)| tid == owner.pid)
    });
    const F_OWNER_PGRP: i32 = 2;
    let inner = process.map(|process| match process.threads.iter().find(|(tid, _)| *tid == owner.pid) {
        Some(&(_, inner)) => inner,
        None => process.pid,
    });
    let id = match (inner, owner.kind) {
        (Some(inner), _) => inner,
        (None, F_OWNER_PGRP) => owner.pid,
        (None, _) => {
            return Err(DumpError::ForeignOwner { pid, number, link: link(), owner: owner.pid });
        }
    };
    const F_GETOWNER_UIDS: i32 = 17;
    let mut uids = [0_u32; 2];
    // SAFETY: F_GETOWNER_UIDS writes two uids. EINVAL without CONFIG_CHECKPOINT_RESTORE, which `stasis check` asks for.
    let got = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWNER_UIDS, uids.as_mut_ptr()) };
    Errno::result(got).map_err(|errno| DumpError::Duplicate { pid, number, link: link(), errno })?;
    Ok((Some(records::Owner { kind: owner.kind, id, uid: uid(uids[0]), euid: uid(uids[1]) }), signal))
}
