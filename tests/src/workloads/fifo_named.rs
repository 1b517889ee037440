//! Named fifos with data: opened for both, and by reader and writer in different tasks; the path still leads to them.

use std::os::fd::OwnedFd;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::ctl::{Ctl, Outcome, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let (one, two) = (ctl.work("one"), ctl.work("two"));
    for path in [&one, &two] {
        nix::unistd::mkfifo(path, Mode::from_bits_truncate(0o600))?;
    }
    let open = |path, flags| -> Outcome<OwnedFd> { Ok(open(path, flags, Mode::empty())?) };
    let both = open(&one, OFlag::O_RDWR)?;
    sys::write(&both, b"in the fifo")?;
    let reader = open(&two, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
    let child = ctl.child("writer", |ctl| {
        let writer = open(&two, OFlag::O_WRONLY)?;
        sys::write(&writer, b"first ")?;
        ctl.wait_as("writer")?;
        sys::write(&writer, b"second").map(drop).map_err(Into::into)
    })?;
    ctl.await_ready("writer")?;

    if ctl.wait()? {
        sys::read(&both, 1)?;
    }

    same("data", sys::read(&both, 100)?, b"in the fifo".to_vec())?;
    let late = open(&one, OFlag::O_WRONLY | OFlag::O_NONBLOCK)?;
    sys::write(&late, b"by path")?;
    same("data by path", sys::read(&both, 100)?, b"by path".to_vec())?;
    child.join()?;
    same("data of the child", sys::read(&reader, 100)?, b"first second".to_vec())?;
    same("end", sys::read(&reader, 100)?, Vec::new())
}
