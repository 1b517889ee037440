//! How results reach the user: one line on stderr for people, an object on stdout for programs (`--json`).

use super::logging;
use serde_json::json;

/// Exit statuses of the binary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitStatus {
    /// Done.
    Success = 0,
    /// It failed; the tree runs on (dump), or nothing is left behind (restore).
    Failure = 1,
    /// The command line is wrong (also what clap uses).
    Usage = 2,
    /// The tree holds something that cannot be kept; nothing was touched.
    Unsupported = 3,
    /// The image is damaged, incomplete or of another format.
    BadImage = 4,
    /// A plugin is missing, broken, or in conflict with another.
    Plugin = 5,
    /// Interrupted by a signal.
    Interrupted = 6,
}

/// Prints an error on one line, or as JSON; gives back the status.
pub fn error(json: bool, operation: &str, error: &dyn std::error::Error, status: u8) -> u8 {
    let message = error.to_string();
    if json {
        println!(
            "{}",
            json!({ "ok": false, "operation": operation, "error": message, "exit_status": status })
        );
    } else {
        eprintln!("stasis {operation}: {message}");
    }
    if logging::to_file() {
        tracing::error!("{operation} failed: {message}");
    }
    status
}
