//! BPF maps: a hash, an array and one with a value for each processor, with their entries; two descriptors of one, frozen.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::ctl::{Ctl, Fail, Outcome, same};
use crate::sys::{cvt_long, errno_of};

const CREATE: i32 = 0;
const LOOKUP: i32 = 1;
const UPDATE: i32 = 2;
const FREEZE: i32 = 22;
const HASH: u32 = 1;
const ARRAY: u32 = 2;
const PERCPU_ARRAY: u32 = 6;

/// union bpf_attr as numbers of 32 bits.
fn bpf(command: i32, attributes: &[u32]) -> io::Result<i64> {
    let (place, length) = (attributes.as_ptr(), size_of_val(attributes));
    // SAFETY: attributes of that length; what they point to suits the commands of this file.
    cvt_long(unsafe { libc::syscall(libc::SYS_bpf, command, place, length) })
}

fn map(kind: u32, entries: u32) -> Outcome<OwnedFd> {
    // Keys of 4 bytes, values of 8.
    let fd = bpf(CREATE, &[kind, 4, 8, entries, 0, 0]).map_err(|error| Fail::Absent(format!("bpf: {error}")))?;
    // SAFETY: new.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn entry(command: i32, map: BorrowedFd<'_>, key: u32, value: *mut u64) -> io::Result<i64> {
    let halves = |number: u64| [number as u32, (number >> 32) as u32];
    let (key, value) = (halves(&raw const key as u64), halves(value as u64));
    bpf(command, &[map.as_raw_fd() as u32, 0, key[0], key[1], value[0], value[1], 0, 0])
}

fn put(map: &OwnedFd, key: u32, value: &mut [u64]) -> io::Result<()> {
    entry(UPDATE, map.as_fd(), key, value.as_mut_ptr()).map(drop)
}

/// Room for the values of every processor.
fn get(map: &OwnedFd, key: u32) -> io::Result<Vec<u64>> {
    let mut values = vec![0; 4096];
    entry(LOOKUP, map.as_fd(), key, values.as_mut_ptr())?;
    Ok(values)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let (hash, array, each) = (map(HASH, 1000)?, map(ARRAY, 4)?, map(PERCPU_ARRAY, 2)?);
    for key in 0..500 {
        put(&hash, key * 7, &mut [u64::from(key) << 33])?;
    }
    put(&array, 3, &mut [77])?;
    put(&each, 1, &mut (0..4096).collect::<Vec<u64>>())?;
    let before = get(&each, 1)?;
    bpf(FREEZE, &[array.as_raw_fd() as u32, 0, 0])?;
    let twin = hash.try_clone()?;

    if ctl.wait()? {
        put(&hash, 7, &mut [0])?;
    }

    for key in 0..500 {
        same("an entry of the hash", get(&hash, key * 7)?[0], u64::from(key) << 33)?;
    }
    same("a key that was never there", errno_of(&get(&hash, 1)), libc::ENOENT)?;
    same("the array", (get(&array, 3)?[0], get(&array, 0)?[0]), (77, 0))?;
    same("a write to the frozen array", errno_of(&put(&array, 3, &mut [1])), libc::EPERM)?;
    same("values of the processors", get(&each, 1)?, before)?;
    put(&twin, 7, &mut [5])?;
    same("the hash, by its other descriptor", get(&hash, 7)?[0], 5)
}
