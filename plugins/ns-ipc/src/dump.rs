//! Reads the objects of a namespace from a thread that has entered it.

use crate::{
    blob, kernel,
    record::stasis::ns_ipc::v1::{
        Extent, IpcNamespace, Message, Permissions, Queue, Segment, SemaphoreSet, Sysctl,
    },
};
use stasis_plugin_api::{
    DumpedNamespace, HookError, Host, NamespaceInfo, Result,
    namespace::{self, IdMap},
};
use std::{
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
};

/// Limits of the namespace, below /proc/sys.
const SYSCTLS: &[&str] = &[
    "kernel/shmmax",
    "kernel/shmall",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "fs/mqueue/queues_max",
    "fs/mqueue/msg_max",
    "fs/mqueue/msgsize_max",
    "fs/mqueue/msg_default",
    "fs/mqueue/msgsize_default",
];
/// `HUGETLBFS_MAGIC` (include/uapi/linux/magic.h).
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}

/// How the tree's user namespace calls owners.
struct Owners {
    uids: IdMap,
    gids: IdMap,
}

impl Owners {
    fn permissions(&self, what: &str, id: i32, perm: &libc::ipc_perm) -> Result<Permissions> {
        let name = |map: &IdMap, owner: u32| {
            map.inside(owner).ok_or_else(|| {
                HookError::unsupported(
                    format!("{what} {id}"),
                    format!("its owner {owner} does not exist in the tree's user namespace"),
                    "change its owner, or remove it (ipcrm)",
                )
            })
        };
        Ok(Permissions {
            id,
            key: perm.__key,
            uid: name(&self.uids, perm.uid)?,
            gid: name(&self.gids, perm.gid)?,
            mode: u32::from(perm.mode),
        })
    }
}

/// What a thread finds in the namespace; the contents of segments by open files.
struct Found {
    sysctls: Vec<Sysctl>,
    segments: Vec<(Segment, File)>,
    semaphores: Vec<SemaphoreSet>,
    queues: Vec<Queue>,
}

pub(crate) fn dump(host: &Host<'_>, namespace: &NamespaceInfo) -> Result<DumpedNamespace<IpcNamespace>> {
    namespace::whole_tree(host, namespace)?;
    let proc: OwnedFd = namespace::member(host, namespace)?;
    let owners = Owners { uids: IdMap::of(&proc, "uid_map")?, gids: IdMap::of(&proc, "gid_map")? };
    let mut found = namespace::within(&proc, "ipc", || read(&owners))?;
    for (segment, file) in &mut found.segments {
        let id = segment.permissions.as_ref().map_or(0, |permissions| permissions.id);
        segment.extents = extents(file, segment.size).map_err(failed("finding the data of a segment"))?;
        let name = blob(id);
        let mut out = host.blob_writer(&name);
        for extent in &segment.extents {
            copy(file, extent, &mut out).map_err(failed("reading a segment"))?;
        }
    }
    let record = IpcNamespace {
        sysctls: found.sysctls,
        segments: found.segments.into_iter().map(|(segment, _)| segment).collect(),
        semaphores: found.semaphores,
        queues: found.queues,
    };
    Ok(DumpedNamespace { record, version: 1 })
}

fn read(owners: &Owners) -> Result<Found> {
    let sysctls = SYSCTLS.iter().filter_map(|path| {
        // Not every kernel has all of them.
        let value = fs::read_to_string(format!("/proc/sys/{path}")).ok()?;
        Some(Sysctl { path: (*path).into(), value: value.trim().into() })
    });
    let segments = kernel::segments().map_err(failed("listing segments"))?;
    let semaphores = kernel::semaphores().map_err(failed("listing semaphores"))?;
    let queues = kernel::queues().map_err(failed("listing queues"))?;
    Ok(Found {
        sysctls: sysctls.collect(),
        segments: segments.iter().map(|(id, one)| segment(owners, *id, one)).collect::<Result<_>>()?,
        semaphores: semaphores.iter().map(|(id, one)| set(owners, *id, one)).collect::<Result<_>>()?,
        queues: queues.iter().map(|(id, one)| queue(owners, *id, one)).collect::<Result<_>>()?,
    })
}

fn segment(owners: &Owners, id: i32, one: &libc::shmid_ds) -> Result<(Segment, File)> {
    let permissions = owners.permissions("shared memory segment", id, &one.shm_perm)?;
    let mode = permissions.mode;
    let attached = kernel::Attached::new(id, one.shm_segsz, libc::SHM_RDONLY);
    let file = attached.and_then(|attached| attached.file()).map_err(failed("attaching a segment"))?;
    let kind = nix::sys::statfs::fstatfs(&file);
    let kind = kind.map_err(|errno| HookError::failed("fstatfs of a segment", errno))?.filesystem_type();
    if kind.0 == HUGETLBFS_MAGIC {
        let why = "it consists of huge pages (SHM_HUGETLB)";
        return Err(HookError::unsupported(format!("shared memory segment {id}"), why, ""));
    }
    let segment = Segment {
        size: one.shm_segsz as u64,
        removed: mode & kernel::SHM_DEST != 0,
        locked: mode & kernel::SHM_LOCKED != 0,
        extents: Vec::new(),
        permissions: Some(Permissions { mode: mode & 0o777, ..permissions }),
    };
    Ok((segment, file))
}

fn set(owners: &Owners, id: i32, one: &libc::semid_ds) -> Result<SemaphoreSet> {
    let values = kernel::values(id, one.sem_nsems as usize).map_err(failed("reading semaphores"))?;
    let permissions = owners.permissions("semaphore set", id, &one.sem_perm)?;
    Ok(SemaphoreSet {
        permissions: Some(Permissions { mode: permissions.mode & 0o777, ..permissions }),
        values: values.into_iter().map(u32::from).collect(),
    })
}

fn queue(owners: &Owners, id: i32, one: &libc::msqid_ds) -> Result<Queue> {
    let permissions = owners.permissions("message queue", id, &one.msg_perm)?;
    // No message has more bytes than all of them.
    let room = one.__msg_cbytes as usize;
    let messages = (0..one.msg_qnum as usize).map(|index| {
        let (kind, text) = kernel::message(id, index, room).map_err(failed("reading a message queue"))?;
        Ok(Message { r#type: kind, text })
    });
    Ok(Queue {
        permissions: Some(Permissions { mode: permissions.mode & 0o777, ..permissions }),
        limit: one.msg_qbytes,
        messages: messages.collect::<Result<_>>()?,
    })
}

/// Where a file has data (lseek(2), SEEK_DATA).
fn extents(file: &File, size: u64) -> io::Result<Vec<Extent>> {
    let seek = |offset: u64, whence| {
        // SAFETY: integer arguments.
        let at = unsafe { libc::lseek(file.as_raw_fd(), offset as i64, whence) };
        match nix::errno::Errno::result(at) {
            Ok(at) => Ok(Some(at as u64)),
            Err(nix::errno::Errno::ENXIO) => Ok(None),
            Err(errno) => Err(io::Error::from(errno)),
        }
    };
    let mut extents = Vec::new();
    let mut next = 0;
    while next < size
        && let Some(start) = seek(next, libc::SEEK_DATA)?.filter(|start| *start < size)
    {
        let end = seek(start, libc::SEEK_HOLE)?.unwrap_or(size).min(size);
        extents.push(Extent { offset: start, length: end - start });
        next = end;
    }
    Ok(extents)
}

fn copy(file: &File, extent: &Extent, out: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 18];
    let (mut offset, end) = (extent.offset, extent.offset + extent.length);
    while offset < end {
        let part = buffer.len().min((end - offset) as usize);
        file.read_exact_at(&mut buffer[..part], offset)?;
        out.write_all(&buffer[..part])?;
        offset += part as u64;
    }
    Ok(())
}
