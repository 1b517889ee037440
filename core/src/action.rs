//! Programs of the user that run at fixed points of a dump or restore (`--action-script`), with the names and the
//! environment that CRIU gives them.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::Arc,
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
    /// Dump: the network is locked, and the tree will be described. Only observers are told.
    QueryExtFiles,
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
            Self::QueryExtFiles => "query-ext-files",
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
    /// Who asked for the dump or restore does not want to go on.
    #[error("at {action}: {source}")]
    Observer {
        /// When.
        action: Action,
        /// What is wrong.
        source: io::Error,
    },
}

/// What an observer is told: the point, and the root task as stasis sees it, if there is one.
type Observe = dyn Fn(Action, Option<i32>) -> io::Result<()> + Send + Sync;

/// Somebody who is told the same as the scripts, in the process that does the work. An error ends the dump or restore, like
/// that of a script.
#[derive(Clone)]
pub struct Observer(Arc<Observe>);

impl Observer {
    /// One that is called.
    pub fn new(observe: impl Fn(Action, Option<i32>) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(observe))
    }

    /// Tells it.
    pub fn tell(&self, action: Action, init: Option<i32>) -> io::Result<()> {
        self.0(action, init)
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

/// The scripts of one dump or restore.
#[derive(Debug, Clone, Copy)]
pub struct ActionScripts<'a> {
    /// Commands for sh(1), in order.
    pub scripts: &'a [String],
    /// The image's directory.
    pub images_dir: &'a Path,
    /// Who is told afterwards.
    pub observer: Option<&'a Observer>,
}

impl ActionScripts<'_> {
    /// Runs all of them, one after the other; `init` is the root task as stasis sees it, if there is one.
    pub fn run(self, action: Action, init: Option<i32>) -> Result<(), ActionError> {
        let images_dir = || self.images_dir.canonicalize().unwrap_or_else(|_| PathBuf::from(self.images_dir));
        let scripts = if action == Action::QueryExtFiles { &[] } else { self.scripts };
        for script in scripts {
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
        let Some(observer) = self.observer else { return Ok(()) };
        observer.tell(action, init).map_err(|source| ActionError::Observer { action, source })
    }

    /// Whether there is nobody to tell.
    pub fn is_empty(self) -> bool {
        self.scripts.is_empty() && self.observer.is_none()
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
        let scripts = ActionScripts { scripts: &scripts, images_dir: directory.path(), observer: None };
        scripts.run(Action::PreDump, None).unwrap();
        let error = scripts.run(Action::PostDump, Some(42)).unwrap_err().to_string();
        assert!(error.contains("post-dump") && error.contains("exit status: 1"), "{error}");
        let place = directory.path().canonicalize().unwrap();
        let expected = format!("pre-dump {0}\npost-dump {0} 42\n", place.display());
        assert_eq!(std::fs::read_to_string(log).unwrap(), expected);
    }
}
