//! What groups are like: the settings of all controllers, by a table, and who owns them.

use crate::record::stasis::cgroup::v1::{Owner, Property};
use stasis_plugin_api::{HookError, Result};
use std::{
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::Path,
};

/// How a setting is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    /// As it is read.
    Whole,
    /// A line at a time.
    Lines,
    /// The controllers of the list, each with a plus sign.
    Controllers,
    /// The list of allowed devices.
    Devices,
    /// The number after `oom_kill_disable`.
    OomControl,
}

/// When it must be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Before tasks are in the group.
    Empty,
    /// When they are, so that no limit stands in the way of the restore.
    Populated,
}

struct Setting {
    /// A file of the group; a star stands for any text.
    name: &'static str,
    how: How,
    when: When,
}

const fn first(name: &'static str) -> Setting {
    Setting { name, how: How::Whole, when: When::Empty }
}
const fn then(name: &'static str) -> Setting {
    Setting { name, how: How::Whole, when: When::Populated }
}
const fn other(how: How, name: &'static str) -> Setting {
    Setting { how, ..then(name) }
}

/// In the order in which they are set. Files that exist in one version only are just missing in the other.
const SETTINGS: &[Setting] = &[
    // Of every group.
    first("cgroup.type"),
    first("cgroup.clone_children"),
    first("notify_on_release"),
    other(How::Controllers, "cgroup.subtree_control"),
    then("cgroup.max.depth"),
    then("cgroup.max.descendants"),
    then("cgroup.pressure"),
    // Without processors and memory nodes, no task can be put into a group.
    first("cpuset.cpus"),
    first("cpuset.mems"),
    first("cpuset.cpus.exclusive"),
    then("cpuset.cpus.partition"),
    then("cpuset.cpu_exclusive"),
    then("cpuset.mem_exclusive"),
    then("cpuset.mem_hardwall"),
    then("cpuset.memory_migrate"),
    then("cpuset.memory_spread_page"),
    then("cpuset.memory_spread_slab"),
    then("cpuset.sched_load_balance"),
    then("cpuset.sched_relax_domain_level"),
    // Processor time. A real-time group needs its time before its tasks.
    first("cpu.rt_period_us"),
    first("cpu.rt_runtime_us"),
    then("cpu.shares"),
    then("cpu.cfs_period_us"),
    then("cpu.cfs_quota_us"),
    then("cpu.cfs_burst_us"),
    then("cpu.idle"),
    then("cpu.weight"),
    then("cpu.max"),
    then("cpu.max.burst"),
    then("cpu.uclamp.min"),
    then("cpu.uclamp.max"),
    // Memory.
    then("memory.use_hierarchy"),
    then("memory.limit_in_bytes"),
    then("memory.memsw.limit_in_bytes"),
    then("memory.kmem.limit_in_bytes"),
    then("memory.kmem.tcp.limit_in_bytes"),
    then("memory.soft_limit_in_bytes"),
    then("memory.swappiness"),
    then("memory.move_charge_at_immigrate"),
    other(How::OomControl, "memory.oom_control"),
    then("memory.min"),
    then("memory.low"),
    then("memory.high"),
    then("memory.max"),
    then("memory.swap.high"),
    then("memory.swap.max"),
    then("memory.zswap.max"),
    then("memory.zswap.writeback"),
    then("memory.oom.group"),
    // Everything else.
    then("pids.max"),
    then("hugetlb.*.limit_in_bytes"),
    then("hugetlb.*.rsvd.limit_in_bytes"),
    then("hugetlb.*.max"),
    then("hugetlb.*.rsvd.max"),
    then("blkio.weight"),
    then("blkio.bfq.weight"),
    other(How::Lines, "blkio.throttle.read_bps_device"),
    other(How::Lines, "blkio.throttle.write_bps_device"),
    other(How::Lines, "blkio.throttle.read_iops_device"),
    other(How::Lines, "blkio.throttle.write_iops_device"),
    other(How::Lines, "io.weight"),
    other(How::Lines, "io.bfq.weight"),
    other(How::Lines, "io.max"),
    other(How::Lines, "io.latency"),
    then("net_cls.classid"),
    other(How::Lines, "net_prio.ifpriomap"),
    other(How::Lines, "rdma.max"),
    other(How::Lines, "misc.max"),
    other(How::Devices, "devices.list"),
];

/// Files whose owner says who may move tasks, and make groups.
const DELEGATED: &[&str] = &["", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control", "tasks"];

fn setting(name: &str) -> Option<(usize, &'static Setting)> {
    SETTINGS.iter().enumerate().find(|(_, setting)| match setting.name.split_once('*') {
        None => setting.name == name,
        // The longer name of two that fit is the one meant.
        Some((head, tail)) => name
            .strip_prefix(head)
            .and_then(|rest| rest.strip_suffix(tail))
            .is_some_and(|star| !star.contains(['.', '/'])),
    })
}

/// All settings of a group, in the order of the table.
pub fn read(directory: &Path) -> Result<Vec<Property>> {
    let failed = |error| HookError::failed(format!("reading {}", directory.display()), error);
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().into_string().unwrap_or_default();
        let Some((order, setting)) = setting(&name) else { continue };
        // Some can be written only, or not be read while a controller is being taken away.
        let Ok(text) = fs::read_to_string(directory.join(&name)) else { continue };
        found.push((order, Property { value: value(setting.how, &text), name }));
    }
    found.sort_by(|a, b| (a.0, &a.1.name).cmp(&(b.0, &b.1.name)));
    Ok(found.into_iter().map(|(_, property)| property).collect())
}

/// What is kept of the text of a file.
fn value(how: How, text: &str) -> String {
    match how {
        How::OomControl => {
            let line = text.lines().find_map(|line| line.strip_prefix("oom_kill_disable "));
            line.unwrap_or_default().trim().to_owned()
        }
        _ => text.trim_end().to_owned(),
    }
}

/// Sets what differs, of those settings that are due. What one setting forbids may be allowed after the next (limits of memory with
/// and without swap), so all are tried twice. Gives names that this kernel does not have.
pub fn write(directory: &Path, properties: &[Property], when: When) -> Result<Vec<String>> {
    let mut missing = Vec::new();
    let mut failed = Vec::new();
    for property in properties {
        match write_one(directory, property, when) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => missing.push(property.name.clone()),
            Err(_) => failed.push(property),
        }
    }
    for property in failed {
        write_one(directory, property, when).map_err(|error| {
            let file = directory.join(&property.name);
            let what = format!("setting {} to {:?}", file.display(), property.value);
            HookError::failed(what, error).remedy("--manage-cgroups=none restores into groups as they are")
        })?;
    }
    Ok(missing)
}

fn write_one(directory: &Path, property: &Property, when: When) -> io::Result<()> {
    let Some((_, setting)) = setting(&property.name) else { return Ok(()) };
    if setting.when != when {
        return Ok(());
    }
    let file = directory.join(&property.name);
    let now = match fs::read_to_string(&file) {
        Ok(text) => value(setting.how, &text),
        // Threaded groups refuse to be read in some ways.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(error),
        Err(_) => String::new(),
    };
    let wanted = &property.value;
    // Nothing to say, or what the kernel makes of a group by itself when others are threaded.
    if now == *wanted || wanted.is_empty() || wanted.starts_with("domain") {
        return Ok(());
    }
    match setting.how {
        How::Whole | How::OomControl => fs::write(file, wanted),
        How::Lines => wanted.lines().try_for_each(|line| fs::write(&file, line)),
        How::Controllers => {
            let new =
                wanted.split_whitespace().filter(|name| !now.split_whitespace().any(|one| one == *name));
            let list: Vec<String> = new.map(|name| format!("+{name}")).collect();
            if list.is_empty() { Ok(()) } else { fs::write(file, list.join(" ")) }
        }
        How::Devices => {
            let say = |file: &str, line: &str| fs::write(directory.join(file), line);
            if wanted.lines().any(|line| line == "a *:* rwm") {
                return say("devices.allow", "a");
            }
            say("devices.deny", "a")?;
            wanted.lines().try_for_each(|line| say("devices.allow", line))
        }
    }
}

/// Who owns a group, and what else of it can be delegated.
pub fn owners(directory: &Path) -> Vec<Owner> {
    let owner = |file: &&str| {
        let data = fs::metadata(directory.join(file)).ok()?;
        Some(Owner { file: (*file).into(), uid: data.uid(), gid: data.gid(), mode: data.mode() & 0o7777 })
    };
    DELEGATED.iter().filter_map(owner).collect()
}

/// Gives a group that was made back to its owners.
pub fn give(directory: &Path, owners: &[Owner]) -> Result<()> {
    for owner in owners.iter().filter(|owner| DELEGATED.contains(&owner.file.as_str())) {
        let path = directory.join(&owner.file);
        let Ok(data) = fs::metadata(&path) else { continue };
        let give = || {
            if (data.uid(), data.gid()) != (owner.uid, owner.gid) {
                chown(&path, Some(owner.uid), Some(owner.gid))?;
            }
            if data.mode() & 0o7777 != owner.mode {
                fs::set_permissions(&path, fs::Permissions::from_mode(owner.mode))?;
            }
            Ok(())
        };
        give().map_err(|error: io::Error| {
            HookError::failed(format!("giving {} to its owner", path.display()), error)
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that looks like a group.
    fn group(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        directory
    }

    fn text(directory: &tempfile::TempDir, name: &str) -> String {
        fs::read_to_string(directory.path().join(name)).unwrap()
    }

    #[test]
    fn settings_are_read_in_order_and_set_when_due() {
        let from = group(&[
            ("pids.max", "17\n"),
            ("pids.current", "3\n"),
            ("cpuset.cpus", "0-1\n"),
            ("hugetlb.2MB.limit_in_bytes", "4096\n"),
            ("hugetlb.2MB.rsvd.limit_in_bytes", "8192\n"),
            ("memory.oom_control", "oom_kill_disable 1\nunder_oom 0\n"),
            ("cgroup.subtree_control", "cpu pids\n"),
        ]);
        let properties = read(from.path()).unwrap();
        let names: Vec<_> = properties.iter().map(|property| property.name.as_str()).collect();
        let expected = [
            "cgroup.subtree_control",
            "cpuset.cpus",
            "memory.oom_control",
            "pids.max",
            "hugetlb.2MB.limit_in_bytes",
            "hugetlb.2MB.rsvd.limit_in_bytes",
        ];
        assert_eq!(names, expected);
        let to = group(&[
            ("pids.max", "max\n"),
            ("cpuset.cpus", "\n"),
            ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n"),
            ("cgroup.subtree_control", "cpu\n"),
        ]);
        assert_eq!(write(to.path(), &properties, When::Empty).unwrap(), [""; 0]);
        assert_eq!((text(&to, "cpuset.cpus").as_str(), text(&to, "pids.max").as_str()), ("0-1", "max\n"));
        let missing = write(to.path(), &properties, When::Populated).unwrap();
        assert_eq!(missing, ["hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.rsvd.limit_in_bytes"]);
        assert_eq!(text(&to, "pids.max"), "17");
        assert_eq!(text(&to, "memory.oom_control"), "1");
        assert_eq!(text(&to, "cgroup.subtree_control"), "+pids");
    }

    #[test]
    fn devices_are_denied_before_some_are_allowed() {
        let list = |text: &str| [Property { name: "devices.list".into(), value: text.into() }];
        let to = group(&[("devices.list", "a *:* rwm\n")]);
        write(to.path(), &list("c 1:3 rwm\nc 1:5 r"), When::Populated).unwrap();
        // Each write takes the place of the one before in this plain file.
        assert_eq!(
            (text(&to, "devices.deny").as_str(), text(&to, "devices.allow").as_str()),
            ("a", "c 1:5 r")
        );
        let to = group(&[("devices.list", "c 1:3 rwm\n")]);
        write(to.path(), &list("a *:* rwm"), When::Populated).unwrap();
        assert_eq!(text(&to, "devices.allow"), "a");
        assert!(!to.path().join("devices.deny").exists());
    }

    #[test]
    fn what_is_right_already_is_not_written() {
        let to = group(&[("pids.max", "17\n")]);
        write(to.path(), &[Property { name: "pids.max".into(), value: "17".into() }], When::Populated)
            .unwrap();
        assert_eq!(text(&to, "pids.max"), "17\n");
        // A name that no table has could lead anywhere.
        let hostile = Property { name: "../escape".into(), value: "x".into() };
        write(to.path(), &[hostile], When::Populated).unwrap();
        assert!(!to.path().join("../escape").exists());
    }
}
