//! Which hierarchies there are, where they are mounted, and where threads are in them.

use stasis_plugin_api::{HookError, Result};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// Its root, as a directory.
    pub directory: PathBuf,
    /// Version 1: its controllers, or `name=NAME`. Empty for version 2.
    pub controllers: Vec<String>,
}

impl Mounted {
    /// Whether it is of version 2.
    pub fn is_unified(&self) -> bool {
        self.controllers.is_empty()
    }

    /// The directory of a group.
    pub fn group(&self, path: &str) -> PathBuf {
        self.directory.join(path.trim_start_matches('/'))
    }

    /// What a user may call it: its controllers.
    pub fn names(&self) -> Vec<String> {
        if !self.is_unified() {
            return self.controllers.clone();
        }
        let text = fs::read_to_string(self.directory.join("cgroup.controllers")).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    }
}

/// All hierarchies that are mounted as a whole.
#[derive(Debug, Clone)]
pub struct Mounts(Vec<Mounted>);

impl Mounts {
    /// Those that this process sees.
    pub fn read() -> Result<Self> {
        let text = fs::read_to_string("/proc/self/mountinfo");
        Ok(Self::parse(&text.map_err(|error| HookError::failed("reading /proc/self/mountinfo", error))?))
    }

    /// From proc_pid_mountinfo(5).
    pub fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(mounted).collect())
    }

    /// The hierarchy that /proc/PID/cgroup calls so.
    pub fn find(&self, controllers: &str) -> Option<&Mounted> {
        self.0.iter().find(|mounted| {
            if controllers.is_empty() {
                return mounted.is_unified();
            }
            controllers.split(',').all(|name| mounted.controllers.iter().any(|known| known == name))
        })
    }
}

fn mounted(line: &str) -> Option<Mounted> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut mount = mount.split(' ').skip(3);
    // Of a part of a hierarchy, not all groups can be reached.
    if mount.next()? != "/" {
        return None;
    }
    let directory = unescape(mount.next()?);
    let mut filesystem = filesystem.split(' ');
    let controllers = match filesystem.next()? {
        "cgroup2" => Vec::new(),
        "cgroup" => filesystem.nth(1)?.split(',').map(str::to_owned).collect(),
        _ => return None,
    };
    Some(Mounted { directory, controllers })
}

/// Blanks and backslashes are written as octal numbers.
fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

/// Lines of proc_pid_cgroup(5), as (controllers, path), in the order of their controllers.
pub fn memberships(text: &str) -> Vec<(String, String)> {
    let line = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        Some((controllers.to_owned(), path.to_owned()))
    };
    let mut found: Vec<_> = text.lines().filter_map(line).collect();
    found.sort();
    found
}

/// Where a thread or process is, by its directory in /proc.
pub fn memberships_of(proc: &Path) -> Result<Vec<(String, String)>> {
    let file = proc.join("cgroup");
    let text = fs::read_to_string(&file);
    Ok(memberships(&text.map_err(|error| HookError::failed(format!("reading {}", file.display()), error))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
25 30 0:24 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
26 25 0:25 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw
27 25 0:26 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
28 25 0:27 / /sys/fs/cgroup/cpu\\040and rw - cgroup cgroup rw,cpu,cpuacct
29 25 0:28 /part /mnt/pids rw - cgroup cgroup rw,pids
";

    #[test]
    fn hierarchies_are_found_by_what_proc_calls_them() {
        let mounts = Mounts::parse(MOUNTS);
        let directory = |controllers| mounts.find(controllers).map(|mounted| mounted.group("/a/b"));
        assert_eq!(directory(""), Some("/sys/fs/cgroup/unified/a/b".into()));
        assert_eq!(directory("name=systemd"), Some("/sys/fs/cgroup/systemd/a/b".into()));
        assert_eq!(directory("cpu,cpuacct"), Some("/sys/fs/cgroup/cpu and/a/b".into()));
        // Mounted in part, and not at all.
        assert_eq!((directory("pids"), directory("memory")), (None, None));
    }

    #[test]
    fn memberships_are_sorted_and_may_hold_colons() {
        let text = "4:memory:/x:y\n1:name=systemd:/\n0::/a\nnonsense\n";
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(memberships(text), [pair("", "/a"), pair("memory", "/x:y"), pair("name=systemd", "/")]);
    }
}
