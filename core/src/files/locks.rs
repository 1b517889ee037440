//! Locks and leases on open files, as fdinfo shows them: POSIX record locks, those of open file descriptions, flock(2), and
//! leases (fcntl(2)).

use crate::image::records::{FileLock, LockKind};

/// A lock that cannot be kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LockError {
    /// Somebody waits for the holder of a lease to give it up.
    #[error("has a lease that is being broken")]
    Breaking,
    /// A delegation, or what a later kernel may have.
    #[error("has a lock of an unknown kind ({0})")]
    Unknown(String),
}

/// The locks in the text of fdinfo, as seen by the process whose table it is: POSIX locks are shown to their owner only.
/// `pid` is that process, in the image.
pub fn parse(fdinfo: &str, pid: i32) -> Result<Vec<FileLock>, LockError> {
    fdinfo.lines().filter_map(|line| line.strip_prefix("lock:")).map(|line| lock(line, pid)).collect()
}

/// fs/locks.c, lock_get_status: number, kind, state, type, pid, inode, first byte, last byte.
fn lock(line: &str, pid: i32) -> Result<FileLock, LockError> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let unknown = || LockError::Unknown(line.trim().to_owned());
    let &[_, kind, state, access, _, _, start, end] = words.as_slice() else { return Err(unknown()) };
    let kind = match (kind, state) {
        ("POSIX", _) => LockKind::Posix,
        ("OFDLCK", _) => LockKind::Description,
        ("FLOCK", _) => LockKind::Flock,
        ("LEASE", "ACTIVE") => LockKind::Lease,
        ("LEASE", _) => return Err(LockError::Breaking),
        _ => return Err(unknown()),
    };
    let write = match access {
        "WRITE" => true,
        "READ" => false,
        _ => return Err(unknown()),
    };
    let number = |word: &str| word.parse::<u64>().map_err(|_| unknown());
    Ok(FileLock {
        kind: kind.into(),
        write,
        start: number(start)?,
        end: if end == "EOF" { None } else { Some(number(end)?) },
        pid: if kind == LockKind::Posix { pid } else { 0 },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_parsed() {
        let text = "mnt_id:\t5\nlock:\t1: POSIX  ADVISORY  WRITE 77 fd:01:9 10 19\n\
            lock:\t2: FLOCK  ADVISORY  READ 77 fd:01:9 0 EOF\nlock:\t3: OFDLCK ADVISORY  READ -1 fd:01:9 5 EOF\n\
            lock:\t1: LEASE  ACTIVE    WRITE 77 fd:01:9 0 EOF\n";
        let locks = parse(text, 4).unwrap();
        let kinds: Vec<_> = locks.iter().map(|lock| (lock.kind(), lock.write, lock.pid)).collect();
        let expected = [
            (LockKind::Posix, true, 4),
            (LockKind::Flock, false, 0),
            (LockKind::Description, false, 0),
            (LockKind::Lease, true, 0),
        ];
        assert_eq!(kinds, expected);
        assert_eq!((locks[0].start, locks[0].end, locks[2].end), (10, Some(19), None));
        let breaking = "lock:\t1: LEASE  BREAKING  READ 77 fd:01:9 0 EOF\n";
        assert_eq!(parse(breaking, 4), Err(LockError::Breaking));
        assert!(matches!(parse("lock:\t1: DELEG  ACTIVE  READ 7 a 0 EOF\n", 4), Err(LockError::Unknown(_))));
    }
}
