//! Making a memory file.

use crate::{blob, kernel, records::stasis::memfd::v1::MemoryFile};
use stasis_plugin_api::{HookError, Host, ObjectInfo, Result};
use std::{
    ffi::CString,
    fs::{File, Permissions},
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{FileExt, PermissionsExt},
    },
};

const CHUNK: u64 = 1 << 20;

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}

/// The file with its contents, and one descriptor for each handle.
pub fn create(host: &Host<'_>, object: &ObjectInfo, record: &MemoryFile) -> Result<Vec<OwnedFd>> {
    let name = CString::new(record.name.clone())
        .map_err(|_| HookError::invalid("the name of a memory file has a NUL in it"))?;
    let file = kernel::create(&name, record.huge_shift).map(File::from).map_err(failed("memfd_create"))?;
    file.set_len(record.size).map_err(failed("set the size of a memory file"))?;
    fill(host, object, record, &file)?;
    // A writable mapping cannot exist, nor be sealed later; one made now of a writable description cannot write.
    if record.seals & libc::F_SEAL_WRITE.cast_unsigned() != 0 {
        finish(file.as_fd(), record)?;
    }
    let handles = object.handles.iter().map(|handle| handle.status_flags.cast_signed());
    let fds = handles.map(|flags| kernel::reopen(file.as_fd(), flags).map(OwnedFd::from));
    fds.collect::<io::Result<_>>().map_err(failed("open a memory file"))
}

fn fill(host: &Host<'_>, object: &ObjectInfo, record: &MemoryFile, file: &File) -> Result<()> {
    // Sizes of hugetlb pages: 2 MiB and 1 GiB (arch/x86/mm/hugetlbpage.c).
    if ![0, 21, 30].contains(&record.huge_shift) {
        return Err(HookError::invalid(format!("a page of 2^{} bytes", record.huge_shift)));
    }
    let name = blob(object);
    let mut reader = host.blob_reader(&name);
    let mut buffer = vec![0; CHUNK.min(record.size) as usize];
    for extent in &record.extents {
        let end = extent.offset.checked_add(extent.length).filter(|end| *end <= record.size);
        let end = end.ok_or_else(|| HookError::invalid("data beyond the end of a memory file"))?;
        let mut offset = extent.offset;
        while offset < end {
            let part = &mut buffer[..CHUNK.min(end - offset) as usize];
            reader.read_exact(part).map_err(failed("read the contents of a memory file"))?;
            match record.huge_shift {
                0 => file.write_all_at(part, offset).map_err(failed("write a memory file"))?,
                shift => kernel::write_mapped(file, part, offset, 1 << shift)
                    .map_err(failed("write hugetlb pages (are there enough? see vm.nr_hugepages)"))?,
            }
            offset += part.len() as u64;
        }
    }
    Ok(())
}

/// Owner, mode, times and seals, when every mapping is there.
pub fn finish(handle: BorrowedFd<'_>, record: &MemoryFile) -> Result<()> {
    // Not the handle itself, which may be for reading only.
    let file = kernel::reopen(handle, libc::O_RDWR).map_err(failed("open a memory file"))?;
    std::os::unix::fs::fchown(&file, Some(record.uid), Some(record.gid))
        .map_err(failed("set the owner of a memory file"))?;
    // After the owner, whose change takes set-user-id bits away.
    file.set_permissions(Permissions::from_mode(record.mode))
        .map_err(failed("set the mode of a memory file"))?;
    let times = [(record.accessed_s, record.accessed_ns), (record.modified_s, record.modified_ns)];
    kernel::set_times(file.as_fd(), times).map_err(failed("set the times of a memory file"))?;
    match record.seals {
        0 => Ok(()),
        seals => kernel::add_seals(file.as_fd(), seals).map_err(failed("F_ADD_SEALS")),
    }
}
