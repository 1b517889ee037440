//! Watches of files: inotify(7) and fanotify(7).
//!
//! A watch sits on an inode. fdinfo shows the inode's number, device and file handle (name_to_handle_at(2)); the path that
//! restore needs is found from these, never by opening anything that could itself be watched. Watches are added in
//! `settle`, when all path work is done, under the numbers they had (`INOTIFY_IOC_SETNEXTWD`). A watch on a removed
//! file is kept by a descriptor of that file in the tree.
//!
//! **Queued events** cannot be given back: the kernel makes events, nobody else can, and removing a stand-in watch queues
//! one of its own. inotify(7) has an event for this case: a queue with events in it comes back with one `IN_Q_OVERFLOW`,
//! upon which a program looks at its files again. The dump takes nothing out, so a tree that runs on has all its events.
//!
//! **Not kept:** the number that the next watch gets, if watches with higher numbers were removed.

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, Host, ObjectInfo, OptionDeclaration, Result, Selector,
    export_plugin, register,
};
use std::os::fd::{BorrowedFd, OwnedFd};

mod records {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
mod dump;
mod fanotify;
mod kernel;
mod locate;
mod overflow;
mod restore;
#[cfg(test)]
mod tests;
use records::stasis::inotify::v1::Instance;

/// Directories to look through for watched files of file systems whose file handles lead nowhere (CRIU has it, too).
pub const SCAN_PATH: &str = "irmap-scan-path";

struct Watches;

impl Descriptor for Watches {
    type Record = Instance;
    const KIND: &'static str = "inotify";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::AnonInode("inotify".into())]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
        // An instance cannot be opened again through /proc, so the handle is the object.
        Ok(Described {
            identity: handle.id.to_string().into(),
            description: format!("inotify with {} watches", dump::listed(handle)?.len()).into(),
            ..Described::default()
        })
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Instance>> {
        dump::instance(host, object)
    }

    fn create(&self, _: &Host<'_>, _: &ObjectInfo, _: &Instance) -> Result<Vec<OwnedFd>> {
        Ok(vec![restore::create()?])
    }

    fn settle(&self, host: &Host<'_>, object: &ObjectInfo, record: &Instance) -> Result<()> {
        restore::settle(host, object, record)
    }
}

register!(descriptor: Watches);
register!(descriptor: fanotify::Groups);
export_plugin! {
    name: "inotify",
    records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")),
    options: [OptionDeclaration::value(
        SCAN_PATH,
        "look below this directory for watched files that the file system cannot find by handle"
    )]
}
