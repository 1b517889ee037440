//! Reading a memory file.

use crate::{
    blob, kernel,
    records::stasis::memfd::v1::{Extent, MemoryFile},
};
use stasis_plugin_api::{HookError, Host, ObjectInfo, Result, namespace::IdMap};
use std::{
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileExt, MetadataExt},
        },
    },
};

const CHUNK: u64 = 1 << 20;

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}

/// Writes the contents and makes the record.
pub fn file(host: &Host<'_>, object: &ObjectInfo) -> Result<MemoryFile> {
    let handle = host.open_handle(object.handles[0].id)?;
    let link =
        fs::read_link(kernel::magic_link(handle.as_fd())).map_err(failed("read the link of a memfd"))?;
    let name = link.as_os_str().as_bytes();
    let name = name.strip_prefix(kernel::PREFIX.as_bytes()).unwrap_or(name);
    let name = name.strip_suffix(kernel::DELETED.as_bytes()).unwrap_or(name);
    // A description of our own: the task's position must not move.
    let file = kernel::reopen(handle.as_fd(), libc::O_RDONLY).map_err(failed("open a memory file"))?;
    let meta = file.metadata().map_err(failed("look at a memory file"))?;
    let (uid, gid) = owner(host, object, meta.uid(), meta.gid())?;
    let huge_shift = kernel::huge_shift(file.as_fd()).map_err(failed("fstatfs of a memory file"))?;
    let extents = match huge_shift {
        0 => contents(host, object, &file, meta.size())?,
        shift => huge_contents(host, object, &file, meta.size(), 1 << shift)?,
    };
    Ok(MemoryFile {
        name: name.to_vec(),
        size: meta.size(),
        seals: kernel::seals(file.as_fd()).map_err(failed("F_GET_SEALS"))?,
        mode: meta.mode() & 0o7777,
        uid,
        gid,
        extents,
        modified_s: meta.mtime(),
        modified_ns: meta.mtime_nsec(),
        accessed_s: meta.atime(),
        accessed_ns: meta.atime_nsec(),
        huge_shift,
    })
}

fn contents(host: &Host<'_>, object: &ObjectInfo, file: &File, size: u64) -> Result<Vec<Extent>> {
    if host.is_dry_run() {
        return Ok(Vec::new());
    }
    let name = blob(object);
    let mut writer = host.blob_writer(&name);
    let mut buffer = vec![0; CHUNK.min(size) as usize];
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size {
        let Some((start, end)) = kernel::data_after(file, at).map_err(failed("look for data in a memfd"))?
        else {
            break;
        };
        let end = end.min(size);
        let mut offset = start;
        while offset < end {
            let part = &mut buffer[..CHUNK.min(end - offset) as usize];
            file.read_exact_at(part, offset).map_err(failed("read a memory file"))?;
            writer.write_all(part).map_err(failed("write the contents of a memory file"))?;
            offset += part.len() as u64;
        }
        host.progress(end, size);
        extents.push(Extent { offset: start, length: end - start });
        at = end;
    }
    Ok(extents)
}

/// The pages of `page` bytes that are not all zeros, each an extent or a part of one. Only these go into the blob.
fn huge_contents(
    host: &Host<'_>,
    object: &ObjectInfo,
    file: &File,
    size: u64,
    page: u64,
) -> Result<Vec<Extent>> {
    let name = blob(object);
    let mut writer = host.blob_writer(&name);
    let mut buffer = vec![0; CHUNK.min(page) as usize];
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = 0;
    while at < size {
        // The zeros before the first piece that has something: their number is known when that turns up.
        let mut zeros = 0;
        let mut offset = at;
        while offset < at + page {
            file.read_exact_at(&mut buffer, offset).map_err(failed("read a memory file"))?;
            offset += buffer.len() as u64;
            if zeros + buffer.len() as u64 == offset - at && buffer.iter().all(|&byte| byte == 0) {
                zeros += buffer.len() as u64;
                continue;
            }
            writer.write_all(&buffer).map_err(failed("write the contents of a memory file"))?;
        }
        if zeros < page {
            match extents.last_mut() {
                Some(last) if last.offset + last.length == at + zeros => last.length += page - zeros,
                _ => extents.push(Extent { offset: at + zeros, length: page - zeros }),
            }
        }
        at += page;
        host.progress(at, size);
    }
    Ok(extents)
}

/// The owner as the tree sees it (user_namespaces(7)).
fn owner(host: &Host<'_>, object: &ObjectInfo, uid: u32, gid: u32) -> Result<(u32, u32)> {
    let holder = object.handles.iter().find_map(|handle| handle.holders.first().map(|holder| holder.pid));
    let pid = holder.or_else(|| host.tasks().first().map(|task| task.pid));
    let Some(pid) = pid else { return Ok((uid, gid)) };
    let proc = host.open_proc(pid)?;
    let inside = |file: &str, id: u32| {
        let path = format!("/proc/self/fd/{}/{file}", proc.as_raw_fd());
        let map = fs::read_to_string(path).map_err(failed("read an id map"))?;
        IdMap::parse(&map).inside(id).ok_or_else(|| {
            let remedy = "change the file's owner to a user of the tree";
            HookError::unsupported("memfd", format!("its owner {id} does not exist in the tree"), remedy)
        })
    };
    Ok((inside("uid_map", uid)?, inside("gid_map", gid)?))
}
