//! Opening a path of the image: by its name, or as the file without a name that it is.

use super::{
    ghosts::Ghosts,
    memory::{MemoryError, OpenMapped},
    namespaces::{self, Spaces},
};
use crate::image::records::{MappedFile, PathRef};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::stat::Mode,
};
use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

/// Where paths lead. Whether the files are what they were was checked before.
#[derive(Debug, Clone, Copy, Default)]
pub struct Paths<'a> {
    /// Files without names.
    pub ghosts: Option<&'a Ghosts>,
    /// Mount namespaces, if there are several.
    pub spaces: Option<&'a Spaces>,
    /// The one that this process is in.
    pub here: u32,
}

impl Paths<'_> {
    /// Opens a path with flags of open(2); close-on-exec.
    pub fn open(self, path: &PathRef, flags: i32) -> io::Result<OwnedFd> {
        if path.ghost == 0 {
            let flags = OFlag::from_bits_retain(flags | libc::O_CLOEXEC);
            let place = namespaces::place(self.spaces, path, self.here).ok_or(Errno::ENOENT)?;
            return Ok(open(&place, flags, Mode::empty())?);
        }
        let holder = self.ghosts.and_then(|ghosts| ghosts.holder(path)).ok_or(Errno::ENOENT)?;
        if path.mode & libc::S_IFMT == libc::S_IFLNK {
            // SAFETY: holders stay open as long as this program runs in the task.
            return unsafe { BorrowedFd::borrow_raw(holder) }.try_clone_to_owned();
        }
        // A magic link must be followed, and one that is a file is no directory whatever the flags of O_TMPFILE say.
        let mut flags = flags & !libc::O_NOFOLLOW;
        if path.mode & libc::S_IFMT == libc::S_IFREG {
            flags &= !libc::O_DIRECTORY;
        }
        let flags = OFlag::from_bits_retain(flags | libc::O_CLOEXEC);
        Ok(open(format!("/proc/self/fd/{holder}").as_str(), flags, Mode::empty())?)
    }
}

/// A path of the image as one.
pub fn name(path: &PathRef) -> &Path {
    Path::new(OsStr::from_bytes(&path.path))
}

impl OpenMapped for Paths<'_> {
    fn open(&mut self, file: &MappedFile, write: bool) -> Result<File, MemoryError> {
        let record = file.path.clone().unwrap_or_default();
        let flags = if write { libc::O_RDWR } else { libc::O_RDONLY };
        let failed = |source| MemoryError::Open { path: PathBuf::from(name(&record)), source };
        Paths::open(*self, &record, flags).map(File::from).map_err(failed)
    }
}
