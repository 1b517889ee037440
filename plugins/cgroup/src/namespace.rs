//! Cgroup namespaces: cgroup_namespaces(7). One of the whole tree. The kernel takes the groups of whoever makes one for its root, so
//! the first task is put there and makes it anew.

use crate::{
    dump,
    record::stasis::cgroup::v1::{CgroupNamespace, Hierarchy},
    restore,
};
use nix::sched::{CloneFlags, unshare};
use stasis_plugin_api::{
    DumpedNamespace, HookError, Host, Namespace, NamespaceInfo, Result, TaskInfo, namespace,
};
use std::{collections::BTreeMap, fs, os::fd::AsRawFd};

/// A kind of namespace.
pub struct Cgroup;

impl Namespace for Cgroup {
    type Record = CgroupNamespace;
    const KIND: &'static str = "cgroup";
    const CLONE_FLAG: u64 = libc::CLONE_NEWCGROUP as u64;

    fn after(&self) -> Vec<&'static str> {
        vec!["user"]
    }

    fn dump(&self, host: &Host<'_>, namespace: &NamespaceInfo) -> Result<DumpedNamespace<CgroupNamespace>> {
        namespace::whole_tree(host, namespace)?;
        let roots = roots(host, &host.tasks())?.into_iter();
        let hierarchies = roots.map(|(controllers, root)| Hierarchy { controllers, root }).collect();
        Ok(DumpedNamespace { record: CgroupNamespace { hierarchies }, version: 1 })
    }

    fn prepare(&self, host: &Host<'_>, record: &CgroupNamespace, host_pid: i32) -> Result<()> {
        restore::place_at_roots(host, &record.hierarchies, host_pid)
    }

    fn enter(&self, _: &Host<'_>, _: &CgroupNamespace) -> Result<()> {
        unshare(CloneFlags::CLONE_NEWCGROUP)
            .map_err(|errno| HookError::failed("unshare(CLONE_NEWCGROUP)", errno))
    }
}

/// Where the root of the tree's cgroup namespace is in each hierarchy; nothing if the tree is in that of stasis.
pub fn roots(host: &Host<'_>, tasks: &[TaskInfo]) -> Result<BTreeMap<String, String>> {
    let Some(task) =
        tasks.iter().find(|task| task.ppid == 0 || !tasks.iter().any(|one| one.pid == task.ppid))
    else {
        return Ok(BTreeMap::new());
    };
    let proc = host.open_proc(task.pid)?;
    let link = |path: String| {
        fs::read_link(&path).map_err(|error| HookError::failed(format!("reading {path}"), error))
    };
    if link(format!("/proc/self/fd/{}/ns/cgroup", proc.as_raw_fd()))? == link("/proc/self/ns/cgroup".into())?
    {
        return Ok(BTreeMap::new());
    }
    let outside = dump::seen(&proc)?;
    let inside = namespace::within(&proc, "cgroup", || dump::seen(&proc))?;
    let root = |(controllers, path): (String, String)| {
        let below = inside.get(&controllers).map_or("", String::as_str);
        let root = root_of(&path, below).ok_or_else(|| {
            let what = format!("task {} ({}), cgroup {path}", task.pid, task.name);
            let why = format!("it is outside of the root of its cgroup namespace ({below})");
            HookError::unsupported(what, why, "move it below that root")
        })?;
        Ok((controllers, root))
    };
    outside.into_iter().map(root).collect()
}

/// The root of a namespace in which the group `path` is called `inside`.
fn root_of(path: &str, inside: &str) -> Option<String> {
    if inside.starts_with("/..") {
        return None;
    }
    let root = path.strip_suffix(inside.trim_end_matches('/'))?;
    Some(if root.is_empty() { "/".into() } else { root.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_of_namespaces() {
        for (path, inside, root) in [
            ("/lxc/a", "/", Some("/lxc/a")),
            ("/lxc/a/init", "/init", Some("/lxc/a")),
            ("/", "/", Some("/")),
            ("/a", "/a", Some("/")),
            ("/b", "/../b", None),
            ("/b", "/c", None),
        ] {
            assert_eq!(root_of(path, inside).as_deref(), root, "{path} {inside}");
        }
    }
}
