//! System V shared memory: with a key and without, removed but attached, read-only, unmapped in part, and in a child.

use std::ptr;

use crate::ctl::{Ctl, Fail, Outcome, ensure, poll_until, same};
use crate::sys::{Map, PAGE, cvt};

/// A segment by its id.
#[derive(Clone, Copy)]
struct Segment(i32);

impl Segment {
    fn new(key: i32, pages: usize) -> Outcome<Self> {
        // SAFETY: numbers only.
        let id = unsafe { libc::shmget(key, pages * PAGE, libc::IPC_CREAT | libc::IPC_EXCL | 0o640) };
        cvt(id).map(Self).map_err(|error| Fail::Absent(format!("shmget: {error}")))
    }

    fn attach(self, flags: i32) -> Outcome<Map> {
        // SAFETY: a new mapping.
        let address = unsafe { libc::shmat(self.0, ptr::null(), flags) };
        ensure(address as isize != -1, "shmat failed")?;
        Ok(Map { addr: address as usize, len: self.stat()?.shm_segsz })
    }

    fn stat(self) -> Outcome<libc::shmid_ds> {
        // SAFETY: zeros are valid.
        let mut found: libc::shmid_ds = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one shmid_ds.
        cvt(unsafe { libc::shmctl(self.0, libc::IPC_STAT, &raw mut found) })?;
        Ok(found)
    }

    fn remove(self) {
        // SAFETY: takes no structure.
        unsafe { libc::shmctl(self.0, libc::IPC_RMID, ptr::null_mut()) };
    }
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let key = 0x5700_0000 | std::fs::metadata(ctl.dir()).map_or(1, |dir| std::os::unix::fs::MetadataExt::ino(&dir) as i32 & 0xff_ffff);
    let segments = [Segment::new(key, 16)?, Segment::new(libc::IPC_PRIVATE, 8)?, Segment::new(libc::IPC_PRIVATE, 4)?];
    let outcome = play(ctl, key, segments);
    // They would outlive us.
    segments.into_iter().for_each(Segment::remove);
    outcome
}

fn play(ctl: &Ctl, key: i32, [keyed, shared, removed]: [Segment; 3]) -> Outcome {
    let map = keyed.attach(0)?;
    map.part(0, 4 * PAGE).fill(1);
    map.part(12 * PAGE, 4 * PAGE).fill(2);
    let read_only = keyed.attach(libc::SHM_RDONLY)?;
    let parts = shared.attach(0)?;
    parts.fill(3);
    parts.part(2 * PAGE, 2 * PAGE).unmap()?;
    parts.part(6 * PAGE, PAGE).protect(libc::PROT_READ)?;
    let last = removed.attach(0)?;
    last.fill(4);
    removed.remove();
    let child = ctl.child("child", move |ctl| {
        let own = shared.attach(0)?;
        ctl.wait_as("child")?;
        own.check("segment of the child", 3)?;
        last.check("removed segment of the child", 4)?;
        map.put(5 * PAGE, 5);
        poll_until("the parent answers", || map.get(6 * PAGE) == 6)
    })?;
    ctl.await_ready("child")?;
    let before = (keyed.stat()?.shm_nattch, shared.stat()?.shm_nattch, removed.stat()?.shm_nattch);

    if ctl.wait()? {
        map.put(0, 0);
    }

    let now = (keyed.stat()?.shm_nattch, shared.stat()?.shm_nattch, removed.stat()?.shm_nattch);
    same("attachments", now, before)?;
    poll_until("the child writes", || read_only.get(5 * PAGE) == 5)?;
    map.put(6 * PAGE, 6);
    child.join()?;
    map.part(0, 4 * PAGE).check("segment", 1)?;
    read_only.part(12 * PAGE, 4 * PAGE).check("segment, read-only", 2)?;
    map.part(7 * PAGE, 5 * PAGE).check_zero("hole of a segment")?;
    let whole = shared.attach(0)?;
    whole.check("other segment", 3)?;
    whole.put(0, 77);
    same("two attachments", parts.get(0), 77)?;
    last.check("removed segment", 4)?;
    // SAFETY: numbers only.
    same("by its key", unsafe { libc::shmget(key, 0, 0) }, keyed.0)?;
    same("mode", keyed.stat()?.shm_perm.mode & 0o777, 0o640)?;
    for map in [whole, last] {
        // SAFETY: no Rust object lives in a `Map`.
        cvt(unsafe { libc::shmdt(map.addr as *const _) })?;
    }
    same("the removed one is gone", removed.stat().is_err(), true)
}
