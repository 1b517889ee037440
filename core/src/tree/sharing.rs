//! What tasks may share besides open file descriptions (clone(2)), by kcmp(2).

use super::{Tree, TreeError};
use crate::proc::kcmp::{Resource, SharingSet, compare};
use std::cmp::Ordering;

/// What the threads of one process always share when made by pthread_create, and what may differ by unshare(2).
const OF_THREADS: &[(Resource, &str)] =
    &[(Resource::Files, "descriptor table"), (Resource::Fs, "root and cwd")];

/// What processes may share by clone(2); pthread_create is not concerned.
const OF_PROCESSES: &[(Resource, &str)] = &[
    (Resource::Memory, "memory"),
    (Resource::Files, "descriptor table"),
    (Resource::Fs, "root and cwd"),
    (Resource::SignalHandlers, "signal handlers"),
];

/// Refuses what is shared between processes, or not shared between threads: restore would change it in silence.
pub fn refuse_unsupported_sharing(tree: &Tree) -> Result<(), TreeError> {
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
    Ok(())
}
