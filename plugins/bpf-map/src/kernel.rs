//! bpf(2): the commands for maps, with the parts of union bpf_attr that they read (include/uapi/linux/bpf.h).

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

const MAP_CREATE: i32 = 0;
const MAP_LOOKUP: i32 = 1;
const MAP_UPDATE: i32 = 2;
const MAP_GET_NEXT_KEY: i32 = 4;
const PROG_GET_NEXT_ID: i32 = 11;
const PROG_GET_FD_BY_ID: i32 = 13;
const MAP_GET_FD_BY_ID: i32 = 14;
const OBJ_GET_INFO_BY_FD: i32 = 15;
const MAP_FREEZE: i32 = 22;

/// Length of a name, with its end.
const NAME: usize = 16;
/// More maps than one program may use (MAX_USED_MAPS).
const MAPS_OF_A_PROGRAM: usize = 64;

/// For BPF_MAP_CREATE.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Create {
    pub(crate) kind: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) flags: u32,
    pub(crate) inner_map: u32,
    pub(crate) numa_node: u32,
    pub(crate) name: [u8; NAME],
}

/// For commands about an entry; `value` is the next key of BPF_MAP_GET_NEXT_KEY.
#[repr(C)]
struct Entry {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// For commands that lead from a number to a descriptor, or to the next number.
#[repr(C)]
struct Number {
    number: u32,
    next: u32,
    flags: u32,
}

/// For BPF_OBJ_GET_INFO_BY_FD.
#[repr(C)]
struct Query {
    fd: u32,
    length: u32,
    place: u64,
}

/// struct bpf_map_info, as far as it is needed.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct MapInfo {
    pub(crate) kind: u32,
    pub(crate) id: u32,
    pub(crate) key_size: u32,
    pub(crate) value_size: u32,
    pub(crate) max_entries: u32,
    pub(crate) flags: u32,
    pub(crate) name: [u8; NAME],
    pub(crate) ifindex: u32,
    vmlinux_value: u32,
    netns: [u64; 2],
    pub(crate) btf_id: u32,
    btf_types: [u32; 3],
    pub(crate) extra: u64,
}

/// struct bpf_prog_info, as far as it is needed.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    skipped: [u64; 6],
    uid: u32,
    map_count: u32,
    maps: u64,
}

/// # Safety
/// What the attributes point to must suit the command.
unsafe fn bpf<T>(command: i32, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: the kernel reads (and for some commands writes) `size_of::<T>()` bytes; for the rest the caller vouches.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

/// # Safety
/// As [`bpf`], and the command must give a new descriptor.
unsafe fn bpf_fd<T>(command: i32, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: as the caller promises; the kernel has just made the descriptor.
    unsafe { bpf(command, attributes).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// BPF_MAP_CREATE.
pub(crate) fn create(attributes: &Create) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    unsafe { bpf_fd(MAP_CREATE, &mut { *attributes }) }
}

/// Another descriptor of a map, with BPF_F_RDONLY or BPF_F_WRONLY.
pub(crate) fn open(id: u32, flags: u32) -> io::Result<OwnedFd> {
    // SAFETY: no pointers.
    unsafe { bpf_fd(MAP_GET_FD_BY_ID, &mut Number { number: id, next: 0, flags }) }
}

/// What the kernel tells of a map.
pub(crate) fn info(map: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let mut info = MapInfo::default();
    query(map, &mut info)?;
    Ok(info)
}

fn query<T>(fd: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let (length, place) = (size_of::<T>() as u32, std::ptr::from_mut(info) as u64);
    // SAFETY: room for `length` bytes of numbers.
    unsafe { bpf(OBJ_GET_INFO_BY_FD, &mut Query { fd: fd.as_raw_fd() as u32, length, place }) }.map(drop)
}

fn entry(map: BorrowedFd<'_>, key: Option<&[u8]>, value: u64) -> Entry {
    let key = key.map_or(0, |key| key.as_ptr() as u64);
    Entry { map: map.as_raw_fd() as u32, padding: 0, key, value, flags: 0 }
}

/// The key after this one, or the first; `next` has room for one. False after the last.
pub(crate) fn next_key(map: BorrowedFd<'_>, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<bool> {
    // SAFETY: both have the length of a key, as the callers make them.
    match unsafe { bpf(MAP_GET_NEXT_KEY, &mut entry(map, key, next.as_mut_ptr() as u64)) } {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads an entry; false if it has gone.
pub(crate) fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    // SAFETY: lengths of a key and of all values of an entry, as the callers make them.
    match unsafe { bpf(MAP_LOOKUP, &mut entry(map, Some(key), value.as_mut_ptr() as u64)) } {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes an entry.
pub(crate) fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    // SAFETY: as in `lookup`.
    unsafe { bpf(MAP_UPDATE, &mut entry(map, Some(key), value.as_ptr() as u64)) }.map(drop)
}

/// BPF_MAP_FREEZE: no more writes by bpf(2).
pub(crate) fn freeze(map: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no pointers.
    unsafe { bpf(MAP_FREEZE, &mut Number { number: map.as_raw_fd() as u32, next: 0, flags: 0 }) }.map(drop)
}

/// The number of a loaded program that uses this map.
pub(crate) fn user_of(map: u32) -> io::Result<Option<u32>> {
    let mut number = Number { number: 0, next: 0, flags: 0 };
    loop {
        // SAFETY: no pointers.
        match unsafe { bpf(PROG_GET_NEXT_ID, &mut number) } {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
            Err(error) => return Err(error),
        }
        number = Number { number: number.next, next: 0, flags: 0 };
        let mut program = Number { number: number.number, next: 0, flags: 0 };
        // SAFETY: no pointers.
        let Ok(program) = (unsafe { bpf_fd(PROG_GET_FD_BY_ID, &mut program) }) else { continue };
        let mut maps = [0u32; MAPS_OF_A_PROGRAM];
        let map_count = maps.len() as u32;
        let mut info = ProgramInfo { map_count, maps: maps.as_mut_ptr() as u64, ..ProgramInfo::default() };
        query(std::os::fd::AsFd::as_fd(&program), &mut info)?;
        if maps.iter().take(info.map_count as usize).any(|&used| used == map) {
            return Ok(Some(number.number));
        }
    }
}
