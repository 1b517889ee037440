//! From a record to live mount namespaces, each a changed copy of stasis's own.
//!
//! All mounts are made first, detached; then each namespace is put together, and at the end come the groups in which mounts tell
//! each other of changes. A root that stasis's namespace does not have is attached over its root, and becomes the root.

use crate::{
    MountNamespace,
    compare::compare,
    external::{self, External},
    inside::{OwnProc, Space},
    kernel::{attach, clone_mount, clone_path, mount_id, open_place, open_within, set_flags},
    make::{self, Source},
    mountinfo::{self, Line, below},
    propagation::{self, Outside},
    record::stasis::ns_mnt::v1::{Class, Mount},
    removed,
};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
    unistd::{chdir, fchdir, pivot_root},
};
use stasis_plugin_api::{HookError, Host, Result};
use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    os::fd::{AsFd, OwnedFd},
    sync::{Mutex, PoisonError},
};

const NONE: Option<&str> = None;

/// Namespaces that are made, in the order in which they will be entered.
static WAITING: Mutex<VecDeque<OwnedFd>> = Mutex::new(VecDeque::new());

/// Enters a namespace. The record of the first one has the mounts of all: all are made then, and the others wait.
pub(crate) fn enter(host: &Host<'_>, record: &MountNamespace) -> Result<()> {
    let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    if !record.mounts.is_empty() {
        let build = || Builder::new(host, record)?.build();
        // Names that exist for a moment must not be left behind.
        let brief = record.mounts.iter().any(|mount| mount.removed != 0);
        *waiting = if brief { host.hold(build) } else { build() }?;
    }
    match waiting.pop_front() {
        Some(namespace) => enter_namespace(&namespace),
        None => Err(HookError::invalid("a mount namespace without mounts")),
    }
}

fn enter_namespace(namespace: &OwnedFd) -> Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWNS)
        .map_err(|errno| HookError::failed("entering a mount namespace", errno))
}

fn own_namespace() -> Result<OwnedFd> {
    let path = "/proc/self/ns/mnt";
    let opened = File::open(path).map_err(|error| HookError::failed(format!("opening {path}"), error));
    Ok(opened?.into())
}

struct Builder<'a, 'h> {
    host: &'a Host<'h>,
    record: &'a MountNamespace,
    proc: OwnProc,
    /// The present root of every namespace of the record, and everything else that is taken from the host.
    sources: Vec<Option<OwnedFd>>,
    outside: Outside,
    /// Mounts that are made.
    trees: Vec<Option<OwnedFd>>,
    /// Where each is to be attached, if that can be told before others are.
    places: Vec<Option<OwnedFd>>,
    attached: Vec<bool>,
    /// Copies of what stasis's namespace has and others cover, by the mounts that show it, too.
    covered: BTreeMap<usize, OwnedFd>,
    /// Names of what was removed, until everything is attached.
    names: Vec<removed::Name>,
}

impl<'a, 'h> Builder<'a, 'h> {
    fn new(host: &'a Host<'h>, record: &'a MountNamespace) -> Result<Self> {
        let mounts = &record.mounts;
        check(mounts)?;
        let count = mounts.len();
        let (external, root) = (External::of(host), external::root(host));
        // First of all: what follows takes away the way to them, and their groups.
        let (mut sources, mut outside) = (Vec::with_capacity(count), Outside::new());
        for (index, mount) in mounts.iter().enumerate() {
            let path = match mount.class() {
                Class::External | Class::Contents | Class::Named if index == 0 && root.is_some() => {
                    root.clone()
                }
                Class::External => Some(make::host_path(mount)?),
                Class::Named => Some(make::named_source(mount, &external)?),
                _ => None,
            };
            let copy = |path: &String| match mount.removed {
                0 => clone_path(path),
                // The directory above, in which it is made for a moment.
                _ => clone_path(path.rsplit_once('/').map_or("/", |(parent, _)| parent)),
            };
            sources.push(path.as_ref().map(copy).transpose()?);
            let groups = [(mount.group, mount.group_outside), (mount.master, mount.master_outside)];
            for (group, _) in groups.into_iter().filter(|(group, outside)| *outside && *group != 0) {
                let place = path.as_deref().unwrap_or(&mount.mountpoint);
                outside.insert(group, clone_path(place)?);
            }
        }
        let proc = OwnProc::open("/proc/self")?;
        let none = || (0..count).map(|_| None).collect::<Vec<Option<OwnedFd>>>();
        let (trees, places, attached, names) = (none(), none(), vec![false; count], Vec::new());
        Ok(Self {
            host,
            record,
            proc,
            sources,
            outside,
            trees,
            places,
            attached,
            covered: BTreeMap::new(),
            names,
        })
    }

    /// Makes all namespaces; gives them in their order.
    fn build(mut self) -> Result<VecDeque<OwnedFd>> {
        // From here on nothing propagates back to the namespace that this is a copy of.
        mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
            .map_err(|errno| HookError::failed("making the copied mounts private", errno))?;
        self.make_early()?;
        let mounts = &self.record.mounts;
        let count = mounts.iter().map(|mount| mount.namespace + 1).max().unwrap_or_default();
        let original = own_namespace()?;
        let mut made = VecDeque::new();
        for number in 0..count {
            if number > 0 {
                enter_namespace(&original)?;
            }
            if count > 1 {
                unshare(CloneFlags::CLONE_NEWNS)
                    .map_err(|errno| HookError::failed("making a mount namespace", errno))?;
            }
            // While its file can be seen.
            made.push_back(own_namespace()?);
            self.put_together(number)?;
        }
        self.names.clear();
        let enter = |number: u32| match made.get(number as usize).filter(|_| made.len() > 1) {
            Some(namespace) => enter_namespace(namespace),
            None => Ok(()),
        };
        propagation::apply(mounts, &self.trees, &self.outside, &enter)?;
        for number in 0..count {
            enter(number)?;
            let of_this = mounts.iter().filter(|mount| mount.namespace == number);
            compare(&self.proc.mounts()?, &of_this.collect::<Vec<_>>(), self.moved_root())?;
        }
        Ok(made)
    }

    /// Whether the root is another directory than it was.
    fn moved_root(&self) -> bool {
        external::root(self.host).is_some()
    }

    fn source(&self, index: usize) -> Source<'_, 'h> {
        Source { host: self.host, id: self.record.id, index, given: self.sources[index].as_ref() }
    }

    /// What needs no other mount in place, and the places inside of it.
    fn make_early(&mut self) -> Result<()> {
        let mounts = &self.record.mounts;
        for (index, mount) in mounts.iter().enumerate().filter(|(_, mount)| make::is_early(mount)) {
            self.trees[index] = Some(match &self.sources[index] {
                Some(above) if mount.removed != 0 => {
                    let (_, name) = mount.host_path.rsplit_once('/').unwrap_or_default();
                    let (tree, name) = removed::make(mount, &self.source(index), above, name)?;
                    self.names.push(name);
                    tree
                }
                _ => make::make(mount, &self.source(index))?,
            });
        }
        let inside = |mount: &Mount| mount.class() == Class::Internal;
        for (index, mount) in mounts.iter().enumerate().filter(|(_, mount)| inside(mount)) {
            if self.trees[mount.of as usize].is_some() {
                self.trees[index] = Some(self.part(index)?);
            }
        }
        for (index, mount) in mounts.iter().enumerate() {
            let parent = usize::try_from(mount.parent).ok();
            if let Some(parent) = parent
                && let Some(tree) = &self.trees[parent]
            {
                let relative = below(&mount.mountpoint, &mounts[parent].mountpoint).unwrap_or_default();
                self.places[index] = Some(open_within(tree.as_fd(), relative).map_err(no_place(mount))?);
            }
        }
        Ok(())
    }

    /// A part of another mount.
    fn part(&mut self, index: usize) -> Result<OwnedFd> {
        let mount = &self.record.mounts[index];
        let of = &self.record.mounts[mount.of as usize];
        if let Some(copy) = self.covered.remove(&index) {
            make::prepare(mount, &copy)?;
            return Ok(copy);
        }
        let tree = self.trees[mount.of as usize].as_ref().ok_or_else(|| {
            HookError::invalid(format!(
                "{} shows a part of {}, which is hidden",
                mount.mountpoint, of.mountpoint
            ))
        })?;
        let what = || format!("{} as a part of {}", mount.mountpoint, of.mountpoint);
        let failed = |error: std::io::Error| HookError::failed(what(), error);
        if mount.removed != 0 {
            let (copied, name) = removed::make(mount, &self.source(index), tree, &mount.within)?;
            self.names.push(name);
            return Ok(copied);
        }
        let part = open_within(tree.as_fd(), &mount.within).map_err(failed)?;
        let copied = clone_mount(part.as_fd(), "").map_err(failed)?;
        make::prepare(mount, &copied)?;
        Ok(copied)
    }

    /// Puts the present namespace, a copy of stasis's own, into the shape of the recorded one.
    fn put_together(&mut self, number: u32) -> Result<()> {
        let mounts = &self.record.mounts;
        let of_this = |mount: &Mount| mount.namespace == number;
        let root = mounts.iter().position(|mount| of_this(mount) && mount.parent < 0);
        let root =
            root.ok_or_else(|| HookError::invalid("the image has a mount namespace without a root"))?;
        let pivots = mounts[root].class() != Class::Inherited;
        if pivots {
            self.pivot(root)?;
        } else {
            self.strip(number)?;
        }
        for (index, mount) in mounts.iter().enumerate().filter(|(_, mount)| of_this(mount)) {
            if self.attached[index] || index == root && pivots {
                continue;
            }
            if self.trees[index].is_none() {
                self.trees[index] = Some(match mount.class() {
                    Class::Internal => self.part(index)?,
                    _ => make::make(mount, &self.source(index))?,
                });
            }
            self.attach(index)?;
        }
        if pivots {
            // The old root, which lies over the new one.
            umount2(".", MntFlags::MNT_DETACH)
                .and_then(|()| chdir("/"))
                .map_err(|errno| HookError::failed("leaving the old root", errno))?;
        }
        Ok(())
    }

    fn attach(&mut self, index: usize) -> Result<()> {
        let mounts = &self.record.mounts;
        let mount = &mounts[index];
        let Some(tree) = &self.trees[index] else { return Ok(()) };
        let place = match self.places[index].take() {
            Some(place) => place,
            None => {
                let parent = usize::try_from(mount.parent).unwrap_or_default();
                let relative = below(&mount.mountpoint, &mounts[parent].mountpoint).unwrap_or_default();
                let above = self.trees[parent].as_ref().ok_or_else(|| {
                    HookError::invalid(format!("another mount hides the place of {}", mount.mountpoint))
                })?;
                open_within(above.as_fd(), relative).map_err(no_place(mount))?
            }
        };
        attach(tree, place.as_fd())
            .map_err(|error| HookError::failed(format!("mounting at {}", mount.mountpoint), error))?;
        self.attached[index] = true;
        Ok(())
    }

    /// Makes a mount the root; the old root stays over it until everything is in place.
    fn pivot(&mut self, root: usize) -> Result<()> {
        let mounts = &self.record.mounts;
        if self.trees[root].is_none() && mounts[root].class() == Class::Internal {
            self.trees[root] = Some(self.part(root)?);
        }
        let tree =
            self.trees[root].as_ref().ok_or_else(|| HookError::invalid("a root that cannot be made"))?;
        let place = open_place("/").map_err(|error| HookError::failed("opening the old root", error))?;
        attach(tree, place.as_fd()).map_err(|error| HookError::failed("mounting the new root", error))?;
        fchdir(tree)
            .and_then(|()| pivot_root(".", "."))
            .map_err(|errno| HookError::failed("making it the root", errno))?;
        self.attached[root] = true;
        Ok(())
    }

    /// Unmounts what the image lacks, and finds what is there already.
    fn strip(&mut self, number: u32) -> Result<()> {
        let mounts = &self.record.mounts;
        let current = self.proc.mounts()?;
        let mut kept: Vec<Option<u32>> = vec![None; mounts.len()];
        for (index, mount) in mounts.iter().enumerate() {
            if mount.namespace == number && mount.class() == Class::Inherited {
                kept[index] = Some(inherited(&current, mount, &kept)?);
            }
        }
        self.find_covered(&current, &kept)?;
        // Children come after their parents, so the topmost goes first.
        for line in current.iter().rev().filter(|line| !kept.contains(&Some(line.id))) {
            let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
            umount2(line.mountpoint.as_str(), flags).map_err(|errno| {
                let error = HookError::failed(format!("unmounting {}", line.label()), errno);
                match errno {
                    // CL_UNPRIVILEGED copies are locked (mount_namespaces(7)).
                    Errno::EINVAL => {
                        error.remedy("unmount it outside; in a user namespace it cannot be taken away")
                    }
                    _ => error,
                }
            })?;
        }
        for (index, mount) in mounts.iter().enumerate() {
            let Some(id) = kept[index] else { continue };
            self.attached[index] = true;
            // One that others cover stays as it is.
            let place = open_place(&mount.mountpoint).ok();
            let Some(place) = place.filter(|fd| mount_id(fd.as_fd()).is_ok_and(|there| there == id)) else {
                continue;
            };
            let flags = make::flags(mount)?;
            let differs = current.iter().any(|line| {
                line.id == id && mountinfo::flags(&line.options).is_ok_and(|present| present != flags)
            });
            if differs {
                set_flags(&place, flags).map_err(|error| {
                    HookError::failed(format!("setting {} of {}", mount.options, mount.mountpoint), error)
                })?;
            }
            self.trees[index] = Some(place);
        }
        Ok(())
    }
}

impl Builder<'_, '_> {
    /// Copies what is covered for each mount that shows it too. `kept` are the numbers of mounts that are there already.
    fn find_covered(&mut self, current: &[Line], kept: &[Option<u32>]) -> Result<()> {
        let mounts = &self.record.mounts;
        let hidden = |line: &&Line| {
            let place = open_place(&line.mountpoint).ok();
            place.is_none_or(|place| mount_id(place.as_fd()).map_or(true, |there| there != line.id))
        };
        let whole = |mount: &Mount| mount.class() == Class::Internal && mount.within.is_empty();
        for (index, mount) in mounts.iter().enumerate().filter(|(_, mount)| whole(mount)) {
            let of = kept.get(mount.of as usize).copied().flatten();
            let line = current.iter().find(|line| Some(line.id) == of).filter(hidden);
            let Some(line) = line.filter(|_| mount.removed == 0) else { continue };
            let path = "/proc/self";
            let opened = File::open(path);
            let proc = opened.map_err(|error| HookError::failed(format!("opening {path}"), error))?;
            // A copy for each: copies from another namespace cannot be copied again (may_copy_tree, fs/namespace.c).
            let copies = Space { proc, ino: 0 }.open_mounts(&[line])?;
            self.covered.extend(copies.into_values().map(|copy| (index, copy)));
        }
        Ok(())
    }
}

fn no_place(mount: &Mount) -> impl FnOnce(std::io::Error) -> HookError {
    let place = mount.mountpoint.clone();
    move |error| HookError::failed(format!("finding the place of mount {place}"), error)
}

/// Which of the present mounts is a recorded one; `kept` has those of its parents.
fn inherited(current: &[Line], mount: &Mount, kept: &[Option<u32>]) -> Result<u32> {
    let parent = usize::try_from(mount.parent).ok().map(|index| kept.get(index).copied().flatten());
    let same = current.iter().find(|line| {
        let place = match parent {
            None => !current.iter().any(|other| other.id == line.parent),
            Some(parent) => Some(line.parent) == parent && line.mountpoint == mount.mountpoint,
        };
        // What the root of a cgroup mount is called depends on the cgroup namespace of who asks, and this is another one.
        let root = line.root == mount.root || line.fstype.starts_with("cgroup");
        place && root && (&line.fstype, &line.source) == (&mount.fstype, &mount.source)
    });
    same.map(|line| line.id).ok_or_else(|| {
        let HostMount { source, fstype, mountpoint } = HostMount::of(mount);
        HookError::invalid(format!(
            "stasis's namespace has no mount of {source} ({fstype}) at {mountpoint} any more"
        ))
        .remedy("mount it again, or restore where it is mounted")
    })
}

struct HostMount<'a> {
    source: &'a str,
    fstype: &'a str,
    mountpoint: &'a str,
}

impl<'a> HostMount<'a> {
    fn of(mount: &'a Mount) -> Self {
        Self { source: &mount.source, fstype: &mount.fstype, mountpoint: &mount.mountpoint }
    }
}

/// Numbers of the image lead to mounts that are there.
fn check(mounts: &[Mount]) -> Result<()> {
    for (index, mount) in mounts.iter().enumerate() {
        let parent = usize::try_from(mount.parent).map_or(true, |parent| parent < index);
        let of = mount.class() != Class::Internal || (mount.of as usize) < mounts.len();
        if !parent || !of || mount.namespace as usize > index {
            return Err(HookError::invalid("the image has a mount of a mount that is not there"));
        }
    }
    Ok(())
}
