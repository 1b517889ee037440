//! Taking locks and leases again.

use crate::image::records::{FileLock, LockKind};
use nix::errno::Errno;
use std::io;

/// `F_OFD_SETLK` and `F_SETLEASE` (fcntl(2)).
const F_OFD_SETLK: i32 = 37;
const F_SETLEASE: i32 = 1024;

/// Whether it must wait until no task opens or closes anything: closing any descriptor of a file drops the POSIX locks that
/// the process has on it, and opening a file breaks leases.
pub fn is_late(lock: &FileLock) -> bool {
    matches!(lock.kind(), LockKind::Posix | LockKind::Lease)
}

/// For messages.
pub fn describe(lock: &FileLock) -> String {
    let access = if lock.write { "write" } else { "read" };
    let range = match lock.end {
        Some(end) => format!("bytes {}-{end}", lock.start),
        None => format!("bytes from {}", lock.start),
    };
    match lock.kind() {
        LockKind::Posix => format!("POSIX {access} lock of {range}"),
        LockKind::Description => format!("{access} lock of {range}"),
        LockKind::Flock => format!("flock ({access})"),
        LockKind::Lease => format!("{access} lease"),
    }
}

/// Takes it on `fd`, at once or not at all.
pub fn take(fd: i32, lock: &FileLock) -> io::Result<()> {
    let kind = if lock.write { libc::F_WRLCK } else { libc::F_RDLCK };
    let record = |command: i32| {
        let outside = || io::Error::from_raw_os_error(libc::EOVERFLOW);
        let start = i64::try_from(lock.start).map_err(|_| outside())?;
        let length = match lock.end {
            None => 0,
            Some(end) => i64::try_from(end)
                .ok()
                .and_then(|end| end.checked_sub(start)?.checked_add(1))
                .ok_or_else(outside)?,
        };
        let flock = libc::flock {
            l_type: kind as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: start,
            l_len: length,
            l_pid: 0,
        };
        // SAFETY: the structure outlives the call.
        Ok(Errno::result(unsafe { libc::fcntl(fd, command, &raw const flock) }).map(drop)?)
    };
    match lock.kind() {
        LockKind::Posix => record(libc::F_SETLK),
        LockKind::Description => record(F_OFD_SETLK),
        LockKind::Flock => {
            let operation = if lock.write { libc::LOCK_EX } else { libc::LOCK_SH };
            // SAFETY: takes integers.
            Ok(Errno::result(unsafe { libc::flock(fd, operation | libc::LOCK_NB) }).map(drop)?)
        }
        // SAFETY: takes integers.
        LockKind::Lease => Ok(Errno::result(unsafe { libc::fcntl(fd, F_SETLEASE, kind) }).map(drop)?),
    }
}
