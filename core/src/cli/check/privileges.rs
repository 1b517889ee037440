//! Privileges.

use super::{Outcome, children::in_child};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::io;

/// Capabilities (include/uapi/linux/capability.h) that dump and restore use.
const NEEDED: &[(u32, &str)] =
    &[(19, "CAP_SYS_PTRACE"), (21, "CAP_SYS_ADMIN"), (6, "CAP_SETGID"), (7, "CAP_SETUID"), (5, "CAP_KILL")];
/// Capabilities without which some tasks cannot be restored.
const USEFUL: &[(u32, &str)] = &[
    (24, "CAP_SYS_RESOURCE"),
    (23, "CAP_SYS_NICE"),
    (12, "CAP_NET_ADMIN"),
    (40, "CAP_CHECKPOINT_RESTORE"),
    (1, "CAP_DAC_OVERRIDE"),
];

pub(super) fn capabilities() -> Outcome {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok())
        .ok_or_else(|| io::Error::other("/proc/self/status has no CapEff"))?;
    let missing = |table: &[(u32, &'static str)]| {
        let absent = table.iter().filter(|(bit, _)| effective & 1 << bit == 0);
        absent.map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
    };
    match (missing(NEEDED), missing(USEFUL)) {
        (needed, _) if !needed.is_empty() => Err(io::Error::other(format!("{needed} missing (run as root)"))),
        (_, useful) if !useful.is_empty() => Ok(format!("without {useful}")),
        _ => Ok(String::new()),
    }
}

/// A hard limit that was lowered can be raised again only with CAP_SYS_RESOURCE in the initial user namespace.
pub(super) fn raise_limit() -> Outcome {
    in_child(|| {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let lower = hard.saturating_sub(1).min(1 << 20);
        setrlimit(Resource::RLIMIT_NOFILE, soft.min(lower), lower)?;
        Ok(setrlimit(Resource::RLIMIT_NOFILE, soft.min(lower), lower + 1)?)
    })
    .map(|()| String::new())
}
