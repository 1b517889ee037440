//! Memory sealed by mseal(2): it can be neither moved, unmapped nor given other access.

use std::fs::{self, File};
use std::os::fd::AsRawFd;

use crate::ctl::{Ctl, Fail, Outcome, ensure, same};
use crate::sys::{Map, PAGE, RW, cvt_long, errno_of};

/// mseal(2), since Linux 6.10.
fn seal(map: &Map) -> std::io::Result<()> {
    // SAFETY: no Rust object lives in a `Map`.
    cvt_long(unsafe { libc::syscall(462, map.addr, map.len, 0) }).map(drop)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let free = Map::anon(30 * PAGE)?;
    free.fill(1);
    // In the middle, so that both neighbours stay free.
    let part = free.part(10 * PAGE, 10 * PAGE);
    if let Err(error) = seal(&part) {
        return Err(Fail::Absent(format!("mseal: {error}")));
    }
    fs::write(ctl.work("file"), vec![7; 8 * PAGE])?;
    let file = File::open(ctl.work("file"))?;
    let read_only = Map::new(8 * PAGE, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0)?;
    let shared = Map::shared(8 * PAGE)?;
    let hidden = Map::anon(8 * PAGE)?;
    shared.fill(2);
    hidden.fill(3);
    hidden.protect(libc::PROT_NONE)?;
    let sealed = [part, read_only, shared, hidden];
    for map in &sealed {
        seal(map)?;
    }
    let child = ctl.child("child", move |ctl| {
        ctl.wait_as("child")?;
        free.check("sealed memory of the child", 1)?;
        same("unmapping it in the child", errno_of(&part.unmap()), libc::EPERM)
    })?;
    ctl.await_ready("child")?;

    if ctl.wait()? {
        part.put(64, 0);
    }

    free.check("memory", 1)?;
    child.join()?;
    shared.check("shared memory", 2)?;
    ensure(read_only.get(0) == 0x0707_0707_0707_0707, "the file has changed")?;
    for map in &sealed {
        let flags = map.smaps("VmFlags:")?.unwrap_or_default();
        ensure(flags.split(' ').any(|flag| flag == "sl"), &format!("not sealed: {flags}"))?;
        same("unmapping", errno_of(&map.unmap()), libc::EPERM)?;
        same("changing its access", errno_of(&map.protect(RW)), libc::EPERM)?;
    }
    // What was free is so still.
    free.part(0, 10 * PAGE).protect(libc::PROT_READ)?;
    free.part(20 * PAGE, 10 * PAGE).unmap()?;
    Ok(())
}
