//! The system calls: shmget(2), shmop(2), shmctl(2).

use stasis_plugin_api::UndoStep;
use std::{fs, io, ptr};

/// What the names of segments begin with in `/proc/PID/maps` (ipc/shm.c).
pub const PREFIX: &str = "/SYSV";
/// In the mode of a segment that goes with its last attachment.
pub const SHM_DEST: u32 = 0o1000;
const NEXT_ID: &str = "/proc/sys/kernel/shm_next_id";

/// What is known of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    pub key: u32,
    pub size: u64,
    /// Permission bits and [`SHM_DEST`].
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Mappings of it, of whomever.
    pub attached: u64,
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Looks at a segment; none if there is no such one.
pub fn stat(id: u32) -> Option<Stat> {
    // SAFETY: zeros are valid.
    let mut found: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one shmid_ds.
    check(unsafe { libc::shmctl(id as i32, libc::IPC_STAT, &raw mut found) }).ok()?;
    Some(Stat {
        key: found.shm_perm.__key.cast_unsigned(),
        size: found.shm_segsz as u64,
        mode: u32::from(found.shm_perm.mode),
        uid: found.shm_perm.uid,
        gid: found.shm_perm.gid,
        attached: found.shm_nattch,
    })
}

/// Makes a segment with this id.
pub fn create(id: u32, key: u32, size: usize, mode: u32) -> io::Result<()> {
    fs::write(NEXT_ID, id.to_string())?;
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | (mode & 0o777) as i32;
    // SAFETY: numbers only.
    let made = check(unsafe { libc::shmget(key.cast_signed(), size, flags) })?;
    if made as u32 == id {
        return Ok(());
    }
    // The kernel takes the wish for a hint.
    let _ = remove(made as u32);
    Err(io::Error::from_raw_os_error(libc::EEXIST))
}

/// Sets owner and permissions.
pub fn set_owner(id: u32, uid: u32, gid: u32, mode: u32) -> io::Result<()> {
    // SAFETY: zeros are valid.
    let mut wanted: libc::shmid_ds = unsafe { std::mem::zeroed() };
    (wanted.shm_perm.uid, wanted.shm_perm.gid) = (uid, gid);
    wanted.shm_perm.mode = (mode & 0o777) as _;
    // SAFETY: the kernel reads one shmid_ds.
    check(unsafe { libc::shmctl(id as i32, libc::IPC_SET, &raw mut wanted) }).map(drop)
}

/// The same as [`remove`], for the guardian.
pub fn removal(id: u32) -> UndoStep {
    let arguments = [id.into(), libc::IPC_RMID as u64, 0, 0, 0, 0];
    UndoStep::Syscall { number: libc::SYS_shmctl, arguments }
}

/// IPC_RMID.
pub fn remove(id: u32) -> io::Result<()> {
    // SAFETY: takes no structure.
    check(unsafe { libc::shmctl(id as i32, libc::IPC_RMID, ptr::null_mut()) }).map(drop)
}

/// A segment attached to this process, until it is dropped or kept.
#[derive(Debug)]
pub struct Attached(pub u64);

impl Attached {
    /// shmat(2), at an address of the kernel's choice.
    pub fn new(id: u32, flags: i32) -> io::Result<Self> {
        // SAFETY: a new mapping.
        let address = unsafe { libc::shmat(id as i32, ptr::null(), flags) };
        if address as isize == -1 { Err(io::Error::last_os_error()) } else { Ok(Self(address as u64)) }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: nobody has a reference into the mapping.
        unsafe { libc::shmdt(self.0 as *const _) };
    }
}
