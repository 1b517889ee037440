//! What a hook says when it cannot do its work.

use abi_stable::{StableAbi, std_types::RString};

/// How a hook failed; decides the wording and the exit code.
#[repr(u8)]
#[derive(StableAbi, Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// An operation went wrong.
    Failed,
    /// The resource is in a state that cannot be kept; nothing went wrong.
    Unsupported,
    /// The plugin panicked.
    Panicked,
    /// The plugin's record cannot be decoded.
    BadRecord,
}

/// An error of a hook. Core adds the plugin, the hook, the task and the descriptor.
#[repr(C)]
#[derive(StableAbi, Debug, Clone, thiserror::Error)]
#[error("{what}{}{}", errno_text(.errno), remedy_text(.remedy))]
pub struct HookError {
    /// What kind of failure this is.
    pub kind: ErrorKind,
    /// What failed or is not supported, and why: one clause, no full stop.
    pub what: RString,
    /// `errno`, or 0.
    pub errno: i32,
    /// What the user can do about it; may be empty.
    pub remedy: RString,
}

fn errno_text(errno: &i32) -> String {
    if *errno == 0 { String::new() } else { format!(": {}", std::io::Error::from_raw_os_error(*errno)) }
}

fn remedy_text(remedy: &RString) -> String {
    if remedy.is_empty() { String::new() } else { format!(" ({remedy})") }
}

/// The result of a hook.
pub type Result<T> = std::result::Result<T, HookError>;

impl HookError {
    /// An operation failed with `errno`, e.g. `HookError::failed("F_SETPIPE_SZ", error)`.
    pub fn failed(what: impl Into<String>, error: impl Into<std::io::Error>) -> Self {
        let error = error.into();
        let what = match error.raw_os_error() {
            Some(_) => what.into(),
            None => format!("{}: {error}", what.into()),
        };
        Self {
            kind: ErrorKind::Failed,
            what: what.into(),
            errno: error.raw_os_error().unwrap_or(0),
            remedy: RString::new(),
        }
    }

    /// Something is not as it must be, without an `errno`.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Failed, what: what.into().into(), errno: 0, remedy: RString::new() }
    }

    /// The resource is in a state that this plugin cannot keep. `remedy` says what the user can do.
    pub fn unsupported(what: impl Into<String>, why: impl AsRef<str>, remedy: impl Into<String>) -> Self {
        Self {
            kind: ErrorKind::Unsupported,
            what: format!("{}: {}", what.into(), why.as_ref()).into(),
            errno: 0,
            remedy: remedy.into().into(),
        }
    }

    /// The same error with advice for the user.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = remedy.into().into();
        self
    }
}

impl From<std::io::Error> for HookError {
    fn from(error: std::io::Error) -> Self {
        Self::failed("system call", error)
    }
}
