//! Pipes of other sizes than the default, and full ones: full means that not one more page goes in.

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::{self, errno_of};

const SIZES: [i32; 4] = [4096, 8192, 65536, 1 << 20];

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut pipes = Vec::new();
    for (n, size) in SIZES.into_iter().enumerate() {
        let (reader, writer) = sys::pipe(libc::O_NONBLOCK)?;
        sys::fcntl(&writer, libc::F_SETPIPE_SZ, size)?;
        let data = sys::bytes(n as u64, size as usize);
        same("filled", sys::write(&writer, &data)?, data.len())?;
        pipes.push((reader, writer, data, size));
    }
    if ctl.wait()? {
        sys::read(&pipes[2].0, 1)?;
    }
    for (reader, writer, data, size) in pipes {
        same("size", sys::fcntl(&reader, libc::F_GETPIPE_SZ, 0)?, size)?;
        same("still full", errno_of(&sys::write(&writer, b"x")), libc::EAGAIN)?;
        let mut got = Vec::new();
        while got.len() < data.len() {
            got.extend(sys::read(&reader, data.len())?);
        }
        same("content", got == data, true)?;
        same("empty now", errno_of(&sys::read(&reader, 1)), libc::EAGAIN)?;
    }
    Ok(())
}
