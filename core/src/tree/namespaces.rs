//! Namespace membership (namespaces(7)): which tasks are in which, compared with stasis itself.

use super::{Process, Tree, TreeError};
use crate::proc::{ProcDir, ProcError};
use std::collections::BTreeMap;

/// `/proc/PID/ns`. The `_for_children` links matter only where they differ from the task's own.
const KINDS: &[&str] = &["user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time"];

/// A namespace that is not the one stasis is in.
#[derive(Debug, Clone)]
pub struct ForeignNamespace {
    /// Number in the image, from 1.
    pub id: u32,
    /// Type, as in `/proc/PID/ns`.
    pub kind: &'static str,
    /// Inode number.
    pub ino: u64,
    /// Processes in it, by pid of the image.
    pub members: Vec<i32>,
}

/// Which namespaces the tree is in.
#[derive(Debug, Default)]
pub struct NamespaceMap {
    /// All that are not stasis' own.
    pub foreign: Vec<ForeignNamespace>,
    ids: BTreeMap<(&'static str, u64), u32>,
    own: BTreeMap<&'static str, u64>,
}

impl NamespaceMap {
    /// Reads `/proc/PID/ns` of the whole tree.
    pub fn read(tree: &Tree) -> Result<Self, TreeError> {
        let mut map = Self::default();
        // Not std::process::id(): /proc may belong to another pid namespace than ours.
        let own = ProcDir::open_self()?;
        for &kind in KINDS {
            if let Some(ino) = inode(&own, kind)? {
                map.own.insert(kind, ino);
            }
        }
        for process in tree.living() {
            for &kind in KINDS {
                let Some(ino) = inode(&process.proc, kind)? else { continue };
                if map.own.get(kind) == Some(&ino) {
                    continue;
                }
                let next = map.foreign.len() as u32 + 1;
                let id = *map.ids.entry((kind, ino)).or_insert(next);
                if id == next {
                    map.foreign.push(ForeignNamespace { id, kind, ino, members: Vec::new() });
                }
                map.foreign[id as usize - 1].members.push(process.pid);
            }
        }
        Ok(map)
    }

    /// The namespaces of a process: (kind, id), id 0 for stasis' own.
    pub fn of(&self, process: &Process) -> Result<Vec<(&'static str, u32)>, TreeError> {
        let mut namespaces = Vec::new();
        for &kind in KINDS {
            if let Some(ino) = inode(&process.proc, kind)? {
                namespaces.push((kind, self.ids.get(&(kind, ino)).copied().unwrap_or(0)));
            }
        }
        Ok(namespaces)
    }

    /// Whether a process is in another namespace of this kind than stasis.
    pub fn is_foreign(&self, kind: &str, process: &Process) -> bool {
        let is = |one: &ForeignNamespace| one.kind == kind && one.members.contains(&process.pid);
        self.foreign.iter().any(is)
    }
}

/// The inode of a namespace; `None` if this kernel has no such namespaces.
fn inode(proc: &ProcDir, kind: &str) -> Result<Option<u64>, ProcError> {
    match proc.stat(&format!("ns/{kind}")) {
        Ok(stat) => Ok(Some(stat.st_ino)),
        Err(ProcError::Read { errno: nix::errno::Errno::ENOENT, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Translates user or group ids, as stasis sees them, into those of a process' user namespace.
#[derive(Debug, Clone, Default)]
pub struct IdTranslation {
    /// (first inside, first outside, count); empty: nothing to translate.
    ranges: Vec<(u32, u32, u32)>,
}

impl IdTranslation {
    /// Reads `uid_map` or `gid_map` (user_namespaces(7)).
    pub fn read(proc: &ProcDir, file: &'static str) -> Result<Self, ProcError> {
        let text = proc.read_text(file)?;
        let range = |line: &str| {
            let mut numbers = line.split_ascii_whitespace().map(str::parse::<u32>);
            Some((numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?))
        };
        let ranges = text.lines().map(range).collect::<Option<Vec<_>>>();
        let what = || ProcError::Format { pid: proc.pid(), file, what: text.clone() };
        Ok(Self { ranges: ranges.ok_or_else(what)? })
    }

    /// The id inside; an unmapped one is the overflow id, as the process itself would see it.
    pub fn inside(&self, id: u32) -> u32 {
        const OVERFLOW: u32 = 65534;
        self.inside_if_mapped(id).unwrap_or(OVERFLOW)
    }

    /// The id inside, if it has one.
    pub fn inside_if_mapped(&self, id: u32) -> Option<u32> {
        if self.ranges.is_empty() {
            return Some(id);
        }
        let hit = self.ranges.iter().find(|&&(_, outside, count)| id >= outside && id - outside < count);
        hit.map(|&(inside, outside, _)| inside + (id - outside))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_translated_by_range() {
        let map = IdTranslation { ranges: vec![(0, 100_000, 1000), (5000, 7, 1)] };
        assert_eq!(map.inside(100_000), 0);
        assert_eq!(map.inside(100_999), 999);
        assert_eq!(map.inside(7), 5000);
        assert_eq!(map.inside(101_000), 65534);
        assert_eq!(IdTranslation::default().inside(42), 42);
    }
}
