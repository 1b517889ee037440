//! Pipes with data, some of it read already; both ends in one task, order and amount kept.

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let (reader, writer) = sys::pipe(0)?;
    let (empty, empty_writer) = sys::pipe(0)?;
    let data = sys::bytes(101, 30_000);
    sys::write(&writer, &data)?;
    same("read before", sys::read(&reader, 7001)?, data[..7001].to_vec())?;
    for piece in 0..10 {
        sys::write(&writer, &[piece; 3])?;
    }

    if ctl.wait()? {
        sys::read(&reader, 1)?;
    }

    same("rest", sys::read(&reader, 22_999)?, data[7001..].to_vec())?;
    let pieces: Vec<u8> = (0..10).flat_map(|piece| [piece; 3]).collect();
    same("pieces", sys::read(&reader, 1000)?, pieces)?;
    ensure(sys::readiness(&reader, libc::POLLIN)? == 0, "there is more than there was")?;
    ensure(sys::readiness(&empty, libc::POLLIN)? == 0, "an empty pipe is not empty")?;
    for (to, from) in [(&writer, &reader), (&empty_writer, &empty)] {
        sys::write(to, b"works")?;
        same("new data", sys::read(from, 100)?, b"works".to_vec())?;
    }
    Ok(())
}
