//! Running and stopped tracees, and what passes between.

use super::{Error, Exit, raw, who};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// A thread and its process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TaskId {
    /// Process.
    pub pid: i32,
    /// Thread.
    pub tid: i32,
}

impl TaskId {
    /// An error about this task.
    pub fn error(self, operation: &'static str, errno: Errno) -> Error {
        let (TaskId { pid, tid }, name) = (self, who::name(self.tid));
        Error::Call { operation: Cow::Borrowed(operation), pid, tid, name, errno: errno as i32 }
    }
}

/// PTRACE_O_*.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options(usize);

impl Options {
    /// For a dump: what the tree forks is seized too. A task whose tracer dies in a system call stop survives only with TRACESYSGOOD
    /// (the signal it would get, 133, is none).
    pub const DUMP: Self = Self(
        (libc::PTRACE_O_TRACEFORK
            | libc::PTRACE_O_TRACEVFORK
            | libc::PTRACE_O_TRACECLONE
            | libc::PTRACE_O_TRACESYSGOOD
            | libc::PTRACE_O_SUSPEND_SECCOMP) as usize,
    );
    /// For a restore: and whatever is forked dies with the tracer.
    pub const RESTORE: Self = Self(Self::DUMP.0 | libc::PTRACE_O_EXITKILL as usize);

    fn without_seccomp_suspension(self) -> Self {
        Self(self.0 & !(libc::PTRACE_O_SUSPEND_SECCOMP as usize))
    }
}

/// Why a task stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// By PTRACE_INTERRUPT, or a new task at its first instruction.
    Interrupted,
    /// A group stop by this signal.
    Group(i32),
    /// This signal is about to be delivered.
    Signal(i32),
    /// Entry to or exit from a system call.
    Syscall,
    /// PTRACE_EVENT_*.
    Event(i32),
}

/// A tracee that runs, as far as we know.
#[derive(Debug)]
pub struct Running {
    pub(super) id: TaskId,
}

/// A tracee that is stopped. Only SIGKILL can change that.
#[derive(Debug)]
pub struct Stopped {
    pub(super) id: TaskId,
    stop: Stop,
}

/// What waiting for a tracee found.
#[derive(Debug)]
pub enum Waited {
    /// Nothing yet.
    Running(Running),
    /// It stopped.
    Stopped(Stopped),
    /// It ended.
    Gone(Exit),
}

impl Running {
    /// PTRACE_SEIZE: attaches without stopping. Finds out why it is refused.
    pub fn seize(id: TaskId, options: Options) -> Result<Self, Error> {
        // SAFETY: the request takes numbers only.
        let seize = |options: Options| unsafe { raw::ptrace(libc::PTRACE_SEIZE, id.tid, 0, options.0) };
        let mut result = seize(options);
        if matches!(result, Err(Errno::EPERM | Errno::EINVAL)) && who::tracer(id.tid) == 0 {
            // Suspending filters takes CAP_SYS_ADMIN and CONFIG_CHECKPOINT_RESTORE.
            result = seize(options.without_seccomp_suspension());
        }
        match result {
            Ok(_) => Ok(Self { id }),
            Err(errno) => Err(Self::why_not(id, errno)),
        }
    }

    fn why_not(id: TaskId, errno: Errno) -> Error {
        let (pid, name) = (id.pid, who::name(id.tid));
        let Some(stat) = who::Stat::read(id.tid) else { return Error::Absent { pid } };
        let tracer = who::tracer(id.tid);
        match errno {
            Errno::ESRCH => Error::Absent { pid },
            Errno::EPERM if stat.is_zombie() => Error::Zombie { pid, name },
            Errno::EPERM if stat.is_kernel_thread() => Error::KernelThread { pid, name },
            Errno::EPERM if tracer != 0 => {
                Error::AlreadyTraced { pid, name, tracer, tracer_name: who::name(tracer) }
            }
            Errno::EPERM => Error::NotPermitted { pid, name },
            errno => id.error("seize", errno),
        }
    }

    /// A task that became ours because its parent is (PTRACE_O_TRACEFORK and others).
    pub fn inherited(id: TaskId) -> Self {
        Self { id }
    }

    /// Which task.
    pub fn id(&self) -> TaskId {
        self.id
    }

    /// PTRACE_INTERRUPT: it will stop as soon as it can.
    pub fn interrupt(&self) {
        interrupt(self.id);
    }

    /// Looks whether it has stopped or ended, without waiting.
    pub fn poll(self) -> Waited {
        let mut status = 0;
        // SAFETY: the kernel writes one int.
        let result = unsafe { libc::waitpid(self.id.tid, &mut status, libc::__WALL | libc::WNOHANG) };
        match result {
            0 => Waited::Running(self),
            // ECHILD: it became another thread by exec, or its process is reaped.
            -1 if Errno::last() == Errno::EINTR => Waited::Running(self),
            -1 => Waited::Gone(Exit::Unknown),
            _ if libc::WIFEXITED(status) => Waited::Gone(Exit::Code(libc::WEXITSTATUS(status))),
            _ if libc::WIFSIGNALED(status) => Waited::Gone(Exit::Signal(libc::WTERMSIG(status))),
            _ => Waited::Stopped(Stopped { id: self.id, stop: Stop::of(status) }),
        }
    }
}

/// The trap is taken before the next user instruction; a task that is gone is found so by waiting.
fn interrupt(id: TaskId) {
    // SAFETY: the request takes numbers only.
    let _ = unsafe { raw::ptrace(libc::PTRACE_INTERRUPT, id.tid, 0, 0) };
}

impl Stop {
    pub(super) fn of(status: i32) -> Self {
        let signal = libc::WSTOPSIG(status);
        match status >> 16 {
            raw::EVENT_STOP if signal == libc::SIGTRAP => Self::Interrupted,
            raw::EVENT_STOP => Self::Group(signal),
            0 if signal == libc::SIGTRAP | 0x80 => Self::Syscall,
            0 => Self::Signal(signal),
            event => Self::Event(event),
        }
    }
}

impl Stopped {
    /// For a status that waitpid(-1) gave.
    pub fn from_status(id: TaskId, status: i32) -> Self {
        Self { id, stop: Stop::of(status) }
    }

    /// Which task.
    pub fn id(&self) -> TaskId {
        self.id
    }

    /// Why it stopped.
    pub fn stop(&self) -> Stop {
        self.stop
    }

    /// It will stop again before it runs a user instruction, once it is continued.
    pub fn interrupt(&self) {
        interrupt(self.id);
    }

    fn resume(self, request: u32, signal: i32) -> Running {
        // A task that was killed meanwhile gives ESRCH, and its end when it is waited for.
        // SAFETY: the request takes numbers only.
        let _ = unsafe { raw::ptrace(request, self.id.tid, 0, signal as usize) };
        Running { id: self.id }
    }

    /// PTRACE_CONT, with a signal to deliver or 0.
    pub fn cont(self, signal: i32) -> Running {
        self.resume(libc::PTRACE_CONT, signal)
    }

    /// PTRACE_SYSCALL: to the next entry or exit of a system call.
    pub fn cont_to_syscall(self) -> Running {
        self.resume(libc::PTRACE_SYSCALL, 0)
    }

    /// PTRACE_LISTEN: stays in its group stop, but reports SIGCONT.
    pub fn listen(self) -> Running {
        self.resume(libc::PTRACE_LISTEN, 0)
    }

    /// PTRACE_DETACH, with a signal to deliver or 0. A group stop that is in effect stays so. A task that has been killed cannot be
    /// let go: its tracer must wait for its end, or its parent never learns of it.
    pub fn detach(self, signal: i32) -> Result<(), Running> {
        // SAFETY: as in `resume`.
        let result = unsafe { raw::ptrace(libc::PTRACE_DETACH, self.id.tid, 0, signal as usize) };
        result.map(drop).map_err(|_| Running { id: self.id })
    }
}

/// A tracee in whatever state.
#[derive(Debug)]
pub enum Tracee {
    /// See [`Running`].
    Running(Running),
    /// See [`Stopped`].
    Stopped(Stopped),
    /// Its end has been seen.
    Gone(TaskId, Exit),
}

impl Tracee {
    /// Which task.
    pub fn id(&self) -> TaskId {
        match self {
            Self::Running(running) => running.id,
            Self::Stopped(stopped) => stopped.id,
            Self::Gone(id, _) => *id,
        }
    }

    /// The stopped task, or why it is none.
    pub fn stopped(&self) -> Result<&Stopped, Error> {
        match self {
            Self::Stopped(stopped) => Ok(stopped),
            Self::Running(Running { id: TaskId { pid, tid } }) => {
                Err(Error::NotStopped { pid: *pid, tid: *tid, name: who::name(*tid) })
            }
            Self::Gone(TaskId { pid, tid }, exit) => Err(Error::Died { pid: *pid, tid: *tid, exit: *exit }),
        }
    }

    fn change(&mut self, by: impl FnOnce(Self) -> Self) {
        let placeholder = Self::Gone(self.id(), Exit::Unknown);
        let old = std::mem::replace(self, placeholder);
        *self = by(old);
    }

    /// Lets a stopped task go on by `how`; others stay as they are.
    pub fn resume(&mut self, how: impl FnOnce(Stopped) -> Running) {
        self.change(|old| match old {
            Self::Stopped(stopped) => Self::Running(how(stopped)),
            other => other,
        });
    }

    /// Lets a task go that stands before the delivery of a signal, with that signal; others stay as they are.
    pub fn detach_from_signal(&mut self) {
        let id = self.id();
        self.change(|old| match old {
            Self::Stopped(stopped) => match stopped.stop() {
                Stop::Signal(signal) => {
                    stopped.detach(signal).map_or_else(Self::Running, |()| Self::Gone(id, Exit::Unknown))
                }
                _ => Self::Stopped(stopped),
            },
            other => other,
        });
    }

    /// Looks whether a running task has stopped or ended; true if it still runs.
    pub fn poll(&mut self) -> bool {
        let id = self.id();
        self.change(|old| match old {
            Self::Running(running) => match running.poll() {
                Waited::Running(running) => Self::Running(running),
                Waited::Stopped(stopped) => Self::Stopped(stopped),
                Waited::Gone(exit) => Self::Gone(id, exit),
            },
            other => other,
        });
        matches!(self, Self::Running(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses() {
        let status = |event: i32, signal: i32| event << 16 | signal << 8 | 0x7f;
        assert_eq!(Stop::of(status(128, libc::SIGTRAP)), Stop::Interrupted);
        assert_eq!(Stop::of(status(128, libc::SIGTSTP)), Stop::Group(libc::SIGTSTP));
        assert_eq!(Stop::of(status(0, libc::SIGTRAP | 0x80)), Stop::Syscall);
        assert_eq!(Stop::of(status(0, libc::SIGTRAP)), Stop::Signal(libc::SIGTRAP));
        assert_eq!(
            Stop::of(status(libc::PTRACE_EVENT_FORK, libc::SIGTRAP)),
            Stop::Event(libc::PTRACE_EVENT_FORK)
        );
    }

    #[test]
    fn refusals_say_why() {
        let absent = TaskId { pid: i32::MAX, tid: i32::MAX };
        let error = Running::seize(absent, Options::DUMP).unwrap_err();
        assert_eq!(error.to_string(), format!("there is no task {}", i32::MAX));
    }
}
