//! Memory files of hugetlb pages: with holes, mapped shared and privately, sealed, and only open.

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use super::mem_hugetlb::HUGE;
use super::memfd::seals;
use crate::ctl::{Ctl, Fail, Outcome, ensure, same};
use crate::sys::{Map, RW, cvt, fcntl};

fn create(name: &CStr, pages: usize) -> Outcome<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
    // SAFETY: the name ends with NUL, and the descriptor is new.
    let file = unsafe { File::from(OwnedFd::from_raw_fd(cvt(libc::memfd_create(name.as_ptr(), flags))?)) };
    file.set_len((pages * HUGE) as u64)?;
    Ok(file)
}

fn map(file: &File, pages: usize, flags: i32) -> Outcome<Map> {
    Map::new(pages * HUGE, RW, flags, file.as_raw_fd(), 0).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOMEM) => Fail::Absent("no hugetlb pages: see vm.nr_overcommit_hugepages".into()),
        _ => error.into(),
    })
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mapped = create(c"mapped", 4)?;
    let shared = map(&mapped, 4, libc::MAP_SHARED | libc::MAP_NORESERVE)?;
    shared.part(HUGE, HUGE).fill(1);
    shared.part(3 * HUGE + HUGE / 2, HUGE / 2).fill(2);
    let private = map(&mapped, 4, libc::MAP_PRIVATE | libc::MAP_NORESERVE)?;
    private.part(HUGE, HUGE).fill(3);
    let closed = create(c"closed", 1)?;
    let alone = map(&closed, 1, libc::MAP_SHARED)?;
    alone.fill(4);
    drop(closed);
    let sealed = create(c"sealed", 1)?;
    let once = map(&sealed, 1, libc::MAP_SHARED)?;
    once.fill(5);
    once.unmap()?;
    let all = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK;
    fcntl(&sealed, libc::F_ADD_SEALS, all)?;
    let empty = create(c"empty", 2)?;
    let child = ctl.child("child", move |ctl| {
        ctl.wait_as("child")?;
        shared.put(HUGE, 7);
        private.part(HUGE, HUGE).check("private page of the child", 3)
    })?;
    ctl.await_ready("child")?;

    if ctl.wait()? {
        private.put(HUGE + 8, 0);
    }

    child.join()?;
    same("written by the child", shared.get(HUGE), 7)?;
    shared.put(HUGE, crate::sys::word(1, 0));
    shared.part(0, HUGE).check_zero("hole")?;
    shared.part(HUGE, HUGE).check("page", 1)?;
    shared.part(3 * HUGE + HUGE / 2, HUGE / 2).check("second half of a page", 2)?;
    shared.part(3 * HUGE, HUGE / 2).check_zero("first half of a page")?;
    private.part(HUGE, HUGE).check("private page", 3)?;
    alone.check("page of a closed file", 4)?;
    same("seals", seals(&sealed)?, all)?;
    let mut first = [0; 8];
    sealed.read_exact_at(&mut first, 0)?;
    same("sealed contents", u64::from_le_bytes(first), crate::sys::word(5, 0))?;
    same("sizes", (empty.metadata()?.len(), sealed.metadata()?.len()), (2 * HUGE as u64, HUGE as u64))?;
    ensure(empty.metadata()?.blocks() == 0, "an empty file has pages")
}
