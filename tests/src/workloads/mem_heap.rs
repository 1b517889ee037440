//! The brk heap: contents, its end, growing and shrinking afterwards.

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys::{Map, PAGE};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let start = grow(0)?;
    let pad = start.next_multiple_of(PAGE) - start;
    grow(pad + 200 * PAGE + 24)?;
    let map = Map { addr: start + pad, len: 200 * PAGE };
    map.fill(31);
    let end = grow(0)?;

    if ctl.wait()? {
        map.put(800, 3);
    }

    map.check("heap", 31)?;
    // Checked by the difference, for the allocator of this very process may use brk as well.
    ensure(grow(0)? >= end, "the heap has become smaller")?;
    let end = grow(50 * PAGE)?;
    let more = Map { addr: end.next_multiple_of(PAGE), len: 40 * PAGE };
    more.fill(32);
    more.check("grown heap", 32)?;
    let now = grow(0)?;
    // SAFETY: gives back what was just taken; nothing lives there.
    let back = unsafe { libc::brk((now - 50 * PAGE) as *mut _) };
    same("brk", back, 0)?;
    same("end after shrinking", grow(0)?, end)
}

/// sbrk(3): the old end.
fn grow(by: usize) -> Outcome<usize> {
    // SAFETY: only grows the heap.
    let old = unsafe { libc::sbrk(by as isize) };
    ensure(old as isize != -1, "sbrk failed")?;
    Ok(old as usize)
}
