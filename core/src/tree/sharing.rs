//! What tasks may share besides open file descriptions (clone(2)), by kcmp(2).

use super::{Process, Tree, TreeError};
use crate::proc::kcmp::{Resource, SharingSet, compare};
use std::{
    cmp::Ordering,
    collections::{BTreeMap, HashMap},
};

/// What the threads of one process always share when made by pthread_create, and what may differ by unshare(2).
const OF_THREADS: &[(Resource, &str)] =
    &[(Resource::Files, "descriptor table"), (Resource::Fs, "root and cwd")];

/// What processes may share by clone(2); pthread_create is not concerned.
const OF_PROCESSES: &[(Resource, &str)] = &[
    (Resource::Memory, "memory"),
    (Resource::Files, "descriptor table"),
    (Resource::SignalHandlers, "signal handlers"),
];

/// Who shares root, cwd and umask with other processes (CLONE_FS): a number from 1 for each such group, by pid as stasis sees it.
pub type FsGroups = HashMap<i32, u32>;

/// A process can share only with the one that forks it. So each of a group but one must be a child of another.
fn fs_groups(tree: &Tree) -> Result<FsGroups, TreeError> {
    let mut set = SharingSet::new(Resource::Fs);
    let mut members: BTreeMap<i32, Vec<&Process>> = BTreeMap::new();
    for process in tree.living() {
        let first = set.find_or_insert((process.worker(), 0), process.host_pid)?;
        members.entry(first.unwrap_or(process.host_pid)).or_default().push(process);
    }
    let mut groups = FsGroups::new();
    for (number, group) in (1..).zip(members.into_values().filter(|group| group.len() > 1)) {
        let child = |process: &&&Process| group.iter().any(|other| other.pid == process.ppid);
        let first = group[0];
        let own_root = first.proc.link("root")? != b"/";
        if let Some(other) = group[1..].iter().find(|process| own_root || !child(process)) {
            return Err(TreeError::Shared {
                first: first.host_pid,
                first_name: first.name.clone(),
                second: other.host_pid,
                what: if own_root { "root directory, which is not /" } else { "root and cwd" },
            });
        }
        groups.extend(group.iter().map(|process| (process.host_pid, number)));
    }
    Ok(groups)
}

/// Refuses what is shared between processes, or not shared between threads, where restore would change it in silence.
pub fn sharing(tree: &Tree) -> Result<FsGroups, TreeError> {
    for &(resource, what) in OF_PROCESSES {
        let mut set = SharingSet::new(resource);
        for process in tree.living() {
            if let Some(first) = set.find_or_insert((process.worker(), 0), process.host_pid)? {
                let first_name = tree.processes.iter().find(|p| p.host_pid == first).map(|p| p.name.clone());
                let first_name = first_name.unwrap_or_default();
                return Err(TreeError::Shared { first, first_name, second: process.host_pid, what });
            }
        }
    }
    for process in tree.living() {
        for &(tid, _) in &process.threads[1..] {
            for &(resource, what) in OF_THREADS {
                if compare(resource, (process.worker(), 0), (tid, 0))? != Ordering::Equal {
                    return Err(TreeError::Unshared {
                        pid: process.host_pid,
                        name: process.name.clone(),
                        tid,
                        what,
                    });
                }
            }
        }
    }
    fs_groups(tree)
}
