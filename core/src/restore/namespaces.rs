//! Namespaces of the image. The root task is cloned into its own; those that only tasks below it are in it makes one after the
//! other, and keeps a descriptor of each, by which their tasks enter them when they are born.

use super::{
    error::{RestoreError, Result},
    host::RestoreHost,
    sys,
    world::{Plans, World},
};
use crate::{
    image::{
        Image,
        records::{NamespaceObject, PathRef, Task},
    },
    plugins::{CallContext, NamespaceKind, PluginError},
    proc::ProcDir,
};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sched::{CloneFlags, setns, unshare},
    sys::stat::Mode,
};
use std::{
    collections::BTreeMap,
    os::fd::{AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
};

/// Types that a process cannot leave again, or that only its children are in.
const ONE_WAY: u64 = (libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_NEWTIME) as u64;

/// Namespaces of the image, each after those that its kind comes after.
pub fn ordered(plans: &Plans) -> Vec<(&'static NamespaceObject, Option<&NamespaceKind>)> {
    let mut rest: Vec<&'static NamespaceObject> = plans.image.namespaces.values().collect();
    let kind =
        |namespace: &NamespaceObject| plans.registry.namespace_kind(&namespace.plugin, &namespace.kind);
    let mut order = Vec::with_capacity(rest.len());
    while !rest.is_empty() {
        let ready = rest.iter().position(|namespace| {
            let after = kind(namespace).map_or(&[][..], |kind| &kind.declaration.after[..]);
            !rest.iter().any(|other| after.iter().any(|name| name.as_str() == other.kind))
        });
        // A cycle of kinds is broken at the first: the order is only a wish of their authors.
        let namespace = rest.remove(ready.unwrap_or(0));
        order.push((namespace, kind(namespace)));
    }
    order
}

/// Whether the root task is in a namespace, so that it is cloned into it.
pub fn is_of_root(image: &Image, namespace: &NamespaceObject) -> bool {
    let root = image.tasks.iter().find(|task| task.ppid == 0);
    root.is_some_and(|root| number(root, &namespace.kind) == namespace.id)
}

/// The number of a task's namespace of a type; 0: that of stasis.
fn number(task: &Task, kind: &str) -> u32 {
    task.namespaces.iter().find(|namespace| namespace.kind == kind).map_or(0, |namespace| namespace.id)
}

fn others(image: &Image) -> impl Iterator<Item = &NamespaceObject> {
    image.namespaces.values().filter(|namespace| !is_of_root(image, namespace))
}

/// Descriptors of our own that [`Spaces`] need at most: of each namespace and of that of the root task, and of their roots.
pub fn count(image: &Image) -> i32 {
    i32::try_from(others(image).count() * 4).unwrap_or(i32::MAX / 2)
}

/// Namespaces that tasks enter.
#[derive(Debug, Default)]
pub struct Spaces {
    /// By type and number, those of the root task among them.
    entries: BTreeMap<(&'static str, u32), (RawFd, CloneFlags)>,
    /// Root directories of mount namespaces; 0: that of the root task.
    roots: BTreeMap<u32, RawFd>,
}

impl Spaces {
    /// In the root task, which is in its own namespaces: makes the others. `proc` is its /proc directory.
    pub fn make(world: &World, proc: &ProcDir) -> Result<Self> {
        let plans = &world.plans;
        let mut this = Self::default();
        for (namespace, kind) in ordered(plans).into_iter().filter(|(n, _)| !is_of_root(plans.image, n)) {
            let unsupported = |what: String| RestoreError::Machine { what };
            if namespace.clone_flag & ONE_WAY != 0 {
                let what = format!("a {} namespace of a part of the tree cannot be made yet", namespace.kind);
                return Err(unsupported(what));
            }
            let name = namespace.kind.as_str();
            let flag = CloneFlags::from_bits_retain(namespace.clone_flag as i32);
            let failed = |what: &str| {
                let operation = format!("{what} a {name} namespace");
                move |errno: Errno| RestoreError::system(operation)(errno.into())
            };
            let of_root = this.keep(world, namespace, proc, flag, true)?;
            unshare(flag).map_err(failed("make"))?;
            hook(world, namespace, kind, |context, kind| context.enter_namespace(kind, &namespace.record))?;
            this.keep(world, namespace, proc, flag, false)?;
            // SAFETY: kept open as long as this program runs in the task.
            let of_root = unsafe { BorrowedFd::borrow_raw(of_root) };
            setns(of_root, flag).map_err(failed("leave"))?;
        }
        Ok(this)
    }

    /// Keeps a descriptor of the present namespace, and of its root directory if it has one.
    fn keep(
        &mut self,
        world: &World,
        namespace: &'static NamespaceObject,
        proc: &ProcDir,
        flag: CloneFlags,
        of_root: bool,
    ) -> Result<RawFd> {
        let kind = namespace.kind.as_str();
        let root = world.plans.image.tasks.iter().find(|task| task.ppid == 0);
        let id = if of_root { root.map_or(0, |root| number(root, kind)) } else { namespace.id };
        if let Some(&(known, _)) = self.entries.get(&(kind, id)) {
            return Ok(known);
        }
        let failed = |errno: Errno| RestoreError::system(format!("open a {kind} namespace"))(errno.into());
        let move_up = |fd: OwnedFd| {
            let moved = sys::duplicate_above(fd.as_raw_fd(), world.plans.descriptors.service.first);
            moved
                .map(IntoRawFd::into_raw_fd)
                .map_err(RestoreError::system("move a descriptor out of the way"))
        };
        let file = proc.open_file(&format!("ns/{kind}"), OFlag::O_RDONLY);
        let file = file.map_err(|error| RestoreError::Machine { what: error.to_string() })?;
        let fd = move_up(file.into())?;
        self.entries.insert((kind, id), (fd, flag));
        if flag.contains(CloneFlags::CLONE_NEWNS) {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let directory = open("/", flags, Mode::empty()).map_err(failed)?;
            self.roots.insert(if of_root { 0 } else { id }, move_up(directory)?);
        }
        Ok(fd)
    }

    /// All descriptors.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.entries.values().map(|(fd, _)| *fd).chain(self.roots.values().copied())
    }

    /// In a new process: enters what its creator is not in.
    pub fn enter(&self, plans: &Plans, node: usize) -> nix::Result<()> {
        let creator = plans.tree.nodes[node].creator;
        for (&(kind, id), &(fd, flag)) in &self.entries {
            let there = creator.map_or(0, |creator| of_node(plans, creator, kind));
            if creator.is_some() && id == of_node(plans, node, kind) && id != there {
                // SAFETY: kept open as long as this program runs in the task.
                setns(unsafe { BorrowedFd::borrow_raw(fd) }, flag)?;
            }
        }
        Ok(())
    }

    /// The mount namespace of a node, by the number that paths have; 0: that of the root task.
    pub fn mounts_of(&self, plans: &Plans, node: usize) -> u32 {
        let kinds = self.entries.iter().find(|(_, (_, flag))| flag.contains(CloneFlags::CLONE_NEWNS));
        let Some((&(kind, _), _)) = kinds else { return 0 };
        let id = of_node(plans, node, kind);
        if id == of_node(plans, 0, kind) { 0 } else { id }
    }

    /// A path of the mount namespace `space`, for a process that is in `here`; none if there is no such namespace.
    pub fn place(&self, space: u32, path: &Path, here: u32) -> Option<PathBuf> {
        if space == here {
            return Some(path.to_owned());
        }
        let mut place = PathBuf::from(format!("/proc/self/fd/{}", self.roots.get(&space)?)).into_os_string();
        place.push(path);
        Some(place.into())
    }
}

/// Where a path of the image is, for a process in mount namespace `here`.
pub fn place(spaces: Option<&Spaces>, path: &PathRef, here: u32) -> Option<PathBuf> {
    let name = super::paths::name(path);
    match spaces {
        None => (path.space == 0).then(|| name.to_owned()),
        Some(spaces) => spaces.place(path.space, name, here),
    }
}

/// The number of a node's namespace: helpers and zombies stay where they are born.
fn of_node(plans: &Plans, node: usize, kind: &str) -> u32 {
    let mut up = Some(node);
    while let Some(at) = up {
        match plans.task(at) {
            Some(task) => return number(task, kind),
            None => up = plans.tree.nodes.get(at).and_then(|node| node.creator),
        }
    }
    0
}

fn hook(
    world: &World,
    namespace: &'static NamespaceObject,
    kind: Option<&NamespaceKind>,
    call: impl FnOnce(&CallContext<'_, RestoreHost<'_>>, &NamespaceKind) -> std::result::Result<(), PluginError>,
) -> Result<()> {
    let pid = world.plans.tree.nodes[0].pid;
    let Some(kind) = kind else {
        let what = format!("plugin {} knows no {} namespaces", namespace.plugin, namespace.kind);
        return Err(RestoreError::Machine { what });
    };
    let (plans, world_of, plugin) = (&world.plans, Some(world), namespace.plugin.as_str());
    let host = RestoreHost { plans, world: world_of, plugin, node: 0, pid, outside: None, guardian: None };
    let resource = format!("{} namespace", namespace.kind);
    let context =
        CallContext { watch: world.watch, host: &host, task: pid, task_name: "", resource: &resource };
    Ok(call(&context, kind)?)
}

/// The root task's own namespaces.
fn of_root(world: &World) -> impl Iterator<Item = (&'static NamespaceObject, Option<&NamespaceKind>)> {
    ordered(&world.plans).into_iter().filter(|(namespace, _)| is_of_root(world.plans.image, namespace))
}

/// In the root task: sets its own namespaces up.
pub fn enter(world: &World) -> Result<()> {
    of_root(world).try_for_each(|(namespace, kind)| {
        hook(world, namespace, kind, |context, kind| context.enter_namespace(kind, &namespace.record))
    })
}

/// When all descriptors are settled.
pub fn finish(world: &World) -> Result<()> {
    of_root(world).try_for_each(|(namespace, kind)| {
        hook(world, namespace, kind, |context, kind| context.finish_namespace(kind, &namespace.record))
    })
}
