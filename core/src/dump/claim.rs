//! Step 4: every resource is claimed by core or by exactly one plugin, or the dump stops here, before anything is injected
//! or written, with the full list.

use super::{
    Context, DumpError,
    inventory::{Claim, Inventory},
    unclaimed::{self, Policy, Unclaimed},
};
use crate::{
    files::{Names, locks, table::Handle},
    image::records::{FileLock, LockKind, PathRef},
    memory::describe::{Unknown, map_file},
    plugins::{DescriptorKind, HandleFacts, MappingFacts, MappingKind, PluginError, Wanted},
    proc::{ProcDir, mappings::Mapping},
    tree::{Process, Tree},
};
use nix::errno::Errno;
use stasis_plugin_api::{ErrorKind, HandleInfo, VmaInfo};
use std::cell::OnceCell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// SO_DOMAIN, SO_TYPE and SO_PROTOCOL of a socket.
fn socket_facts(fd: BorrowedFd<'_>) -> Option<[i32; 3]> {
    let get = |name: libc::c_int| {
        let (mut value, mut length) = (0_i32, size_of::<i32>() as libc::socklen_t);
        // SAFETY: `value` and `length` describe an int to write to.
        let result = unsafe {
            libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, name, (&raw mut value).cast(), &mut length)
        };
        (result == 0).then_some(value)
    };
    Some([get(libc::SO_DOMAIN)?, get(libc::SO_TYPE)?, get(libc::SO_PROTOCOL)?])
}

/// f_type of statfs(2).
fn filesystem_magic(fd: BorrowedFd<'_>) -> Option<u64> {
    nix::sys::statfs::fstatfs(fd).ok().map(|statfs| statfs.filesystem_type().0 as u64)
}

/// Regular files and directories with a path are core's own, and whatever is only named (O_PATH): nothing happens when
/// such a descriptor is opened.
fn is_path_backed(handle: &Handle) -> bool {
    let kind = handle.facts.stat.st_mode & libc::S_IFMT;
    let named = handle.facts.status_flags & libc::O_PATH as u32 != 0;
    (named || kind == libc::S_IFREG || kind == libc::S_IFDIR) && handle.facts.link.starts_with(b"/")
}

/// The locks of a description, each once; or why they cannot be kept.
fn locks(
    context: &Context<'_>,
    inventory: &Inventory,
    handle: &Handle,
) -> Result<Result<Vec<FileLock>, (String, String)>, DumpError> {
    let mut found: Vec<FileLock> = Vec::new();
    for (pid, text) in &handle.locks {
        let Some(process) = inventory.tree.processes.iter().find(|process| process.host_pid == *pid) else {
            continue;
        };
        let shown = match locks::parse(text, process.pid) {
            Ok(shown) => shown,
            Err(error) => return Ok(Err((error.to_string(), "let the program unlock it".into()))),
        };
        if shown.iter().any(|lock| lock.kind() == LockKind::Posix) {
            // Restoring closes a descriptor of the executable, and with it go all locks that the process has on it.
            let (exe, stat) = (process.proc.stat("exe")?, &handle.facts.stat);
            if (exe.st_dev, exe.st_ino) == (stat.st_dev, stat.st_ino) {
                let why = "is locked by the program whose executable it is".to_owned();
                return Ok(Err((why, "let the program unlock it".into())));
            }
        }
        found.extend(shown);
    }
    found.sort_by_key(|lock| (lock.kind, lock.pid, lock.start));
    found.dedup();
    if !found.is_empty() && !context.options.file_locks {
        return Ok(Err((
            "is locked".into(),
            "--file-locks keeps locks, if nobody takes them meanwhile".into(),
        )));
    }
    Ok(Ok(found))
}

/// A file or directory of core's: its name for the image, or why there is none.
fn path_backed(
    tree: &Tree,
    handle: &Handle,
    names: &mut Names,
    open: impl FnOnce() -> Result<OwnedFd, Errno>,
) -> Result<Result<PathRef, (String, String)>, DumpError> {
    let facts = &handle.facts;
    let (pid, number) = handle.subject();
    let file = format!("fd/{number}");
    let (link, stat) = (&facts.link, &facts.stat);
    let reads = facts.status_flags & (libc::O_ACCMODE | libc::O_PATH) as u32 == libc::O_RDONLY as u32;
    let refer = |proc: &ProcDir| match reads {
        true => names.refer_read(proc, &file, link, stat, open),
        false => names.refer(proc, &file, link, stat),
    };
    let found = match tree.processes.iter().find(|process| process.host_pid == pid) {
        Some(process) => refer(&process.proc),
        None => refer(&ProcDir::open(pid)?),
    };
    Ok(found.map_err(|refusal| (refusal.to_string(), refusal.remedy())))
}

/// Asks for every descriptor who takes it, until no further one turns up in flight.
pub(super) fn descriptors(
    context: &Context<'_>,
    names: &mut Names,
    missing: &mut Vec<Unclaimed>,
) -> Result<(), DumpError> {
    let mut next = 0;
    while next < context.inventory.borrow().handles.all.len() {
        let (claim, in_flight) = descriptor(context, next, names, missing)?;
        let inventory = &mut *context.inventory.borrow_mut();
        inventory.claims.push(claim);
        if let Claim::Object { index, .. } = claim {
            inventory.objects[index].handles.push(next);
            for fd in in_flight {
                let handle = inventory.handles.add_in_flight(fd)?;
                inventory.objects[index].in_flight.push(handle);
            }
        }
        next += 1;
    }
    Ok(())
}

/// The key of `--external` by which the user says that a descriptor stays outside: its link, or CRIU's `file[MOUNT:INODE]`.
fn external_key(context: &Context<'_>, handle: &Handle, info: &HandleInfo) -> Option<String> {
    let keys = &context.options.external;
    if keys.is_empty() {
        return None;
    }
    let mount: u64 = info.field("mnt_id").ok()?.parse().ok()?;
    let file = format!("file[{mount:x}:{:x}]", handle.facts.stat.st_ino);
    keys.iter().find(|key| **key == info.link.as_str() || **key == file).cloned()
}

/// What becomes of a descriptor that nobody takes: an entry in the list, unless the user wants it left out.
fn refuse(
    context: &Context<'_>,
    handle: &Handle,
    class: &str,
    entry: Unclaimed,
    missing: &mut Vec<Unclaimed>,
) -> Claim {
    let policy = unclaimed::policy(&context.options.on_unclaimed, class);
    // What some object or mapping alone has cannot be left out: they name it.
    if policy == Policy::Fail || handle.holders.is_empty() {
        missing.push(entry);
        return Claim::Refused;
    }
    context.warnings.borrow_mut().push(format!("left out: {entry}"));
    Claim::LeftOut { null: policy == Policy::Null }
}

/// Calls `f` with the facts by which a handle is claimed. Most kinds need a duplicate, which is put into `opened`; plain
/// files do not, and an O_PATH descriptor of a device cannot be asked anything.
fn facts_of<T>(
    context: &Context<'_>,
    inventory: &Inventory,
    (index, info): (usize, &HandleInfo),
    opened: &OnceCell<Result<OwnedFd, Errno>>,
    f: impl FnOnce(&HandleFacts<'_>) -> T,
) -> T {
    let open = || opened.get_or_init(|| inventory.open_handle(Inventory::handle_id(index))).as_ref();
    let magic = || filesystem_magic(open().ok()?.as_fd());
    let socket = || socket_facts(open().ok()?.as_fd());
    let judge = |kind: &DescriptorKind| {
        let host = context.host(&kind.plugin);
        // Asked for many descriptors: no text is made for a message that hardly ever comes.
        let (pid, _) = inventory.handles.all[index].subject();
        context.call(&host, pid, "", &info.link).claims(kind, info)
    };
    f(&HandleFacts::new(info, &magic, &socket, &judge))
}

/// Which plugin would take a handle that nobody takes, or that `refuser` takes but refuses, and what must be done for that.
fn other_taker(context: &Context<'_>, inventory: &Inventory, index: usize, refuser: Option<&str>) -> String {
    let opened = OnceCell::new();
    let info = inventory.handle_info(Inventory::handle_id(index)).unwrap_or_default();
    facts_of(context, inventory, (index, &info), &opened, |facts| {
        context.registry.remedy(Wanted::Handle(facts), refuser)
    })
}

/// A refusal of a plugin, with the name of another one that would take the handle, if there is one.
pub(super) fn with_other_taker(
    context: &Context<'_>,
    inventory: &Inventory,
    index: usize,
    mut error: PluginError,
) -> PluginError {
    let other = match error.source.kind {
        ErrorKind::Unsupported => other_taker(context, inventory, index, Some(&error.plugin)),
        _ => String::new(),
    };
    let remedy = &mut error.source.remedy;
    if !other.is_empty() {
        *remedy = if remedy.is_empty() { other.into() } else { format!("{remedy}; {other}").into() };
    }
    error
}

fn descriptor(
    context: &Context<'_>,
    index: usize,
    names: &mut Names,
    missing: &mut Vec<Unclaimed>,
) -> Result<(Claim, Vec<OwnedFd>), DumpError> {
    let id = Inventory::handle_id(index);
    let inventory = context.inventory.borrow();
    let handle = &inventory.handles.all[index];
    let (pid, number) = handle.subject();
    let (pid, place) = match &handle.mapped {
        Some((pid, place)) => (*pid, place.clone()),
        None => (pid, format!("descriptor {number}")),
    };
    // The loop of the caller goes over existing handles only.
    let info = inventory.handle_info(id).unwrap_or_default();
    if let Some(key) = external_key(context, handle, &info) {
        drop(inventory);
        context.inventory.borrow_mut().external.insert(index, key);
        return Ok((Claim::External, Vec::new()));
    }
    let class = unclaimed::class(&info.link, info.mode);
    let mut refused = |what, remedy| {
        let entry = unclaimed::unclaimed(&inventory.tree, pid, place.clone(), what, remedy);
        Ok((refuse(context, handle, class, entry, missing), Vec::new()))
    };
    let locked = match locks(context, &inventory, handle)? {
        Ok(locks) => locks,
        Err((why, remedy)) => return refused(format!("{} {why}", info.link), remedy),
    };
    let task = inventory.tree.processes.iter().find(|process| process.host_pid == pid);
    let task_name = task.map_or("", |process| process.name.as_str());
    let resource = format!("{place}, {}", info.link);
    let opened = OnceCell::new();
    let open = || opened.get_or_init(|| inventory.open_handle(id));
    let kind = facts_of(context, &inventory, (index, &info), &opened, |facts| {
        context.registry.descriptor_for(facts)
    })?;
    let Some(kind) = kind else {
        if !is_path_backed(handle) {
            let plugin = other_taker(context, &inventory, index, None);
            let remedy = unclaimed::way_out(class, &info.link, plugin);
            return refused(format!("{} is claimed by no enabled plugin", info.link), remedy);
        }
        return match path_backed(&inventory.tree, handle, names, || inventory.open_handle(id))? {
            Err((why, remedy)) => refused(format!("{} {why}", info.link), remedy),
            Ok(path) => {
                drop(inventory);
                let mut inventory = context.inventory.borrow_mut();
                inventory.paths.insert(index, path);
                inventory.keep_locks(index, locked);
                Ok((Claim::Path, Vec::new()))
            }
        };
    };
    let fd = open().as_ref().map_err(|&errno| DumpError::Duplicate {
        pid,
        number,
        link: info.link.to_string(),
        errno,
    })?;
    let host = context.host(&kind.plugin);
    let call = context.call(&host, pid, task_name, &resource);
    let (described, in_flight) = match call.describe(kind, &info, fd.as_fd()) {
        Ok(described) => described,
        // All of them at once, as what nobody claims.
        Err(error) if error.source.kind == ErrorKind::Unsupported => {
            let error = with_other_taker(context, &inventory, index, error);
            return refused(format!("{}: {}", info.link, error.source.what), error.source.remedy.to_string());
        }
        Err(error) => return Err(error.into()),
    };
    let (plugin, kind) = (kind.plugin.clone(), kind.name().to_string());
    drop(inventory);
    let inventory = &mut *context.inventory.borrow_mut();
    inventory.keep_locks(index, locked);
    let index = inventory.object(&plugin, &kind, &described.identity, &described.description);
    Ok((Claim::Object { index, role: described.role }, in_flight))
}

/// Asks for the objects behind controlling terminals: some are held by no descriptor.
pub(super) fn sessions(context: &Context<'_>, missing: &mut Vec<Unclaimed>) -> Result<(), DumpError> {
    let sessions = context.inventory.borrow().sessions();
    for session in sessions {
        let major = libc::major(session.terminal);
        let resource =
            format!("terminal {major}:{} of session {}", libc::minor(session.terminal), session.sid);
        let Some(kind) = context.registry.terminal(major) else {
            let what = "is claimed by no enabled plugin".to_string();
            let remedy = context.registry.remedy(Wanted::Terminal(major), None);
            let tree = &context.inventory.borrow().tree;
            missing.push(unclaimed::unclaimed(tree, session.sid, resource, what, remedy));
            continue;
        };
        let host = context.host(&kind.plugin);
        let described = match context.call(&host, session.sid, "", &resource).describe_session(kind, &session)
        {
            Ok(described) => described,
            Err(error) if error.source.kind == ErrorKind::Unsupported => {
                let (what, remedy) = (error.source.what.to_string(), error.source.remedy.to_string());
                let tree = &context.inventory.borrow().tree;
                missing.push(unclaimed::unclaimed(tree, session.sid, resource, what, remedy));
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        if let Some((described, in_flight)) = described {
            let (plugin, kind) = (kind.plugin.clone(), kind.name().to_string());
            let inventory = &mut *context.inventory.borrow_mut();
            let index = inventory.object(&plugin, &kind, &described.identity, &described.description);
            for fd in in_flight {
                let handle = inventory.handles.add_in_flight(fd)?;
                inventory.objects[index].in_flight.push(handle);
            }
        }
    }
    Ok(())
}

/// For facts that nobody can look up.
pub(super) fn no_facts<T>() -> Option<T> {
    None
}

/// What hooks are shown of a mapping, and whether it is one of a character device.
fn mapping_info(process: &Process, mapping: &Mapping) -> VmaInfo {
    VmaInfo {
        pid: process.pid,
        start: mapping.start,
        end: mapping.end,
        prot: mapping.prot,
        shared: mapping.shared,
        offset: mapping.offset,
        dev: mapping.dev,
        ino: mapping.ino,
        path: String::from_utf8_lossy(&mapping.path).as_ref().into(),
    }
}

fn device(process: &Process, mapping: &Mapping) -> Option<u64> {
    let stat = process.proc.stat(&map_file(mapping)).ok()?;
    (stat.st_mode & libc::S_IFMT == libc::S_IFCHR).then_some(stat.st_rdev)
}

/// Calls `f` with the facts by which a mapping is claimed.
fn with_facts<T>(
    context: &Context<'_>,
    process: &Process,
    mapping: &Mapping,
    f: impl FnOnce(&MappingFacts<'_>) -> T,
) -> (VmaInfo, T) {
    let info = mapping_info(process, mapping);
    let device = || device(process, mapping);
    let place = place(mapping.start, mapping.end);
    let judge = |kind: &MappingKind| {
        let host = context.host(&kind.plugin);
        context.call(&host, process.host_pid, &process.name, &place).claims_mapping(kind, &info)
    };
    let result = f(&MappingFacts::new(&info, &device, &judge));
    (info, result)
}

/// The plugin and kind that takes a mapping that core does not know.
pub(super) fn mapping_kind<'r>(
    context: &'r Context<'_>,
    process: &Process,
    mapping: &Mapping,
) -> Result<Option<(&'r MappingKind, VmaInfo)>, DumpError> {
    let (info, kind) = with_facts(context, process, mapping, |facts| context.registry.mapping_for(facts));
    Ok(kind?.map(|kind| (kind, info)))
}

/// What is to be said of a mapping that nobody takes.
pub(super) fn unclaimed_mapping(
    context: &Context<'_>,
    tree: &Tree,
    process: &Process,
    unknown: &Unknown,
) -> Unclaimed {
    let mapping = &unknown.mapping;
    let remedy = |facts: &MappingFacts<'_>| context.registry.remedy(Wanted::Mapping(facts), None);
    let (info, remedy) = with_facts(context, process, mapping, remedy);
    let what = format!("{} is claimed by no enabled plugin: {}", info.path, unknown.why);
    let out = format!("--on-unclaimed {}=skip leaves a hole", unclaimed::MAPPING);
    let remedy = if remedy.is_empty() { out } else { format!("{remedy}; {out}") };
    unclaimed::unclaimed(tree, process.host_pid, place(mapping.start, mapping.end), what, remedy)
}

/// How a mapping is named in messages.
pub(super) fn place(start: u64, end: u64) -> String {
    format!("mapping {start:x}-{end:x}")
}
