//! System calls on epolls.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// `KCMP_EPOLL_TFD` (include/uapi/linux/kcmp.h).
const KCMP_EPOLL_TFD: i32 = 7;

/// `EPIOCSPARAMS` and `EPIOCGPARAMS` (include/uapi/linux/eventpoll.h): `_IOW` and `_IOR` of type 0x8A.
const EPIOCSPARAMS: libc::Ioctl = 0x4008_8a01;
const EPIOCGPARAMS: libc::Ioctl = 0x8008_8a02;

/// `struct kcmp_epoll_slot`.
#[repr(C)]
struct Slot {
    epoll: u32,
    number: u32,
    nth: u32,
}

/// `struct epoll_params`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Params {
    pub usecs: u32,
    pub budget: u16,
    pub prefer: u8,
    pad: u8,
}

impl Params {
    pub fn new(usecs: u32, budget: u16, prefer: bool) -> Self {
        Self { usecs, budget, prefer: prefer.into(), pad: 0 }
    }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Whether descriptor `fd` of process `pid` is what `epoll` watches as the `nth` entry of those added under `number`.
pub fn is_target(epoll: BorrowedFd<'_>, number: i32, nth: u32, pid: i32, fd: RawFd) -> io::Result<bool> {
    let slot = Slot { epoll: epoll.as_raw_fd().cast_unsigned(), number: number.cast_unsigned(), nth };
    let own = std::process::id();
    // SAFETY: kcmp reads the slot and changes nothing.
    let result = unsafe { libc::syscall(libc::SYS_kcmp, pid, own, KCMP_EPOLL_TFD, fd, &raw const slot) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result == 0) }
}

/// epoll_create1(2).
pub fn create() -> io::Result<OwnedFd> {
    // SAFETY: an integer argument.
    let fd = check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `EPOLL_CTL_ADD` of the descriptor at `number`.
pub fn add(epoll: RawFd, number: RawFd, events: u32, data: u64) -> io::Result<()> {
    let mut event = libc::epoll_event { events, u64: data };
    // SAFETY: `event` is complete.
    check(unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, number, &raw mut event) }).map(drop)
}

/// The same descriptor at the first free number from `free` on.
pub fn move_above(fd: OwnedFd, free: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes an integer.
    let raw = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, free) })?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// The number of events taken, at most one.
pub fn wait_one(epoll: BorrowedFd<'_>) -> io::Result<i32> {
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    // SAFETY: room for one event, as the count says.
    check(unsafe { libc::epoll_wait(epoll.as_raw_fd(), &raw mut event, 1, 0) })
}

/// Busy polling, if the kernel and the epoll have it.
pub fn params(epoll: BorrowedFd<'_>) -> Option<Params> {
    let mut params = Params::default();
    // SAFETY: the request fills a struct epoll_params.
    let result = unsafe { libc::ioctl(epoll.as_raw_fd(), EPIOCGPARAMS, &raw mut params) };
    (result == 0 && params != Params::default()).then_some(params)
}

pub fn set_params(epoll: BorrowedFd<'_>, params: Params) -> io::Result<()> {
    // SAFETY: the request reads a struct epoll_params.
    check(unsafe { libc::ioctl(epoll.as_raw_fd(), EPIOCSPARAMS, &raw const params) }).map(drop)
}

/// An entry to be added under a number that means something else in our table.
#[derive(Clone, Copy)]
pub struct Foreign {
    pub target: RawFd,
    pub number: RawFd,
    pub events: u32,
    pub data: u64,
    /// `errno` of what failed; -1 as long as it was not tried.
    pub errno: i32,
}

struct Scratch<'a> {
    epoll: RawFd,
    entries: &'a mut [Foreign],
}

/// Runs in the child of [`add_foreign`]: system calls only, as it borrows our memory and our thread's state.
extern "C" fn scratch(argument: *mut libc::c_void) -> i32 {
    // SAFETY: `add_foreign` passes a Scratch that outlives the child, and waits meanwhile.
    let scratch = unsafe { &mut *argument.cast::<Scratch<'_>>() };
    for entry in scratch.entries.iter_mut() {
        // SAFETY: the table is the child's own; dup3 touches no memory.
        let placed = unsafe { libc::dup3(entry.target, entry.number, libc::O_CLOEXEC) };
        let added = match placed {
            0.. => add(scratch.epoll, entry.number, entry.events, entry.data),
            _ => Err(io::Error::last_os_error()),
        };
        entry.errno = added.map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0);
    }
    0
}

/// Adds entries under numbers that are free or mean something else in our table. The numbers of our own table must
/// not change even for a moment, as other tasks copy descriptors from it: a child with a copy of the table does it. It
/// shares our memory and our signal handlers (a signalfd waits where the adding task's signals arrive), no tracer
/// is attached to it, and it is gone when this returns; an entry lives as long as its file, whatever becomes of the number.
pub fn add_foreign(epoll: RawFd, entries: &mut [Foreign]) -> io::Result<()> {
    const STACK: usize = 64 << 10;
    let mut stack = vec![0u128; STACK / 16];
    let top = stack.as_mut_ptr_range().end;
    let mut argument = Scratch { epoll, entries };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_SIGHAND | libc::CLONE_UNTRACED;
    // SAFETY: the stack is the child's alone; CLONE_VFORK holds this thread until the child is gone, so neither stack nor
    // argument is dropped before, and the child's use of our thread-local errno disturbs nobody.
    let pid = check(unsafe { libc::clone(scratch, top.cast(), flags, (&raw mut argument).cast()) })?;
    let mut status = 0;
    // No signal tells of its end, hence __WALL.
    // SAFETY: waits for the child made above.
    check(unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) }).map(drop)
}
