//! Making a pipe, and finding a fifo again.

use crate::{
    Role,
    contents::{self, Buffer, PAGE},
    kernel,
    records::stasis::pipe::v1::{Pipe, pipe::Contents},
};
use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::stat::Mode,
    unistd::{mkfifo, unlink},
};
use stasis_plugin_api::{HookError, Host, ObjectInfo, Result, namespace::IdMap};
use std::{
    ffi::{CString, OsStr},
    fs::{self, File, Permissions},
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, MetadataExt, PermissionsExt, fchown},
        },
    },
    path::PathBuf,
};

/// A new pipe with all its handles.
pub fn pipe(host: &Host<'_>, object: &ObjectInfo, record: &Pipe) -> Result<Vec<OwnedFd>> {
    let ends = kernel::pipe().map_err(failed("pipe2"))?;
    set_capacity(ends.write.as_fd(), record)?;
    fill(host, ends.write.as_fd(), record)?;
    set_owner(host, &ends.read, record)?;
    let (mut read, mut write) = (false, false);
    let mut handles = Vec::with_capacity(object.handles.len());
    for handle in &object.handles {
        // The first of each kind is an end of pipe2, so that the usual pipe needs no /proc.
        let fd = match Role::of(handle) {
            Role::Read if !read => {
                read = true;
                ends.read.try_clone()
            }
            Role::Write if !write => {
                write = true;
                ends.write.try_clone()
            }
            role => kernel::reopen(ends.read.as_fd(), role.flags(handle) & !libc::O_NOFOLLOW),
        };
        handles.push(fd.map_err(failed("open of a pipe's end through /proc/self/fd"))?);
    }
    Ok(handles)
}

/// The fifo at the recorded path, with all its handles.
pub fn fifo(host: &Host<'_>, object: &ObjectInfo, record: &Pipe) -> Result<Vec<OwnedFd>> {
    let path = CString::new(record.path.clone())
        .map_err(|_| HookError::invalid("path of a fifo with a zero byte"))?;
    handles(host, object, record, path)
}

/// How many other names are tried where the old one is in use again.
const ATTEMPTS: usize = 1000;

/// A fifo that has lost its name, with all its handles.
pub fn unlinked(host: &Host<'_>, object: &ObjectInfo, record: &Pipe) -> Result<Vec<OwnedFd>> {
    let shown = String::from_utf8_lossy(&record.path).into_owned();
    let failed = |errno| {
        HookError::failed(format!("making the unlinked fifo {shown}"), errno)
            .remedy("its directory must exist and be writable")
    };
    let holder = host.hold(|| make_unlinked(&record.path)).map_err(failed)?;
    let path = format!("/proc/self/fd/{}", holder.as_raw_fd());
    let mode = Permissions::from_mode(record.mode);
    let (uid, gid) = (inside("/proc/self/uid_map", record.uid), inside("/proc/self/gid_map", record.gid));
    if let (Some(uid), Some(gid)) = (uid, gid) {
        std::os::unix::fs::chown(&path, Some(uid), Some(gid)).map_err(self::failed("chown of a fifo"))?;
    }
    fs::set_permissions(&path, mode).map_err(self::failed("chmod of a fifo"))?;
    let path = CString::new(path).map_err(|_| HookError::invalid("path with a zero byte"))?;
    handles(host, object, record, path)
}

/// Makes a fifo under its old name, or another beside it, opens it with O_PATH and takes the name away.
fn make_unlinked(path: &[u8]) -> nix::Result<OwnedFd> {
    let wanted = PathBuf::from(OsStr::from_bytes(path));
    let others = (0..ATTEMPTS).map(|n| wanted.with_file_name(format!(".stasis-fifo.{n}")));
    for place in std::iter::once(wanted.clone()).chain(others) {
        match mkfifo(&place, Mode::S_IRUSR | Mode::S_IWUSR) {
            Ok(()) => {
                let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let opened = nix::fcntl::open(&place, flags, Mode::empty());
                unlink(&place)?;
                return opened;
            }
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    Err(Errno::EEXIST)
}

fn handles(host: &Host<'_>, object: &ObjectInfo, record: &Pipe, path: CString) -> Result<Vec<OwnedFd>> {
    let shown = String::from_utf8_lossy(&record.path).into_owned();
    let open = |flags: i32| {
        // A magic link must be followed.
        let flags = if record.unlinked { flags & !libc::O_NOFOLLOW } else { flags };
        let nonblock = if flags & libc::O_PATH != 0 { 0 } else { libc::O_NONBLOCK };
        kernel::open(&path, flags | nonblock)
            .map_err(|error| HookError::failed(format!("open fifo {shown}"), error))
    };
    // Looked at before it is opened for use: opening something else may have effects.
    let inode = File::from(open(libc::O_PATH)?).metadata().map_err(failed("fstat of a fifo"))?;
    if !inode.file_type().is_fifo() {
        return Err(HookError::invalid(format!("{shown} is no fifo any more"))
            .remedy(format!("remove it and make the fifo again: mkfifo {shown}")));
    }
    let in_use = in_use(&path)?;
    // Reads and writes, so that opening waits for nobody and the contents stay.
    let keeper = open(libc::O_RDWR)?;
    if !in_use {
        if record.capacity != 0 {
            set_capacity(keeper.as_fd(), record)?;
        }
        fill(host, keeper.as_fd(), record)?;
    } else if !record.shared && !record.buffers.is_empty() {
        return Err(HookError::unsupported(
            format!("fifo {shown}"),
            "another process has it open, so its contents cannot be put back",
            "end that process before the restore",
        ));
    }
    let mut handles: Vec<Option<OwnedFd>> = Vec::new();
    let quiet = |id: u32| record.quiet.contains(&id);
    for handle in &object.handles {
        let fd = if quiet(handle.id) { None } else { Some(open(Role::of(handle).flags(handle))?) };
        handles.push(fd);
    }
    // A reader opened while there is no writer sees no end of file until one has come and gone (fs/pipe.c, fifo_open).
    let reader = if record.quiet.is_empty() { None } else { Some(open(libc::O_RDONLY)?) };
    drop(keeper);
    let open_quiet = |fd: Option<OwnedFd>| fd.map_or_else(|| open(libc::O_RDONLY), Ok);
    let handles = handles.into_iter().map(open_quiet).collect();
    drop(reader);
    handles
}

/// Whether anybody has the fifo open: found without consuming and without blocking.
fn in_use(path: &CString) -> Result<bool> {
    match kernel::open(path, libc::O_WRONLY | libc::O_NONBLOCK) {
        Ok(_) => return Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {}
        Err(error) => return Err(failed("open of a fifo for writing")(error)),
    }
    let reader = kernel::open(path, libc::O_RDONLY | libc::O_NONBLOCK)
        .map_err(failed("open of a fifo for reading"))?;
    let scratch = kernel::pipe().map_err(failed("pipe2"))?;
    // 0: empty and without writers (fs/splice.c, ipipe_prep).
    match kernel::tee(reader.as_fd(), scratch.write.as_fd(), 1) {
        Ok(0) => Ok(false),
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(true),
        Err(error) => Err(failed("tee of a fifo")(error)),
    }
}

fn buffers(record: &Pipe) -> Vec<Buffer> {
    record.buffers.iter().copied().map(Buffer::decode).collect()
}

fn set_capacity(fd: BorrowedFd<'_>, record: &Pipe) -> Result<()> {
    let needed = contents::buffers_needed(&buffers(record)) * PAGE;
    // 0 is the pipe that nobody had open but by O_PATH.
    let size = match record.capacity as usize {
        0 => return Ok(()),
        capacity => capacity.max(needed.next_power_of_two()),
    };
    kernel::set_capacity(fd, size).map_err(|error| {
        HookError::failed(format!("F_SETPIPE_SZ to {size}"), error)
            .remedy("raise /proc/sys/fs/pipe-max-size or pipe-user-pages-soft")
    })
}

fn fill(host: &Host<'_>, fd: BorrowedFd<'_>, record: &Pipe) -> Result<()> {
    let buffers = buffers(record);
    let result = match &record.contents {
        None => Ok(()),
        Some(Contents::Data(data)) => contents::fill(fd, &buffers, &mut data.as_slice()),
        Some(Contents::Blob(name)) => contents::fill(fd, &buffers, &mut host.blob_reader(name)),
    };
    result.map_err(failed("putting back a pipe's contents"))
}

/// Permissions and owner decide who may open the pipe through /proc, as /dev/stderr does.
fn set_owner(host: &Host<'_>, end: &OwnedFd, record: &Pipe) -> Result<()> {
    let file = File::from(end.try_clone().map_err(failed("duplicate of a pipe"))?);
    let inode = file.metadata().map_err(failed("fstat of a pipe"))?;
    if inode.mode() & 0o7777 != record.mode {
        let mode = Permissions::from_mode(record.mode);
        file.set_permissions(mode).map_err(failed("fchmod of a pipe"))?;
    }
    let uid = inside("/proc/self/uid_map", record.uid);
    let gid = inside("/proc/self/gid_map", record.gid);
    match (uid, gid) {
        (Some(uid), Some(gid)) if (uid, gid) == (inode.uid(), inode.gid()) => Ok(()),
        (Some(uid), Some(gid)) => fchown(&file, Some(uid), Some(gid)).map_err(failed("fchown of a pipe")),
        _ => {
            let (uid, gid) = (record.uid, record.gid);
            host.warn(&format!(
                "a pipe of owner {uid}:{gid}, who has no name in this user namespace, is root's now"
            ));
            Ok(())
        }
    }
}

/// The id in our user namespace of what has `id` in its parent (user_namespaces(7)).
fn inside(map: &str, id: u32) -> Option<u32> {
    match fs::read_to_string(map) {
        Ok(text) => IdMap::parse(&text).inside(id),
        // Without /proc we cannot tell; then there is no other namespace either, or its plugin has mounted one.
        Err(_) => Some(id),
    }
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}
