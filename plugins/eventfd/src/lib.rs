//! Event counters: eventfd(2).

use nix::sys::eventfd::{EfdFlags, EventFd};
use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, Selector, export_plugin,
    register,
};
use std::os::fd::{BorrowedFd, OwnedFd};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::eventfd::v1::EventCounter;

struct Counter;

/// A field of fdinfo (fs/eventfd.c, eventfd_show_fdinfo).
fn field<'a>(handle: &'a HandleInfo, name: &str) -> Result<&'a str> {
    handle
        .fdinfo
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
        .ok_or_else(|| HookError::invalid(format!("fdinfo has no field {name}")))
}

impl Descriptor for Counter {
    type Record = EventCounter;
    const KIND: &'static str = "eventfd";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::AnonInode("[eventfd]".into())]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
        // Every eventfd has exactly one open file description, so the handle is the object.
        let identity = field(handle, "eventfd-id")?;
        Ok(Described {
            identity: identity.into(),
            description: format!("eventfd:[{identity}]").into(),
            ..Described::default()
        })
    }

    fn dump(&self, _: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<EventCounter>> {
        let handle = &object.handles[0];
        let count = u64::from_str_radix(field(handle, "eventfd-count")?, 16)
            .map_err(|error| HookError::invalid(format!("eventfd-count: {error}")))?;
        let semaphore = field(handle, "eventfd-semaphore")? == "1";
        Ok(Dumped::new(EventCounter { count, semaphore }))
    }

    fn create(&self, _: &Host<'_>, _: &ObjectInfo, record: &EventCounter) -> Result<Vec<OwnedFd>> {
        let flags = if record.semaphore { EfdFlags::EFD_SEMAPHORE } else { EfdFlags::empty() };
        // The initial value of eventfd(2) has 32 bits only; a write adds the rest, and a full counter would block.
        let eventfd =
            EventFd::from_value_and_flags(0, flags | EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(|errno| HookError::failed("eventfd2", errno))?;
        if record.count > 0 {
            eventfd.write(record.count).map_err(|errno| HookError::failed("write to the eventfd", errno))?;
        }
        Ok(vec![OwnedFd::from(eventfd)])
    }
}

register!(descriptor: Counter);
export_plugin! { name: "eventfd", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }
