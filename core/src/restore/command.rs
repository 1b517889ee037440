//! The command's share of a restore: checks, asks for the root task, and brings everything together at the end.

use super::{
    RestoreOptions, RestoreReport, check,
    error::{RestoreError, Result},
    final_state,
    front::{Channel, CloneRequest, Message},
    ghosts,
    host::{Outside, RestoreHost},
    namespaces, pids,
    shared::Shared,
    world::{Plans, task_name},
};
use crate::{
    action::Action,
    front::check_interrupted,
    guardian::{Guardian, GuardianError},
    plugins::{CallContext, HookWatch},
};
use nix::unistd::{UnlinkatFlags, unlinkat};
use stasis_plugin_api::Event;
use std::{
    cell::RefCell,
    fs::File,
    io::{IsTerminal, Write},
    os::fd::OwnedFd,
    path::PathBuf,
    time::{Duration, Instant},
};

/// What the command is given.
pub struct Command<'a> {
    /// Options.
    pub options: &'a RestoreOptions,
    /// The first process.
    pub front: Channel,
    /// The guardian.
    pub guardian: RefCell<Guardian>,
    /// Stage, failure, slots.
    pub shared: Shared,
    /// Which hook runs.
    pub watch: &'static HookWatch,
    /// Lets the root task go on.
    pub permission: OwnedFd,
    /// Processes of ours whose pids must not be in the image.
    pub own: Vec<i32>,
}

/// What became of it.
pub enum Outcome {
    /// All tasks run.
    Restored(RestoreReport),
    /// Pids of our own processes are in the way.
    Again,
}

impl Command<'_> {
    /// All steps; whatever fails, nothing is left.
    pub fn run(mut self) -> Result<Outcome> {
        let started = Instant::now();
        let plans = Plans::new(self.options)?;
        for name in &plans.ignored_options {
            tracing::warn!("--{name}: no plugin of the image knows it, so it is ignored");
        }
        check::check(&plans, self.options)?;
        if pids::check(&plans, &self.own)? {
            return Ok(Outcome::Again);
        }
        let result = self
            .action(Action::PreRestore, None)
            .and_then(|()| self.event(&plans, Event::BeforeRestore, None))
            .and_then(|()| self.restore(&plans, started));
        match result {
            Ok(report) => Ok(Outcome::Restored(report)),
            Err(error) => {
                let error = self.first_cause(&plans, error);
                self.shared.fail("");
                if let Err(abort) = self.guardian.borrow_mut().abort() {
                    tracing::warn!("the guardian: {abort}");
                }
                if let Err(hook) = self.event(&plans, Event::Aborted, None) {
                    tracing::warn!("{hook}");
                }
                Err(error)
            }
        }
    }

    /// A task that failed says why before it dies, and the others die of that.
    fn first_cause(&self, plans: &Plans, error: RestoreError) -> RestoreError {
        match self.shared.failure() {
            Some(text) if !text.is_empty() => match serde_json::from_str(&text) {
                Ok(failure) => RestoreError::Elsewhere(failure),
                Err(_) => error,
            },
            _ => final_state::restorer_failure(plans, self.shared).unwrap_or_else(|| self.blame_hook(error)),
        }
    }

    /// A task that died in a hook died of it.
    fn blame_hook(&self, error: RestoreError) -> RestoreError {
        let (died, how) = match &error {
            RestoreError::Guardian(GuardianError::RestoredTaskDied { pid, exit }) => (*pid, exit.to_string()),
            RestoreError::Died { pid, how, .. } => (*pid, how.clone()),
            _ => return error,
        };
        match self.watch.read().into_iter().find(|hook| hook.task == died) {
            Some(hook) => RestoreError::HookDied { hook: hook.into(), how },
            None => error,
        }
    }

    fn restore(&mut self, plans: &Plans, started: Instant) -> Result<RestoreReport> {
        check_interrupted()?;
        let image = plans.image;
        let now = pids::crowded(plans, &self.own);
        if now {
            // Our threads could take pids of the image, so they end before the first of its tasks exists.
            image.verify_pages(self.options.verify_threads())?;
        }
        let host_pid = self.front.clone_root(self.clone_request(plans))?;
        self.guardian.borrow_mut().adopt(host_pid, None)?;
        self.action(Action::SetupNamespaces, Some(host_pid))?;
        self.prepare_namespaces(plans, host_pid)?;
        self.event(plans, Event::Cloned, Some(&Outside::root_alone(plans, host_pid)))?;
        let mut permission =
            File::from(self.permission.try_clone().map_err(RestoreError::system("duplicate a pipe"))?);
        permission.write_all(&[1]).map_err(RestoreError::system("let the root task go on"))?;

        let verified = std::thread::scope(|scope| {
            let pages = (!image.shards.is_empty())
                .then(|| scope.spawn(|| image.verify_pages(self.options.verify_threads())));
            let arrived = self.wait_for_tasks(plans, host_pid, started);
            let verified = pages.map_or(Ok(Ok(())), |pages| pages.join());
            arrived.and(match verified {
                Ok(result) => result.map_err(RestoreError::from),
                Err(_) => {
                    Err(RestoreError::system("check the pages")(std::io::Error::other("a thread panicked")))
                }
            })
        });
        verified?;
        check_interrupted()?;
        let outside = plans.registry.lifecycles().next().map(|_| Outside::new(plans, host_pid));
        self.event(plans, Event::Restored, outside.as_ref())?;
        self.action(Action::PostRestore, Some(host_pid))?;
        self.action(Action::NetworkUnlock, Some(host_pid))?;
        let tasks = final_state::tasks(plans, self.shared, self.options.leave_stopped)?;
        self.guardian.borrow_mut().finalize(tasks)?;
        if let Some(path) = &self.options.pidfile {
            let written = std::fs::write(path, host_pid.to_string());
            written.map_err(RestoreError::system(format!("write {}", path.display())))?;
        }
        self.give_terminal(host_pid);
        self.action(Action::PreResume, Some(host_pid))?;
        // Only now, while the root is there to tell where paths lead.
        let links = ghosts::links(image, &PathBuf::from(format!("/proc/{host_pid}/root")));
        let released = check_interrupted()
            .map_err(RestoreError::from)
            .and_then(|()| Ok(self.guardian.borrow_mut().release()?));
        if let Err(error) = released {
            if let Some(path) = &self.options.pidfile {
                // Names a process that is about to end.
                let _ = std::fs::remove_file(path);
            }
            return Err(error);
        }
        for (directory, name) in links {
            // The files are open in the tree; another restore from this image would need the links, and says so.
            if let Err(errno) = unlinkat(&directory, &name, UnlinkatFlags::NoRemoveDir) {
                tracing::warn!("cannot take away the link {}: {errno}", name.display());
            }
        }
        let resumed = self.event(plans, Event::Resumed, outside.as_ref());
        // The tasks run: an error is no reason to undo it.
        for error in
            [resumed, self.action(Action::PostResume, Some(host_pid))].into_iter().filter_map(Result::err)
        {
            tracing::warn!("{error}");
        }
        Ok(RestoreReport {
            root_pid: host_pid,
            tasks: image.tasks.len(),
            threads: image.tasks.iter().map(|task| task.threads.len()).sum(),
            elapsed: started.elapsed(),
        })
    }

    /// A shell's job runs in the foreground, as it did; the shell takes the terminal back when this command ends.
    fn give_terminal(&self, root: i32) {
        let stdin = std::io::stdin();
        if !self.options.shell_job || !stdin.is_terminal() {
            return;
        }
        if let Ok(group) = nix::unistd::getpgid(Some(nix::unistd::Pid::from_raw(root))) {
            crate::front::set_foreground(group);
        }
    }

    fn clone_request(&self, plans: &Plans) -> CloneRequest {
        let flags = plans
            .image
            .namespaces
            .values()
            .filter(|one| namespaces::is_of_root(plans.image, one))
            .fold(0, |flags, namespace| flags | namespace.clone_flag);
        CloneRequest { flags, pid: plans.tree.nodes[0].pid, sibling: self.options.sibling }
    }

    /// From outside, while the root task waits.
    fn prepare_namespaces(&self, plans: &Plans, host_pid: i32) -> Result<()> {
        for (namespace, kind) in
            namespaces::ordered(plans).into_iter().filter(|(n, _)| namespaces::is_of_root(plans.image, n))
        {
            let Some(kind) = kind else {
                let what = format!("plugin {} knows no {} namespaces", namespace.plugin, namespace.kind);
                return Err(RestoreError::Machine { what });
            };
            let host = self.host(plans, &namespace.plugin, None);
            let resource = format!("{} namespace", namespace.kind);
            let context =
                CallContext { watch: self.watch, host: &host, task: 0, task_name: "", resource: &resource };
            context.prepare_namespace(kind, &namespace.record, host_pid)?;
        }
        Ok(())
    }

    /// Until every thread is at its trap. A task that dies before is an error.
    fn wait_for_tasks(&mut self, plans: &Plans, host_pid: i32, started: Instant) -> Result<()> {
        let live = plans.image.tasks.iter().filter(|task| !task.zombie);
        let threads: usize = live.map(|task| task.threads.len() - usize::from(task.dead_leader)).sum();
        let nobody = self.options.scripts().is_empty();
        let mut forked = plans.registry.lifecycles().next().is_none() && nobody;
        loop {
            let tick = Duration::from_millis(if forked { 50 } else { 2 });
            let done = match self.guardian.borrow_mut().wait_arrived(threads, tick) {
                Ok(()) => true,
                Err(GuardianError::NotArrived { .. }) => false,
                // A zombie of the image that is meant to end so.
                Err(GuardianError::RestoredTaskDied { pid, .. }) if is_zombie(plans, pid) => false,
                Err(error) => return Err(error.into()),
            };
            self.shared.check()?;
            self.check_deaths(plans)?;
            if !forked && self.shared.stage() > 0 {
                forked = true;
                self.action(Action::PostSetupNamespaces, Some(host_pid))?;
                self.event(plans, Event::Forked, None)?;
            }
            if done {
                return Ok(());
            }
            check_interrupted()?;
            if let Some(limit) = self.options.timeout.filter(|limit| started.elapsed() > *limit) {
                return Err(RestoreError::Timeout(limit));
            }
        }
    }

    /// Whether a task has ended that should not. Helpers and zombies do.
    fn check_deaths(&mut self, plans: &Plans) -> Result<()> {
        while let Some(died) = self.guardian.borrow_mut().try_died()? {
            let lost =
                plans.image.tasks.iter().find(|task| {
                    !task.zombie && task.threads.iter().any(|thread| thread.tid == died.inner_tid)
                });
            if let Some(task) = lost {
                let how = died.exit.to_string();
                return Err(RestoreError::Died { pid: task.pid, name: task_name(task), how });
            }
        }
        Ok(())
    }

    fn action(&self, action: Action, init: Option<i32>) -> Result<()> {
        Ok(self.options.scripts().run(action, init)?)
    }

    fn host<'s>(
        &'s self,
        plans: &'s Plans,
        plugin: &'s str,
        outside: Option<&'s Outside>,
    ) -> RestoreHost<'s> {
        let guardian = Some(&self.guardian);
        RestoreHost { plans, world: None, plugin, node: 0, pid: 0, outside, guardian }
    }

    fn event(&self, plans: &Plans, event: Event, outside: Option<&Outside>) -> Result<()> {
        for kind in plans.registry.lifecycles() {
            let host = self.host(plans, &kind.plugin, outside);
            let resource = format!("{event:?}");
            let context =
                CallContext { watch: self.watch, host: &host, task: 0, task_name: "", resource: &resource };
            context.event(kind, event)?;
        }
        Ok(())
    }
}

fn is_zombie(plans: &Plans, pid: i32) -> bool {
    plans.image.task(pid).is_some_and(|task| task.zombie)
}

/// In the command's process: runs it, and tells the first process what became of it. Gives the exit status.
pub fn run(command: Command<'_>) -> u8 {
    let front = command.front.clone();
    let message = match command.run() {
        Ok(Outcome::Restored(report)) => Message::Restored(report),
        Ok(Outcome::Again) => Message::Again,
        Err(error) => Message::Failed(error.to_failure()),
    };
    match front.send(&message) {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!("{error}");
            1
        }
    }
}
