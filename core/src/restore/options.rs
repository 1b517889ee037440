//! What the user asks of a restore, and what he is told.

use crate::plugins::{GivenOption, PluginChoice};
use serde::{Deserialize, Serialize};
use std::{path::PathBuf, time::Duration};

/// Options of [`restore`](super::restore).
#[derive(Debug, Clone, Default)]
pub struct RestoreOptions {
    /// `-D`: the image.
    pub images_dir: PathBuf,
    /// Which plugins.
    pub plugins: PluginChoice,
    /// Options for plugins.
    pub plugin_options: Vec<GivenOption>,
    /// `--restore-sibling`: the root becomes a child of the caller's parent.
    pub sibling: bool,
    /// `--leave-stopped`: all tasks are left stopped by SIGSTOP.
    pub leave_stopped: bool,
    /// `--shell-job`: a session whose leader is not in the image is replaced by that of the caller.
    pub shell_job: bool,
    /// `--pidfile`: gets the root's pid before it runs.
    pub pidfile: Option<PathBuf>,
    /// `--timeout`: for the whole restore.
    pub timeout: Option<Duration>,
    /// `--plugin-timeout`: for one hook.
    pub plugin_timeout: Option<Duration>,
    /// Threads that verify the pages; 0: as many as there are processors.
    pub threads: usize,
}

impl RestoreOptions {
    pub(super) fn verify_threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        }
    }
}

/// A finished restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// The root task, as the caller sees it.
    pub root_pid: i32,
    /// Processes.
    pub tasks: usize,
    /// Threads.
    pub threads: usize,
    /// From the start of the command to the release of the tasks.
    pub elapsed: Duration,
}
