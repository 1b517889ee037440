//! Pipes and fifos: pipe(7), fifo(7).
//!
//! An object is the pipe (device and inode number); its handles are all open file descriptions: the two of pipe(2), those
//! opened anew through /proc/self/fd, those of a fifo. Roles are access modes, see [`Role`].
//!
//! The contents are copied buffer by buffer, so that packets (`O_DIRECT`) keep their bounds, and a pipe that is full because
//! its buffers are in use, not because of its bytes, is full again.
//!
//! **Ends outside the tree.** A pipe whose only readers, or only writers, are outside the tree is refused, unless
//! `--ext-pipe` is given: then it is restored without that end, so that a reader sees the end of file and a writer
//! `EPIPE`. A pipe with an outside process besides ends of both kinds in the tree cannot be told from others by cheap
//! means; the outside process sees its peers close when the tree is killed. A fifo is opened by its path again, and so
//! meets its outside peers again: contents that outlived the tree with them are not written a second time.
//!
//! **Unlinked fifos** are made again under the old name (or another, if that is in use again), which is taken away at once.
//!
//! **Not kept:** pages given by vmsplice(2) are copied, so later changes of that memory do not show in the pipe; a last
//! buffer that came from splice(2) takes more data after restore than before. Reading a pipe that has data and no reader
//! opens one for a moment: an edge-triggered epoll of the write end reports once more.

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, Host, ObjectInfo, OptionDeclaration, Result, Selector,
    export_plugin, register,
};
use std::os::fd::{BorrowedFd, OwnedFd};

mod records {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
mod contents;
mod dump;
mod kernel;
mod restore;
#[cfg(test)]
mod tests;
use records::stasis::pipe::v1::Pipe;

/// `PIPEFS_MAGIC` (include/uapi/linux/magic.h).
const PIPEFS_MAGIC: u64 = 0x5049_5045;

/// The option that allows ends outside the tree.
const EXT_PIPE: &str = "ext-pipe";

/// What a handle can do with its pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Read,
    Write,
    ReadWrite,
    /// `O_PATH`: only names it.
    Path,
}

impl Role {
    fn of(handle: &HandleInfo) -> Self {
        let flags = handle.status_flags.cast_signed();
        match flags & libc::O_ACCMODE {
            _ if flags & libc::O_PATH != 0 => Self::Path,
            libc::O_RDONLY => Self::Read,
            libc::O_WRONLY => Self::Write,
            _ => Self::ReadWrite,
        }
    }
    /// For open(2).
    fn flags(self, handle: &HandleInfo) -> i32 {
        match self {
            Self::Read => libc::O_RDONLY,
            Self::Write => libc::O_WRONLY,
            Self::ReadWrite => libc::O_RDWR,
            Self::Path => libc::O_PATH | handle.status_flags.cast_signed() & libc::O_NOFOLLOW,
        }
    }
    fn reads(self) -> bool {
        matches!(self, Self::Read | Self::ReadWrite)
    }
    fn writes(self) -> bool {
        matches!(self, Self::Write | Self::ReadWrite)
    }
}

struct Pipes;

impl Descriptor for Pipes {
    type Record = Pipe;
    const KIND: &'static str = "pipe";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::Filesystem(PIPEFS_MAGIC), Selector::FileType(libc::S_IFIFO)]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
        Ok(Described {
            identity: format!("{:x}:{}", handle.dev, handle.ino).into(),
            role: Role::of(handle) as u32,
            description: handle.link.clone(),
            ..Described::default()
        })
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Pipe>> {
        dump::pipe(host, object).map(Dumped::new)
    }

    fn create(&self, host: &Host<'_>, object: &ObjectInfo, record: &Pipe) -> Result<Vec<OwnedFd>> {
        match record.path.is_empty() {
            true => restore::pipe(host, object, record),
            false if record.unlinked => restore::unlinked(host, object, record),
            false => restore::fifo(host, object, record),
        }
    }
}

register!(descriptor: Pipes);
export_plugin! {
    name: "pipe",
    records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")),
    options: [OptionDeclaration::switch(
        "ext-pipe",
        "dump pipes whose other end is held outside of the tree; after restore that end is closed"
    )],
}
