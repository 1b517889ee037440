//! A plugin for what another one has claimed already: event counters (eventfd(2)) without EFD_SEMAPHORE.

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, Selector, export_plugin,
    register,
};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

mod records {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use records::rival::v1::Count;

unsafe extern "C" {
    fn eventfd(value: u32, flags: i32) -> i32;
}

struct Counter;

impl Descriptor for Counter {
    type Record = Count;
    const KIND: &'static str = "counter";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::AnonInode("[eventfd]".into())]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
        let identity = handle.field("eventfd-id")?;
        Ok(Described { identity: identity.into(), ..Described::default() })
    }

    fn dump(&self, _: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Count>> {
        let handle = &object.handles[0];
        if handle.field("eventfd-semaphore")? == "1" {
            return Err(HookError::unsupported("eventfd", "it is a semaphore", "--without rival"));
        }
        let value = u64::from_str_radix(handle.field("eventfd-count")?, 16);
        let value = value.map_err(|error| HookError::invalid(format!("eventfd-count: {error}")))?;
        Ok(Dumped::new(Count { value }))
    }

    fn create(&self, _: &Host<'_>, _: &ObjectInfo, record: &Count) -> Result<Vec<OwnedFd>> {
        let value =
            u32::try_from(record.value).map_err(|_| HookError::invalid("a count of more than 32 bits"))?;
        // SAFETY: two integers.
        let fd = unsafe { eventfd(value, 0) };
        if fd < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(vec![unsafe { OwnedFd::from_raw_fd(fd) }])
    }
}

register!(descriptor: Counter);
export_plugin! { name: "rival", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }
