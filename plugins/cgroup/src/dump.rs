//! Who is where, and what the groups are like. Only looks.

use crate::{
    BLOB, Mode,
    hierarchy::{Mounts, memberships, memberships_of},
    namespace, properties,
    record::stasis::cgroup::v1::{Cgroups, Group, Hierarchy, Member, Set},
    roots,
};
use stasis_plugin_api::{HookError, Host, Result, TaskInfo, prost::Message};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    io::Write,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

/// More groups than this below the root of one tree are refused: somebody else's are among them.
const MOST_GROUPS: usize = 10_000;

/// Writes the blob, if cgroups are to be kept.
pub fn dump(host: &Host<'_>) -> Result<()> {
    if Mode::of(host)?.is_none() {
        return Ok(());
    }
    let mounts = Mounts::read()?;
    let tasks = host.tasks();
    let found = members(host, &tasks)?;
    let Some(first) = found.sets.first() else { return Ok(()) };
    let names: Vec<String> = first.iter().map(|(controllers, _)| controllers.clone()).collect();
    let mut cgroups = Cgroups { members: found.members, ..Cgroups::default() };
    for set in &found.sets {
        if !set.iter().map(|(controllers, _)| controllers).eq(&names) {
            return Err(HookError::invalid("tasks of the tree are in different hierarchies of cgroups"));
        }
        cgroups.sets.push(Set { paths: set.iter().map(|(_, path)| path.clone()).collect() });
    }
    let inside = namespace::roots(host, &tasks)?;
    for (index, controllers) in names.into_iter().enumerate() {
        let paths: BTreeSet<&str> = found.sets.iter().map(|set| set[index].1.as_str()).collect();
        let root = match inside.get(&controllers) {
            Some(root) => root.clone(),
            None => roots::common(paths.iter().copied()),
        };
        match mounts.find(&controllers) {
            Some(mounted) => {
                let groups = groups(index, &root, &paths, |path| mounted.group(path))?;
                cgroups.groups.extend(groups);
            }
            // Version 2 is there even if it is mounted nowhere.
            None if paths.iter().all(|path| *path == "/") => {}
            None => {
                let what = format!("the cgroup hierarchy {controllers:?} (of group {root})");
                let remedy = "mount it below /sys/fs/cgroup, or --manage-cgroups=ignore";
                return Err(HookError::unsupported(what, "it is not mounted as a whole", remedy));
            }
        }
        cgroups.hierarchies.push(Hierarchy { controllers, root });
    }
    let write = |cgroups: &Cgroups| host.blob_writer(BLOB).write_all(&cgroups.encode_to_vec());
    write(&cgroups).map_err(|error| HookError::failed("writing the blob of cgroups", error))
}

/// Who is where.
#[derive(Default)]
struct Found {
    members: Vec<Member>,
    /// What /proc shows, once for all that have the same.
    sets: Vec<Vec<(String, String)>>,
}

/// The text of a file in the /proc directory of a task.
fn read(proc: &OwnedFd, file: &str) -> std::io::Result<String> {
    fs::read_to_string(format!("/proc/self/fd/{}/{file}", proc.as_raw_fd()))
}

fn members(host: &Host<'_>, tasks: &[TaskInfo]) -> Result<Found> {
    let mut found = Found::default();
    let mut known: HashMap<String, u32> = HashMap::new();
    for task in tasks {
        let failed = |error| HookError::failed(format!("reading the cgroups of task {}", task.pid), error);
        let proc = host.open_proc(task.pid)?;
        let threads = fs::read_dir(format!("/proc/self/fd/{}/task", proc.as_raw_fd())).map_err(failed)?;
        for thread in threads {
            let name = thread.map_err(failed)?.file_name();
            let name = name.to_string_lossy();
            let status = read(&proc, &format!("task/{name}/status")).map_err(failed)?;
            // Who has ended is nowhere.
            if matches!(
                field(&status, "State").and_then(|state| state.chars().next()),
                None | Some('Z' | 'X')
            ) {
                continue;
            }
            let tid = inner(&status);
            let tid = tid.ok_or_else(|| HookError::invalid(format!("thread {name} has no number inside")))?;
            let text = read(&proc, &format!("task/{name}/cgroup")).map_err(failed)?;
            let set = match known.get(&text) {
                Some(set) => *set,
                None => {
                    found.sets.push(memberships(&text));
                    let set = found.sets.len() as u32 - 1;
                    known.insert(text, set);
                    set
                }
            };
            found.members.push(Member { pid: task.pid, tid, set });
        }
    }
    Ok(found)
}

/// A field of proc_pid_status(5).
pub fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// The number of a thread in its own pid namespace.
pub fn inner(status: &str) -> Option<i32> {
    field(status, "NSpid")?.split_whitespace().next_back()?.parse().ok()
}

/// The groups of one hierarchy that a restore may have to make, each after its parent.
fn groups(
    hierarchy: usize,
    root: &str,
    paths: &BTreeSet<&str>,
    directory: impl Fn(&str) -> PathBuf,
) -> Result<Vec<Group>> {
    // Path, and whether it is above the root.
    let mut wanted: BTreeMap<String, bool> = BTreeMap::new();
    for path in paths.iter().copied().chain([root]).filter(|path| *path != "/") {
        for ancestor in roots::ancestors(path) {
            let above = roots::below(&ancestor, root).is_none_or(|_| root == "/");
            wanted.entry(ancestor).or_insert(above);
        }
        wanted.insert(path.into(), false);
    }
    // What is below the root of the hierarchy is everybody's.
    if root != "/" {
        for path in descendants(&directory(root), root)? {
            wanted.entry(path).or_insert(false);
        }
    }
    let group = |(path, above): (String, bool)| {
        let place = directory(&path);
        Ok(Group {
            hierarchy: hierarchy as u32,
            above,
            properties: properties::read(&place)?,
            owners: properties::owners(&place),
            path,
        })
    };
    wanted.into_iter().map(group).collect()
}

/// Paths of all groups below one.
fn descendants(directory: &Path, path: &str) -> Result<Vec<String>> {
    let failed = |error| HookError::failed(format!("reading {}", directory.display()), error);
    let mut found = Vec::new();
    let mut queue = vec![(directory.to_owned(), path.to_owned())];
    while let Some((directory, path)) = queue.pop() {
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if !entry.file_type().map_err(failed)?.is_dir() {
                continue;
            }
            let name = entry.file_name().into_string().unwrap_or_default();
            let below = format!("{}/{name}", path.trim_end_matches('/'));
            found.push(below.clone());
            queue.push((entry.path(), below));
        }
        if found.len() > MOST_GROUPS {
            let what = format!("the cgroups below {path}");
            let why = format!("there are more than {MOST_GROUPS}");
            return Err(HookError::unsupported(what, why, "--manage-cgroups=ignore"));
        }
    }
    Ok(found)
}

/// Where a task is in each hierarchy, as this thread's cgroup namespace calls it.
pub fn seen(proc: &OwnedFd) -> Result<BTreeMap<String, String>> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", proc.as_raw_fd()));
    Ok(memberships_of(&path)?.into_iter().collect())
}
