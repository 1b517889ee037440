//! What `/proc` shows of a tree, in a form in which two sights of it can be compared: what differs by nature (inode
//! numbers of pipes, mount ids, times) is left out or turned into classes of equals.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Facts of one tree: (task, name of the fact) to value.
///
/// A task is named by its depth and number in its own pid namespace: numbers in outer namespaces cannot be chosen from
/// inside a user namespace (clone(2), `set_tid`), so a restore need not keep them.
#[derive(Debug, Default)]
pub struct Snapshot {
    facts: BTreeMap<(String, String), String>,
    /// The pids of the tree in the namespace of the harness, parents first.
    pub pids: Vec<i32>,
}

/// Lines of /proc/pid/status that must be the same after a restore (proc_pid_status(5)).
const STATUS: [&str; 24] = [
    "Name",
    "Umask",
    "TracerPid",
    "Uid",
    "Gid",
    "Groups",
    "Kthread",
    "VmLck",
    "VmPin",
    "Threads",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "Cpus_allowed",
];

/// Lines of pids, outermost namespace first.
const PIDS: [&str; 4] = ["NStgid", "NSpid", "NSpgid", "NSsid"];

/// Fields of /proc/pid/stat, by their number in proc_pid_stat(5).
const STAT: [(usize, &str); 16] = [
    (7, "tty_nr"),
    (19, "nice"),
    (26, "startcode"),
    (27, "endcode"),
    (28, "startstack"),
    (38, "exit_signal"),
    (40, "rt_priority"),
    (41, "policy"),
    (45, "start_data"),
    (46, "end_data"),
    (47, "start_brk"),
    (48, "arg_start"),
    (49, "arg_end"),
    (50, "env_start"),
    (51, "env_end"),
    (18, "priority"),
];

/// Files of a task that are compared as a whole.
const WHOLE: [&str; 11] = [
    "comm",
    "cmdline",
    "environ",
    "auxv",
    "personality",
    "limits",
    "oom_score_adj",
    "timerslack_ns",
    "coredump_filter",
    "uid_map",
    "gid_map",
];

/// Lines of fdinfo that differ by nature.
const FDINFO_VARIES: [&str; 8] =
    ["mnt_id:", "ino:", "it_value:", "ticks:", "eventfd-id:", "map_id:", "scm_fds:", "Pid:"];

impl Snapshot {
    /// Looks at the tree below `root`.
    pub fn take(root: i32) -> io::Result<Snapshot> {
        let mut seen = Snapshot::default();
        let mut classes = Classes::default();
        let mut todo = vec![root];
        while let Some(pid) = todo.pop() {
            seen.pids.push(pid);
            let mut children: Vec<(String, i32)> =
                children(pid).into_iter().map(|child| (own_name(child), child)).collect();
            children.sort();
            let task = own_name(pid);
            let names: Vec<&str> = children.iter().map(|(name, _)| name.as_str()).collect();
            seen.put(&task, "children", names.join(" "));
            todo.extend(children.iter().rev().map(|(_, child)| child));
            seen.task(pid, &task, &mut classes)?;
        }
        Ok(seen)
    }

    /// What is different in `other`, one line each.
    pub fn differences(&self, other: &Snapshot) -> Vec<String> {
        let keys: std::collections::BTreeSet<_> = self.facts.keys().chain(other.facts.keys()).collect();
        keys.into_iter()
            .filter_map(|key| {
                let (was, is) = (self.facts.get(key), other.facts.get(key));
                let text = |value: Option<&String>| value.map_or("absent".to_owned(), |v| format!("{v:?}"));
                (was != is).then(|| format!("task {} {}: was {}, is {}", key.0, key.1, text(was), text(is)))
            })
            .collect()
    }

    fn put(&mut self, task: &str, name: &str, value: impl Into<String>) {
        self.facts.insert((task.to_owned(), name.to_owned()), value.into());
    }

    fn task(&mut self, pid: i32, task: &str, classes: &mut Classes) -> io::Result<()> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let stat = fs::read_to_string(proc.join("stat"))?;
        let zombie = stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'));
        let after_name: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split_whitespace().collect();
        // What a zombie ran with is nobody's business any more.
        for (number, name) in STAT.into_iter().filter(|_| !zombie) {
            self.put(task, name, after_name.get(number - 3).copied().unwrap_or_default());
        }
        self.put(task, "zombie", zombie.to_string());
        if zombie {
            return Ok(());
        }
        for tid in names(&proc.join("task")) {
            self.status(task, &tid, &proc.join("task").join(&tid));
        }
        for name in WHOLE {
            let content = fs::read(proc.join(name)).unwrap_or_default();
            self.put(task, name, String::from_utf8_lossy(&content));
        }
        for name in ["exe", "cwd", "root"] {
            self.put(task, name, link(&proc.join(name)));
        }
        for name in names(&proc.join("ns")) {
            let class = classes.namespace(&link(&proc.join("ns").join(&name)), &name);
            self.put(task, &format!("ns {name}"), class);
        }
        self.descriptors(task, &proc, classes);
        for (place, what) in mappings(&proc)? {
            self.put(task, &format!("mapping {place}"), what);
        }
        if let Ok(mounts) = fs::read_to_string(proc.join("mountinfo")) {
            self.put(task, "mounts", mount_lines(&mounts));
        }
        Ok(())
    }

    fn status(&mut self, task: &str, tid: &str, dir: &Path) {
        let status = fs::read_to_string(dir.join("status")).unwrap_or_default();
        let tid = innermost(&status, "NSpid").unwrap_or_else(|| tid.to_owned());
        for line in status.lines() {
            let (name, value) = line.split_once(':').unwrap_or((line, ""));
            if STATUS.contains(&name) {
                self.put(task, &format!("thread {tid} {name}"), value.trim());
            }
            if PIDS.contains(&name) {
                let own = value.split_whitespace().last().unwrap_or_default();
                self.put(task, &format!("thread {tid} {name}"), own);
            }
            if name == "State" {
                let stopped = matches!(value.trim().chars().next(), Some('T' | 't'));
                self.put(task, &format!("thread {tid} stopped"), stopped.to_string());
            }
        }
    }

    fn descriptors(&mut self, task: &str, proc: &Path, classes: &mut Classes) {
        for number in names(&proc.join("fd")) {
            let target = link(&proc.join("fd").join(&number));
            let class = classes.descriptor(&target);
            let info = fs::read_to_string(proc.join("fdinfo").join(&number)).unwrap_or_default();
            let mut info: Vec<String> = info
                .lines()
                .filter(|line| !FDINFO_VARIES.iter().any(|start| line.starts_with(start)))
                // An epoll entry ends with the position, inode and device of its target.
                .map(|line| match line.find(" pos:") {
                    Some(end) if line.starts_with("tfd:") => line[..end].to_owned(),
                    // Of a process descriptor: the pid in the innermost namespace, which alone stays.
                    _ if line.starts_with("NSpid:") => {
                        format!("NSpid: {}", line.split_whitespace().next_back().unwrap_or_default())
                    }
                    _ => open_flags(line).or_else(|| lock(line)).unwrap_or_else(|| line.to_owned()),
                })
                .collect();
            // The order of an epoll's entries is that of a tree of kernel addresses.
            info.sort();
            self.put(task, &format!("descriptor {number}"), format!("{class}; {}", info.join("; ")));
        }
    }
}

/// Names for things whose own names differ after a restore, in the order in which they are first seen.
#[derive(Debug, Default)]
struct Classes {
    known: BTreeMap<String, usize>,
}

impl Classes {
    fn class(&mut self, key: &str) -> usize {
        let next = self.known.len();
        *self.known.entry(key.to_owned()).or_insert(next)
    }

    fn descriptor(&mut self, target: &str) -> String {
        match target.split_once(":[") {
            Some((kind @ ("pipe" | "socket"), _)) => format!("{kind} #{}", self.class(target)),
            Some((kind @ ("user" | "mnt" | "pid" | "net" | "ipc" | "uts" | "cgroup" | "time"), _)) => {
                format!("{kind} namespace {}", self.namespace(target, kind))
            }
            _ => unlinked(target).unwrap_or_else(|| target.to_owned()),
        }
    }

    fn namespace(&mut self, target: &str, name: &str) -> String {
        if link(&Path::new("/proc/self/ns").join(name)) == target {
            "the harness'".to_owned()
        } else {
            format!("#{}", self.class(target))
        }
    }
}

/// The children of all threads of a process (CONFIG_PROC_CHILDREN).
pub fn children(pid: i32) -> Vec<i32> {
    let tasks = PathBuf::from(format!("/proc/{pid}/task"));
    let mut found: Vec<i32> = names(&tasks)
        .iter()
        .filter_map(|tid| fs::read_to_string(tasks.join(tid).join("children")).ok())
        .flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>())
        .collect();
    found.sort_unstable();
    found
}

/// The entries of a directory of numbers or names, sorted as numbers where they are.
fn names(dir: &Path) -> Vec<String> {
    let mut found: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    found.sort_by_key(|name| (name.parse::<u64>().ok(), name.clone()));
    found
}

/// The name of an unlinked file that a restore cannot make once more: that of an O_TMPFILE file is its inode number, and
/// another name may be in use again.
fn unlinked(target: &str) -> Option<String> {
    let path = Path::new(target.strip_suffix(" (deleted)")?);
    let (directory, name) = (path.parent()?, path.file_name()?.to_str()?);
    let numbered = name.strip_prefix('#').is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_digit()));
    let in_use = name.starts_with(".stasis-") || path.symlink_metadata().is_ok();
    (numbered || in_use).then(|| format!("{}/? (deleted)", directory.display()))
}

/// The flags line of fdinfo without O_TMPFILE, which says how a file was made.
fn open_flags(line: &str) -> Option<String> {
    let flags = i32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok()?;
    let made = flags & libc::O_TMPFILE == libc::O_TMPFILE;
    made.then(|| format!("flags:\t0{:o}", flags & !libc::O_TMPFILE))
}

/// A lock without pid and inode, which differ in outer pid namespaces and for unlinked files.
fn lock(line: &str) -> Option<String> {
    let words: Vec<&str> = line.strip_prefix("lock:")?.split_whitespace().collect();
    let kept = words.iter().enumerate().filter(|(n, _)| ![4, 5].contains(n)).map(|(_, word)| *word);
    Some(format!("lock: {}", kept.collect::<Vec<_>>().join(" ")))
}

fn link(path: &Path) -> String {
    fs::read_link(path).map(|target| target.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The last number of a line of /proc/pid/status: in the innermost pid namespace.
fn innermost(status: &str, name: &str) -> Option<String> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.split_whitespace().last()?.to_owned())
}

/// How a task is named here: depth of its pid namespace, and pid in it.
fn own_name(pid: i32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
    let pids: Vec<&str> = line.split_whitespace().collect();
    match pids.last() {
        Some(own) if pids.len() == 1 => (*own).to_owned(),
        Some(own) => format!("{own} (depth {})", pids.len()),
        None => format!("{pid} (gone)"),
    }
}

/// All mounts, in an order of their own.
fn mount_lines(mountinfo: &str) -> String {
    let mut lines: Vec<String> = mountinfo.lines().map(mount_line).collect();
    lines.sort();
    lines.join("\n")
}

/// A line of mountinfo without ids and device numbers (proc_pid_mountinfo(5)).
fn mount_line(line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    let kept = words.iter().skip(3).map(|word| match word.split_once(':') {
        Some((kind @ ("shared" | "master" | "propagate_from"), _)) => kind,
        _ => word,
    });
    kept.collect::<Vec<_>>().join(" ")
}

/// VmFlags that are bookkeeping: soft-dirty and userfaultfd marks of other tools, and whether the mapping counts towards
/// the commit limit, which depends on whether it ever was writable.
const FLAGS_VARY: [&str; 3] = ["sd", "uw", "ac"];

/// The device, mapped privately.
const ZERO: &str = "/dev/zero";

/// One mapping of smaps.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    perms: String,
    offset: u64,
    file: String,
    flags: String,
}

impl Mapping {
    /// Whether the kernel may at will show this and `next` as one mapping or as two.
    fn continues_with(&self, next: &Mapping) -> bool {
        let anonymous = self.file.is_empty()
            || self.file.starts_with('[')
            || self.file.starts_with("/anon")
            || self.file == ZERO;
        self.end == next.start
            && (&self.perms, &self.file, &self.flags) == (&next.perms, &next.file, &next.flags)
            && (anonymous || self.offset + (self.end - self.start) == next.offset)
    }
}

/// The mappings, adjacent like ones merged.
fn mappings(proc: &Path) -> io::Result<BTreeMap<String, String>> {
    let smaps = fs::read_to_string(proc.join("smaps"))?;
    let mut found: Vec<Mapping> = Vec::new();
    let mut current: Option<Mapping> = None;
    for line in smaps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(mut mapping) = current.take() {
                mapping.flags = flags
                    .split_whitespace()
                    .filter(|f| !FLAGS_VARY.contains(f))
                    .collect::<Vec<_>>()
                    .join(" ");
                match found.last_mut() {
                    Some(last) if last.continues_with(&mapping) => last.end = mapping.end,
                    _ => found.push(mapping),
                }
            }
        } else if let Some(mapping) = header(line) {
            current = Some(mapping);
        }
    }
    Ok(found
        .into_iter()
        .map(|m| {
            // Private zeros are anonymous memory, whose offset the kernel changes as it likes when the mapping is moved.
            let offset = if m.file.starts_with('/') && m.file != ZERO { m.offset } else { 0 };
            let what = format!("{} {:#x} {} {}", m.perms, offset, m.file, m.flags);
            (format!("{:x}-{:x}", m.start, m.end), what)
        })
        .collect())
}

/// Parses `start-end perms offset dev inode path`.
fn header(line: &str) -> Option<Mapping> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let perms = words.next()?.to_owned();
    let offset = u64::from_str_radix(words.next()?, 16).ok()?;
    let file = words.skip(2).collect::<Vec<_>>().join(" ");
    // An object without a path shows as its kind and a new inode number.
    let file = match file.split_once(":[") {
        Some((kind, _)) if !file.starts_with(['/', '[']) => kind.to_owned(),
        _ => file,
    };
    Some(Mapping { start, end, perms, offset, file, flags: String::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_like_mappings_are_one() {
        let map = |start, end, perms: &str, offset, file: &str| Mapping {
            start,
            end,
            perms: perms.into(),
            offset,
            file: file.into(),
            flags: "rd".into(),
        };
        assert!(map(0, 4096, "rw-p", 0, "").continues_with(&map(4096, 8192, "rw-p", 0, "")));
        assert!(!map(0, 4096, "rw-p", 0, "").continues_with(&map(4096, 8192, "r--p", 0, "")));
        assert!(!map(0, 4096, "rw-p", 0, "").continues_with(&map(8192, 9000, "rw-p", 0, "")));
        assert!(!map(0, 4096, "rw-p", 0, "/a").continues_with(&map(4096, 8192, "rw-p", 0, "/a")));
        assert!(map(0, 4096, "rw-p", 0, "/a").continues_with(&map(4096, 8192, "rw-p", 4096, "/a")));
    }

    #[test]
    fn mount_lines_lose_their_ids() {
        let line = "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        assert_eq!(mount_line(line), "/mnt1 /mnt2 rw,noatime master - ext3 /dev/root rw,errors=continue");
    }

    #[test]
    fn a_look_at_ourselves_equals_the_next() {
        let me = std::process::id() as i32;
        let (one, two) = (Snapshot::take(me), Snapshot::take(me));
        assert!(one.is_ok() && two.is_ok());
    }
}
