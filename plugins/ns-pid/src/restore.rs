//! Core clones the first task into the new namespace; here is checked that it got there.

use crate::{PidNamespace, dump};
use stasis_plugin_api::{HookError, Result};
use std::fs;

pub(crate) fn prepare(record: &PidNamespace, host_pid: i32) -> Result<()> {
    let path = format!("/proc/{host_pid}/status");
    let status =
        fs::read_to_string(&path).map_err(|error| HookError::failed(format!("reading {path}"), error))?;
    let levels = dump::levels(&status).map(|levels| levels.saturating_sub(1));
    if levels != Some(record.levels as usize) {
        return Err(HookError::invalid(format!(
            "the first task is {} pid namespaces below stasis, not {}",
            levels.unwrap_or(0),
            record.levels
        )));
    }
    Ok(())
}
