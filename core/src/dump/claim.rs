//! Step 4: every resource is claimed by core or by exactly one plugin, or the dump stops here, before anything is injected
//! or written, with the full list.

use super::{
    Context, DumpError,
    inventory::{Claim, Inventory},
};
use crate::{
    files::table::Handle,
    memory::describe::Unknown,
    plugins::{HandleFacts, MappingFacts, MappingKind, Wanted},
    tree::{Process, Tree},
};
use stasis_plugin_api::{ErrorKind, VmaInfo};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// A resource that nobody takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unclaimed {
    /// The task.
    pub pid: i32,
    /// Its name.
    pub task: String,
    /// Descriptor number, mapping, namespace.
    pub place: String,
    /// What it is.
    pub what: String,
    /// What the user can do.
    pub remedy: String,
}

impl std::fmt::Display for Unclaimed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "task {} ({}), {}: {}", self.pid, self.task, self.place, self.what)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, " ({})", self.remedy) }
    }
}

/// What is known of the owner of something unclaimed, for the list.
pub(super) fn unclaimed(
    tree: &Tree,
    host_pid: i32,
    place: String,
    what: String,
    remedy: String,
) -> Unclaimed {
    let task = tree
        .processes
        .iter()
        .find(|process| process.host_pid == host_pid)
        .map(|process| process.name.clone());
    Unclaimed { pid: host_pid, task: task.unwrap_or_default(), place, what, remedy }
}

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

/// Regular files and directories with a path are core's own.
fn is_path_backed(handle: &Handle) -> bool {
    let kind = handle.facts.stat.st_mode & libc::S_IFMT;
    (kind == libc::S_IFREG || kind == libc::S_IFDIR) && handle.facts.link.starts_with(b"/")
}

/// Why a path-backed file could not be opened again, if so.
fn refused_path(handle: &Handle) -> Option<&'static str> {
    let facts = &handle.facts;
    match facts.stat.st_nlink {
        0 if facts.stat.st_mode & libc::S_IFMT == libc::S_IFREG => {
            Some("is deleted, which is not supported yet")
        }
        0 => Some("is a removed directory, which is not supported yet"),
        _ if facts.link.ends_with(b" (deleted)") => {
            Some("was unlinked under this name, which is not supported yet")
        }
        // fs/locks.c, show_fd_locks: one line per lock, only in fdinfo.
        _ if facts.info.lines().any(|line| line.starts_with("lock:")) => {
            Some("is locked, which is not supported yet")
        }
        _ => None,
    }
}

/// Asks for every descriptor who takes it, until no further one turns up in flight.
pub(super) fn descriptors(context: &Context<'_>, missing: &mut Vec<Unclaimed>) -> Result<(), DumpError> {
    let mut next = 0;
    while next < context.inventory.borrow().handles.all.len() {
        let (claim, in_flight) = descriptor(context, next, missing)?;
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

fn descriptor(
    context: &Context<'_>,
    index: usize,
    missing: &mut Vec<Unclaimed>,
) -> Result<(Claim, Vec<OwnedFd>), DumpError> {
    let id = Inventory::handle_id(index);
    let inventory = context.inventory.borrow();
    let handle = &inventory.handles.all[index];
    let (pid, number) = handle.subject();
    // The loop of the caller goes over existing handles only.
    let info = inventory.handle_info(id).unwrap_or_default();
    // Most kinds need a duplicate; plain files do not, and an O_PATH descriptor of a device cannot be asked anything.
    let opened = std::cell::OnceCell::new();
    let open = || opened.get_or_init(|| inventory.open_handle(id));
    let magic = || filesystem_magic(open().as_ref().ok()?.as_fd());
    let socket = || socket_facts(open().as_ref().ok()?.as_fd());
    let facts = HandleFacts::new(&info, &magic, &socket);
    let Some(kind) = context.registry.descriptor_for(&facts) else {
        let refused = if is_path_backed(handle) { refused_path(handle) } else { Some("") };
        let Some(why) = refused else { return Ok((Claim::Path, Vec::new())) };
        let what = match why {
            "" => format!("{} is claimed by no enabled plugin", info.link),
            why => format!("{} {why}", info.link),
        };
        let helper = if why.is_empty() { context.registry.would_take(Wanted::Handle(&facts)) } else { None };
        let remedy =
            helper.map_or_else(String::new, |name| format!("plugin {name} would take it: enable it"));
        missing.push(unclaimed(&inventory.tree, pid, format!("descriptor {number}"), what, remedy));
        return Ok((Claim::Path, Vec::new()));
    };
    let task = inventory.tree.processes.iter().find(|process| process.host_pid == pid);
    let task_name = task.map_or("", |process| process.name.as_str());
    let resource = format!("descriptor {number}, {}", info.link);
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
            let what = format!("{}: {}", info.link, error.source.what);
            let remedy = error.source.remedy.to_string();
            missing.push(unclaimed(&inventory.tree, pid, format!("descriptor {number}"), what, remedy));
            return Ok((Claim::Path, Vec::new()));
        }
        Err(error) => return Err(error.into()),
    };
    let (plugin, kind) = (kind.plugin.clone(), kind.name().to_string());
    drop(inventory);
    let inventory = &mut *context.inventory.borrow_mut();
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
            let remedy = context.registry.would_take(Wanted::Terminal(major));
            let remedy =
                remedy.map_or_else(String::new, |name| format!("plugin {name} would take it: enable it"));
            missing.push(unclaimed(&context.inventory.borrow().tree, session.sid, resource, what, remedy));
            continue;
        };
        let host = context.host(&kind.plugin);
        let described = match context.call(&host, session.sid, "", &resource).describe_session(kind, &session)
        {
            Ok(described) => described,
            Err(error) if error.source.kind == ErrorKind::Unsupported => {
                let (what, remedy) = (error.source.what.to_string(), error.source.remedy.to_string());
                missing.push(unclaimed(
                    &context.inventory.borrow().tree,
                    session.sid,
                    resource,
                    what,
                    remedy,
                ));
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

/// Mappings that core does not know: the plugin and kind that takes each.
pub(super) fn mapping<'r>(
    context: &'r Context<'_>,
    process: &Process,
    unknown: &Unknown,
    missing: &mut Vec<Unclaimed>,
) -> Option<(&'r MappingKind, VmaInfo)> {
    let mapping = &unknown.mapping;
    let info = VmaInfo {
        pid: process.pid,
        start: mapping.start,
        end: mapping.end,
        prot: mapping.prot,
        shared: mapping.shared,
        offset: mapping.offset,
        dev: mapping.dev,
        ino: mapping.ino,
        path: String::from_utf8_lossy(&mapping.path).as_ref().into(),
    };
    let device = || {
        let stat = process.proc.stat(&format!("map_files/{:x}-{:x}", mapping.start, mapping.end)).ok()?;
        (stat.st_mode & libc::S_IFMT == libc::S_IFCHR).then_some(stat.st_rdev)
    };
    let facts = MappingFacts::new(&info, &device);
    if let Some(kind) = context.registry.mapping_for(&facts) {
        return Some((kind, info));
    }
    let what = format!("{} is claimed by no enabled plugin: {}", info.path, unknown.why);
    let remedy = context.registry.would_take(Wanted::Mapping(&facts));
    let remedy = remedy.map_or_else(String::new, |name| format!("plugin {name} would take it: enable it"));
    let inventory = context.inventory.borrow();
    missing.push(unclaimed(
        &inventory.tree,
        process.host_pid,
        place(mapping.start, mapping.end),
        what,
        remedy,
    ));
    None
}

/// How a mapping is named in messages.
pub(super) fn place(start: u64, end: u64) -> String {
    format!("mapping {start:x}-{end:x}")
}
