//! Timers: timerfd_create(2).
//!
//! The time that remains when the tree is frozen is what remains when it runs on: the timer is armed again in `settle`, as
//! late as a hook can. The exception is a timer set for a moment of the wall clock (`TFD_TIMER_ABSTIME` with
//! `CLOCK_REALTIME` or `CLOCK_REALTIME_ALARM`): it expires at that moment, at once if it has passed.
//!
//! Not kept: a cancellation by a jump of the clock (`TFD_TIMER_CANCEL_ON_SET`) that was not read yet looks like an
//! expiration, since the kernel shows only the count.

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
use records::stasis::timerfd::v1::Timer;

struct Timers;

impl Descriptor for Timers {
    type Record = Timer;
    const KIND: &'static str = "timerfd";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::AnonInode("[timerfd]".into())]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
        // A timerfd cannot be opened again through /proc, so the handle is the object.
        let clock = handle.field("clockid")?;
        Ok(Described {
            identity: handle.id.to_string().into(),
            description: format!("timerfd (clock {clock})").into(),
            ..Described::default()
        })
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Timer>> {
        dump::timer(host.open_handle(object.handles[0].id)?).map(Dumped::new)
    }

    fn create(&self, _: &Host<'_>, _: &ObjectInfo, record: &Timer) -> Result<Vec<OwnedFd>> {
        Ok(vec![restore::create(record)?])
    }

    fn settle(&self, host: &Host<'_>, object: &ObjectInfo, record: &Timer) -> Result<()> {
        restore::arm(&host.open_handle(object.handles[0].id)?, record)
    }
}

register!(descriptor: Timers);
export_plugin! { name: "timerfd", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }
