//! Sockets whose peers are outside the tree: the test has made `work/service` and `work/stream` before. Passes when the
//! one was connected again, and the other came back cut.

use libc::{SOCK_DGRAM, SOCK_STREAM};

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::unix;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let datagrams = unix::client(SOCK_DGRAM, &unix::path(&ctl.work("service")))?;
    unix::send(&datagrams, &[], b"before", &[])?;
    let stream = unix::client(SOCK_STREAM, &unix::path(&ctl.work("stream")))?;
    ctl.wait()?;
    unix::send(&datagrams, &[], b"after", &[])?;
    same("what the service had sent", unix::data(&stream)?, b"from outside".to_vec())?;
    ensure(unix::data(&stream)?.is_empty(), "the connection goes on")
}
