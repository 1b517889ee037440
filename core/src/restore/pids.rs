//! Whether the pids of the image are free.

use super::{
    error::{RestoreError, Result},
    world::Plans,
};
use nix::errno::Errno;
use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

/// How long a zombie may take to be reaped: an init may be slow.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// All numbers that restored processes, threads and helpers will have.
pub fn of_image(plans: &Plans) -> BTreeSet<i32> {
    let tids = plans.image.tasks.iter().flat_map(|task| task.threads.iter().map(|thread| thread.tid));
    let pids = plans.tree.nodes.iter().map(|node| node.pid).filter(|pid| *pid != 0);
    pids.chain(tids).collect()
}

/// Whether the tasks get their pids in a new pid namespace.
pub fn has_namespace(plans: &Plans) -> bool {
    plans.image.namespaces.values().any(|namespace| namespace.clone_flag & libc::CLONE_NEWPID as u64 != 0)
}

/// Refuses if a number is taken; `own` are processes of ours that will still be there. Gives whether one of `own` is in
/// the way, so that it helps to start them anew.
pub fn check(plans: &Plans, own: &[i32]) -> Result<bool> {
    if has_namespace(plans) {
        return Ok(false);
    }
    let wanted = of_image(plans);
    if own.iter().any(|pid| wanted.contains(pid)) {
        return Ok(true);
    }
    let started = Instant::now();
    for pid in wanted {
        while taken(pid) {
            // A group lives a moment longer than its last process.
            let passing = is_zombie(pid) || field(pid, "Name").is_none();
            if !passing || started.elapsed() > PATIENCE {
                return Err(RestoreError::PidTaken {
                    pid,
                    holder: holder(pid),
                    remedy: "end that process, or restore in a pid namespace of its own",
                });
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
    Ok(false)
}

/// Whether threads that we start now are likely to get numbers of the image.
pub fn crowded(plans: &Plans, own: &[i32]) -> bool {
    /// More threads than we ever start.
    const NEAR: i32 = 256;
    let last = own.iter().copied().max().unwrap_or(0);
    !has_namespace(plans) && of_image(plans).range(last..last.saturating_add(NEAR)).next().is_some()
}

/// Whether a process, thread or process group has this number.
pub fn taken(pid: i32) -> bool {
    [pid, -pid].into_iter().any(|target| {
        // SAFETY: signal 0 only asks.
        let result = unsafe { libc::kill(target, 0) };
        result == 0 || Errno::last() == Errno::EPERM
    })
}

fn field(pid: i32, name: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(line.trim_start_matches(':').trim().to_owned())
}

fn is_zombie(pid: i32) -> bool {
    field(pid, "State").is_some_and(|state| state.starts_with('Z'))
}

/// Who has a pid, in words.
pub fn holder(pid: i32) -> String {
    match (field(pid, "Name"), field(pid, "Tgid"), field(pid, "PPid")) {
        (Some(name), _, Some(parent)) if is_zombie(pid) => {
            format!("it belongs to zombie {name}, which its parent {parent} has not waited for")
        }
        (Some(name), Some(tgid), _) if tgid != pid.to_string() => {
            format!("it is a thread of process {tgid} ({name})")
        }
        (Some(name), ..) => format!("by process {name}"),
        _ => match member(pid) {
            Some((member, name)) => {
                format!("it is the process group or session of process {member} ({name})")
            }
            None => "it is the number of a process group or session".into(),
        },
    }
}

/// A process that is in group or session `number`, and its name.
fn member(number: i32) -> Option<(i32, String)> {
    let entries = std::fs::read_dir("/proc").ok()?.flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_member = |pid: &i32| {
        // SAFETY: both calls take a number and only answer.
        let (group, session) = unsafe { (libc::getpgid(*pid), libc::getsid(*pid)) };
        group == number || session == number
    };
    let pid = pids.into_iter().find(is_member)?;
    let state = if is_zombie(pid) { "zombie " } else { "" };
    Some((pid, format!("{state}{}", field(pid, "Name").unwrap_or_default())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_are_named() {
        let me = std::process::id() as i32;
        assert!(taken(me));
        assert!(holder(me).starts_with("by process "), "{}", holder(me));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        while !is_zombie(pid) {
            thread::yield_now();
        }
        assert!(holder(pid).contains("zombie true"), "{}", holder(pid));
        child.wait().unwrap();
        assert!(!taken(pid));
        // SAFETY: takes no pointers.
        let group = unsafe { libc::getpgid(0) };
        assert!(member(group).is_some());
    }
}
