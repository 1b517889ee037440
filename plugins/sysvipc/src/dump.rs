//! Reading segments.

use crate::{
    kernel::{self, PREFIX, SHM_DEST},
    record::stasis::sysvshm::v1::{Attachment, Extent, Segment},
};
use stasis_plugin_api::{HookError, Host, Result, VmaInfo, prost::Message};
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt},
    },
    sync::{Mutex, PoisonError},
};

const CHUNK: u64 = 1 << 20;
/// The blob with the list of segments.
pub const SEGMENTS: &str = "segments";
/// Segments that this dump has written already.
static WRITTEN: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

/// The blob with the data of a segment.
pub fn data(id: u32) -> String {
    format!("data/{id}")
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}

pub fn attachment(host: &Host<'_>, vma: &VmaInfo) -> Result<Attachment> {
    // The inode number of a segment is its id (ipc/shm.c, newseg).
    let id = vma.ino as u32;
    let mut written = WRITTEN.lock().unwrap_or_else(PoisonError::into_inner);
    if in_our_namespace(host, vma)? && written.insert(id) {
        segment(host, vma, id)?;
    }
    let read_only = vma.prot & libc::PROT_WRITE as u32 == 0 && !may_write(host, vma)?;
    Ok(Attachment { segment: id, read_only })
}

/// Whether the segment belongs to the IPC namespace of this process, and not to one of the tree.
fn in_our_namespace(host: &Host<'_>, vma: &VmaInfo) -> Result<bool> {
    let proc = host.open_proc(vma.pid)?;
    let namespace = |path: String| fs::metadata(path).map_err(failed("look at an IPC namespace"));
    let theirs = namespace(format!("/proc/self/fd/{}/ns/ipc", proc.as_raw_fd()))?;
    Ok(theirs.ino() == namespace("/proc/self/ns/ipc".into())?.ino())
}

/// Whether mprotect(2) may add the right to write: the segment was not attached read-only (VmFlags in proc_pid_smaps(5)).
fn may_write(host: &Host<'_>, vma: &VmaInfo) -> Result<bool> {
    let proc = host.open_proc(vma.pid)?;
    let smaps = fs::read_to_string(format!("/proc/self/fd/{}/smaps", proc.as_raw_fd()));
    let smaps = smaps.map_err(failed("read the mappings of a task"))?;
    let head = format!("{:x}-{:x} ", vma.start, vma.end);
    let flags = smaps
        .lines()
        .skip_while(|line| !line.starts_with(&head))
        .find_map(|line| line.strip_prefix("VmFlags:"));
    Ok(flags.is_some_and(|flags| flags.split_whitespace().any(|flag| flag == "mw")))
}

fn segment(host: &Host<'_>, vma: &VmaInfo, id: u32) -> Result<()> {
    let label = format!("System V segment {id}");
    let refuse = |why: String, remedy: &str| Err(HookError::unsupported(label.clone(), why, remedy));
    let Some(stat) = kernel::stat(id) else {
        return Err(HookError::invalid(format!("there is no {label}")));
    };
    let proc = host.open_proc(vma.pid)?;
    let path = format!("/proc/self/fd/{}/map_files/{:x}-{:x}", proc.as_raw_fd(), vma.start, vma.end);
    let file = File::open(path).map_err(failed("open a System V segment"))?;
    let magic = file_system(&file).map_err(failed("fstatfs of a System V segment"))?;
    if magic == libc::HUGETLBFS_MAGIC {
        return refuse("it is made of hugetlb pages (SHM_HUGETLB)".into(), "let the program use plain pages");
    }
    let ours = attachments(host, id)?;
    if stat.attached != ours {
        let why = format!(
            "{} of its {} attachments are outside of the tree",
            stat.attached - ours.min(stat.attached),
            stat.attached
        );
        return refuse(why, "dump those processes, too");
    }
    let segment = Segment {
        id,
        key: stat.key,
        size: stat.size,
        mode: stat.mode & 0o777,
        uid: stat.uid,
        gid: stat.gid,
        removed: stat.mode & SHM_DEST != 0,
        extents: contents(host, &file, id, stat.size)?,
    };
    let list = segment.encode_length_delimited_to_vec();
    host.blob_writer(SEGMENTS).write_all(&list).map_err(failed("write the list of segments"))
}

fn file_system(file: &File) -> io::Result<i64> {
    // SAFETY: zeros are valid.
    let mut statfs: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: room for a struct statfs.
    match unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut statfs) } {
        0 => Ok(statfs.f_type),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How many mappings of a segment the tree has; the kernel counts them likewise.
fn attachments(host: &Host<'_>, id: u32) -> Result<u64> {
    let mut count = 0;
    for task in host.tasks() {
        let proc = host.open_proc(task.pid)?;
        let maps = fs::read_to_string(format!("/proc/self/fd/{}/maps", proc.as_raw_fd()));
        let maps = maps.map_err(failed("read the mappings of a task"))?;
        count += maps.lines().filter(|line| is_of(line, id)).count() as u64;
    }
    Ok(count)
}

/// `address perms offset dev inode path`
fn is_of(line: &str, id: u32) -> bool {
    let mut words = line.split_whitespace().skip(4);
    words.next().is_some_and(|ino| ino.parse() == Ok(id))
        && words.next().is_some_and(|path| path.starts_with(PREFIX))
}

/// Writes what is in a segment, holes left out.
fn contents(host: &Host<'_>, file: &File, id: u32, size: u64) -> Result<Vec<Extent>> {
    let name = data(id);
    let mut writer = host.blob_writer(&name);
    let mut buffer = vec![0; CHUNK as usize];
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size {
        let Some(start) = seek(file, at, libc::SEEK_DATA).map_err(failed("look for data in a segment"))?
        else {
            break;
        };
        let end = seek(file, start, libc::SEEK_HOLE).map_err(failed("look for a hole in a segment"))?;
        let end = end.unwrap_or(size).min(size);
        let mut offset = start;
        while offset < end {
            let part = &mut buffer[..CHUNK.min(end - offset) as usize];
            file.read_exact_at(part, offset).map_err(failed("read a System V segment"))?;
            writer.write_all(part).map_err(failed("write the contents of a segment"))?;
            offset += part.len() as u64;
        }
        if end > start {
            extents.push(Extent { offset: start, length: end - start });
        }
        at = end.max(start + 1);
    }
    Ok(extents)
}

/// lseek(2); none behind the last data.
fn seek(file: &File, offset: u64, whence: i32) -> io::Result<Option<u64>> {
    // SAFETY: integers only.
    match unsafe { libc::lseek(file.as_raw_fd(), offset.cast_signed(), whence) } {
        -1 => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
        at => Ok(Some(at.cast_unsigned())),
    }
}
