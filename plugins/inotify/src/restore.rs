//! Making an instance and adding its watches.

use crate::{
    kernel, locate, overflow,
    records::stasis::inotify::v1::{Instance, Watch},
};
use stasis_plugin_api::{HookError, Host, ObjectInfo, Result};
use std::{
    ffi::OsStr,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

/// An instance without watches.
pub fn create() -> Result<OwnedFd> {
    kernel::create().map_err(|error| {
        let remedy = match error.raw_os_error() {
            Some(libc::EMFILE) => "raise fs.inotify.max_user_instances",
            _ => "",
        };
        HookError::failed("inotify_init1", error).remedy(remedy)
    })
}

/// Queues what stands for lost events, and adds the watches.
pub fn settle(host: &Host<'_>, object: &ObjectInfo, record: &Instance) -> Result<()> {
    let inotify = host.open_handle(object.handles[0].id)?;
    if record.overflow {
        overflow::queue(inotify.as_fd())?;
        set_next(inotify.as_fd(), 1)?;
    }
    let mut next = 1;
    for watch in &record.watches {
        add(host, inotify.as_fd(), watch, next)?;
        next = watch.number.saturating_add(1);
    }
    Ok(())
}

fn set_next(inotify: BorrowedFd<'_>, number: i32) -> Result<()> {
    kernel::set_next(inotify, number).map_err(|error| {
        HookError::failed(format!("INOTIFY_IOC_SETNEXTWD to {number}"), error)
            .remedy("needs a kernel with CONFIG_CHECKPOINT_RESTORE")
    })
}

/// `next` is the number that the kernel would give.
fn add(host: &Host<'_>, inotify: BorrowedFd<'_>, watch: &Watch, next: i32) -> Result<()> {
    if watch.number != next {
        set_next(inotify, watch.number)?;
    }
    let target = target(host, watch)?;
    // The magic link leads to this very file, were it a symbolic link itself.
    let number = kernel::add(inotify, &kernel::magic_link(target.as_fd()), watch.mask).map_err(|error| {
        let remedy = match error.raw_os_error() {
            Some(libc::ENOSPC) => "raise fs.inotify.max_user_watches",
            _ => "",
        };
        HookError::failed(format!("inotify_add_watch of {}", shown(watch)), error).remedy(remedy)
    })?;
    if number == watch.number {
        return Ok(());
    }
    let what = format!("watch {} on {} got number {number}", watch.number, shown(watch));
    let remedy = "two watched files of the dump are one file now: put the files back as they were";
    Err(HookError::invalid(what).remedy(remedy))
}

pub fn shown(watch: &Watch) -> String {
    match watch.path.as_slice() {
        b"" => format!("the file of watch {}", watch.number),
        path => String::from_utf8_lossy(path).into_owned(),
    }
}

pub fn target(host: &Host<'_>, watch: &Watch) -> Result<OwnedFd> {
    if watch.handle != 0 {
        return host.open_handle(watch.handle);
    }
    let missing = || io::Error::from_raw_os_error(libc::ENOENT);
    let by_path = match watch.path.as_slice() {
        b"" => Err(missing()),
        path => kernel::locate(None, Path::new(OsStr::from_bytes(path)), false),
    };
    let fits = |file: OwnedFd| match locate::kind_of(file.as_fd()) {
        Ok(kind) if kind == watch.mode => Ok(file),
        Ok(_) => Err(missing()),
        Err(error) => Err(error),
    };
    let found = by_path.and_then(fits).or_else(|error| match &watch.file {
        Some(file) => locate::reopen(file.r#type, &file.data, &file.mount).and_then(fits).map_err(|_| error),
        None => Err(error),
    });
    found.map_err(|error| {
        HookError::failed(format!("find {}, which is watched", shown(watch)), error)
            .remedy("put the file back where it was at the dump")
    })
}
