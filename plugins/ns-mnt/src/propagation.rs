//! Which mounts tell which others of changes (mount_namespaces(7), Documentation/filesystems/sharedsubtree.rst).
//!
//! A mount is in a peer group (`shared:N`), or receives from one (`master:N`), or both, or neither. Groups are made again
//! when all mounts are in place: the widest member becomes shared, and the others join it.

use crate::{
    kernel::{join_groups, set_propagation},
    mountinfo::{Line, below},
    plan::Scene,
    record::stasis::ns_mnt::v1::{Class, Mount},
};
use stasis_plugin_api::{HookError, Result};
use std::{collections::BTreeMap, os::fd::OwnedFd};

/// Notes groups and masters; refuses those that cannot be made again.
pub(crate) fn describe(scene: &Scene<'_>, mounts: &mut [Mount]) -> Result<()> {
    let has = |lines: &[Line], group: u32| lines.iter().any(|line| line.tag("shared") == Some(group));
    for (line, mount) in scene.theirs.iter().zip(&mut *mounts) {
        let refuse = |why: String, remedy: &str| Err(HookError::unsupported(line.label(), why, remedy));
        let of_host = matches!(mount.class(), Class::External | Class::Inherited | Class::Named);
        mount.unbindable = line.propagation.iter().any(|tag| tag == "unbindable");
        mount.group = line.tag("shared").unwrap_or_default();
        mount.master = line.tag("master").unwrap_or_default();
        mount.group_outside = mount.group != 0 && has(scene.ours, mount.group);
        mount.master_outside = mount.master != 0 && !has(scene.theirs, mount.master);
        if mount.group_outside && !(scene.external.sharing && of_host) {
            let why = format!("it exchanges its changes with mounts of the host (group {})", mount.group);
            return refuse(
                why,
                "--enable-external-sharing keeps that, or make it private: mount --make-private",
            );
        }
        if mount.master_outside && !has(scene.ours, mount.master) {
            let why =
                format!("it receives changes from group {}, which is of neither tree nor host", mount.master);
            return refuse(why, "make it private (mount --make-private) before the dump");
        }
        if mount.master_outside && !(scene.external.masters && of_host) {
            let why = format!("it receives changes from mounts of the host (group {})", mount.master);
            return refuse(
                why,
                "--enable-external-masters keeps that, or make it private: mount --make-private",
            );
        }
    }
    for (line, mount) in scene.theirs.iter().zip(&*mounts) {
        let needed = [(mount.group, mount.group_outside), (mount.master, mount.master_outside)];
        for (group, _) in needed.into_iter().filter(|(group, outside)| *group != 0 && !outside) {
            let wide = widest(mounts, group).is_some_and(|at| below(&mount.root, &mounts[at].root).is_some());
            if !wide {
                let why = format!("no mount of its group {group} shows all that the others show");
                return Err(HookError::unsupported(line.label(), why, "make it private before the dump"));
            }
        }
    }
    Ok(())
}

/// The member of a group that shows most.
fn widest(mounts: &[Mount], group: u32) -> Option<usize> {
    let members = mounts.iter().enumerate().filter(|(_, mount)| mount.group == group);
    members.min_by_key(|(_, mount)| mount.root.len()).map(|(at, _)| at)
}

/// Mounts of the host's groups, by which others join these.
pub(crate) type Outside = BTreeMap<u32, OwnedFd>;

/// Puts private mounts into their groups. `trees` are the mounts, in the order of `mounts`; `enter` goes to a namespace, since
/// only from there its mounts' propagation can be set.
pub(crate) fn apply(
    mounts: &[Mount],
    trees: &[Option<OwnedFd>],
    outside: &Outside,
    enter: &dyn Fn(u32) -> Result<()>,
) -> Result<()> {
    let mut state = State { mounts, trees, outside, enter, first: BTreeMap::new() };
    for index in 0..mounts.len() {
        state.join(index, 0)?;
    }
    for (index, _) in mounts.iter().enumerate().filter(|(_, mount)| mount.unbindable) {
        state.set(index, libc::MS_UNBINDABLE, "the propagation")?;
    }
    Ok(())
}

struct State<'a> {
    mounts: &'a [Mount],
    trees: &'a [Option<OwnedFd>],
    outside: &'a Outside,
    enter: &'a dyn Fn(u32) -> Result<()>,
    /// The member of each group by which others join.
    first: BTreeMap<u32, usize>,
}

impl State<'_> {
    fn tree(&self, index: usize) -> Result<&OwnedFd> {
        self.trees.get(index).and_then(Option::as_ref).ok_or_else(|| {
            let place = self.mounts.get(index).map_or("", |mount| mount.mountpoint.as_str());
            HookError::invalid(format!("another mount hides {place}, whose propagation is to be set"))
        })
    }

    fn failed(&self, index: usize, what: String) -> impl FnOnce(std::io::Error) -> HookError {
        let place = self.mounts[index].mountpoint.clone();
        move |error| HookError::failed(format!("{what} of {place}"), error)
    }

    fn set(&self, index: usize, propagation: u64, what: &str) -> Result<()> {
        (self.enter)(self.mounts[index].namespace)?;
        set_propagation(self.tree(index)?, propagation).map_err(self.failed(index, what.to_owned()))
    }

    /// Puts a mount into its groups, after those that they depend on. `depth` ends cycles of a hostile image.
    fn join(&mut self, index: usize, depth: usize) -> Result<()> {
        let mount = &self.mounts[index];
        if depth > self.mounts.len() {
            return Err(HookError::invalid("the image has a cycle of mounts that receive from each other"));
        }
        if mount.group_outside {
            let from = self.outside.get(&mount.group).ok_or_else(|| no_group(mount.group))?;
            let joined = join_groups(from, self.tree(index)?);
            return joined.map_err(self.failed(index, format!("the host's peer group {}", mount.group)));
        }
        if mount.group != 0 {
            let first = widest(self.mounts, mount.group).unwrap_or(index);
            if index != first || self.first.contains_key(&mount.group) {
                if !self.first.contains_key(&mount.group) {
                    self.join(first, depth + 1)?;
                }
                if index == first {
                    return Ok(());
                }
                let joined = join_groups(self.tree(first)?, self.tree(index)?);
                return joined.map_err(self.failed(index, format!("the peer group {}", mount.group)));
            }
            self.first.insert(mount.group, index);
        }
        if mount.master != 0 {
            self.receive(index, depth)?;
        }
        if mount.group != 0 {
            self.set(index, libc::MS_SHARED, "the sharing")?;
        }
        Ok(())
    }

    /// Makes a private mount a slave: first a peer, then one that only listens.
    fn receive(&mut self, index: usize, depth: usize) -> Result<()> {
        let mount = &self.mounts[index];
        let what = format!("the master group {}", mount.master);
        if mount.master_outside {
            let from = self.outside.get(&mount.master).ok_or_else(|| no_group(mount.master))?;
            join_groups(from, self.tree(index)?).map_err(self.failed(index, what.clone()))?;
        } else {
            let first = widest(self.mounts, mount.master).ok_or_else(|| no_group(mount.master))?;
            if !self.first.contains_key(&mount.master) {
                self.join(first, depth + 1)?;
            }
            join_groups(self.tree(first)?, self.tree(index)?).map_err(self.failed(index, what.clone()))?;
        }
        self.set(index, libc::MS_SLAVE, &what)
    }
}

fn no_group(group: u32) -> HookError {
    HookError::invalid(format!("the image has no mount of peer group {group}"))
}
