//! Droppable memory (MAP_DROPPABLE), as the C library uses it for random numbers.

use crate::ctl::{Ctl, Fail, Outcome, ensure, same};
use crate::sys::{Map, PAGE, RW};

/// Since Linux 6.11 (include/uapi/linux/mman.h).
const DROPPABLE: i32 = 8;
const PAGES: usize = 100;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let Ok(map) = Map::new(PAGES * PAGE, RW, DROPPABLE | libc::MAP_ANONYMOUS, -1, 0) else {
        return Err(Fail::Absent("the kernel has no droppable memory".into()));
    };
    let untouched = Map::new(PAGES * PAGE, RW, DROPPABLE | libc::MAP_ANONYMOUS, -1, 0)?;
    map.fill(5);
    let flags = map.smaps("VmFlags:")?;
    let child = ctl.child("child", move |ctl| {
        ctl.wait_as("child")?;
        map.check_zero("droppable memory after a fork")
    })?;
    ctl.await_ready("child")?;

    if ctl.wait()? {
        map.page(3).put(0, 1);
    }

    // Nobody is short of memory here, so most of it must be there; what the kernel dropped reads as zeros.
    let mut kept = 0;
    for n in 0..PAGES {
        match map.page(n).check_zero("page") {
            Ok(()) => {}
            Err(_) => {
                let whole = (0..PAGE / 8).all(|at| map.page(n).get(at * 8) == crate::sys::word(5, n * PAGE / 8 + at));
                ensure(whole, &format!("droppable page {n} has other contents"))?;
                kept += 1;
            }
        }
    }
    ensure(kept > PAGES / 2, &format!("only {kept} of {PAGES} pages are there"))?;
    same("VmFlags", map.smaps("VmFlags:")?, flags)?;
    untouched.check_zero("untouched droppable memory")?;
    untouched.fill(6);
    child.join()
}
