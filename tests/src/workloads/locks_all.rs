//! Locks: POSIX ones of two processes on one description, of ranges; those of open file descriptions; flock shared and
//! exclusive; all on files that are mapped and unlinked, too. After the restore they still keep others out.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys::{self, Map, PAGE, cvt};

const F_OFD_GETLK: i32 = 36;
const F_OFD_SETLK: i32 = 37;

fn range(kind: i32, start: i64, length: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: start, l_len: length, l_pid: 0 }
}

fn lock(file: &File, command: i32, kind: i32, start: i64, length: i64) -> Outcome {
    let mut lock = range(kind, start, length);
    // SAFETY: the structure outlives the call.
    cvt(unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) })?;
    Ok(())
}

/// What would keep `file` from a write lock: type, start, length, owner.
fn conflict(file: &File, start: i64, length: i64) -> Outcome<(i32, i64, i64, i32)> {
    let mut lock = range(libc::F_WRLCK, start, length);
    // SAFETY: the structure outlives the call.
    cvt(unsafe { libc::fcntl(file.as_raw_fd(), F_OFD_GETLK, &raw mut lock) })?;
    Ok((lock.l_type.into(), lock.l_start, lock.l_len, lock.l_pid))
}

fn flock(file: &File, operation: i32) -> bool {
    // SAFETY: takes numbers.
    unsafe { libc::flock(file.as_raw_fd(), operation | libc::LOCK_NB) == 0 }
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let open = |path: &Path| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    let posix = open(&ctl.work("posix"))?;
    posix.set_len(PAGE as u64)?;
    // Whoever closes another descriptor of it loses the lock: mapping it on restore must not.
    let map = Map::new(PAGE, sys::RW, libc::MAP_SHARED, posix.as_raw_fd(), 0)?;
    map.put(0, 5);
    let second = posix.try_clone()?;
    lock(&posix, libc::F_SETLK, libc::F_WRLCK, 10, 20)?;
    lock(&posix, libc::F_SETLK, libc::F_RDLCK, 100, 0)?;
    let description = open(&ctl.work("description"))?;
    lock(&description, F_OFD_SETLK, libc::F_WRLCK, 5, 5)?;
    lock(&description, F_OFD_SETLK, libc::F_RDLCK, 50, 5)?;
    let (exclusive, shared) = (open(&ctl.work("exclusive"))?, open(&ctl.work("shared"))?);
    let unlinked = open(&ctl.work("unlinked"))?;
    ensure(flock(&exclusive, libc::LOCK_EX) && flock(&shared, libc::LOCK_SH), "flock")?;
    ensure(flock(&unlinked, libc::LOCK_EX), "flock")?;
    fs::remove_file(ctl.work("unlinked"))?;
    let directory = File::open(ctl.work(""))?;
    ensure(flock(&directory, libc::LOCK_EX), "flock of a directory")?;
    let child = ctl.child("holder", |ctl| {
        // The same description, another owner.
        lock(&second, libc::F_SETLK, libc::F_WRLCK, 40, 2)?;
        ctl.wait_as("holder")?;
        lock(&posix, libc::F_SETLK, libc::F_WRLCK, 45, 1)?;
        ctl.announce("locked", b"")?;
        crate::ctl::poll_until("the parent has looked", || ctl.dir().join("looked").exists())
    })?;
    let (own, other) = (std::process::id() as i32, child.pid.as_raw());
    ctl.await_ready("holder")?;

    if ctl.wait()? {
        lock(&posix, libc::F_SETLK, libc::F_UNLCK, 0, 0)?;
    }

    crate::ctl::poll_until("the child has locked", || ctl.dir().join("locked").exists())?;
    let stranger = open(&ctl.work("posix"))?;
    let looks = [
        conflict(&stranger, 0, 35)?,
        conflict(&stranger, 40, 3)?,
        conflict(&stranger, 45, 1)?,
        conflict(&stranger, 100, 0)?,
        conflict(&stranger, 30, 10)?,
    ];
    // Opening and closing it here drops them, so this comes last.
    let expected = [
        (libc::F_WRLCK, 10, 20, own),
        (libc::F_WRLCK, 40, 2, other),
        (libc::F_WRLCK, 45, 1, other),
        (libc::F_RDLCK, 100, 0, own),
        (libc::F_UNLCK, 30, 10, 0),
    ];
    same("POSIX locks", looks, expected)?;
    let stranger = open(&ctl.work("description"))?;
    same("lock of the description", conflict(&stranger, 0, 10)?, (libc::F_WRLCK, 5, 5, -1))?;
    same("read lock of the description", conflict(&stranger, 40, 20)?, (libc::F_RDLCK, 50, 5, -1))?;
    ensure(!flock(&open(&ctl.work("exclusive"))?, libc::LOCK_SH), "an exclusive flock keeps nobody out")?;
    let late = open(&ctl.work("shared"))?;
    ensure(flock(&late, libc::LOCK_SH), "a shared flock keeps readers out")?;
    ensure(!flock(&late, libc::LOCK_EX), "a shared flock lets writers in")?;
    let again = open(Path::new(&format!("/proc/self/fd/{}", unlinked.as_raw_fd())))?;
    ensure(!flock(&again, libc::LOCK_SH), "the flock of an unlinked file keeps nobody out")?;
    ensure(!flock(&File::open(ctl.work(""))?, libc::LOCK_SH), "the flock of a directory keeps nobody out")?;
    same("mapping", map.get(0), 5)?;
    ctl.announce("looked", b"")?;
    child.join()?;
    // A restored copy is asked again.
    Ok(["looked", "locked"].iter().try_for_each(|name| fs::remove_file(ctl.dir().join(name)))?)
}
