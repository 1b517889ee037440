//! Shared anonymous memory: between parent and child, and mapped a second time, in part, by mremap.

use crate::ctl::{Ctl, Outcome, ensure, poll_until};
use crate::sys::{Map, PAGE};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let map = Map::shared(64 * PAGE)?;
    map.part(16 * PAGE, 48 * PAGE).fill(7);
    // Old size 0 makes a second mapping of the same pages (mremap(2)).
    // SAFETY: makes a new mapping, touches no old one.
    let twin = unsafe { libc::mremap((map.addr + 32 * PAGE) as *mut _, 0, 16 * PAGE, libc::MREMAP_MAYMOVE) };
    ensure(twin != libc::MAP_FAILED, "no second mapping")?;
    let twin = Map { addr: twin as usize, len: 16 * PAGE };
    let child = ctl.child("reader", |ctl| {
        // The child keeps only the upper half.
        map.part(0, 8 * PAGE).unmap()?;
        ctl.wait_as("reader")?;
        map.part(16 * PAGE, 16 * PAGE).check("child's sight", 7)?;
        map.put(8 * PAGE, 0xc0ffee);
        poll_until("the parent answers", || map.get(9 * PAGE) == 0xdecaf)
    })?;
    ctl.await_ready("reader")?;
    if ctl.wait()? {
        map.put(50 * PAGE, 1);
    }

    poll_until("the child writes", || map.get(8 * PAGE) == 0xc0ffee)?;
    map.put(9 * PAGE, 0xdecaf);
    child.join()?;
    map.part(16 * PAGE, 48 * PAGE).check("parent's sight", 7)?;
    twin.put(8, 42);
    ensure(map.get(32 * PAGE + 8) == 42, "the two mappings of one task are no longer the same memory")?;
    map.part(0, 8 * PAGE).check_zero("the untouched part")
}
