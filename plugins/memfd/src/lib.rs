//! Memory files: memfd_create(2).
//!
//! An object is a file; its handles are all descriptions of it, those of mappings included, which core hands over as
//! descriptors. The contents go into a blob, holes left out. Seals come last, in `settle`, when the
//! mappings are there: `F_SEAL_FUTURE_WRITE` forbids new ones. `F_SEAL_WRITE` comes at once: it forbids them all.
//!
//! Those of hugetlb pages can be written by mapping them only, and do not tell their holes: pages that are all zeros are left out.
//!
//! **Not kept:** preallocated pages without data (fallocate(2)), and change time. Locked memory files are refused by name.

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, Selector, export_plugin,
    register,
};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

mod records {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
mod dump;
mod kernel;
mod restore;
#[cfg(test)]
mod tests;
use records::stasis::memfd::v1::MemoryFile;

struct MemoryFiles;

/// The name of the blob with an object's contents.
fn blob(object: &ObjectInfo) -> String {
    format!("memfd-{}", object.id)
}

impl Descriptor for MemoryFiles {
    type Record = MemoryFile;
    const KIND: &'static str = "memfd";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::Predicate]
    }

    fn claims(&self, _: &Host<'_>, handle: &HandleInfo) -> bool {
        // A removed file of this name may lie in a root directory, but not on the kernel's own mounts.
        handle.link.starts_with(kernel::PREFIX)
            && handle.link.ends_with(kernel::DELETED)
            && kernel::devices().contains(&handle.dev)
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
        // fs/locks.c, show_fd_locks: one line per lock.
        if handle.fdinfo.lines().any(|line| line.starts_with("lock:")) {
            return Err(HookError::unsupported("memfd", "it is locked", "let the program unlock it"));
        }
        Ok(Described {
            identity: format!("{}:{}", handle.dev, handle.ino).into(),
            description: handle.link.trim_end_matches(kernel::DELETED).into(),
            ..Described::default()
        })
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<MemoryFile>> {
        dump::file(host, object).map(Dumped::new)
    }

    fn create(&self, host: &Host<'_>, object: &ObjectInfo, record: &MemoryFile) -> Result<Vec<OwnedFd>> {
        restore::create(host, object, record)
    }

    fn settle(&self, host: &Host<'_>, object: &ObjectInfo, record: &MemoryFile) -> Result<()> {
        if record.seals & libc::F_SEAL_WRITE.cast_unsigned() != 0 {
            return Ok(());
        }
        restore::finish(host.open_handle(object.handles[0].id)?.as_fd(), record)
    }
}

register!(descriptor: MemoryFiles);
export_plugin! { name: "memfd", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }
