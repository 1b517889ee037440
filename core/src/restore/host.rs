//! The services that hooks get in a restored task (and, for a few, in the command).

use super::{
    pids, sys,
    world::{Plans, World, task_name},
};
use crate::{guardian::Guardian, image::records::Handle};
use stasis_plugin_api::{
    HandleInfo, HookError, ObjectInfo, SessionInfo, TaskInfo, UndoStep,
    abi::{AbiResult, HostAbi},
    abi_stable::std_types::{RErr, ROk, ROption, RSlice, RSliceMut, RStr, RString, RVec},
};
use std::{
    cell::RefCell,
    collections::BTreeMap,
    os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd},
};

/// The host for hooks of one plugin.
pub struct RestoreHost<'a> {
    /// Image, plugins, plans.
    pub plans: &'a Plans,
    /// What only tasks have; none in the command.
    pub world: Option<&'a World>,
    /// The plugin.
    pub plugin: &'a str,
    /// Node of the task in which the hook runs.
    pub node: usize,
    /// Pid of that task, or 0.
    pub pid: i32,
    /// In the command, once all is in place: the tasks, as they are from outside.
    pub outside: Option<&'a Outside>,
    /// In the command.
    pub guardian: Option<&'a RefCell<Guardian>>,
}

/// The restored tasks as the command sees them.
pub struct Outside {
    /// Their pids here, by those of the image.
    pids: BTreeMap<i32, i32>,
}

impl Outside {
    /// The tree whose root is `root`.
    pub fn new(plans: &Plans, root: i32) -> Self {
        let image = plans.image.tasks.iter().map(|task| (task.pid, task.pid));
        if !pids::has_namespace(plans) {
            return Self { pids: image.collect() };
        }
        let space = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let ours = space(root);
        let inner = |pid: i32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
            line.split_whitespace().next_back()?.parse().ok()
        };
        let numbers = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let members = pids.filter(|&pid| ours.is_some() && space(pid) == ours);
        Self { pids: members.filter_map(|pid| Some((inner(pid)?, pid))).collect() }
    }
}

impl Outside {
    /// While nobody but the root task exists.
    pub fn root_alone(plans: &Plans, host_pid: i32) -> Self {
        Self { pids: BTreeMap::from([(plans.tree.nodes[0].pid, host_pid)]) }
    }
}

fn refused<T>(what: &str) -> AbiResult<T> {
    RErr(HookError::invalid(format!("{what} is for dump only")))
}

/// A duplicate of handle `id`, or of one of its auxiliary descriptors, in the process of node `node`.
pub fn duplicate(world: &World, node: usize, id: u32, auxiliary: Option<u32>) -> Result<OwnedFd, HookError> {
    let failed = |error| HookError::failed(format!("getting handle {id}"), error);
    let plans = &world.plans;
    let creator = plans.descriptors.creator.get(&id).copied();
    let creator = creator.ok_or_else(|| HookError::invalid(format!("there is no handle {id}")))?;
    let location = match auxiliary {
        None => world.locations.get(id),
        Some(index) => world.locations.auxiliary(id, index),
    };
    let number = location.ok_or_else(|| {
        HookError::invalid(format!(
            "handle {id} is not created yet (name it in `after` to have it in `create`)"
        ))
    })?;
    if creator == node {
        return sys::duplicate_above(number, 0).map_err(failed);
    }
    let pidfd = sys::pidfd_open(plans.tree.nodes[creator].pid).map_err(failed)?;
    sys::pidfd_getfd(pidfd.as_fd(), number).map_err(failed)
}

impl RestoreHost<'_> {
    fn duplicate(&self, id: u32, auxiliary: Option<u32>) -> Result<OwnedFd, HookError> {
        match self.world {
            Some(world) => duplicate(world, self.node, id, auxiliary),
            None => self.duplicate_outside(id),
        }
    }

    /// In the command: from a task that holds it.
    fn duplicate_outside(&self, id: u32) -> Result<OwnedFd, HookError> {
        let failed = |error| HookError::failed(format!("getting handle {id}"), error);
        let none = || HookError::invalid(format!("no task holds handle {id}, or none yet"));
        let holder = self.plans.holders.get(&id).and_then(|holders| holders.first()).ok_or_else(none)?;
        let pid = self.outside.and_then(|outside| outside.pids.get(&holder.pid)).ok_or_else(none)?;
        let pidfd = sys::pidfd_open(*pid).map_err(failed)?;
        sys::pidfd_getfd(pidfd.as_fd(), holder.fd).map_err(failed)
    }
}

impl HostAbi for RestoreHost<'_> {
    fn option(&self, name: RStr<'_>) -> ROption<RString> {
        self.plans.registry.option(self.plugin, name.as_str()).map(RString::from).into()
    }
    fn warn(&self, message: RStr<'_>) {
        tracing::warn!(plugin = self.plugin, "{message}");
    }
    fn progress(&self, done: u64, total: u64) {
        tracing::debug!(plugin = self.plugin, done, total, "progress");
    }
    fn current_task(&self) -> i32 {
        self.pid
    }
    fn ends_tree(&self) -> bool {
        false
    }
    fn is_dry_run(&self) -> bool {
        false
    }
    fn externals(&self) -> RVec<RString> {
        self.plans.external.iter().map(|key| key.as_str().into()).collect()
    }
    fn inherited(&self, key: RStr<'_>) -> AbiResult<ROption<i32>> {
        let Some(&number) = self.plans.inherited.get(key.as_str()) else { return ROk(ROption::RNone) };
        match sys::duplicate_above(number, 0) {
            Ok(fd) => ROk(ROption::RSome(fd.into_raw_fd())),
            Err(error) => RErr(HookError::failed(format!("duplicating the descriptor for {key}"), error)),
        }
    }
    fn tasks(&self) -> RVec<TaskInfo> {
        let tasks = self.plans.image.tasks.iter();
        tasks
            .map(|task| TaskInfo {
                pid: task.pid,
                ppid: task.ppid,
                pgid: task.pgid,
                sid: task.sid,
                host_pid: self.outside.and_then(|outside| outside.pids.get(&task.pid)).copied().unwrap_or(0),
                name: task_name(task).into(),
            })
            .collect()
    }
    fn sessions(&self) -> RVec<SessionInfo> {
        let tasks = &self.plans.image.tasks;
        let mut sessions: BTreeMap<i32, SessionInfo> = BTreeMap::new();
        for task in tasks {
            let Some(terminal) = task.tty_nr.filter(|tty| *tty != 0) else { continue };
            sessions.entry(task.sid).or_insert_with(|| SessionInfo {
                sid: task.sid,
                leader_in_tree: tasks.iter().any(|other| other.pid == task.sid),
                terminal: terminal_device(terminal),
                foreground: task.tty_pgrp.unwrap_or(-1),
            });
        }
        sessions.into_values().collect()
    }
    fn handle(&self, id: u32) -> ROption<HandleInfo> {
        self.plans.image.handles.get(&id).map(|handle| handle_info(self.plans, handle)).into()
    }
    fn handle_at(&self, pid: i32, fd: i32) -> ROption<u32> {
        let image = self.plans.image;
        let table = image.task(pid).and_then(|task| image.tables.get(&task.files));
        let descriptors = table.map_or(&[][..], |table| &table.descriptors);
        descriptors.iter().find(|d| d.number as i32 == fd).map(|d| d.handle).into()
    }
    fn handle_of(&self, _: u64, _: u64) -> ROption<u32> {
        ROption::RNone
    }
    fn open_handle(&self, id: u32) -> AbiResult<i32> {
        self.duplicate(id, None).map(IntoRawFd::into_raw_fd).into()
    }
    fn open_auxiliary(&self, handle: u32, index: u32) -> AbiResult<i32> {
        self.duplicate(handle, Some(index)).map(IntoRawFd::into_raw_fd).into()
    }
    fn open_proc(&self, _: i32) -> AbiResult<i32> {
        refused("open_proc")
    }
    fn remote_syscall(&self, _: i32, _: i64, _: &[u64; 6]) -> AbiResult<i64> {
        refused("remote_syscall")
    }
    fn read_memory(&self, _: i32, _: u64, _: RSliceMut<'_, u8>) -> AbiResult<()> {
        refused("read_memory")
    }
    fn blob_append(&self, _: RStr<'_>, _: RSlice<'_, u8>) -> AbiResult<()> {
        refused("blob_append")
    }
    fn blob_read(&self, name: RStr<'_>, offset: u64, mut buffer: RSliceMut<'_, u8>) -> AbiResult<usize> {
        let failed = |error: crate::image::ImageError| RErr(HookError::invalid(error.to_string()));
        let Some(world) = self.world else {
            let mut blobs = match self.plans.image.blobs() {
                Ok(blobs) => blobs,
                Err(error) => return failed(error),
            };
            return match blobs.read_at(self.plugin, name.as_str(), offset, buffer.as_mut_slice()) {
                Ok(n) => ROk(n),
                Err(error) => failed(error),
            };
        };
        let Ok(mut blobs) = world.blobs.try_borrow_mut() else {
            return RErr(HookError::invalid("a blob is being read already"));
        };
        match blobs.read_at(self.plugin, name.as_str(), offset, buffer.as_mut_slice()) {
            Ok(n) => ROk(n),
            Err(error) => failed(error),
        }
    }
    fn undo(&self, fd: i32, steps: RSlice<'_, UndoStep>) -> AbiResult<()> {
        let Some(guardian) = self.guardian else { return refused("undo in a task") };
        // SAFETY: the hook has it open during this call.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let result = guardian.borrow_mut().undo(fd, steps.iter().map(Into::into).collect());
        result.map_err(|error| HookError::invalid(format!("a journal entry: {error}"))).into()
    }
    fn hold(&self, begin: bool) {
        if let Some(world) = self.world {
            if begin { world.shared.hold() } else { world.shared.let_go() }
        }
    }
}

/// Device number as makedev(3) gives it, from the old encoding of field 7 of proc_pid_stat(5).
fn terminal_device(tty_nr: i32) -> u64 {
    let number = tty_nr as u32;
    libc::makedev(number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xfff00)
}

fn handle_info(plans: &Plans, handle: &Handle) -> HandleInfo {
    let path = handle.path.as_ref();
    HandleInfo {
        id: handle.id,
        link: path.map(|path| String::from_utf8_lossy(&path.path).into_owned().into()).unwrap_or_default(),
        status_flags: handle.status_flags,
        position: handle.position,
        holders: plans.holders.get(&handle.id).into_iter().flatten().cloned().collect(),
        role: handle.role,
        ..HandleInfo::default()
    }
}

/// What hooks are told of an object.
pub fn object_info(plans: &Plans, object: u32) -> Option<ObjectInfo> {
    let object = plans.image.objects.get(&object)?;
    let handles = object.handles.iter().filter_map(|id| plans.image.handles.get(id));
    Some(ObjectInfo {
        id: object.id,
        handles: handles.map(|handle| handle_info(plans, handle)).collect(),
        description: object.description.as_str().into(),
        ..ObjectInfo::default()
    })
}
