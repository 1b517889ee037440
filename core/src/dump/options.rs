//! What a dump is asked to do.

use super::OnUnclaimed;
use crate::{
    action::{ActionScripts, Observer},
    plugins::{GivenOption, PluginChoice},
};
use std::{path::PathBuf, time::Duration};

/// What becomes of the tree after a successful dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Afterwards {
    /// It is killed: it lives on in the image.
    #[default]
    Kill,
    /// It runs on (`--leave-running`).
    Run,
    /// It stays, stopped by SIGSTOP (`--leave-stopped`).
    Stop,
}

/// Deleted files up to this size go into the image unasked; CRIU's default.
pub const GHOST_LIMIT: u64 = 1 << 20;

/// Options of [`dump`](super::dump).
#[derive(Debug, Clone)]
pub struct DumpOptions {
    /// Root of the tree.
    pub tree: i32,
    /// Where the image goes; created if it does not exist.
    pub images_dir: PathBuf,
    /// What becomes of the tree.
    pub afterwards: Afterwards,
    /// The tree may belong to a session, group and terminal outside (`--shell-job`).
    pub shell_job: bool,
    /// With `afterwards: Run`: fork the processes and write the copies out while they run on. Off: copy while frozen.
    pub copy_on_write: bool,
    /// `--external`: resources that the user knows to be outside, by keys of the plugins.
    pub external: Vec<String>,
    /// `--on-unclaimed`: what becomes of what nobody takes; the last wish for a kind counts.
    pub on_unclaimed: Vec<OnUnclaimed>,
    /// `--action-script`: commands for sh(1) that run at fixed points.
    pub action_scripts: Vec<String>,
    /// Who is told what the scripts are told.
    pub observer: Option<Observer>,
    /// How long tasks may take to stop.
    pub timeout: Duration,
    /// A cgroup v1 freezer or v2 directory to freeze with, instead of stopping task by task.
    pub freeze_cgroup: Option<PathBuf>,
    /// Wait until the page files are on the disk too; the rest of the image always is.
    pub sync: bool,
    /// Copy pages from outside even where tasks could write them themselves (for tests of the fallback).
    pub outside_only: bool,
    /// Which plugins to use.
    pub plugins: PluginChoice,
    /// Options that plugins declare.
    pub plugin_options: Vec<GivenOption>,
    /// `--ghost-limit`: deleted files with more bytes than this on disk are refused.
    pub ghost_limit: u64,
    /// `--link-remap`: hard links may be made for files that are unlinked under one of their names.
    pub link_remap: bool,
    /// `--file-locks`: locks and leases are kept; otherwise a locked file is refused.
    pub file_locks: bool,
    /// How long one hook may take.
    pub plugin_timeout: Option<Duration>,
}

impl DumpOptions {
    /// The defaults for a tree and a directory.
    pub fn new(tree: i32, images_dir: impl Into<PathBuf>) -> Self {
        Self {
            tree,
            images_dir: images_dir.into(),
            afterwards: Afterwards::Kill,
            shell_job: false,
            copy_on_write: true,
            external: Vec::new(),
            on_unclaimed: Vec::new(),
            action_scripts: Vec::new(),
            observer: None,
            timeout: Duration::from_secs(10),
            freeze_cgroup: None,
            sync: false,
            outside_only: false,
            plugins: PluginChoice::default(),
            plugin_options: Vec::new(),
            ghost_limit: GHOST_LIMIT,
            link_remap: false,
            file_locks: false,
            plugin_timeout: Some(Duration::from_secs(60)),
        }
    }

    pub(super) fn scripts(&self) -> ActionScripts<'_> {
        ActionScripts {
            scripts: &self.action_scripts,
            images_dir: &self.images_dir,
            observer: self.observer.as_ref(),
        }
    }
}
