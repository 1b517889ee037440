//! Event polls: epoll(7).
//!
//! The kernel's key of an entry is an open file description and the number under which it was added (fs/eventpoll.c,
//! `struct epoll_filefd`). The number may have been closed or used again since, so the description is found by
//! kcmp(2) with `KCMP_EPOLL_TFD`. Entries are added again in `settle`, in the task in whose table most numbers still mean
//! what they meant, since a signalfd looks at the signals of the task that added it; an entry whose number means
//! something else now is added from a scratch copy of that task's table.
//!
//! **Readiness.** An entry that is added looks at its file at once, so whatever is ready is reported: no event is
//! lost. The kernel does not tell which edges an `EPOLLET` entry has reported already: one that is still ready is
//! reported once more. A disarmed `EPOLLONESHOT` entry is disarmed again by letting it fire unseen; if its file is ready
//! for nothing at that moment, the entry can still wake for `EPOLLERR` and `EPOLLHUP`, with no other events.
//!
//! **Not kept:** the order in which ready entries are reported; `EPOLLWAKEUP` without `CAP_BLOCK_SUSPEND`; which of several
//! tasks with the same numbers added a signalfd (the first one is taken). A target that is in no task's table, be it in
//! flight in a socket or open outside the tree only, is refused by name.

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, Host, ObjectInfo, Result, Selector, export_plugin, register,
};
use std::os::fd::{BorrowedFd, OwnedFd};

mod records {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
mod dump;
mod kernel;
mod restore;
#[cfg(test)]
mod tests;
use records::stasis::epoll::v1::Epoll;

struct Polls;

impl Descriptor for Polls {
    type Record = Epoll;
    const KIND: &'static str = "epoll";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::AnonInode("[eventpoll]".into())]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
        // An epoll cannot be opened again through /proc, so the handle is the object.
        Ok(Described {
            identity: handle.id.to_string().into(),
            description: format!("epoll with {} entries", dump::entries(handle)?.len()).into(),
            ..Described::default()
        })
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Epoll>> {
        dump::epoll(host, object)
    }

    fn create(&self, _: &Host<'_>, _: &ObjectInfo, record: &Epoll) -> Result<Vec<OwnedFd>> {
        Ok(vec![restore::create(record)?])
    }

    fn settle(&self, host: &Host<'_>, object: &ObjectInfo, record: &Epoll) -> Result<()> {
        restore::settle(host, object, record)
    }
}

register!(descriptor: Polls);
export_plugin! { name: "epoll", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }
