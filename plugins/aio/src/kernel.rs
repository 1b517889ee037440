//! The system calls and the ring: linux/aio_abi.h, and `struct aio_ring` in fs/aio.c.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

/// Bytes of `struct aio_ring` without its events, and of a `struct io_event`.
pub const HEADER: usize = 32;
pub const EVENT: usize = 32;
const MAGIC: u32 = 0xa10a_10a1;
const PAGE: u64 = 4096;

/// The head of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Slots.
    pub events: u32,
    /// Slot that is read next.
    pub head: u32,
    /// Slot that is written next.
    pub tail: u32,
}

impl Header {
    /// Parses it; none if it is damaged: the task can write to it.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
        let header = Self { events: word(4)?, head: word(8)?, tail: word(12)? };
        let sound = word(16)? == MAGIC && word(28)? == HEADER as u32 && header.is_sound();
        sound.then_some(header)
    }

    fn is_sound(self) -> bool {
        self.events > 1 && self.head < self.events && self.tail < self.events
    }

    /// Slots from head to tail.
    pub fn finished(self) -> u32 {
        (self.tail + self.events - self.head) % self.events
    }
}

/// How many slots a ring of so many bytes has.
pub fn slots(size: u64) -> u64 {
    (size - HEADER as u64) / EVENT as u64
}

fn checked(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// struct iocb.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Request {
    data: u64,
    key_and_flags: u64,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

/// A file from which nothing can be read.
pub fn empty_file() -> io::Result<OwnedFd> {
    // SAFETY: a name that ends with NUL.
    let fd = checked(unsafe { libc::memfd_create(c"stasis".as_ptr(), libc::MFD_CLOEXEC) }.into())?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A context of the calling process, by its number: the address of its ring.
#[derive(Debug, Clone, Copy)]
pub struct Context(pub u64);

impl Context {
    /// Makes one whose ring has exactly `size` bytes: of the requests asked for, the kernel makes twice as many slots, and two more.
    pub fn new(size: u64) -> io::Result<Self> {
        let requests = slots(size).saturating_sub(2) / 2;
        let mut number = 0u64;
        // SAFETY: the kernel writes one number.
        checked(unsafe { libc::syscall(libc::SYS_io_setup, requests, &raw mut number) })?;
        Ok(Self(number))
    }

    /// Moves the ring, and with it the number.
    pub fn move_to(self, address: u64, size: u64) -> io::Result<Self> {
        if self.0 == address {
            return Ok(self);
        }
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let size = size as usize;
        // SAFETY: the ring is ours alone, and the caller has kept the new place free.
        let moved =
            unsafe { libc::mremap(self.0 as *mut _, size, size, flags, address as *mut libc::c_void) };
        if moved == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self(address)) }
    }

    /// The first bytes of the ring.
    pub fn bytes(self, length: usize) -> Vec<u8> {
        // SAFETY: the ring is mapped, and at least a page long.
        (0..length.min(PAGE as usize))
            .map(|at| unsafe { ((self.0 as usize + at) as *const u8).read_volatile() })
            .collect()
    }

    /// Writes to the ring.
    pub fn write(self, offset: u64, bytes: &[u8]) {
        // SAFETY: the caller stays inside the ring, into which nobody has a reference.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), (self.0 + offset) as *mut u8, bytes.len()) };
    }

    /// Requests that are done at once.
    pub fn submit(self, file: &OwnedFd, count: u32) -> io::Result<()> {
        let mut request = Request { fd: file.as_raw_fd() as u32, ..Request::default() };
        for _ in 0..count {
            let list = [&raw mut request];
            // SAFETY: one request, which is read during the call alone.
            checked(unsafe { libc::syscall(libc::SYS_io_submit, self.0, 1, list.as_ptr()) })?;
        }
        Ok(())
    }

    /// Takes up to `most` finished requests, as `struct io_event`.
    pub fn fetch(self, most: u32) -> io::Result<Vec<u8>> {
        let mut events = vec![0u8; most as usize * EVENT];
        let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the kernel writes at most `most` events.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.0,
                0,
                i64::from(most),
                events.as_mut_ptr(),
                &raw const none,
            )
        };
        events.truncate(checked(result)? as usize * EVENT);
        Ok(events)
    }

    /// io_destroy(2).
    pub fn destroy(self) -> io::Result<()> {
        // SAFETY: a number.
        checked(unsafe { libc::syscall(libc::SYS_io_destroy, self.0) }).map(drop)
    }
}

/// How many requests the machine allows, for messages.
pub fn limit() -> String {
    use io::Read;
    let mut text = String::new();
    let _ = File::open("/proc/sys/fs/aio-max-nr").and_then(|mut file| file.read_to_string(&mut text));
    text.trim().to_owned()
}
