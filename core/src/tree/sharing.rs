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
const OF_PROCESSES: &[(Resource, &str)] =
    &[(Resource::Memory, "memory"), (Resource::SignalHandlers, "signal handlers")];

/// What processes share by CLONE_FS or CLONE_FILES: the first of those who do, by pid as stasis sees them. Who shares with
/// nobody is not in it.
pub type Groups = HashMap<i32, i32>;

/// What processes of the tree share, and restore can make them share again.
#[derive(Debug, Default)]
pub struct Sharing {
    /// Root, cwd and umask.
    pub fs: Groups,
    /// The descriptor table.
    pub files: Groups,
}

/// A process can share only with the one that forks it. So each of a group but one must be a child of another.
fn groups(tree: &Tree, resource: Resource, what: &'static str) -> Result<Groups, TreeError> {
    let mut set = SharingSet::new(resource);
    let mut members: BTreeMap<i32, Vec<&Process>> = BTreeMap::new();
    for process in tree.living() {
        let first = set.find_or_insert((process.worker(), 0), process.host_pid)?;
        members.entry(first.unwrap_or(process.host_pid)).or_default().push(process);
    }
    let mut groups = Groups::new();
    for (first, group) in members.into_iter().filter(|(_, group)| group.len() > 1) {
        let child = |process: &&&Process| group.iter().any(|other| other.pid == process.ppid);
        if let Some(other) = group[1..].iter().find(|process| !child(process)) {
            return Err(shared(group[0], other, what));
        }
        groups.extend(group.iter().map(|process| (process.host_pid, first)));
    }
    Ok(groups)
}

fn shared(first: &Process, second: &Process, what: &'static str) -> TreeError {
    let (first_name, second) = (first.name.clone(), second.host_pid);
    TreeError::Shared { first: first.host_pid, first_name, second, what }
}

/// chroot(2) of one that shares would be that of all.
fn refuse_own_root(tree: &Tree, fs: &Groups) -> Result<(), TreeError> {
    for process in tree.living().filter(|process| fs.get(&process.host_pid) == Some(&process.host_pid)) {
        let sharer = tree.living().find(|other| {
            other.host_pid != process.host_pid && fs.get(&other.host_pid) == Some(&process.host_pid)
        });
        if let Some(sharer) = sharer.filter(|_| process.proc.link("root").is_ok_and(|root| root != b"/")) {
            return Err(shared(process, sharer, "root directory, which is not /"));
        }
    }
    Ok(())
}

/// Who shares what. Refuses what is shared between processes, or not shared between threads, where restore would change it
/// in silence.
pub fn sharing(tree: &Tree) -> Result<Sharing, TreeError> {
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
    let fs = groups(tree, Resource::Fs, "root and cwd")?;
    refuse_own_root(tree, &fs)?;
    Ok(Sharing { fs, files: groups(tree, Resource::Files, "descriptor table")? })
}
