//! Why a restore failed.

use super::{descriptor_plan::DescriptorPlanError, shared::Aborted, tree_plan::TreeError};
use crate::{
    front::{FrontError, Interrupted, RunningHook},
    image::ImageError,
    plugins::{PluginError, PluginsError},
    restore::{blob::BlobError, memory::MemoryError},
};
use serde::{Deserialize, Serialize};
use std::{io, path::PathBuf, time::Duration};

/// What went wrong, in words, as it is passed from the process in which it happened to the one that tells the user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The whole sentence.
    pub message: String,
    /// Task of the image that it is about, or 0.
    pub pid: i32,
    /// `errno`, or 0.
    pub errno: i32,
    /// Exit status for it.
    pub status: u8,
}

/// An error of [`restore`](super::restore).
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The plugins cannot be used.
    #[error(transparent)]
    Plugins(#[from] PluginsError),
    /// A script of the user.
    #[error(transparent)]
    Action(#[from] crate::action::ActionError),
    /// A hook failed.
    #[error(transparent)]
    Hook(#[from] PluginError),
    /// The process tree cannot be made.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The descriptors cannot be made.
    #[error(transparent)]
    Descriptors(#[from] DescriptorPlanError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The last code that runs in a task.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The supervisor.
    #[error(transparent)]
    Front(#[from] FrontError),
    /// The guardian.
    #[error(transparent)]
    Guardian(#[from] crate::guardian::GuardianError),
    /// The user stopped it.
    #[error("{0}; nothing was left behind")]
    Interrupted(#[from] Interrupted),
    /// It failed in another process.
    #[error(transparent)]
    Elsewhere(Failure),
    /// Another task failed first, and its words count.
    #[error(transparent)]
    Aborted(#[from] Aborted),
    /// A pid is not free.
    #[error("pid {pid} of the image is in use: {holder} ({remedy})")]
    PidTaken {
        /// The pid.
        pid: i32,
        /// Who has it.
        holder: String,
        /// What helps.
        remedy: &'static str,
    },
    /// This machine cannot run the image's tasks.
    #[error("this machine cannot run the image: {what}")]
    Machine {
        /// What is missing.
        what: String,
    },
    /// A file is not as it was.
    #[error("task {pid} ({name}), {use_of} {}: {difference}", path.display())]
    File {
        /// A task that needs it.
        pid: i32,
        /// Its name.
        name: String,
        /// What for, e.g. "descriptor 3".
        use_of: String,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        difference: String,
    },
    /// Something that this version does not restore.
    #[error("task {pid} ({name}): {what} cannot be restored yet")]
    Unsupported {
        /// The task.
        pid: i32,
        /// Its name.
        name: String,
        /// What it has.
        what: &'static str,
    },
    /// The image needs a flag.
    #[error("{what} (use {flag})")]
    NeedsFlag {
        /// Why.
        what: String,
        /// The flag.
        flag: String,
    },
    /// An operation failed in or for a task.
    #[error("task {pid}{}: cannot {operation}: {source}", named(name))]
    Task {
        /// The task.
        pid: i32,
        /// Its name.
        name: String,
        /// What was tried.
        operation: String,
        /// Why not.
        source: io::Error,
    },
    /// A task ended before it was complete.
    #[error("task {pid}{} died while it was being restored: {how}", named(name))]
    Died {
        /// The task.
        pid: i32,
        /// Its name.
        name: String,
        /// How.
        how: String,
    },
    /// A hook ended the task that it ran in.
    #[error("{hook} ended it: {how}; nothing was left behind (report it to the plugin's author, or use --without {})", hook.plugin)]
    HookDied {
        /// The hook.
        hook: RunningHook,
        /// How.
        how: String,
    },
    /// The tree did not come out as in the image.
    #[error("task {pid}: {what} is {found} instead of {expected}")]
    Mismatch {
        /// The task.
        pid: i32,
        /// What differs.
        what: &'static str,
        /// As it is.
        found: i32,
        /// As it must be.
        expected: i32,
    },
    /// An operation of stasis itself failed.
    #[error("cannot {operation}: {source}")]
    System {
        /// What was tried.
        operation: String,
        /// Why not.
        source: io::Error,
    },
    /// It took too long.
    #[error("the restore did not end within {} s; nothing was left behind (--timeout)", .0.as_secs_f64())]
    Timeout(Duration),
}

fn named(name: &str) -> String {
    if name.is_empty() { String::new() } else { format!(" ({name})") }
}

impl RestoreError {
    /// An operation of stasis itself failed.
    pub fn system(operation: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { operation: operation.into(), source }
    }

    /// The documented exit status of the binary: 1 failed, 3 not supported, 4 bad image, 5 plugins, 6 interrupted.
    pub fn exit_status(&self) -> u8 {
        use stasis_plugin_api::ErrorKind;
        match self {
            Self::Image(_) => 4,
            Self::Memory(
                MemoryError::Damaged { .. } | MemoryError::Missing { .. } | MemoryError::Tree { .. },
            ) => 4,
            Self::Tree(TreeError::Session { .. }) | Self::Unsupported { .. } => 3,
            Self::Tree(_) | Self::Descriptors(DescriptorPlanError::Cycle(_)) => 4,
            Self::Plugins(_) => 5,
            Self::Hook(error) if error.source.kind == ErrorKind::Unsupported => 3,
            Self::Hook(error) if error.source.kind == ErrorKind::BadRecord => 4,
            Self::Hook(_) | Self::HookDied { .. } => 5,
            Self::Front(
                FrontError::HookCrashed { .. } | FrontError::HookHung { .. } | FrontError::HookExited { .. },
            ) => 5,
            Self::Interrupted(_) => 6,
            Self::Elsewhere(failure) => failure.status,
            _ => 1,
        }
    }

    /// As data that can be passed on.
    pub fn to_failure(&self) -> Failure {
        let (pid, errno) = match self {
            Self::Task { pid, source, .. } => (*pid, source.raw_os_error().unwrap_or(0)),
            Self::Hook(error) => (error.task, error.source.errno),
            Self::PidTaken { pid, .. } | Self::File { pid, .. } | Self::Unsupported { pid, .. } => (*pid, 0),
            Self::Died { pid, .. } | Self::Mismatch { pid, .. } => (*pid, 0),
            Self::System { source, .. } => (0, source.raw_os_error().unwrap_or(0)),
            Self::Elsewhere(failure) => return failure.clone(),
            _ => (0, 0),
        };
        Failure { message: self.to_string(), pid, errno, status: self.exit_status() }
    }
}

/// The result of a step.
pub type Result<T> = std::result::Result<T, RestoreError>;
