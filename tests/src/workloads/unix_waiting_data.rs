//! Connections that are not accepted yet, over which something was sent already.

use crate::ctl::{Ctl, Outcome};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    super::unix_waiting::play(ctl, b"early")
}
