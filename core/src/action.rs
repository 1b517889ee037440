//! Programs of the user that run at fixed points of a dump or restore (`--action-script`), with the names and the
//! environment that CRIU gives them.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

/// A point at which scripts run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Dump: nothing is stopped yet.
    PreDump,
    /// Dump: the image is complete, the tree is not yet killed or running.
    PostDump,
    /// Dump: the tree is stopped; connections are to be cut off from the network.
    NetworkLock,
    /// Dump that leaves the tree running, or fails: connections may go on. Restore: likewise, before the tasks run.
    NetworkUnlock,
    /// Restore: nothing is created yet.
    PreRestore,
    /// Restore: the root task exists in its new namespaces, and waits.
    SetupNamespaces,
    /// Restore: all processes exist, in namespaces that are set up.
    PostSetupNamespaces,
    /// Restore: everything is in place, nothing runs yet.
    PostRestore,
    /// Restore: the tasks run as soon as the script ends.
    PreResume,
    /// Restore: the tree runs.
    PostResume,
}

impl Action {
    /// The value of `CRTOOLS_SCRIPT_ACTION`.
    pub fn name(self) -> &'static str {
        match self {
            Self::PreDump => "pre-dump",
            Self::PostDump => "post-dump",
            Self::NetworkLock => "network-lock",
            Self::NetworkUnlock => "network-unlock",
            Self::PreRestore => "pre-restore",
            Self::SetupNamespaces => "setup-namespaces",
            Self::PostSetupNamespaces => "post-setup-namespaces",
            Self::PostRestore => "post-restore",
            Self::PreResume => "pre-resume",
            Self::PostResume => "post-resume",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a script has not done its work.
#[derive(Debug, thiserror::Error)]
pub enum ActionError {
    /// It could not be started.
    #[error("action script {script} at {action}: cannot be started: {source}")]
    Start {
        /// As the user gave it.
        script: String,
        /// When.
        action: Action,
        /// Why.
        source: io::Error,
    },
    /// It says so.
    #[error("action script {script} at {action}: {status} (it must end with status 0)")]
    Failed {
        /// As the user gave it.
        script: String,
        /// When.
        action: Action,
        /// How it ended.
        status: ExitStatus,
    },
}

/// The scripts of one dump or restore.
#[derive(Debug, Clone, Copy)]
pub struct ActionScripts<'a> {
    /// Commands for sh(1), in order.
    pub scripts: &'a [String],
    /// The image's directory.
    pub images_dir: &'a Path,
}

impl ActionScripts<'_> {
    /// Runs all of them, one after the other; `init` is the root task as stasis sees it, if there is one.
    pub fn run(self, action: Action, init: Option<i32>) -> Result<(), ActionError> {
        let images_dir = || self.images_dir.canonicalize().unwrap_or_else(|_| PathBuf::from(self.images_dir));
        for script in self.scripts {
            tracing::debug!(script, %action, "action script");
            let mut command = Command::new("/bin/sh");
            command.arg("-c").arg(script).stdin(Stdio::null());
            command.env("CRTOOLS_SCRIPT_ACTION", action.name()).env("CRTOOLS_IMAGE_DIR", images_dir());
            if let Some(pid) = init {
                command.env("CRTOOLS_INIT_PID", pid.to_string());
            }
            let script = script.clone();
            match command.status() {
                Ok(status) if status.success() => {}
                Ok(status) => return Err(ActionError::Failed { script, action, status }),
                Err(source) => return Err(ActionError::Start { script, action, source }),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_get_the_environment_and_their_failure_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let say =
            format!("echo $CRTOOLS_SCRIPT_ACTION $CRTOOLS_IMAGE_DIR $CRTOOLS_INIT_PID >> {}", log.display());
        let scripts = [say, "test $CRTOOLS_SCRIPT_ACTION != post-dump".to_owned()];
        let scripts = ActionScripts { scripts: &scripts, images_dir: directory.path() };
        scripts.run(Action::PreDump, None).unwrap();
        let error = scripts.run(Action::PostDump, Some(42)).unwrap_err().to_string();
        assert!(error.contains("post-dump") && error.contains("exit status: 1"), "{error}");
        let place = directory.path().canonicalize().unwrap();
        let expected = format!("pre-dump {0}\npost-dump {0} 42\n", place.display());
        assert_eq!(std::fs::read_to_string(log).unwrap(), expected);
    }
}
