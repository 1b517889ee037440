//! Waits on sockets that have a timeout, dumped half way: they end by it, when they would have ended without a dump.

use super::wait_limits::{SOCKET_WAITS, play};
use crate::ctl::{Ctl, Outcome};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    play(ctl, SOCKET_WAITS)
}
