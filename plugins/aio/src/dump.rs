//! Reading a ring.

use crate::{
    kernel::{self, EVENT, HEADER, Header},
    record::stasis::aio::v1::Ring,
};
use stasis_plugin_api::{ErrorKind, HookError, Host, Result, VmaInfo};
use std::time::{Duration, Instant};

/// How long a ring must stand still, and how long that is waited for.
const STILL: Duration = Duration::from_millis(2);
const PATIENCE: Duration = Duration::from_millis(500);

fn label(vma: &VmaInfo) -> String {
    format!("AIO ring {:x}-{:x}", vma.start, vma.end)
}

fn header(host: &Host<'_>, vma: &VmaInfo) -> Result<Header> {
    let mut bytes = [0; HEADER];
    host.read_memory(vma.pid, vma.start, &mut bytes)?;
    let sound =
        Header::of(&bytes).filter(|header| u64::from(header.events) <= kernel::slots(vma.end - vma.start));
    sound.ok_or_else(|| {
        HookError::unsupported(
            label(vma),
            "the program has written over its head",
            "report this to its authors",
        )
    })
}

pub fn ring(host: &Host<'_>, vma: &VmaInfo) -> Result<Ring> {
    // Asks for no events: only a ring of this very process is one (a child has the mapping, but not the context).
    match host.remote_syscall(vma.pid, libc::SYS_io_getevents, [vma.start, 0, 0, 0, 0, 0]) {
        Err(error) if error.kind == ErrorKind::Failed && error.errno == libc::EINVAL => {
            let why = "it is that of a parent, of which a child has only the memory";
            return Err(HookError::unsupported(label(vma), why, "let the child unmap it"));
        }
        result => result.map(drop)?,
    }
    let began = Instant::now();
    let mut last = header(host, vma)?;
    loop {
        std::thread::sleep(STILL);
        let now = header(host, vma)?;
        if now == last {
            break;
        }
        last = now;
        if began.elapsed() > PATIENCE {
            let why = "requests finish all the time";
            return Err(HookError::unsupported(label(vma), why, "try again in a moment"));
        }
    }
    host.warn(&format!(
        "{}: requests under way cannot be seen; one that has not finished yet is lost",
        label(vma)
    ));
    let mut finished = vec![0; last.finished() as usize * EVENT];
    for (slot, event) in (0..).zip(finished.chunks_exact_mut(EVENT)) {
        let slot = (u64::from(last.head) + slot) % u64::from(last.events);
        host.read_memory(vma.pid, vma.start + HEADER as u64 + slot * EVENT as u64, event)?;
    }
    Ok(Ring { events: last.events, head: last.head, tail: last.tail, finished })
}
