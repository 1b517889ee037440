//! Copying what is in a pipe, buffer by buffer (struct pipe_buffer, include/linux/pipe_fs_i.h), and putting it back.

use crate::kernel::{self, Ends};
use std::{
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd},
};

/// A buffer that write(2) makes has one page at most, and the capacity counts pages.
pub const PAGE: usize = 4096;

/// More than any buffer has.
const ANY: usize = 1 << 30;

/// One buffer of a pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    pub length: usize,
    /// What a read does not get of it is dropped, and a read ends with it (pipe(2), `O_DIRECT`).
    pub packet: bool,
}

impl Buffer {
    pub fn encode(self) -> u32 {
        self.length as u32 * 2 + u32::from(self.packet)
    }
    pub fn decode(number: u32) -> Self {
        Self { length: (number / 2) as usize, packet: number % 2 == 1 }
    }
}

/// The number of buffers that the contents have when they are put back.
pub fn buffers_needed(buffers: &[Buffer]) -> usize {
    buffers.iter().map(|buffer| buffer.length.div_ceil(PAGE)).sum()
}

/// Copies the contents of the pipe that `from` reads, of `capacity`, without consuming them.
pub fn copy(from: BorrowedFd<'_>, capacity: usize, sink: &mut impl Write) -> io::Result<Vec<Buffer>> {
    let scratch = kernel::pipe_of(capacity)?;
    kernel::tee(from, scratch.write.as_fd(), ANY)?;
    // A pipe of one page has room for one buffer: what comes through it is one buffer.
    let one = kernel::pipe_of(PAGE)?;
    let two = kernel::pipe_of(2 * PAGE)?;
    let mut buffers = Vec::new();
    let mut data = Vec::new();
    while kernel::available(scratch.read.as_fd())? > 0 {
        let length = kernel::splice(scratch.read.as_fd(), one.write.as_fd(), ANY)?;
        move_all(&one, two.write.as_fd(), length)?;
        let packet = read_one(&two, length, &mut data)?;
        sink.write_all(&data[..length])?;
        buffers.push(Buffer { length, packet });
    }
    Ok(buffers)
}

/// Reads the only buffer of a pipe with room for two. A read goes beyond a buffer unless it is a packet; a spliced
/// buffer takes no more data, so the mark is a buffer of its own.
fn read_one(pipe: &Ends, length: usize, data: &mut Vec<u8>) -> io::Result<bool> {
    kernel::write(pipe.write.as_fd(), b"|")?;
    data.resize(length + 1, 0);
    let packet = kernel::read(pipe.read.as_fd(), data)? == length;
    if packet {
        kernel::read(pipe.read.as_fd(), &mut [0])?;
    }
    Ok(packet)
}

fn move_all(from: &Ends, to: BorrowedFd<'_>, length: usize) -> io::Result<()> {
    match kernel::splice(from.read.as_fd(), to, length)? {
        n if n == length => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
    }
}

/// Puts contents into an empty pipe that is not blocking and has room.
pub fn fill(to: BorrowedFd<'_>, buffers: &[Buffer], source: &mut impl Read) -> io::Result<()> {
    let helper = kernel::pipe()?;
    let mut page = [0; PAGE];
    for (index, buffer) in buffers.iter().enumerate() {
        let last = index + 1 == buffers.len();
        let mut left = buffer.length;
        while left > 0 {
            let piece = &mut page[..left.min(PAGE)];
            source.read_exact(piece)?;
            left -= piece.len();
            if !buffer.packet && (piece.len() == PAGE || last) {
                write_all(to, piece)?;
                continue;
            }
            // A write would go on in a buffer that has room: a spliced one takes no more.
            kernel::set_packets(helper.write.as_fd(), buffer.packet)?;
            write_all(helper.write.as_fd(), piece)?;
            move_all(&helper, to, piece.len())?;
        }
    }
    Ok(())
}

fn write_all(to: BorrowedFd<'_>, data: &[u8]) -> io::Result<()> {
    match kernel::write(to, data)? {
        n if n == data.len() => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
    }
}
