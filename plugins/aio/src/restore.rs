//! Making a ring as it was.

use crate::{
    kernel::{self, Context, EVENT, HEADER, Header},
    record::stasis::aio::v1::Ring,
};
use stasis_plugin_api::{HookError, Result, VmaInfo};
use std::io;

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}

/// The kernel's own count of slots is moved on by requests that are done at once: first to the head, each of them fetched, then to the
/// tail, where those stay that stand for the finished ones.
pub fn ring(vma: &VmaInfo, record: &Ring) -> Result<()> {
    let size = vma.end - vma.start;
    let wanted = Header { events: record.events, head: record.head, tail: record.tail };
    let sound = record.head < record.events
        && record.tail < record.events
        && u64::from(record.events) <= kernel::slots(size)
        && record.finished.len() == wanted.finished() as usize * EVENT;
    if !sound {
        return Err(HookError::invalid("an AIO ring whose numbers do not fit"));
    }
    let made = Context::new(size).map_err(|error| {
        let remedy = format!("fs.aio-max-nr is {}: raise it", kernel::limit());
        HookError::failed("io_setup", error).remedy(remedy)
    })?;
    fill(made, size, vma.start, wanted, record).inspect_err(|_| {
        let _ = made.destroy();
    })
}

fn fill(made: Context, size: u64, place: u64, wanted: Header, record: &Ring) -> Result<()> {
    let has =
        Header::of(&made.bytes(HEADER)).ok_or_else(|| HookError::invalid("a new AIO ring has no head"))?;
    if has.events != wanted.events {
        let what = format!("this kernel makes an AIO ring of {} events, not {}", has.events, wanted.events);
        return Err(HookError::invalid(what).remedy("a machine with as many processors as that of the dump"));
    }
    let file = kernel::empty_file().map_err(failed("memfd_create"))?;
    // Half of the slots at once: some may be in reserve for other processors.
    let mut rest = wanted.head;
    while rest > 0 {
        let count = rest.min(wanted.events / 4).max(1);
        made.submit(&file, count).map_err(failed("io_submit"))?;
        made.fetch(count).map_err(failed("io_getevents"))?;
        rest -= count;
    }
    made.submit(&file, wanted.finished()).map_err(failed("io_submit"))?;
    for (slot, event) in (0..).zip(record.finished.chunks_exact(EVENT)) {
        let slot = (u64::from(wanted.head) + slot) % u64::from(wanted.events);
        made.write(HEADER as u64 + slot * EVENT as u64, event);
    }
    made.move_to(place, size).map(drop).map_err(failed("moving an AIO ring"))
}
