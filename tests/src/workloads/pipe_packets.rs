//! Packet mode (O_DIRECT): each write is read as a packet of its own, and a packet read short loses its rest.

use crate::ctl::{Ctl, Outcome, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let (reader, writer) = sys::pipe(libc::O_DIRECT | libc::O_NONBLOCK)?;
    let packets: [&[u8]; 4] = [b"one", b"second", b"3", &[9; 4096]];
    for packet in packets {
        sys::write(&writer, packet)?;
    }

    if ctl.wait()? {
        sys::read(&reader, 1)?;
    }

    same("first packet, read short", sys::read(&reader, 2)?, b"on".to_vec())?;
    for packet in &packets[1..] {
        same("packet", sys::read(&reader, 5000)?, packet.to_vec())?;
    }
    sys::write(&writer, b"a")?;
    sys::write(&writer, b"b")?;
    same("mode", sys::read(&reader, 100)?, b"a".to_vec())?;
    same("flags", sys::fcntl(&writer, libc::F_GETFL, 0)? & libc::O_DIRECT, libc::O_DIRECT)
}
