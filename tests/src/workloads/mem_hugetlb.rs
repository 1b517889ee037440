//! Hugetlb pages: private and shared, touched and not, read-only, in a child that has written to some.

use crate::ctl::{Ctl, Fail, Outcome, same};
use crate::sys::{Map, RW};

/// The pages that every machine has.
pub const HUGE: usize = 2 << 20;

fn map(pages: usize, flags: i32) -> Outcome<Map> {
    let flags = flags | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    Map::new(pages * HUGE, RW, flags, -1, 0).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOMEM) => Fail::Absent("no hugetlb pages: see vm.nr_overcommit_hugepages".into()),
        _ => error.into(),
    })
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let private = map(3, libc::MAP_PRIVATE)?;
    private.part(0, HUGE).fill(1);
    // The second one mostly empty, the third untouched.
    private.part(HUGE, 8192).fill(2);
    let shared = map(2, libc::MAP_SHARED)?;
    shared.part(0, HUGE).fill(3);
    let read_only = map(1, libc::MAP_PRIVATE | libc::MAP_NORESERVE)?;
    read_only.fill(4);
    read_only.protect(libc::PROT_READ)?;
    let unreserved = map(1, libc::MAP_PRIVATE | libc::MAP_NORESERVE)?;
    let child = ctl.child("child", move |ctl| {
        // A page of its own; the others stay the parent's too.
        private.part(HUGE, 8192).fill(5);
        shared.part(HUGE, HUGE).fill(6);
        ctl.wait_as("child")?;
        private.part(0, HUGE).check("huge page of the child", 1)?;
        private.part(HUGE, 8192).check("huge page of the child alone", 5)?;
        read_only.check("read-only huge page of the child", 4)?;
        shared.put(0, 77);
        Ok(())
    })?;
    ctl.await_ready("child")?;
    let kind = private.smaps("KernelPageSize:")?;

    if ctl.wait()? {
        private.put(HUGE / 2, 0);
    }

    child.join()?;
    private.part(0, HUGE).check("private huge page", 1)?;
    private.part(HUGE, 8192).check("second huge page", 2)?;
    private.part(HUGE + 8192, HUGE - 8192).check_zero("rest of the second")?;
    private.part(2 * HUGE, HUGE).check_zero("third huge page")?;
    read_only.check("read-only huge page", 4)?;
    same("written by the child afterwards", shared.get(0), 77)?;
    shared.put(0, crate::sys::word(3, 0));
    shared.part(0, HUGE).check("shared huge page", 3)?;
    shared.part(HUGE, HUGE).check("written by the child", 6)?;
    unreserved.check_zero("untouched huge page")?;
    same("page size", private.smaps("KernelPageSize:")?, kind)
}
