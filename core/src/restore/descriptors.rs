//! Descriptors of a task: create, pull from the creators, link, settle; then flags, positions and owners.

use super::{
    descriptor_plan::{Item, Phase, name},
    error::{RestoreError, Result},
    host::{RestoreHost, object_info},
    locks, paths, sys,
    world::{World, task_name},
};
use crate::{
    image::records::{Actor, FileLock, Handle, LockKind, Object, PathRef},
    plugins::{CallContext, DescriptorKind, PluginError},
};
use stasis_plugin_api::ObjectInfo;
use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd},
    sync::atomic::{AtomicU32, Ordering},
};

/// Flags that fcntl(2) can set later.
const SETTABLE: i32 = libc::O_APPEND | libc::O_ASYNC | libc::O_DIRECT | libc::O_NOATIME | libc::O_NONBLOCK;
/// Flags that would make or cut the file again; `__O_TMPFILE` is O_TMPFILE without O_DIRECTORY.
const CREATING: i32 =
    libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | (libc::O_TMPFILE & !libc::O_DIRECTORY) | libc::O_ASYNC;

/// Commands of fcntl(2) that the libc crate lacks (asm-generic/fcntl.h).
const F_SETSIG: i32 = 10;
const F_SETOWN_EX: i32 = 15;

/// Descriptors of the calling task.
pub struct TaskDescriptors<'a> {
    world: &'a World,
    node: usize,
    pid: i32,
    name: String,
    /// Numbers of each handle that this task holds.
    numbers: BTreeMap<u32, Vec<(i32, bool)>>,
    parked: Vec<i32>,
    /// The node that fills the table, if it is shared (CLONE_FILES).
    filler: Option<usize>,
}

/// While this lives, nobody else puts descriptors into a table that is shared.
struct Turn(&'static AtomicU32);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.store(0, Ordering::Release);
    }
}

impl<'a> TaskDescriptors<'a> {
    /// For the task or stand-in of a node.
    pub fn new(world: &'a World, node: usize) -> Self {
        let task = world.plans.task(node);
        let mut numbers: BTreeMap<u32, Vec<(i32, bool)>> = BTreeMap::new();
        let table = task.and_then(|task| world.plans.image.tables.get(&task.files));
        for descriptor in table.map_or(&[][..], |table| &table.descriptors) {
            numbers
                .entry(descriptor.handle)
                .or_default()
                .push((descriptor.number as i32, descriptor.cloexec));
        }
        let pid = world.plans.tree.nodes[node].pid;
        let filler = world.plans.descriptors.sharers.get(&node).copied();
        let name = task.map(task_name).unwrap_or_default();
        Self { world, node, pid, name, numbers, parked: Vec::new(), filler }
    }

    /// Whether another task puts the descriptors of this one at their numbers.
    fn is_filled_by_another(&self) -> bool {
        self.filler.is_some_and(|filler| filler != self.node)
    }

    /// In a shared table a number that one task has for the moment must not be one that another fills.
    fn turn(&self) -> Result<Option<Turn>> {
        let Some(slot) = self.filler.and_then(|filler| self.world.shared.slot(filler)) else {
            return Ok(None);
        };
        while slot.table.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
            self.world.shared.check()?;
            std::thread::yield_now();
        }
        Ok(Some(Turn(&slot.table)))
    }

    fn failed(&self, operation: impl Into<String>) -> impl FnOnce(io::Error) -> RestoreError {
        let (pid, name, operation) = (self.pid, self.name.clone(), operation.into());
        move |source| RestoreError::Task { pid, name, operation, source }
    }

    /// Creates what the session leader must create before it forks.
    pub fn create_early(&mut self) -> Result<()> {
        self.create(|creation| creation.early)
    }

    /// Creates what belongs to one level.
    pub fn create_level(&mut self, level: usize) -> Result<()> {
        self.create(|creation| !creation.early && creation.level == level)
    }

    fn create(&mut self, wanted: impl Fn(&super::descriptor_plan::Creation) -> bool) -> Result<()> {
        let world = self.world;
        for creation in &world.plans.descriptors.creations {
            if creation.node != self.node || !wanted(creation) {
                continue;
            }
            let _turn = self.turn()?;
            match creation.item {
                Item::File(id) => self.create_file(id)?,
                Item::Object(id) => self.create_object(id, creation.early)?,
            }
        }
        Ok(())
    }

    fn create_file(&mut self, id: u32) -> Result<()> {
        let Some(handle) = self.world.plans.image.handles.get(&id) else { return Ok(()) };
        if !handle.external.is_empty() {
            // That it is there was checked before.
            let Some(&number) = self.world.plans.inherited.get(&handle.external) else { return Ok(()) };
            let fd = sys::duplicate_above(number, 0);
            let fd = fd.map_err(self.failed(format!("duplicate the descriptor for {}", handle.external)))?;
            return self.place(vec![(id, fd)], false);
        }
        let path = handle.path.clone().unwrap_or_default();
        let fd = self.open(handle, &path)?;
        if handle.position != 0 {
            let seek = nix::unistd::lseek(&fd, handle.position as i64, nix::unistd::Whence::SeekSet);
            seek.map_err(|errno| {
                self.failed(format!("set the position of {}", paths::name(&path).display()))(errno.into())
            })?;
        }
        self.place(vec![(id, fd)], false)
    }

    fn open(&self, handle: &Handle, path: &PathRef) -> Result<OwnedFd> {
        let flags = handle.status_flags as i32 & !CREATING | libc::O_CLOEXEC | libc::O_NOCTTY;
        self.world.paths(self.node).open(path, flags).map_err(self.failed(format!(
            "open {} for descriptor {}",
            paths::name(path).display(),
            handle.first_fd
        )))
    }

    fn create_object(&mut self, id: u32, early: bool) -> Result<()> {
        let Some((object, kind, info)) = self.find(id)? else { return Ok(()) };
        let further = object.auxiliaries;
        let create =
            |context: &CallContext<'_, RestoreHost<'_>>| context.create(kind, &info, further, &object.record);
        let mut fds = self.call(object, object.create_as, create)?;
        let auxiliaries = fds.split_off(info.handles.len());
        if let Some(first) = info.handles.first() {
            for (index, fd) in (0..).zip(auxiliaries) {
                let number = self.move_up(fd)?.into_raw_fd();
                self.parked.push(number);
                self.world.locations.set_auxiliary(first.id, index, number);
            }
        }
        let ids = info.handles.iter().map(|handle| handle.id);
        self.place(ids.zip(fds).collect(), early)
    }

    fn find(&self, id: u32) -> Result<Option<(&'a Object, &'a DescriptorKind, ObjectInfo)>> {
        let plans = &self.world.plans;
        let (Some(object), Some(info)) = (plans.image.objects.get(&id), object_info(plans, id)) else {
            return Ok(None);
        };
        match plans.registry.descriptor_kind(&object.plugin, &object.kind) {
            Some(kind) => Ok(Some((object, kind, info))),
            None => Err(RestoreError::Machine {
                what: format!("plugin {} knows no {} ({})", object.plugin, object.kind, name(object)),
            }),
        }
    }

    fn call<T>(
        &self,
        object: &Object,
        actor: Option<Actor>,
        hook: impl FnOnce(&CallContext<'_, RestoreHost<'_>>) -> std::result::Result<T, PluginError>,
    ) -> Result<T> {
        let plans = &self.world.plans;
        let host = RestoreHost {
            plans,
            world: Some(self.world),
            plugin: &object.plugin,
            node: self.node,
            pid: self.pid,
            outside: None,
            guardian: None,
        };
        let context = CallContext {
            watch: self.world.watch,
            host: &host,
            task: self.pid,
            task_name: &self.name,
            resource: &name(object),
        };
        let ids = actor.filter(|actor| actor.has_ids).map(|actor| (actor.uid, actor.gid));
        let Some((uid, gid)) = ids else { return Ok(hook(&context)?) };
        self.become_effective(uid, gid)?;
        let result = hook(&context);
        self.become_effective_root()?;
        Ok(result?)
    }

    /// Group first: afterwards there is no privilege for it.
    fn become_effective(&self, uid: u32, gid: u32) -> Result<()> {
        let set = nix::unistd::setegid(gid.into()).and_then(|()| nix::unistd::seteuid(uid.into()));
        set.map_err(|errno| self.failed(format!("take on uid {uid} and gid {gid}"))(errno.into()))
    }

    fn become_effective_root(&self) -> Result<()> {
        let set = nix::unistd::seteuid(0.into()).and_then(|()| nix::unistd::setegid(0.into()));
        set.map_err(|errno| self.failed("become root again")(errno.into()))
    }

    /// Puts created handles at their final numbers, or parks them, and says where they are.
    fn place(&mut self, fds: Vec<(u32, OwnedFd)>, early: bool) -> Result<()> {
        let several = fds.len() > 1;
        let mut up = Vec::with_capacity(fds.len());
        for (id, fd) in fds {
            let home =
                self.numbers.get(&id).is_some_and(|n| n.iter().any(|(number, _)| *number == fd.as_raw_fd()));
            let park = early || self.is_filled_by_another() || !self.numbers.contains_key(&id);
            // Among several, one may sit where another belongs.
            if park || several && !home {
                up.push((id, self.move_up(fd)?, park))
            } else {
                up.push((id, fd, false))
            }
        }
        for (id, fd, park) in up {
            let at = if park {
                let number = fd.into_raw_fd();
                self.parked.push(number);
                number
            } else {
                self.settle_numbers(id, fd)?
            };
            self.world.locations.set(id, at);
        }
        Ok(())
    }

    fn move_up(&self, fd: OwnedFd) -> Result<OwnedFd> {
        let moved = sys::duplicate_above(fd.as_raw_fd(), self.world.parking);
        let moved = moved.map_err(self.failed("move a descriptor out of the way"))?;
        if moved.as_raw_fd() < self.world.plans.descriptors.service.end {
            return Ok(moved);
        }
        Err(self.failed("find a free descriptor number")(nix::errno::Errno::EMFILE.into()))
    }

    /// Duplicates `fd` to all numbers of a handle and gives one of them.
    fn settle_numbers(&self, id: u32, fd: OwnedFd) -> Result<i32> {
        let numbers = self.numbers.get(&id).map_or(&[][..], Vec::as_slice);
        let from = fd.into_raw_fd();
        let mut stays = false;
        for &(number, cloexec) in numbers {
            let set = if number == from {
                stays = true;
                let flags = if cloexec { libc::FD_CLOEXEC } else { 0 };
                sys::fcntl(from, libc::F_SETFD, flags.into()).map(drop)
            } else {
                sys::duplicate_to(from, number, cloexec)
            };
            set.map_err(self.failed(format!("put a descriptor at number {number}")))?;
        }
        if !stays {
            sys::close(from);
        }
        Ok(numbers.first().map_or(from, |(number, _)| *number))
    }

    /// Takes duplicates of all handles that other tasks created, and of our own early ones.
    pub fn pull(&mut self) -> Result<()> {
        if self.is_filled_by_another() {
            return Ok(());
        }
        let descriptors = &self.world.plans.descriptors;
        let mut creators: BTreeMap<usize, OwnedFd> = BTreeMap::new();
        for &id in self.numbers.keys() {
            let Some(&creator) = descriptors.creator.get(&id) else { continue };
            let Some(number) = self.world.locations.get(id) else { continue };
            let fd = if creator == self.node {
                if !self.parked.contains(&number) {
                    continue;
                }
                sys::duplicate_above(number, 0).map_err(self.failed("duplicate a descriptor"))?
            } else {
                let pid = self.world.plans.tree.nodes[creator].pid;
                let pidfd = match creators.entry(creator) {
                    std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
                    std::collections::btree_map::Entry::Vacant(entry) => {
                        let pidfd = sys::pidfd_open(pid).map_err(self.failed(format!("open task {pid}")))?;
                        entry.insert(self.move_up(pidfd)?)
                    }
                };
                sys::pidfd_getfd(pidfd.as_fd(), number)
                    .map_err(self.failed(format!("take descriptor {number} of task {pid}")))?
            };
            self.settle_numbers(id, fd)?;
        }
        Ok(())
    }

    /// Link phase of the objects for which this task is the actor.
    pub fn link(&self) -> Result<()> {
        self.phase(
            &self.world.plans.descriptors.link,
            |object| object.link_as,
            |context, kind, info, record| context.link(kind, info, record),
        )
    }

    /// Settle phase.
    pub fn settle(&self) -> Result<()> {
        self.phase(
            &self.world.plans.descriptors.settle,
            |object| object.settle_as,
            |context, kind, info, record| context.settle(kind, info, record),
        )
    }

    fn phase(
        &self,
        phases: &[Phase],
        actor: impl Fn(&Object) -> Option<Actor>,
        hook: impl Fn(
            &CallContext<'_, RestoreHost<'_>>,
            &DescriptorKind,
            &ObjectInfo,
            &[u8],
        ) -> std::result::Result<(), PluginError>,
    ) -> Result<()> {
        for phase in phases.iter().filter(|phase| phase.node == self.node) {
            let Some((object, kind, info)) = self.find(phase.object)? else { continue };
            self.call(object, actor(object), |context| hook(context, kind, &info, &object.record))?;
        }
        Ok(())
    }

    /// Flags, position, owner and signal of what this task created; then parked descriptors go.
    pub fn finish(&mut self) -> Result<()> {
        let plans = &self.world.plans;
        for creation in plans.descriptors.creations.iter().filter(|creation| creation.node == self.node) {
            match creation.item {
                Item::File(id) => self.finish_handle(id)?,
                Item::Object(id) => {
                    let handles = plans.image.objects.get(&id).map_or(&[][..], |object| &object.handles);
                    handles.iter().try_for_each(|&handle| self.finish_handle(handle))?;
                }
            }
        }
        self.parked.drain(..).for_each(sys::close);
        Ok(())
    }

    fn finish_handle(&self, id: u32) -> Result<()> {
        let (Some(handle), Some(fd)) =
            (self.world.plans.image.handles.get(&id), self.world.locations.get(id))
        else {
            return Ok(());
        };
        // What is outside is as its owner wants it.
        if handle.status_flags as i32 & libc::O_PATH != 0 || !handle.external.is_empty() {
            return Ok(());
        }
        handle
            .locks
            .iter()
            .filter(|lock| !locks::is_late(lock))
            .try_for_each(|lock| self.lock(handle, lock, fd))?;
        let what =
            |what: &str| format!("set {what} of descriptor {} of task {}", handle.first_fd, handle.first_pid);
        if handle.object != 0 && handle.position != 0 {
            // SAFETY: an integer argument. ESPIPE: a kind that has no position but shows one.
            unsafe { libc::lseek(fd, handle.position as i64, libc::SEEK_SET) };
        }
        if let Some(owner) = &handle.owner {
            self.set_owner(fd, owner).map_err(self.failed(what("the owner")))?;
        }
        if handle.signal != 0 {
            sys::fcntl(fd, F_SETSIG, handle.signal.into()).map_err(self.failed(what("the signal")))?;
        }
        let wanted = handle.status_flags as i32 & SETTABLE;
        let present = sys::fcntl(fd, libc::F_GETFL, 0).map_err(self.failed(what("the flags")))? & SETTABLE;
        if wanted != present {
            sys::fcntl(fd, libc::F_SETFL, wanted.into()).map_err(self.failed(what("the flags")))?;
        }
        Ok(())
    }

    /// POSIX locks of this task, and leases on what it created.
    pub fn late_locks(&self, pid: i32) -> Result<()> {
        let plans = &self.world.plans;
        for handle in plans.image.handles.values() {
            for lock in handle.locks.iter().filter(|lock| locks::is_late(lock)) {
                let number = if lock.kind() == LockKind::Posix {
                    let numbers = self.numbers.get(&handle.id).filter(|_| lock.pid == pid);
                    numbers.and_then(|numbers| numbers.first()).map(|(number, _)| *number)
                } else {
                    let own = plans.descriptors.creator.get(&handle.id) == Some(&self.node);
                    self.world.locations.get(handle.id).filter(|_| own)
                };
                if let Some(number) = number {
                    self.lock(handle, lock, number)?;
                }
            }
        }
        Ok(())
    }

    fn lock(&self, handle: &Handle, lock: &FileLock, fd: i32) -> Result<()> {
        let name =
            handle.path.as_ref().map_or_else(String::new, |path| paths::name(path).display().to_string());
        locks::take(fd, lock).map_err(self.failed(format!(
            "take the {} on descriptor {} {name} (another process may have it)",
            locks::describe(lock),
            handle.first_fd
        )))
    }

    /// The kernel keeps the ids of the caller for the permission to signal (f_setown in fs/fcntl.c).
    fn set_owner(&self, fd: i32, owner: &crate::image::records::Owner) -> io::Result<()> {
        #[repr(C)]
        struct OwnerEx {
            kind: i32,
            pid: i32,
        }
        let argument = OwnerEx { kind: owner.kind, pid: owner.id };
        let all = u32::MAX;
        let set = |uid: u32, euid: u32| {
            // SAFETY: three integers.
            nix::errno::Errno::result(unsafe { libc::setresuid(uid, euid, all) }).map(drop)
        };
        let differs = owner.uid != 0 || owner.euid != 0;
        if differs {
            set(owner.uid, owner.euid)?;
        }
        // SAFETY: the structure outlives the call.
        let result = nix::errno::Errno::result(unsafe { libc::fcntl(fd, F_SETOWN_EX, &raw const argument) });
        if differs {
            set(0, 0)?;
            // Lost with the ids; without it files below /proc/self belong to a stranger.
            sys::prctl(libc::PR_SET_DUMPABLE, 1)?;
        }
        result?;
        Ok(())
    }
}
