//! System V shared memory, attached.

use crate::ctl::{Ctl, Outcome, ensure};
use crate::sys::{Map, PAGE, cvt};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    // SAFETY: makes a segment and attaches it where the kernel likes; it is marked for removal at once.
    let map = unsafe {
        let id = cvt(libc::shmget(libc::IPC_PRIVATE, 2 * PAGE, 0o600 | libc::IPC_CREAT))?;
        let addr = libc::shmat(id, std::ptr::null(), 0);
        ensure(addr as isize != -1, "shmat failed")?;
        cvt(libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()))?;
        Map { addr: addr as usize, len: 2 * PAGE }
    };
    map.fill(4);

    if ctl.wait()? {
        map.put(0, 0);
    }

    map.check("segment", 4)?;
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    ensure(maps.contains("/SYSV"), "it is no longer a System V segment")
}
