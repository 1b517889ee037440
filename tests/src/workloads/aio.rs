//! Rings of asynchronous I/O: finished requests that nobody has fetched, in order, and a ring that has gone round; with work afterwards.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;

use crate::ctl::{Ctl, Fail, Outcome, ensure, same};
use crate::sys::{self, cvt_long};

/// struct iocb (linux/aio_abi.h).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Request {
    data: u64,
    key: u64,
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

/// struct io_event.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
struct Event {
    data: u64,
    request: u64,
    result: i64,
    second: i64,
}

/// A context of io_setup(2).
#[derive(Clone, Copy)]
struct Ring(u64);

impl Ring {
    fn new(requests: u32) -> io::Result<Self> {
        let mut number = 0;
        // SAFETY: the kernel writes one number.
        cvt_long(unsafe { libc::syscall(libc::SYS_io_setup, requests, &raw mut number) })?;
        Ok(Self(number))
    }

    /// Reads `bytes.len()` bytes at an offset.
    fn read(self, file: &File, number: u64, offset: usize, bytes: &mut [u8]) -> Outcome {
        let mut request = Request {
            data: number,
            fd: file.as_raw_fd() as u32,
            buffer: bytes.as_mut_ptr() as u64,
            bytes: bytes.len() as u64,
            offset: offset as i64,
            ..Request::default()
        };
        let list = [&raw mut request];
        // SAFETY: one request, whose buffer outlives it: reads of a page cache are done at once.
        same("requests taken", cvt_long(unsafe { libc::syscall(libc::SYS_io_submit, self.0, 1, list.as_ptr()) })?, 1)
    }

    fn events(self, least: i64, most: usize) -> io::Result<Vec<Event>> {
        let mut events = vec![Event::default(); most];
        let wait = libc::timespec { tv_sec: 5, tv_nsec: 0 };
        // SAFETY: the kernel writes at most `most` events.
        let got = cvt_long(unsafe {
            libc::syscall(libc::SYS_io_getevents, self.0, least, most, events.as_mut_ptr(), &raw const wait)
        })?;
        events.truncate(got as usize);
        Ok(events)
    }
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    fs::write(ctl.work("data"), sys::bytes(5, 1 << 16))?;
    let file = File::open(ctl.work("data"))?;
    let ring = Ring::new(100).map_err(|error| Fail::Absent(format!("io_setup: {error}")))?;
    let (small, empty) = (Ring::new(1)?, Ring::new(4000)?);
    let mut buffer = [0u8; 512];
    // Round and round, so that head and tail are somewhere.
    for number in 0..777 {
        small.read(&file, number, 0, &mut buffer)?;
        same("an event", small.events(1, 5)?.len(), 1)?;
    }
    for number in 0..60 {
        ring.read(&file, 1000 + number, number as usize * 512, &mut buffer)?;
        small.read(&file, number, 0, &mut buffer[..number as usize + 1]).or_else(|_| small.events(1, 50).map(drop))?;
    }
    same("events fetched", ring.events(1, 20)?.len(), 20)?;
    let waiting = small.events(0, 0)?.len();

    if ctl.wait()? {
        ring.events(1, 1)?;
    }

    let events = ring.events(1, 100)?;
    same("events that waited", events.len(), 40)?;
    for (number, event) in (20..).zip(&events) {
        same("an event", (event.data, event.result, event.second), (1000 + number, 512, 0))?;
    }
    same("nothing more", ring.events(0, 10)?.len() + waiting, 0)?;
    let first = small.events(1, 200)?;
    ensure(first.iter().all(|event| event.result == event.data as i64 + 1), "the small ring has changed")?;
    for _ in 0..3 {
        for number in 0..90 {
            buffer.fill(0);
            ring.read(&file, number, number as usize * 512, &mut buffer)?;
            ensure(buffer[..] == sys::bytes(5, 1 << 16)[number as usize * 512..][..512], "a read has changed")?;
        }
        same("events afterwards", ring.events(90, 200)?.len(), 90)?;
    }
    empty.read(&file, 9, 0, &mut buffer)?;
    same("the empty ring", empty.events(1, 9)?.len(), 1)?;
    // SAFETY: a number.
    cvt_long(unsafe { libc::syscall(libc::SYS_io_destroy, ring.0) })?;
    same("a destroyed ring", ring.events(0, 1).is_err(), true)
}
