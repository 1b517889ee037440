//! What can go wrong in a dump, and which exit status says so.

use super::Unclaimed;
use crate::{
    action::ActionError,
    front::{FrontError, Interrupted},
    guardian::GuardianError,
    image::ImageError,
    memory::MemoryError,
    plugins::{PluginError, PluginsError},
    proc::ProcError,
    task::TaskError,
    tree::TreeError,
};
use nix::errno::Errno;
use stasis_plugin_api::ErrorKind;

/// A dump failed; the tree runs on as before.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// Plugins cannot be found, loaded or told apart.
    #[error(transparent)]
    Plugins(#[from] PluginsError),
    /// A hook failed.
    #[error(transparent)]
    Plugin(#[from] PluginError),
    /// The image cannot be written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The tree cannot be stopped, or nothing injected.
    #[error(transparent)]
    Guardian(#[from] GuardianError),
    /// The tree cannot be described.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A task cannot be described.
    #[error(transparent)]
    Task(#[from] TaskError),
    /// Memory cannot be read or written out.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// /proc cannot be read.
    #[error(transparent)]
    Proc(#[from] ProcError),
    /// The process that supervises the command failed, or the command crashed.
    #[error(transparent)]
    Front(#[from] FrontError),
    /// A script of the user.
    #[error(transparent)]
    Action(#[from] ActionError),
    /// Resources that nobody takes, all of them.
    #[error("{} cannot be dumped:{}", count(.0.len()), lines(.0))]
    Unclaimed(Vec<Unclaimed>),
    /// Something is to be left out that is needed.
    #[error("{object} needs {link}, which is to be left out (another --on-unclaimed for it)")]
    LeftOut {
        /// Who needs it.
        object: String,
        /// What it is.
        link: String,
    },
    /// There is no image in a dry run.
    #[error("a dry run writes nothing")]
    DryRun,
    /// A descriptor cannot be duplicated into this process.
    #[error("cannot duplicate descriptor {number} ({link}) of task {pid}: {errno}")]
    Duplicate {
        /// The task.
        pid: i32,
        /// Descriptor number.
        number: i32,
        /// What it is.
        link: String,
        /// Why.
        errno: Errno,
    },
    /// A file without a name cannot be kept.
    #[error("cannot {operation} the unlinked file {path}: {errno}")]
    Ghost {
        /// What was tried.
        operation: &'static str,
        /// A name that it had.
        path: String,
        /// Why not.
        errno: Errno,
    },
    /// Signals of a descriptor go to somebody outside the tree.
    #[error(
        "descriptor {number} ({link}) of task {pid} sends its signals to process {owner}, which is not in the tree \
         (dump a tree that has both, or clear the owner with F_SETOWN)"
    )]
    ForeignOwner {
        /// The task.
        pid: i32,
        /// Descriptor number.
        number: i32,
        /// What it is.
        link: String,
        /// F_GETOWN.
        owner: i32,
    },
    /// A session hook described an object for a kind that its plugin does not have.
    #[error(
        "plugin {plugin} described an object of kind {kind}, which it does not declare (report this to its author)"
    )]
    NoSuchKind {
        /// The plugin.
        plugin: String,
        /// The kind.
        kind: String,
    },
    /// The user stopped it.
    #[error("{0}; the tree runs on as before")]
    Interrupted(#[from] Interrupted),
    /// A bug of ours.
    #[error("{what} panicked (this is a bug in stasis; the tree runs on as before)")]
    ThreadPanicked {
        /// Which thread.
        what: &'static str,
    },
    /// uname(2) failed.
    #[error("cannot ask the kernel for its release: {errno}")]
    Kernel {
        /// Why.
        errno: Errno,
    },
}

impl DumpError {
    /// Exit status of the binary.
    pub fn exit_status(&self) -> u8 {
        use crate::cli::ExitStatus;
        let status = match self {
            Self::Unclaimed(_) | Self::ForeignOwner { .. } => ExitStatus::Unsupported,
            Self::Task(TaskError::Unsupported { .. }) => ExitStatus::Unsupported,
            Self::Tree(
                TreeError::Shared { .. } | TreeError::Unshared { .. } | TreeError::LeaderOutside { .. },
            ) => ExitStatus::Unsupported,
            Self::Plugin(error) if error.source.kind == ErrorKind::Unsupported => ExitStatus::Unsupported,
            Self::Plugins(_) | Self::Plugin(_) | Self::NoSuchKind { .. } => ExitStatus::Plugin,
            Self::Front(FrontError::HookCrashed { .. } | FrontError::HookHung { .. }) => ExitStatus::Plugin,
            Self::Interrupted(_) => ExitStatus::Interrupted,
            _ => ExitStatus::Failure,
        };
        status as u8
    }
}

fn count(n: usize) -> String {
    if n == 1 { "one resource".into() } else { format!("{n} resources") }
}

fn lines(list: &[Unclaimed]) -> String {
    match list {
        [one] => format!(" {one}"),
        all => all.iter().map(|one| format!("\n  {one}")).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_unclaimed_resources_are_listed_with_their_remedies() {
        let one = |fd: u32| Unclaimed {
            pid: 7,
            task: "demo".into(),
            place: format!("descriptor {fd}"),
            what: "thing:[1] is claimed by no enabled plugin".into(),
            remedy: if fd == 4 { "plugin thing would take it: enable it".into() } else { String::new() },
        };
        let text = DumpError::Unclaimed(vec![one(3)]).to_string();
        assert_eq!(
            text,
            "one resource cannot be dumped: task 7 (demo), descriptor 3: thing:[1] is claimed by no enabled plugin"
        );
        let text = DumpError::Unclaimed(vec![one(3), one(4)]).to_string();
        assert_eq!(text.lines().count(), 3);
        assert!(text.starts_with("2 resources cannot be dumped:\n"));
        assert!(text.ends_with("(plugin thing would take it: enable it)"));
    }
}
