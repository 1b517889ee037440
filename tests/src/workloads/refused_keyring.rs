//! A process with a keyring of its own, which cannot be kept.

use crate::ctl::{Ctl, Fail, Outcome, ensure};
use crate::sys::cvt_long;

const KEYCTL_GET_KEYRING_ID: i64 = 0;
const KEY_SPEC_PROCESS_KEYRING: i64 = -2;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    // SAFETY: takes numbers.
    let ask = |create: i64| cvt_long(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_PROCESS_KEYRING, create) });
    ask(1).map_err(|error| Fail::Absent(format!("keyrings: {error}")))?;
    let sabotage = ctl.wait()?;
    ensure(ask(0).is_ok() != sabotage, "the keyring is gone")
}
