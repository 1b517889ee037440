//! Opening what is mapped: by its path, or as another description of a file that a plugin has made.

use super::{
    host,
    memory::{MemoryError, OpenMapped},
    sys,
    world::World,
};
use crate::image::records::MappedFile;
use std::{
    ffi::OsStr,
    fs::{File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::ffi::OsStrExt},
    path::PathBuf,
};

/// Opens mapped files in the process of a node.
pub struct TaskFiles<'a> {
    /// Where handles are.
    pub world: &'a World,
    /// The node.
    pub node: usize,
}

impl OpenMapped for TaskFiles<'_> {
    fn open(&mut self, file: &MappedFile, write: bool) -> Result<File, MemoryError> {
        if file.handle == 0 {
            return OpenMapped::open(&mut self.world.paths(self.node), file, write);
        }
        self.described(file.handle, write || file.writable).map_err(|source| {
            let path = file.path.as_ref().map_or(&[][..], |path| &path.path);
            MemoryError::Open { path: PathBuf::from(OsStr::from_bytes(path)), source }
        })
    }
}

impl TaskFiles<'_> {
    /// The description itself if it is open for just that: a file can be sealed against writing only if no mapping of a
    /// writable description is there.
    fn described(&self, handle: u32, write: bool) -> io::Result<File> {
        let description =
            host::duplicate(self.world, self.node, handle, None).map_err(|error| match error.errno {
                0 => io::Error::other(error),
                errno => io::Error::from_raw_os_error(errno),
            })?;
        let mode = sys::fcntl(description.as_raw_fd(), libc::F_GETFL, 0)? & (libc::O_ACCMODE | libc::O_PATH);
        if mode == if write { libc::O_RDWR } else { libc::O_RDONLY } {
            return Ok(description.into());
        }
        let link = format!("/proc/self/fd/{}", description.as_raw_fd());
        OpenOptions::new().read(true).write(write).open(link)
    }
}
