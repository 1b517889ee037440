//! The life of one process of the plan, from its birth to the restorer. Every process is forked by another one of the
//! plan; the first is the root task (see [`root`](super::root)).

use super::{
    blob::{RestorerCall, RestorerOptions},
    descriptors::TaskDescriptors,
    error::{RestoreError, Result},
    host::RestoreHost,
    locks,
    mapped::TaskFiles,
    memory::TaskMemory,
    namespaces, root, sys,
    tree_plan::{NodeKind, Step},
    world::{World, memory_pid, task_name},
};
use crate::{
    image::records::{PathRef, Task, Vma},
    plugins::CallContext,
};
use nix::{
    sys::{
        signal::{SigHandler, Signal, signal},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::{Pid, getpgid, getpid, getppid, getsid},
};
use stasis_plugin_api::{TaskInfo, VmaInfo};
use std::{
    convert::Infallible,
    io,
    ops::Range,
    os::fd::{AsRawFd, IntoRawFd, OwnedFd},
    sync::atomic::Ordering,
};

/// A process of the plan.
pub struct Life<'a> {
    world: &'a World,
    node: usize,
    pid: i32,
}

impl<'a> Life<'a> {
    /// The process that runs now.
    pub fn new(world: &'a World, node: usize) -> Self {
        Self { world, node, pid: world.plans.tree.nodes[node].pid }
    }

    /// From birth to the restorer; ends in this process only by an error.
    pub fn live(self, mut memory: TaskMemory<'a>) -> Result<Infallible> {
        let world = self.world;
        if let Some(spaces) = world.spaces.get() {
            spaces.enter(&world.plans, self.node).map_err(self.failed("enter its namespaces"))?;
        }
        let mut descriptors = TaskDescriptors::new(world, self.node);
        memory = self.grow_tree(memory, &mut descriptors)?;
        self.form_groups()?;
        self.create_descriptors(&mut descriptors)?;
        let task = world.plans.task(self.node);
        let mut exe = -1;
        if let Some(task) = task {
            memory.fill(&world.pages, &mut TaskFiles { world, node: self.node })?;
            self.plugin_mappings(&memory)?;
            exe = self.executable(task)?;
        }
        self.settle_descriptors(&mut descriptors)?;
        let Some(task) = task else { leave(0) };
        self.task_hooks(task)?;
        self.proc_settings(task)?;
        self.directories(task)?;
        self.locks(task, &descriptors)?;
        self.check_place(task)?;
        self.enter_restorer(task, memory, exe)
    }

    fn failed(&self, operation: impl Into<String>) -> impl FnOnce(nix::errno::Errno) -> RestoreError {
        let name = self.world.plans.task(self.node).map(task_name).unwrap_or_default();
        let (pid, operation) = (self.pid, operation.into());
        move |errno| RestoreError::Task { pid, name, operation, source: errno.into() }
    }

    /// Step 3: the processes below this one.
    fn grow_tree(
        &self,
        memory: TaskMemory<'a>,
        descriptors: &mut TaskDescriptors<'a>,
    ) -> Result<TaskMemory<'a>> {
        let world = self.world;
        let mut memory = memory;
        memory.before_forks(&world.pages, &mut world.paths(self.node))?;
        for step in &world.plans.tree.nodes[self.node].steps {
            match *step {
                Step::Adopt => {
                    let set = sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1);
                    set.map_err(RestoreError::system("become a child subreaper"))?;
                }
                Step::NewSession => {
                    nix::unistd::setsid().map_err(self.failed("start a session"))?;
                    descriptors.create_early()?;
                }
                Step::NewGroup => {
                    nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0))
                        .map_err(self.failed("found a process group"))?;
                }
                Step::Fork(child) => memory = self.fork(child, memory)?,
            }
        }
        memory.after_forks()?;
        Ok(memory)
    }

    fn fork(&self, child: usize, memory: TaskMemory<'a>) -> Result<TaskMemory<'a>> {
        let world = self.world;
        let pid = world.plans.tree.nodes[child].pid;
        let record = world.plans.task(child);
        let exit_signal = record.map_or(libc::SIGCHLD, |task| task.exit_signal);
        let own = world.plans.task(self.node);
        let shares = own.zip(record).is_some_and(|(own, child)| own.fs != 0 && own.fs == child.fs);
        let sharers = &world.plans.descriptors.sharers;
        let table = sharers.get(&self.node);
        let same_table = table.is_some() && sharers.get(&child) == table;
        let flags = [(shares, libc::CLONE_FS), (same_table, libc::CLONE_FILES)];
        let flags = flags.iter().filter(|(set, _)| *set).map(|&(_, flag)| flag as u64).sum();
        match fork_as(world, flags, exit_signal, pid) {
            Ok(0) => {
                let closed = if same_table { Ok(()) } else { close_inherited(world, table.is_some()) };
                let result = closed
                    .and_then(|()| Ok(memory.into_child(memory_pid(&world.plans.tree, child))?))
                    .and_then(|memory| Life::new(world, child).live(memory));
                root::end(world.shared, result)
            }
            Ok(_) => Ok(memory),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Err(RestoreError::PidTaken {
                pid,
                holder: super::pids::holder(pid),
                remedy: "end that process, or restore in a pid namespace of its own",
            }),
            Err(source) => {
                let name = record.map(task_name).unwrap_or_default();
                Err(RestoreError::Task { pid, name, operation: "fork it".into(), source })
            }
        }
    }

    fn barrier(&self, count: usize) -> Result<()> {
        Ok(self.world.shared.barrier(count)?)
    }

    /// Groups, when all processes exist; then helpers and zombies end.
    fn form_groups(&self) -> Result<()> {
        let tree = &self.world.plans.tree;
        let node = &tree.nodes[self.node];
        self.barrier(tree.nodes.len())?;
        let late = tree.nodes.iter().any(|node| node.join_late);
        let mortal = tree.nodes.iter().any(|node| !matches!(node.kind, NodeKind::Task(_)));
        // A barrier after the first round keeps founders until the others have joined, after the second it keeps helpers.
        for (round, barrier) in [(false, late), (true, mortal)] {
            if let Some(pgid) = node.join.filter(|_| node.join_late == round) {
                nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(pgid))
                    .map_err(self.failed(format!("join process group {pgid}")))?;
            }
            if barrier {
                self.barrier(tree.nodes.len())?;
            }
        }
        if node.kind == NodeKind::Helper {
            leave(0);
        }
        let mut ended = self.reap_all(NodeKind::Helper)?;
        if let NodeKind::Zombie(at) = node.kind {
            die_as(self.world.plans.image.tasks[at].exit_status);
        }
        for zombie in self.world.plans.image.tasks.iter().filter(|t| t.zombie && t.ppid == self.pid) {
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::__WALL;
            waitid(Id::Pid(Pid::from_raw(zombie.pid)), flags)
                .map_err(self.failed(format!("wait for zombie {}", zombie.pid)))?;
            ended = true;
        }
        if ended {
            forget_child_signals();
        }
        Ok(())
    }

    /// Waits for what this process forked for the while; gives whether there was any.
    fn reap_all(&self, kind: NodeKind) -> Result<bool> {
        let nodes = self.world.plans.tree.nodes.iter().enumerate();
        let mut any = false;
        for (number, _) in nodes.filter(|(_, child)| child.creator == Some(self.node) && child.kind == kind) {
            self.reap(number)?;
            any = true;
        }
        Ok(any)
    }

    /// Waits for a helper that this process forked. One without a fixed pid is any child that is no task.
    fn reap(&self, number: usize) -> Result<()> {
        let plans = &self.world.plans;
        let pid = plans.tree.nodes[number].pid;
        if pid != 0 {
            let reaped = nix::sys::wait::waitpid(Pid::from_raw(pid), None);
            return reaped.map(drop).map_err(self.failed(format!("wait for helper {pid}")));
        }
        loop {
            let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
            let status = waitid(Id::All, flags).map_err(self.failed("wait for a helper"))?;
            match status.pid() {
                Some(pid) if plans.tree.find(pid.as_raw()).is_none() => {
                    return nix::sys::wait::waitpid(pid, None)
                        .map(drop)
                        .map_err(self.failed("wait for a helper"));
                }
                // A zombie of the image, which stays.
                _ => std::thread::yield_now(),
            }
        }
    }

    /// Step 4: everything exists and is connected.
    fn create_descriptors(&self, descriptors: &mut TaskDescriptors<'a>) -> Result<()> {
        let plans = &self.world.plans;
        let count = plans.tree.settlers();
        for level in 0..plans.descriptors.levels {
            descriptors.create_level(level)?;
            self.barrier(count)?;
        }
        descriptors.pull()?;
        // Who shares a table may open something again only when it is full.
        if !plans.image.objects.is_empty() || !plans.descriptors.sharers.is_empty() {
            self.barrier(count)?;
            descriptors.link()?;
        }
        Ok(())
    }

    /// What comes when all files that any task opens are open, mapped ones included: watches notice no more of restore, and
    /// a sealed file has its writable mappings.
    fn settle_descriptors(&self, descriptors: &mut TaskDescriptors<'a>) -> Result<()> {
        let plans = &self.world.plans;
        let count = plans.tree.settlers();
        if !plans.image.objects.is_empty() {
            self.barrier(count)?;
            descriptors.settle()?;
            self.barrier(count)?;
        } else if count > 1 {
            self.barrier(count)?;
        }
        descriptors.finish()?;
        if plans.tree.nodes[self.node].kind == NodeKind::StandIn {
            leave(0);
        }
        if self.reap_all(NodeKind::StandIn)? {
            forget_child_signals();
        }
        if self.node == 0 {
            namespaces::finish(self.world)?;
        }
        Ok(())
    }

    fn plugin_mappings(&self, memory: &TaskMemory<'_>) -> Result<()> {
        let mappings: Vec<(&Vma, Range<u64>)> = memory.plugin_mappings().collect();
        for (vma, place) in mappings {
            let plans = &self.world.plans;
            let kind = plans.registry.mapping_kind(&vma.plugin, &vma.plugin_kind).ok_or_else(|| {
                RestoreError::Machine { what: format!("plugin {} knows no {}", vma.plugin, vma.plugin_kind) }
            })?;
            let info = VmaInfo {
                pid: self.pid,
                start: place.start,
                end: place.end,
                prot: vma.prot,
                offset: vma.offset,
                ..VmaInfo::default()
            };
            let resource = format!("mapping {:#x}-{:#x}", vma.start, vma.end);
            self.hook(&vma.plugin, &resource, |context| context.map(kind, &info, &vma.record))?;
        }
        Ok(())
    }

    fn task_hooks(&self, task: &Task) -> Result<()> {
        let plans = &self.world.plans;
        for record in plans.image.task_records.iter().filter(|record| record.pid == self.pid) {
            let kind = plans.registry.task_kind(&record.plugin, &record.kind).ok_or_else(|| {
                RestoreError::Machine { what: format!("plugin {} knows no {}", record.plugin, record.kind) }
            })?;
            let info = TaskInfo {
                pid: task.pid,
                ppid: task.ppid,
                pgid: task.pgid,
                sid: task.sid,
                host_pid: 0,
                name: task_name(task).into(),
            };
            self.hook(&record.plugin, &record.kind, |context| {
                context.restore_task(kind, &info, &record.record)
            })?;
        }
        Ok(())
    }

    fn hook<T>(
        &self,
        plugin: &str,
        resource: &str,
        call: impl FnOnce(
            &CallContext<'_, RestoreHost<'_>>,
        ) -> std::result::Result<T, crate::plugins::PluginError>,
    ) -> Result<T> {
        let plans = &self.world.plans;
        let name = plans.task(self.node).map(task_name).unwrap_or_default();
        let host = RestoreHost {
            plans,
            world: Some(self.world),
            plugin,
            node: self.node,
            pid: self.pid,
            outside: None,
            guardian: None,
        };
        let context =
            CallContext { watch: self.world.watch, host: &host, task: self.pid, task_name: &name, resource };
        Ok(call(&context)?)
    }

    /// What only /proc can set.
    fn proc_settings(&self, task: &Task) -> Result<()> {
        let inherited = self.world.inherited;
        let settings = [
            ("oom_score_adj", inherited.oom_score_adj, task.oom_score_adj.to_string()),
            ("coredump_filter", inherited.coredump_filter as i32, format!("{:#x}", task.coredump_filter)),
        ];
        let wanted = [task.oom_score_adj, task.coredump_filter as i32];
        let set = settings.into_iter().zip(wanted).filter(|((_, present, _), wanted)| present != wanted);
        let mut set: Vec<(&str, String)> = set.map(|((file, _, text), _)| (file, text)).collect();
        if let Some(login) = task.login_uid.filter(|_| task.login_uid != inherited.login_uid) {
            set.push(("loginuid", login.to_string()));
        }
        for (file, text) in set {
            std::fs::write(format!("/proc/self/{file}"), &text).map_err(|source| RestoreError::Task {
                pid: task.pid,
                name: task_name(task),
                operation: format!("set {file} to {text}"),
                source,
            })?;
        }
        Ok(())
    }

    fn open_own(&self, task: &Task, path: &PathRef, flags: i32, what: &str) -> Result<OwnedFd> {
        let opened = self.world.paths(self.node).open(path, flags);
        let moved = opened
            .and_then(|fd| sys::duplicate_above(fd.as_raw_fd(), self.world.plans.descriptors.service.first));
        moved.map_err(|error| self.path_failed(task, what, &path.path, error))
    }

    fn path_failed(&self, task: &Task, what: &str, path: &[u8], source: io::Error) -> RestoreError {
        let operation = format!("{what} {}", String::from_utf8_lossy(path));
        RestoreError::Task { pid: task.pid, name: task_name(task), operation, source }
    }

    /// Opens the executable.
    fn executable(&self, task: &Task) -> Result<i32> {
        let exe = task.exe.clone().unwrap_or_default();
        self.open_own(task, &exe, libc::O_RDONLY, "open its executable").map(IntoRawFd::into_raw_fd)
    }

    /// Root and working directory.
    fn directories(&self, task: &Task) -> Result<()> {
        let cwd = task.cwd.clone().unwrap_or_default();
        let directory = libc::O_PATH | libc::O_DIRECTORY;
        let cwd_fd = self.open_own(task, &cwd, directory, "open its working directory")?;
        if let Some(root) = task.root.as_ref().filter(|root| root.path != b"/" && !root.path.is_empty()) {
            let fd = self.open_own(task, root, directory, "open its root directory")?;
            let change = nix::unistd::fchdir(&fd).and_then(|()| nix::unistd::chroot("."));
            change.map_err(|errno| self.path_failed(task, "chroot to", &root.path, errno.into()))?;
        }
        nix::unistd::fchdir(&cwd_fd)
            .map_err(|errno| self.path_failed(task, "change to", &cwd.path, errno.into()))
    }

    /// POSIX locks and leases, when no task opens or closes a file any more.
    fn locks(&self, task: &Task, descriptors: &TaskDescriptors<'_>) -> Result<()> {
        let plans = &self.world.plans;
        if !plans.image.handles.values().any(|handle| handle.locks.iter().any(locks::is_late)) {
            return Ok(());
        }
        self.barrier(plans.tree.live_tasks())?;
        descriptors.late_locks(task.pid)
    }

    /// Whether the task is where it was.
    fn check_place(&self, task: &Task) -> Result<()> {
        let outside = task.ppid == 0;
        let is = |what, found: Option<Pid>, expected: i32| match found.map_or(-1, Pid::as_raw) {
            found if found == expected => Ok(()),
            found => Err(RestoreError::Mismatch { pid: task.pid, what, found, expected }),
        };
        is("pid", Some(getpid()), task.pid)?;
        if outside {
            return Ok(());
        }
        let creator = self.world.plans.tree.nodes[self.node].creator;
        if creator.is_some_and(|by| self.world.plans.tree.nodes[by].kind == NodeKind::StandIn) {
            // Which is just leaving.
            while getppid().as_raw() != task.ppid {
                self.world.shared.check()?;
                std::thread::yield_now();
            }
        }
        is("parent", Some(getppid()), task.ppid)?;
        let known = |id: i32| self.world.plans.tree.find(id).is_some();
        if known(task.sid) {
            is("session", getsid(None).ok(), task.sid)?;
        }
        if known(task.pgid) { is("process group", getpgid(None).ok(), task.pgid) } else { Ok(()) }
    }

    /// Step 5: leaves this program.
    fn enter_restorer(&self, task: &Task, memory: TaskMemory<'_>, exe: i32) -> Result<Infallible> {
        let Some(slot) = self.world.shared.slot(self.node) else {
            return Err(RestoreError::Unsupported {
                pid: task.pid,
                name: task_name(task),
                what: "so large a tree",
            });
        };
        let mut close = vec![exe];
        let sharers = &self.world.plans.descriptors.sharers;
        if !sharers.is_empty() {
            // Nobody needs what all have from the first process any more, so in a shared table one can close it.
            self.barrier(self.world.plans.tree.live_tasks())?;
        }
        if sharers.get(&self.node).is_none_or(|filler| *filler == self.node) {
            close.extend(self.world.kept());
        }
        let parent = self.world.plans.image.task(task.ppid);
        let late_death_signals = parent.is_some_and(|parent| parent.dead_leader);
        let options = RestorerOptions { exe, close, status: &raw const slot.status, late_death_signals };
        let call = RestorerCall::new(&memory.finish(), task, &options)?;
        let region = call.region();
        slot.region_start.store(region.start, Ordering::Release);
        slot.region_end.store(region.end, Ordering::Release);
        for (to, from) in slot.arming.iter().zip(call.arming()) {
            to.store(from, Ordering::Release);
        }
        self.world.shared.check()?;
        call.enter()
    }
}

/// In a new process: what a leader created early is for the leader. If the table that this one is a copy of is shared, it
/// may also hold what others have open for the moment.
fn close_inherited(world: &World, was_shared: bool) -> Result<()> {
    if was_shared {
        return root::close_all_but(world.kept().collect());
    }
    sys::close_range(world.parking, u32::MAX).map_err(RestoreError::system("close inherited descriptors"))
}

/// Forks a task, or a helper with any pid that the image does not use.
fn fork_as(world: &World, flags: u64, exit_signal: i32, pid: i32) -> io::Result<i32> {
    if pid != 0 {
        return sys::fork(flags, exit_signal, pid);
    }
    let used = |pid: i32| {
        world.plans.tree.find(pid).is_some()
            || world.plans.image.tasks.iter().flat_map(|task| &task.threads).any(|thread| thread.tid == pid)
    };
    // Numbers from the upper end are the last that a growing counter reaches.
    for pid in (300..32_000).rev().filter(|pid| !used(*pid)) {
        match sys::fork_once(0, exit_signal, pid) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            result => return result,
        }
    }
    Err(nix::errno::Errno::EAGAIN.into())
}

/// Drops pending SIGCHLD: ignoring a signal flushes it (sigaction(2)). Children that end from now on are noticed again.
fn forget_child_signals() {
    for handler in [SigHandler::SigIgn, SigHandler::SigDfl] {
        // SAFETY: no handler function.
        let _ = unsafe { signal(Signal::SIGCHLD, handler) };
    }
}

/// Ends without running anything of the program.
pub fn leave(status: i32) -> ! {
    // SAFETY: takes an integer.
    unsafe { libc::_exit(status) }
}

/// Ends with the wait status of a zombie.
fn die_as(status: i32) -> ! {
    if libc::WIFSIGNALED(status) {
        let signal = libc::WTERMSIG(status);
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: no core file; then the signal gets its default action, is let in, and is sent to this process.
        unsafe {
            libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
            libc::signal(signal, libc::SIG_DFL);
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, signal);
            libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
            libc::kill(libc::getpid(), signal);
        }
    }
    leave(libc::WEXITSTATUS(status))
}
