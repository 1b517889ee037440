//! What nobody takes: the list of it, and what the user wants done about it.

use crate::tree::Tree;
use nix::sys::stat::SFlag;
use std::str::FromStr;

/// A resource that nobody takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unclaimed {
    /// The task.
    pub pid: i32,
    /// Its name.
    pub task: String,
    /// Descriptor number, mapping, namespace.
    pub place: String,
    /// What it is.
    pub what: String,
    /// What the user can do.
    pub remedy: String,
}

impl std::fmt::Display for Unclaimed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "task {} ({}), {}: {}", self.pid, self.task, self.place, self.what)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, " ({})", self.remedy) }
    }
}

/// What is known of the owner of something unclaimed, for the list.
pub(super) fn unclaimed(
    tree: &Tree,
    host_pid: i32,
    place: String,
    what: String,
    remedy: String,
) -> Unclaimed {
    let task = tree
        .processes
        .iter()
        .find(|process| process.host_pid == host_pid)
        .map(|process| process.name.clone());
    Unclaimed { pid: host_pid, task: task.unwrap_or_default(), place, what, remedy }
}

/// What becomes of a resource that nobody takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// The dump fails.
    #[default]
    Fail,
    /// It is left out: a closed descriptor, a hole in the memory.
    Skip,
    /// In its place, the restored task has /dev/null open.
    Null,
    /// The restored task has the descriptor closed.
    Close,
}

/// `--on-unclaimed KIND=POLICY`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OnUnclaimed {
    /// As [`class`] calls it, or "all" descriptors.
    pub kind: String,
    /// What becomes of those.
    pub policy: Policy,
}

/// What `--on-unclaimed` was given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OnUnclaimedError {
    /// Not of that form.
    #[error("{0:?} is not of the form KIND=fail|skip|null|close")]
    Form(String),
    /// A policy for descriptors alone.
    #[error("a mapping can be skipped only (mapping=skip)")]
    Mapping,
}

/// [`OnUnclaimed::kind`] of mappings.
pub(super) const MAPPING: &str = "mapping";

impl FromStr for OnUnclaimed {
    type Err = OnUnclaimedError;

    fn from_str(text: &str) -> Result<Self, OnUnclaimedError> {
        let form = || OnUnclaimedError::Form(text.to_owned());
        let (kind, policy) = text.split_once('=').filter(|(kind, _)| !kind.is_empty()).ok_or_else(form)?;
        let policy = match policy {
            "fail" => Policy::Fail,
            "skip" => Policy::Skip,
            "null" => Policy::Null,
            "close" => Policy::Close,
            _ => return Err(form()),
        };
        if kind == MAPPING && matches!(policy, Policy::Null | Policy::Close) {
            return Err(OnUnclaimedError::Mapping);
        }
        Ok(Self { kind: kind.to_owned(), policy })
    }
}

/// What the user wants for a class: what he said of it last, or else of all.
pub(super) fn policy(wishes: &[OnUnclaimed], class: &str) -> Policy {
    let of = |kind: &str| wishes.iter().rev().find(|wish| wish.kind == kind).map(|wish| wish.policy);
    let all = || of("all").filter(|_| class != MAPPING);
    of(class).or_else(all).unwrap_or_default()
}

/// How `--on-unclaimed` calls the kind of a descriptor: what its link says, or the type of the file that has a path.
pub(super) fn class(link: &str, mode: u32) -> &str {
    if !link.starts_with('/') {
        let (before, after) = link.split_once(':').unwrap_or((link, ""));
        let name = if before == "anon_inode" { after } else { before };
        return name.trim_matches(['[', ']']);
    }
    match SFlag::from_bits_truncate(mode & libc::S_IFMT) {
        SFlag::S_IFCHR => "chardev",
        SFlag::S_IFBLK => "blockdev",
        SFlag::S_IFDIR => "directory",
        SFlag::S_IFIFO => "fifo",
        SFlag::S_IFSOCK => "socket",
        _ => "file",
    }
}

/// What the user can do if no plugin can be of help.
pub(super) fn way_out(class: &str, link: &str, plugin: String) -> String {
    let out = format!(
        "--on-unclaimed {class}=close leaves it out; --external '{link}' and, to restore, --inherit-fd give another"
    );
    if plugin.is_empty() { out } else { format!("{plugin}; {out}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_what_links_say() {
        let cases = [
            ("anon_inode:[some]", 0, "some"),
            ("anon_inode:some-map", 0, "some-map"),
            ("socket:[12]", libc::S_IFSOCK, "socket"),
            ("net:[12]", libc::S_IFREG, "net"),
            ("/dev/x", libc::S_IFCHR, "chardev"),
            ("/a/b (deleted)", libc::S_IFREG, "file"),
        ];
        for (link, mode, expected) in cases {
            assert_eq!(class(link, mode), expected, "{link}");
        }
    }

    #[test]
    fn wishes_are_parsed_and_looked_up() {
        let wish = |text: &str| text.parse::<OnUnclaimed>();
        for bad in ["x", "x=", "=close", "x=open", "x=close=y"] {
            assert_eq!(wish(bad), Err(OnUnclaimedError::Form(bad.into())));
        }
        assert_eq!(wish("mapping=close"), Err(OnUnclaimedError::Mapping));
        let wishes: Vec<_> =
            ["all=null", "x=close", "x=fail", "y=skip"].iter().map(|t| wish(t).unwrap()).collect();
        assert_eq!(policy(&wishes, "x"), Policy::Fail);
        assert_eq!(policy(&wishes, "y"), Policy::Skip);
        assert_eq!(policy(&wishes, "z"), Policy::Null);
        assert_eq!(policy(&wishes, MAPPING), Policy::Fail);
        assert_eq!(policy(&[], "x"), Policy::Fail);
    }
}
