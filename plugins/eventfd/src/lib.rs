//! Event counters: eventfd(2).

use nix::sys::eventfd::{EfdFlags, EventFd};
use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, Selector, export_plugin,
    register,
};
use std::os::fd::{BorrowedFd, OwnedFd};

mod records {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use records::stasis::eventfd::v1::EventCounter;

struct Counter;

/// Reads fdinfo (fs/eventfd.c, eventfd_show_fdinfo): the count is hexadecimal and padded with blanks.
fn record(handle: &HandleInfo) -> Result<EventCounter> {
    let count = u64::from_str_radix(handle.field("eventfd-count")?, 16)
        .map_err(|error| HookError::invalid(format!("eventfd-count: {error}")))?;
    if count == u64::MAX {
        // eventfd(2): the one count that a write cannot reach; the kernel itself got it there.
        let remedy = "let the program read the counter before the dump";
        return Err(HookError::unsupported("eventfd", "its counter has overflowed", remedy));
    }
    let semaphore = handle
        .field("eventfd-semaphore")
        .map_err(|error| error.remedy("the kernel must tell EFD_SEMAPHORE, which Linux 6.5 and later do"))?;
    Ok(EventCounter { count, semaphore: semaphore == "1" })
}

impl Descriptor for Counter {
    type Record = EventCounter;
    const KIND: &'static str = "eventfd";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::AnonInode("[eventfd]".into())]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
        // Every eventfd has exactly one open file description, so the handle is the object.
        let identity = handle.field("eventfd-id")?;
        Ok(Described {
            identity: identity.into(),
            description: format!("eventfd:[{identity}]").into(),
            ..Described::default()
        })
    }

    fn dump(&self, _: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<EventCounter>> {
        record(&object.handles[0]).map(Dumped::new)
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

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_plugin_api::testing::Kit;

    fn handle(fdinfo: &str) -> HandleInfo {
        HandleInfo { fdinfo: fdinfo.into(), ..HandleInfo::default() }
    }

    #[test]
    fn fdinfo_is_hexadecimal_and_padded() {
        let text = "pos:\t0\neventfd-count:              1a4\neventfd-id: 7\neventfd-semaphore: 1\n";
        assert_eq!(record(&handle(text)).unwrap(), EventCounter { count: 0x1a4, semaphore: true });
    }

    #[test]
    fn what_cannot_be_kept_is_refused() {
        let overflow = "eventfd-count: ffffffffffffffff\neventfd-id: 7\neventfd-semaphore: 0\n";
        assert!(record(&handle(overflow)).unwrap_err().to_string().contains("overflowed"));
        let old = "eventfd-count:                1\neventfd-id: 7\n";
        assert!(record(&handle(old)).unwrap_err().to_string().contains("6.5"));
    }

    fn round_trip(count: u64, flags: EfdFlags) -> EventFd {
        let eventfd = EventFd::from_value_and_flags(0, flags | EfdFlags::EFD_NONBLOCK).unwrap();
        if count > 0 {
            eventfd.write(count).unwrap();
        }
        let mut kit = Kit::new();
        kit.plugin(Counter);
        let number = kit.hold(OwnedFd::from(eventfd), Counter::KIND).unwrap();
        assert_eq!(kit.dump().unwrap(), 1);
        kit.restore().unwrap();
        let fd = kit.fd(number).try_clone_to_owned().unwrap();
        // SAFETY: the descriptor was just restored as an eventfd.
        unsafe { EventFd::from_owned_fd(fd) }
    }

    #[test]
    fn count_and_semaphore_come_back() {
        assert_eq!(round_trip(u64::MAX - 1, EfdFlags::empty()).read().unwrap(), u64::MAX - 1);
        assert!(round_trip(0, EfdFlags::empty()).read().is_err());
        let semaphore = round_trip(2, EfdFlags::EFD_SEMAPHORE);
        assert_eq!((semaphore.read(), semaphore.read()), (Ok(1), Ok(1)));
        assert!(semaphore.read().is_err());
    }
}
