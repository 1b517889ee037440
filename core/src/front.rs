//! The process that the user starts. It forks the command, in which plugins run, and stays behind: single-threaded and
//! without plugin code, so that a crash or a hang of a hook becomes an error message instead of a lost program.

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask},
        signalfd::{SfdFlags, SignalFd},
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork, getpid, getppid},
};
use std::{
    io::{self, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::atomic::{AtomicI32, Ordering},
    time::Duration,
};

/// A hook that runs at this moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunningHook {
    /// Plugin.
    pub plugin: String,
    /// Hook, e.g. `create`.
    pub hook: String,
    /// Task in which (restore) or for which (dump) it runs, or 0.
    pub task: i32,
    /// Thread that runs it.
    pub thread: i32,
    /// How long it has been running.
    pub elapsed: Duration,
}

impl std::fmt::Display for RunningHook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "hook `{}` of plugin `{}`", self.hook, self.plugin)?;
        if self.task != 0 { write!(f, " in task {}", self.task) } else { Ok(()) }
    }
}

/// Where to see which hook runs.
pub trait Watch {
    /// The hooks that run, the one that has been running longest first.
    fn running(&self) -> Vec<RunningHook>;
}

/// How a command is watched over.
pub struct Supervision<'a> {
    /// Which hook runs.
    pub watch: &'a dyn Watch,
    /// A hook may take this long.
    pub plugin_timeout: Option<Duration>,
    /// What the guardian has done by the time the user reads the error, e.g. "the tree runs on as before".
    pub aftermath: &'a str,
}

/// Why a command ended without a word of its own.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    /// A system call failed.
    #[error("cannot {operation}: {source}")]
    System {
        /// What was tried.
        operation: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// The command was killed while a hook ran.
    #[error("{hook} crashed ({signal}); {aftermath} (report it to its author, or use --without {})", hook.plugin)]
    HookCrashed {
        /// The hook.
        hook: RunningHook,
        /// By what.
        signal: Signal,
        /// What became of the tree.
        aftermath: String,
    },
    /// A hook did not come back.
    #[error("{hook} did not end within {} s; {aftermath} (--plugin-timeout, or --without {})", limit.as_secs_f64(), hook.plugin)]
    HookHung {
        /// The hook.
        hook: RunningHook,
        /// What it was allowed.
        limit: Duration,
        /// What became of the tree.
        aftermath: String,
    },
    /// A hook ended the command.
    #[error("{hook} ended its process (exit status {status}); {aftermath} (report it to its author, or use --without {})", hook.plugin)]
    HookExited {
        /// The hook.
        hook: RunningHook,
        /// With what.
        status: i32,
        /// What became of the tree.
        aftermath: String,
    },
    /// The command was killed outside of any hook.
    #[error("stasis was killed by {signal}; {aftermath}")]
    Killed {
        /// By what.
        signal: Signal,
        /// What became of the tree.
        aftermath: String,
    },
}

/// The user asked the command to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted by {0}")]
pub struct Interrupted(pub Signal);

static INTERRUPTED: AtomicI32 = AtomicI32::new(0);
const STOP_SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

extern "C" fn note_interrupt(signal: libc::c_int) {
    INTERRUPTED.store(signal, Ordering::Relaxed);
}

/// For the command, between steps: whether the user wants it to stop.
pub fn check_interrupted() -> Result<(), Interrupted> {
    match Signal::try_from(INTERRUPTED.load(Ordering::Relaxed)) {
        Ok(signal) => Err(Interrupted(signal)),
        Err(_) => Ok(()),
    }
}

fn system(operation: &'static str) -> impl Fn(Errno) -> FrontError {
    move |errno| FrontError::System { operation, source: errno.into() }
}

/// Runs `command` in a child and gives back its exit status. A first SIGINT, SIGTERM or SIGHUP asks it to stop
/// ([`check_interrupted`]), a second one kills it. `command` is dropped in this process as soon as the child exists, so
/// what it owns (channels) is the child's alone.
pub fn supervise(supervision: &Supervision<'_>, command: impl FnOnce() -> u8) -> Result<u8, FrontError> {
    supervise_serving(supervision, command, None)
}

/// A descriptor and what to do when it is readable; `false`: not to be asked again.
pub type Service<'a> = (BorrowedFd<'a>, &'a mut dyn FnMut() -> bool);

/// Likewise, and serves the command's requests meanwhile.
pub fn supervise_serving(
    supervision: &Supervision<'_>,
    command: impl FnOnce() -> u8,
    service: Option<Service<'_>>,
) -> Result<u8, FrontError> {
    let signals: SigSet = STOP_SIGNALS.into_iter().collect();
    let mut before = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), Some(&mut before)).map_err(system("block signals"))?;
    // What is still buffered would be written twice.
    let _ = io::stdout().flush();
    let front = getpid();
    // SAFETY: this process has one thread, so the child may run any code.
    let child = match unsafe { fork() } {
        Ok(ForkResult::Child) => run_command(front, &before, command),
        Ok(ForkResult::Parent { child }) => child,
        Err(errno) => {
            let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None);
            return Err(system("fork")(errno));
        }
    };
    drop(command);
    let result = watch(supervision, child, &signals, service);
    if result.is_err() {
        // Whatever went wrong here, no command without its front. ESRCH if it is gone already.
        let _ = nix::sys::signal::kill(child, Signal::SIGKILL);
        let _ = waitpid(child, None);
    }
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None);
    result
}

/// In the child; never returns.
fn run_command(front: Pid, mask: &SigSet, command: impl FnOnce() -> u8) -> ! {
    // SAFETY: prctl(PR_SET_PDEATHSIG) has no memory operands (prctl(2)).
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    if getppid() != front {
        std::process::exit(libc::SIGKILL + 128);
    }
    let action = SigAction::new(SigHandler::Handler(note_interrupt), SaFlags::SA_RESTART, SigSet::empty());
    for signal in STOP_SIGNALS {
        // SAFETY: the handler only stores to an atomic.
        let _ = unsafe { sigaction(signal, &action) };
    }
    default_crashes();
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(mask), None);
    let status = command();
    let _ = io::stdout().flush();
    std::process::exit(status.into())
}

/// Signals by which code that goes wrong ends.
pub const CRASHES: [Signal; 7] = [
    Signal::SIGSEGV,
    Signal::SIGBUS,
    Signal::SIGFPE,
    Signal::SIGILL,
    Signal::SIGABRT,
    Signal::SIGTRAP,
    Signal::SIGSYS,
];

/// A crash ends this process at once: the handler that the Rust runtime has for stack overflows would let it go on after a
/// signal that was sent.
pub fn default_crashes() {
    for signal in CRASHES {
        // SAFETY: no handler function.
        let _ = unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) };
    }
}

fn pidfd(pid: Pid) -> Result<OwnedFd, FrontError> {
    // SAFETY: pidfd_open(2) takes two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = Errno::result(fd).map_err(system("open a pidfd"))?;
    // SAFETY: a descriptor that the kernel just made.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// How often the hook's clock is looked at.
const TICK_MS: u16 = 50;

fn watch(
    supervision: &Supervision<'_>,
    child: Pid,
    signals: &SigSet,
    mut service: Option<Service<'_>>,
) -> Result<u8, FrontError> {
    let ended = pidfd(child)?;
    let stop = SignalFd::with_flags(signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(system("make a signalfd"))?;
    let mut asked = false;
    loop {
        let mut fds = vec![PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
        fds.push(PollFd::new(stop.as_fd(), PollFlags::POLLIN));
        if let Some((fd, _)) = &service {
            fds.push(PollFd::new(*fd, PollFlags::POLLIN));
        }
        let timeout = supervision.plugin_timeout.map_or(PollTimeout::NONE, |_| TICK_MS.into());
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(system("poll")(errno)),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        // Requests first: the command may have asked for something with its last breath.
        if ready.get(2) == Some(&true)
            && let Some((_, serve)) = &mut service
            && !serve()
        {
            service = None;
        }
        if ready[0] {
            return ended_how(supervision, waitpid(child, None).map_err(system("wait for the command"))?);
        }
        while let Ok(Some(signal)) = stop.read_signal() {
            let forward = if asked { libc::SIGKILL } else { signal.ssi_signo as i32 };
            send(&ended, forward)?;
            asked = true;
        }
        if let (Some(limit), Some(hook)) =
            (supervision.plugin_timeout, supervision.watch.running().into_iter().next())
            && hook.elapsed > limit
        {
            let aftermath = supervision.aftermath.to_owned();
            return Err(FrontError::HookHung { hook, limit, aftermath });
        }
    }
}

fn send(pidfd: &OwnedFd, signal: i32) -> Result<(), FrontError> {
    // SAFETY: pidfd_send_signal(2) with no siginfo.
    let sent = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<()>(), 0)
    };
    match Errno::result(sent) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(system("signal the command")(errno)),
    }
}

fn ended_how(supervision: &Supervision<'_>, status: WaitStatus) -> Result<u8, FrontError> {
    let aftermath = supervision.aftermath.to_owned();
    let hooks = supervision.watch.running();
    match status {
        WaitStatus::Exited(child, status) => {
            match hooks.into_iter().find(|hook| hook.thread == child.as_raw()) {
                Some(hook) => Err(FrontError::HookExited { hook, status, aftermath }),
                // Exit statuses have eight bits.
                None => Ok(status as u8),
            }
        }
        WaitStatus::Signaled(_, signal, _) => Err(match hooks.into_iter().next() {
            Some(hook) => FrontError::HookCrashed { hook, signal, aftermath },
            None => FrontError::Killed { signal, aftermath },
        }),
        _ => Ok(1),
    }
}

/// Makes `group` the foreground group of the controlling terminal, which is standard input. A background process that
/// does so is stopped by SIGTTOU unless it blocks that (tcsetpgrp(3)).
pub fn set_foreground(group: Pid) {
    let signals: SigSet = [Signal::SIGTTOU].into_iter().collect();
    let mut before = SigSet::empty();
    let _ = sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), Some(&mut before));
    // ENOTTY: the terminal is that of another session, and none of our business.
    let _ = nix::unistd::tcsetpgrp(io::stdin(), group);
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None);
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nobody;
    impl Watch for Nobody {
        fn running(&self) -> Vec<RunningHook> {
            Vec::new()
        }
    }
    struct Hook(Duration);
    impl Watch for Hook {
        fn running(&self) -> Vec<RunningHook> {
            let (plugin, hook) = ("a".into(), "create".into());
            vec![RunningHook { plugin, hook, task: 7, thread: 0, elapsed: self.0 }]
        }
    }

    fn message(watch: &dyn Watch, limit: Option<Duration>, command: fn() -> u8) -> String {
        let supervision = Supervision { watch, plugin_timeout: limit, aftermath: "all is well" };
        match supervise(&supervision, command) {
            Ok(code) => format!("exit {code}"),
            Err(error) => error.to_string(),
        }
    }

    fn die() -> u8 {
        // SAFETY: only this child dies.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        0
    }

    #[test]
    fn exit_status_is_passed_on() {
        assert_eq!(message(&Nobody, None, || 42), "exit 42");
    }

    #[test]
    fn crashes_name_the_hook() {
        let text = message(&Hook(Duration::ZERO), None, die);
        assert!(
            text.starts_with("hook `create` of plugin `a` in task 7 crashed (SIGKILL); all is well"),
            "{text}"
        );
        assert_eq!(message(&Nobody, None, die), "stasis was killed by SIGKILL; all is well");
    }

    #[test]
    fn hangs_are_ended() {
        let limit = Duration::from_millis(20);
        let text = message(&Hook(Duration::from_secs(1)), Some(limit), || {
            loop {
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        assert!(
            text.starts_with("hook `create` of plugin `a` in task 7 did not end within 0.02 s"),
            "{text}"
        );
    }
}
