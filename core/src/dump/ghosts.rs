//! Step 7, files without names: their contents, or a hard link for the restore.

use super::{Context, DumpError};
use crate::{
    files::{Ghost, Names, names::parent},
    image::{
        GHOST_PLUGIN, ImageWriter, ghost_blob,
        records::{ExtendedAttribute, GhostExtent, GhostFile},
    },
};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::stat::Mode,
    unistd::{Whence, lseek},
};
use std::{
    ffi::{CStr, CString},
    fs::{File, OpenOptions},
    os::{
        fd::AsFd,
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{FileExt, OpenOptionsExt},
        },
    },
    path::Path,
};

/// Bytes copied at once.
const PIECE: usize = 1 << 20;

/// Writes every ghost of the tree.
pub(super) fn write(context: &Context<'_>, names: &Names) -> Result<(), DumpError> {
    for ghost in &names.ghosts {
        context.check_interrupted()?;
        let failed = |operation| move |errno| fail(ghost, operation, errno);
        let record = if ghost.is_linked() {
            let link = link(context, names, ghost)?;
            GhostFile { link, ..outline(ghost) }
        } else {
            contents(ghost, context.writer()?)?.map_err(failed("copy"))?
        };
        context.writer()?.write(&record)?;
    }
    Ok(())
}

fn fail(ghost: &Ghost, operation: &'static str, errno: Errno) -> DumpError {
    let name = ghost.paths.first().unwrap_or(&ghost.nameless);
    DumpError::Ghost { operation, path: String::from_utf8_lossy(name).into_owned(), errno }
}

/// What is known without a look at the file.
fn outline(ghost: &Ghost) -> GhostFile {
    let stat = &ghost.stat;
    GhostFile {
        id: ghost.id,
        mode: stat.st_mode,
        uid: ghost.owner.0,
        gid: ghost.owner.1,
        size: stat.st_size as u64,
        paths: ghost.paths.clone(),
        // A file that has both kinds of names was given one by linkat(2) and lost it again.
        nameless: if ghost.paths.is_empty() { ghost.nameless.clone() } else { Vec::new() },
        space: ghost.space,
        accessed_s: stat.st_atime,
        accessed_ns: stat.st_atime_nsec as u32,
        modified_s: stat.st_mtime,
        modified_ns: stat.st_mtime_nsec as u32,
        ..GhostFile::default()
    }
}

/// A hard link beside the lost name. The guardian makes it, and takes it away again if the dump fails.
fn link(context: &Context<'_>, names: &Names, ghost: &Ghost) -> Result<Vec<u8>, DumpError> {
    let failed = |errno| fail(ghost, "make a link for", errno);
    let beside = ghost.paths.first().map_or(b"/".as_slice(), |path| parent(path));
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let file = open(&ghost.source, flags, Mode::empty()).map_err(failed)?;
    let directory =
        open(&names.outside(beside), flags | OFlag::O_DIRECTORY, Mode::empty()).map_err(failed)?;
    let nonce = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME).map_err(failed)?;
    let name = format!(".stasis-link.{}.{:x}{:08x}", ghost.id, nonce.tv_sec(), nonce.tv_nsec());
    context.guardian.borrow_mut().link(file.as_fd(), directory.as_fd(), &name)?;
    let mut path = beside.to_vec();
    if path != b"/" {
        path.push(b'/');
    }
    path.extend(name.as_bytes());
    Ok(path)
}

/// The record of a file that has no names at all; its bytes go into a blob.
fn contents(ghost: &Ghost, writer: &ImageWriter) -> Result<Result<GhostFile, Errno>, DumpError> {
    let mut record = outline(ghost);
    match attributes(&ghost.source) {
        Ok(attributes) => record.attributes = attributes,
        Err(errno) => return Ok(Err(errno)),
    }
    match ghost.stat.st_mode & libc::S_IFMT {
        libc::S_IFREG => {
            // Neither its access time may change, nor may a lease on it be broken for long.
            let flags = libc::O_NOATIME | libc::O_NONBLOCK;
            let file = match OpenOptions::new().read(true).custom_flags(flags).open(&ghost.source) {
                Ok(file) => file,
                Err(error) => return Ok(Err(errno_of(&error))),
            };
            copy(&file, &mut record, writer)
        }
        libc::S_IFLNK => {
            // The link of /proc leads to the symbolic link itself, which an O_PATH descriptor can read.
            let target = open(&ghost.source, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
                .and_then(|link| nix::fcntl::readlinkat(link, ""));
            Ok(target.map(|target| GhostFile { target: target.into_vec(), ..record }))
        }
        _ => Ok(Ok(record)),
    }
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Copies what is no hole.
fn copy(
    file: &File,
    record: &mut GhostFile,
    writer: &ImageWriter,
) -> Result<Result<GhostFile, Errno>, DumpError> {
    let name = ghost_blob(record.id);
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < record.size {
        let start = match lseek(file, at as i64, Whence::SeekData) {
            Ok(start) => start as u64,
            Err(Errno::ENXIO) => break,
            Err(errno) => return Ok(Err(errno)),
        };
        let end = match lseek(file, start as i64, Whence::SeekHole) {
            Ok(end) => (end as u64).min(record.size),
            Err(errno) => return Ok(Err(errno)),
        };
        let mut done = start;
        while done < end {
            let room = buffer.len().min((end - done) as usize);
            match file.read_at(&mut buffer[..room], done) {
                // Cut off meanwhile, by somebody outside of the tree.
                Ok(0) => return Ok(Err(Errno::ENODATA)),
                Ok(n) => {
                    writer.append_blob(GHOST_PLUGIN, &name, &buffer[..n])?;
                    done += n as u64;
                }
                Err(error) => return Ok(Err(errno_of(&error))),
            }
        }
        record.extents.push(GhostExtent { offset: start, length: end - start });
        at = end;
    }
    Ok(Ok(std::mem::take(record)))
}

/// Extended attributes (xattr(7)) of what a magic link leads to.
fn attributes(source: &Path) -> Result<Vec<ExtendedAttribute>, Errno> {
    let path = CString::new(source.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    let names = match attribute(|buffer| {
        // SAFETY: the path is NUL-terminated, the buffer has the length that is given; 0 only asks for the size.
        unsafe { libc::listxattr(path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) }
    }) {
        Err(Errno::EOPNOTSUPP) => return Ok(Vec::new()),
        names => names?,
    };
    let names =
        names.split_inclusive(|&byte| byte == 0).filter_map(|name| CStr::from_bytes_with_nul(name).ok());
    names
        .map(|name| {
            let value = attribute(|buffer| {
                // SAFETY: path and name are NUL-terminated, the buffer has the length that is given.
                unsafe {
                    libc::getxattr(path.as_ptr(), name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len())
                }
            })?;
            Ok(ExtendedAttribute { name: name.to_bytes().to_vec(), value })
        })
        .collect()
}

/// Asks for the size, then for the bytes; once more if it has grown between.
fn attribute(get: impl Fn(&mut [u8]) -> isize) -> Result<Vec<u8>, Errno> {
    loop {
        let size = Errno::result(get(&mut []))? as usize;
        let mut buffer = vec![0; size];
        if size == 0 {
            return Ok(buffer);
        }
        match Errno::result(get(&mut buffer)) {
            Ok(n) => {
                buffer.truncate(n as usize);
                return Ok(buffer);
            }
            Err(Errno::ERANGE) => {}
            Err(errno) => return Err(errno),
        }
    }
}
