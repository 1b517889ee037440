//! What the user asks of a restore, and what he is told.

use crate::{
    action::{ActionScripts, Observer},
    plugins::{GivenOption, PluginChoice},
};
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
    /// `--external`: resources that are outside, by keys of the plugins.
    pub external: Vec<String>,
    /// `--action-script`: commands for sh(1) that run at fixed points.
    pub action_scripts: Vec<String>,
    /// Who is told what the scripts are told.
    pub observer: Option<Observer>,
    /// `--inherit-fd`: descriptors of the caller for external resources.
    pub inherit_fds: Vec<InheritFd>,
    /// `--pidfile`: gets the root's pid before it runs.
    pub pidfile: Option<PathBuf>,
    /// `--timeout`: for the whole restore.
    pub timeout: Option<Duration>,
    /// `--plugin-timeout`: for one hook.
    pub plugin_timeout: Option<Duration>,
    /// `--no-file-check`: files may have another mode, size or build id than at the dump.
    pub no_file_check: bool,
    /// Threads that verify the pages; 0: as many as there are processors.
    pub threads: usize,
}

impl RestoreOptions {
    pub(super) fn scripts(&self) -> ActionScripts<'_> {
        ActionScripts {
            scripts: &self.action_scripts,
            images_dir: &self.images_dir,
            observer: self.observer.as_ref(),
        }
    }

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

/// A descriptor of the caller that takes the place of an external resource: `fd[N]:KEY`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InheritFd {
    /// Its number in this process.
    pub fd: i32,
    /// What it is for, in the words of the plugin.
    pub key: String,
}

/// What `--inherit-fd` was given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InheritFdError {
    /// Not of that form.
    #[error("{0:?} is not of the form fd[N]:KEY")]
    Form(String),
    /// The caller has no such descriptor.
    #[error("descriptor {0} is not open")]
    NotOpen(i32),
}

impl std::str::FromStr for InheritFd {
    type Err = InheritFdError;

    fn from_str(text: &str) -> Result<Self, InheritFdError> {
        let parts = text.strip_prefix("fd[").and_then(|rest| rest.split_once("]:"));
        let fd = parts.and_then(|(number, _)| number.parse().ok()).filter(|fd| *fd >= 0);
        match (fd, parts) {
            (Some(fd), Some((_, key))) if !key.is_empty() => {
                let open = super::sys::fcntl(fd, libc::F_GETFD, 0).is_ok();
                if open { Ok(Self { fd, key: key.into() }) } else { Err(InheritFdError::NotOpen(fd)) }
            }
            _ => Err(InheritFdError::Form(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inherited_descriptors_are_parsed() {
        let parsed = InheritFd { fd: 0, key: "tty[8800:17]".into() };
        assert_eq!("fd[0]:tty[8800:17]".parse(), Ok(parsed));
        for bad in ["fd[0]", "fd[0]:", "fd[-1]:x", "0:x", "fd[x]:y"] {
            assert_eq!(bad.parse::<InheritFd>(), Err(InheritFdError::Form(bad.into())));
        }
        assert_eq!("fd[99999]:x".parse::<InheritFd>(), Err(InheritFdError::NotOpen(99999)));
    }
}
