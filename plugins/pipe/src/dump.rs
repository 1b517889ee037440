//! Reading a pipe.

use crate::{
    EXT_PIPE, Role, contents, kernel,
    records::stasis::pipe::v1::{Pipe, pipe::Contents},
};
use stasis_plugin_api::{HandleInfo, HookError, Host, ObjectInfo, Result};
use std::{
    fs::{self, File, Metadata},
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
};

/// Contents up to this length are kept in the record itself.
const SHORT: usize = 4096;

/// A handle with a duplicate of it.
struct End<'a> {
    handle: &'a HandleInfo,
    role: Role,
    fd: OwnedFd,
}

/// Makes the record of a pipe or fifo.
pub fn pipe(host: &Host<'_>, object: &ObjectInfo) -> Result<Pipe> {
    let open = |handle| Ok(End { handle, role: Role::of(handle), fd: host.open_handle(handle.id)? });
    let all = object.handles.iter().map(open).collect::<Result<Vec<End<'_>>>>()?;
    let inode = metadata(&all[0].fd)?;
    let mut record =
        Pipe { mode: inode.mode() & 0o7777, uid: inode.uid(), gid: inode.gid(), ..Pipe::default() };
    let named = !object.handles[0].link.starts_with("pipe:[");
    if named {
        record.unlinked = inode.nlink() == 0;
        record.path = fifo_path(host, object, &inode)?;
        record.shared = held_outside(host, &inode)?;
    }
    let ends: Vec<&End<'_>> = all.iter().filter(|end| end.role != Role::Path).collect();
    let Some(first) = ends.first() else { return Ok(record) };
    record.capacity = kernel::capacity(first.fd.as_fd()).map_err(failed("F_GETPIPE_SZ"))? as u64;
    refuse_notifications(&ends)?;
    let missing = missing_end(&ends, named)?;
    if let Some(outside) = missing.filter(|_| !named) {
        external(host, object, outside)?;
        if outside == Role::Read {
            // What is in the pipe is the outside reader's, who still gets it.
            return Ok(record);
        }
    }
    if named {
        for end in ends.iter().filter(|end| end.role == Role::Read) {
            if poll(&end.fd)? & libc::POLLHUP == 0 {
                record.quiet.push(end.handle.id);
            }
        }
    }
    read_contents(host, object, &ends, &mut record)?;
    Ok(record)
}

/// The kind of end that nobody in the tree has although it is open: it is outside. A fifo's reader that no writer has
/// ever met does not see the difference; for fifos it does not matter.
fn missing_end(ends: &[&End<'_>], named: bool) -> Result<Option<Role>> {
    let reads = ends.iter().any(|end| end.role.reads());
    let writes = ends.iter().any(|end| end.role.writes());
    Ok(match (reads, writes) {
        (false, true) if poll(&ends[0].fd)? & libc::POLLERR == 0 => Some(Role::Read),
        (true, false) if !named && poll(&ends[0].fd)? & libc::POLLHUP == 0 => Some(Role::Write),
        _ => None,
    })
}

fn external(host: &Host<'_>, object: &ObjectInfo, outside: Role) -> Result<()> {
    let end = if outside == Role::Read { "read" } else { "write" };
    let what = object.description.as_str();
    if !host.has_option(EXT_PIPE) {
        let why = format!("its {end} end is held by a process outside of the tree");
        let remedy =
            format!("dump that process, too, or give --{EXT_PIPE} to restore the pipe without that end");
        return Err(HookError::unsupported(what, why, remedy));
    }
    host.warn(&format!("{what}: its {end} end is outside of the tree and will be closed after restore"));
    Ok(())
}

fn read_contents(host: &Host<'_>, object: &ObjectInfo, ends: &[&End<'_>], record: &mut Pipe) -> Result<()> {
    let total = kernel::available(ends[0].fd.as_fd()).map_err(failed("FIONREAD"))?;
    if total == 0 {
        return Ok(());
    }
    let reopened;
    let reader = match ends.iter().find(|end| end.role.reads()) {
        Some(end) => end.fd.as_fd(),
        None => {
            reopened = extra_reader(object, ends)?;
            reopened.as_fd()
        }
    };
    let capacity = record.capacity as usize;
    let buffers = if total <= SHORT {
        let mut data = Vec::with_capacity(total);
        let buffers = copy(reader, capacity, &mut data)?;
        record.contents = Some(Contents::Data(data));
        buffers
    } else {
        let name = format!("pipe-{}", object.id);
        let buffers = copy(reader, capacity, &mut host.blob_writer(&name))?;
        record.contents = Some(Contents::Blob(name));
        buffers
    };
    let copied: usize = buffers.iter().map(|buffer| buffer.length).sum();
    // Others than the tree may write to a fifo meanwhile; what was there when we began must have been copied.
    if copied < total {
        return Err(HookError::invalid(format!("{}: {copied} of {total} bytes copied", object.description)));
    }
    let needed = contents::buffers_needed(&buffers) * contents::PAGE;
    if needed > capacity {
        host.warn(&format!("{}: will have a capacity of at least {needed} bytes", object.description));
    }
    record.buffers = buffers.into_iter().map(contents::Buffer::encode).collect();
    Ok(())
}

fn copy(from: BorrowedFd<'_>, capacity: usize, sink: &mut impl Write) -> Result<Vec<contents::Buffer>> {
    contents::copy(from, capacity, sink).map_err(failed("copy of a pipe's contents"))
}

/// A read end where the tree has none. The tree is frozen and the reader is gone before it runs; but when the last
/// reader goes, the kernel sends SIGIO to who asked for it (fs/pipe.c, pipe_release).
fn extra_reader(object: &ObjectInfo, ends: &[&End<'_>]) -> Result<OwnedFd> {
    let asks = |end: &&&End<'_>| end.handle.status_flags.cast_signed() & libc::O_ASYNC != 0;
    if ends.iter().any(|end| asks(&end)) {
        let why = "it has unread data, no reader, and a writer that asks for SIGIO";
        return Err(HookError::unsupported(
            object.description.as_str(),
            why,
            "close the pipe or drop O_ASYNC",
        ));
    }
    kernel::reopen(ends[0].fd.as_fd(), libc::O_RDONLY).map_err(failed("open of a pipe for reading"))
}

/// An empty write says whether the kernel itself writes to the pipe (watch_queue(7)); it does nothing else.
fn refuse_notifications(ends: &[&End<'_>]) -> Result<()> {
    let Some(end) = ends.iter().find(|end| end.role.writes()) else { return Ok(()) };
    match kernel::write(end.fd.as_fd(), &[]) {
        Err(error) if error.raw_os_error() == Some(libc::EXDEV) => Err(HookError::unsupported(
            end.handle.link.as_str(),
            "it is a notification pipe, whose watches the kernel does not tell",
            "close it before the dump",
        )),
        _ => Ok(()),
    }
}

fn fifo_path(host: &Host<'_>, object: &ObjectInfo, inode: &Metadata) -> Result<Vec<u8>> {
    let path = object.handles[0].link.as_str();
    let unsupported =
        |why: &str, remedy: &str| Err(HookError::unsupported(format!("fifo {path}"), why, remedy));
    if inode.nlink() == 0 {
        return Ok(path.strip_suffix(" (deleted)").unwrap_or(path).as_bytes().to_vec());
    }
    let same =
        |found: io::Result<Metadata>| found.is_ok_and(|f| (f.dev(), f.ino()) == (inode.dev(), inode.ino()));
    let mut found = same(fs::metadata(path));
    for holder in object.handles.iter().flat_map(|handle| &handle.holders) {
        if found {
            break;
        }
        let task = host.open_proc(holder.pid)?;
        found = same(fs::metadata(format!("/proc/self/fd/{}/root{path}", task.as_raw_fd())));
    }
    match found {
        true => Ok(path.as_bytes().to_vec()),
        false => unsupported("its path leads elsewhere now", "make the fifo reachable by its path again"),
    }
}

/// Whether a process outside the tree has the fifo open.
fn held_outside(host: &Host<'_>, inode: &Metadata) -> Result<bool> {
    let mut own: Vec<i32> = host.tasks().iter().map(|task| task.host_pid).collect();
    own.push(std::process::id().cast_signed());
    let entries = fs::read_dir("/proc").map_err(failed("list /proc"))?;
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    for pid in pids.filter(|pid| !own.contains(pid)) {
        // Processes may go while we look.
        let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        let same = |meta: Metadata| (meta.dev(), meta.ino()) == (inode.dev(), inode.ino());
        if fds.flatten().any(|fd| fs::metadata(fd.path()).is_ok_and(same)) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn metadata(fd: &OwnedFd) -> Result<Metadata> {
    let file = File::from(fd.try_clone().map_err(failed("duplicate of a pipe"))?);
    file.metadata().map_err(failed("fstat of a pipe"))
}

fn poll(fd: &OwnedFd) -> Result<i16> {
    kernel::poll(fd.as_fd()).map_err(failed("poll of a pipe"))
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}
