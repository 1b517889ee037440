//! shmctl(2), semctl(2), msgctl(2) and their kin, of the namespace of the calling thread.

use nix::errno::Errno;
use std::{io, ptr::NonNull};

/// Commands that the libc crate lacks (include/uapi/linux/{shm,sem,msg}.h): any object, whoever may read it.
const SHM_STAT_ANY: i32 = 15;
const SEM_STAT_ANY: i32 = 20;
const MSG_STAT_ANY: i32 = 13;
const SEM_INFO: i32 = 19;
const MSG_INFO: i32 = 12;
/// msgrcv(2): a copy of the message with this number.
const MSG_COPY: i32 = 0o40000;
/// Flags of `shm_perm.mode` (include/linux/shm.h).
pub const SHM_DEST: u32 = 0o1000;
pub const SHM_LOCKED: u32 = 0o2000;
/// The largest a message can be (the limit of `msgmax`), with room for its type.
const LARGEST_MESSAGE: usize = 1 << 24;

fn check(result: i32) -> io::Result<i32> {
    Ok(Errno::result(result)?)
}

/// A kind of object: how all of them are found.
fn all<T>(highest: i32, stat: impl Fn(i32) -> io::Result<T>) -> io::Result<Vec<T>> {
    let mut found = Vec::new();
    for index in 0..=highest {
        match stat(index) {
            Ok(one) => found.push(one),
            // A number that is not in use; or one whose object is just going.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EIDRM)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// All segments: number and `struct shmid_ds`.
pub fn segments() -> io::Result<Vec<(i32, libc::shmid_ds)>> {
    // SAFETY: zeros are valid for this structure of integers.
    let mut unused: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: SHM_INFO writes a struct shm_info, which is smaller.
    let highest = check(unsafe { libc::shmctl(0, 14, &raw mut unused) })?;
    all(highest, |index| {
        // SAFETY: as above.
        let mut one: libc::shmid_ds = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills the structure.
        let id = check(unsafe { libc::shmctl(index, SHM_STAT_ANY, &raw mut one) })?;
        Ok((id, one))
    })
}

/// All semaphore sets: number and `struct semid_ds`.
pub fn semaphores() -> io::Result<Vec<(i32, libc::semid_ds)>> {
    let mut unused = [0_i32; 16];
    // SAFETY: SEM_INFO writes a struct seminfo of ten ints.
    let highest = check(unsafe { libc::semctl(0, 0, SEM_INFO, unused.as_mut_ptr()) })?;
    all(highest, |index| {
        // SAFETY: zeros are valid for this structure of integers.
        let mut one: libc::semid_ds = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills the structure.
        let id = check(unsafe { libc::semctl(index, 0, SEM_STAT_ANY, &raw mut one) })?;
        Ok((id, one))
    })
}

/// All queues: number and `struct msqid_ds`.
pub fn queues() -> io::Result<Vec<(i32, libc::msqid_ds)>> {
    // SAFETY: zeros are valid for this structure of integers.
    let mut unused: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: MSG_INFO writes a struct msginfo, which is smaller.
    let highest = check(unsafe { libc::msgctl(0, MSG_INFO, &raw mut unused) })?;
    all(highest, |index| {
        // SAFETY: as above.
        let mut one: libc::msqid_ds = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills the structure.
        let id = check(unsafe { libc::msgctl(index, MSG_STAT_ANY, &raw mut one) })?;
        Ok((id, one))
    })
}

/// The values of a set.
pub fn values(id: i32, count: usize) -> io::Result<Vec<u16>> {
    let mut values = vec![0_u16; count];
    // SAFETY: room for as many values as the set has.
    check(unsafe { libc::semctl(id, 0, libc::GETALL, values.as_mut_ptr()) })?;
    Ok(values)
}

/// Sets all values of a set.
pub fn set_values(id: i32, values: &mut [u16]) -> io::Result<()> {
    // SAFETY: the kernel reads as many values as the set has, which was made with this length.
    check(unsafe { libc::semctl(id, 0, libc::SETALL, values.as_mut_ptr()) }).map(drop)
}

/// A copy of message `index` of a queue, which stays: type and text.
pub fn message(id: i32, index: usize, room: usize) -> io::Result<(i64, Vec<u8>)> {
    let room = room.min(LARGEST_MESSAGE);
    let mut buffer = vec![0_u64; 1 + room.div_ceil(8)];
    let flags = MSG_COPY | libc::IPC_NOWAIT;
    // SAFETY: room for the type and `room` bytes behind it.
    let length = unsafe { libc::msgrcv(id, buffer.as_mut_ptr().cast(), room, index as libc::c_long, flags) };
    let length = Errno::result(length)? as usize;
    let kind = buffer[0] as i64;
    let text = buffer[1..].iter().flat_map(|word| word.to_ne_bytes()).take(length).collect();
    Ok((kind, text))
}

/// Appends a message.
pub fn send(id: i32, kind: i64, text: &[u8]) -> io::Result<()> {
    let mut buffer = vec![0_u64; 1 + text.len().div_ceil(8)];
    buffer[0] = kind as u64;
    for (word, bytes) in buffer[1..].iter_mut().zip(text.chunks(8)) {
        let mut padded = [0; 8];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(padded);
    }
    // SAFETY: the type and as many bytes behind it as the kernel reads.
    let sent = unsafe { libc::msgsnd(id, buffer.as_ptr().cast(), text.len(), libc::IPC_NOWAIT) };
    check(sent).map(drop)
}

/// A segment that is attached to this process (shmat(2)).
pub struct Attached {
    address: NonNull<libc::c_void>,
    length: usize,
}

impl Attached {
    /// Attaches a segment of `length` bytes.
    pub fn new(id: i32, length: usize, flags: i32) -> io::Result<Self> {
        // SAFETY: at an address of the kernel's choice.
        let address = unsafe { libc::shmat(id, std::ptr::null(), flags) };
        match NonNull::new(address).filter(|address| address.as_ptr() as isize != -1) {
            Some(address) => Ok(Self { address, length }),
            None => Err(io::Error::last_os_error()),
        }
    }

    /// The file of the mapping, for reading without making pages of holes (proc_pid_map_files(5)).
    pub fn file(&self) -> io::Result<std::fs::File> {
        let start = self.address.as_ptr() as usize;
        let end = start + self.length.next_multiple_of(4096);
        std::fs::File::open(format!("/proc/self/map_files/{start:x}-{end:x}"))
    }

    /// Its bytes from `offset` on.
    pub fn slice(&mut self, offset: usize, length: usize) -> Option<&mut [u8]> {
        let end = offset.checked_add(length).filter(|end| *end <= self.length)?;
        // SAFETY: within the mapping, which lives as long as this value; nobody else has attached the segment for writing
        // while it is being filled.
        Some(unsafe {
            std::slice::from_raw_parts_mut(self.address.as_ptr().cast::<u8>().add(offset), end - offset)
        })
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: what `new` has attached.
        unsafe { libc::shmdt(self.address.as_ptr()) };
    }
}
