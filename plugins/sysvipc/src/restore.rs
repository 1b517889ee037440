//! Making segments in the command, and attaching them in the tasks.

use crate::{
    dump::{SEGMENTS, data},
    kernel::{self, Attached},
    record::stasis::sysvshm::v1::{Attachment, Segment},
};
use stasis_plugin_api::{HookError, Host, Result, VmaInfo, prost::Message};
use std::{
    fs::File,
    io::{self, Read},
    os::fd::AsFd,
    slice,
};

/// No list of segments is longer.
const LONGEST_LIST: u64 = 1 << 26;

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}

fn segments(host: &Host<'_>) -> Result<Vec<Segment>> {
    let mut bytes = Vec::new();
    let read = host.blob_reader(SEGMENTS).take(LONGEST_LIST).read_to_end(&mut bytes);
    read.map_err(failed("read the list of segments"))?;
    let mut rest = bytes.as_slice();
    let mut list = Vec::new();
    while !rest.is_empty() {
        let one = Segment::decode_length_delimited(&mut rest);
        list.push(one.map_err(|error| HookError::invalid(format!("the list of segments: {error}")))?);
    }
    Ok(list)
}

/// Before there is any task.
pub fn make_all(host: &Host<'_>) -> Result<()> {
    segments(host)?.iter().try_for_each(|segment| make(host, segment))
}

fn make(host: &Host<'_>, segment: &Segment) -> Result<()> {
    let (id, size) = (segment.id, segment.size);
    let length = usize::try_from(size).map_err(|_| HookError::invalid("a segment of impossible size"))?;
    let inside = |(offset, length): (u64, u64)| offset.checked_add(length).is_some_and(|end| end <= size);
    if length == 0
        || i32::try_from(id).is_err()
        || !segment.extents.iter().all(|e| inside((e.offset, e.length)))
    {
        return Err(HookError::invalid(format!("System V segment {id} has data beyond its end")));
    }
    match kernel::stat(id) {
        Some(there) if (there.key, there.size) != (segment.key, size) => {
            let what = format!("System V segment {id} is another one here");
            return Err(HookError::invalid(what).remedy("remove it first (ipcrm -m), if nobody needs it"));
        }
        Some(there) if there.attached != 0 => {
            let what = format!("System V segment {id} is in use");
            return Err(HookError::invalid(what).remedy("end the processes that have it attached"));
        }
        Some(_) => {}
        None => {
            // Taken away by the guardian if nobody comes to use it.
            let null = File::open("/dev/null").map_err(failed("open /dev/null"))?;
            host.undo(null.as_fd(), &[kernel::removal(id)])?;
            kernel::create(id, segment.key, length, segment.mode).map_err(|error| {
                let remedy = format!("its key {:#x} may be taken (ipcs -m)", segment.key);
                HookError::failed(format!("making System V segment {id}"), error).remedy(remedy)
            })?;
        }
    }
    fill(host, segment, length)?;
    kernel::set_owner(id, segment.uid, segment.gid, segment.mode)
        .map_err(failed("set the owner of a segment"))
}

fn fill(host: &Host<'_>, segment: &Segment, length: usize) -> Result<()> {
    let attached = Attached::new(segment.id, 0).map_err(failed("shmat"))?;
    // SAFETY: attached just now, and nobody else has it.
    let memory = unsafe { slice::from_raw_parts_mut(attached.0 as *mut u8, length) };
    let name = data(segment.id);
    let mut reader = host.blob_reader(&name);
    let mut at = 0;
    for extent in &segment.extents {
        let (start, end) = (extent.offset as usize, (extent.offset + extent.length) as usize);
        if start < at {
            return Err(HookError::invalid("data of a segment out of order"));
        }
        clear(&mut memory[at..start]);
        reader.read_exact(&mut memory[start..end]).map_err(failed("read the contents of a segment"))?;
        at = end;
    }
    clear(&mut memory[at..]);
    Ok(())
}

/// Only what is not clear yet: holes stay holes.
fn clear(memory: &mut [u8]) {
    for page in memory.chunks_mut(4096) {
        if page.iter().any(|byte| *byte != 0) {
            page.fill(0);
        }
    }
}

/// All tasks have theirs: what was removed goes with the last of them.
pub fn attached(host: &Host<'_>) -> Result<()> {
    for segment in segments(host)?.iter().filter(|segment| segment.removed) {
        kernel::remove(segment.id).map_err(failed("remove a System V segment"))?;
    }
    Ok(())
}

/// Keeps a place from being chosen by the kernel for the whole segment, of which only a part belongs there.
fn reserve(start: u64, length: u64) -> Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: replaces no mapping.
    let place =
        unsafe { libc::mmap(start as *mut libc::c_void, length as usize, libc::PROT_NONE, flags, -1, 0) };
    match io::Error::last_os_error() {
        error if place == libc::MAP_FAILED && error.raw_os_error() != Some(libc::EEXIST) => {
            Err(failed("reserving the place of a System V segment")(error))
        }
        // There is a mapping already, ours or core's.
        _ => Ok(()),
    }
}

/// The part of a segment that `vma` shows, at its place.
pub fn attach(vma: &VmaInfo, record: &Attachment) -> Result<()> {
    let size = kernel::stat(record.segment).map_or(0, |stat| stat.size.next_multiple_of(4096));
    let length = vma.end - vma.start;
    let inside = vma.offset.checked_add(length).is_some_and(|end| end <= size);
    if !inside {
        return Err(HookError::invalid(format!(
            "System V segment {} is smaller than its mapping",
            record.segment
        )));
    }
    reserve(vma.start, length)?;
    let execute = if vma.prot & libc::PROT_EXEC as u32 != 0 { libc::SHM_EXEC } else { 0 };
    let read_only = if record.read_only { libc::SHM_RDONLY } else { 0 };
    let whole = Attached::new(record.segment, execute | read_only).map_err(|error| {
        HookError::failed(format!("attaching System V segment {}", record.segment), error)
            .remedy("the task must have access to it by its permissions")
    })?;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let from = (whole.0 + vma.offset) as *mut libc::c_void;
    // SAFETY: a part of what was just attached; the target is ours, as core promises.
    let moved = unsafe {
        libc::mremap(from, length as usize, length as usize, flags, vma.start as *mut libc::c_void)
    };
    if moved == libc::MAP_FAILED {
        return Err(failed("moving a System V segment")(io::Error::last_os_error()));
    }
    // What is left of it around the part.
    let around = [(whole.0, vma.offset), (whole.0 + vma.offset + length, size - vma.offset - length)];
    std::mem::forget(whole);
    for (start, length) in around.into_iter().filter(|(_, length)| *length != 0) {
        // SAFETY: of the attachment above, into which nobody has a reference.
        unsafe { libc::munmap(start as *mut _, length as usize) };
    }
    // SAFETY: the mapping that was just moved.
    match unsafe { libc::mprotect(vma.start as *mut _, length as usize, vma.prot as i32) } {
        0 => Ok(()),
        _ => Err(failed("setting the access of a System V segment")(io::Error::last_os_error())),
    }
}
