//! The first process' share of a restore. It stays single-threaded and free of plugins, and forks the root task, which
//! only it can do: with `--restore-sibling` the root becomes a child of *its* parent.

use super::{
    RestoreOptions, RestoreReport,
    command::{self, Command},
    error::{Failure, RestoreError, Result},
    root::{self, RootSetup},
    shared::Shared,
    sys,
};
use crate::{
    front::{Supervision, supervise_serving},
    guardian::Guardian,
    plugins::HookWatch,
};
use nix::{
    errno::Errno,
    sys::{
        socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use serde::{Deserialize, Serialize};
use std::{
    cell::RefCell,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    rc::Rc,
    time::{Duration, Instant},
};

/// How the root task is to be forked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneRequest {
    /// `CLONE_NEW*`.
    pub flags: u64,
    /// Its pid in the innermost pid namespace.
    pub pid: i32,
    /// As a child of our parent.
    pub sibling: bool,
}

/// From the command to the first process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Message {
    /// Fork the root task; answered with its pid, or a negative errno.
    Clone(CloneRequest),
    /// All tasks run.
    Restored(RestoreReport),
    /// Pids of ours are in the way.
    Again,
    /// It failed.
    Failed(Failure),
}

/// The largest message: a failure with its text.
const LARGEST: usize = 1 << 17;

/// The command's end of the channel to the first process.
#[derive(Debug, Clone)]
pub struct Channel {
    socket: Rc<OwnedFd>,
}

impl Channel {
    fn new(socket: OwnedFd) -> Self {
        Self { socket: Rc::new(socket) }
    }

    /// Sends a message.
    pub fn send(&self, message: &Message) -> Result<()> {
        let failed = || RestoreError::system("tell the first process");
        let bytes = postcard::to_allocvec(message).map_err(|error| failed()(io::Error::other(error)))?;
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL)
            .map_err(|errno| failed()(errno.into()))?;
        Ok(())
    }

    /// Has the root task forked; gives its pid as this process sees it.
    pub fn clone_root(&self, request: CloneRequest) -> Result<i32> {
        self.send(&Message::Clone(request))?;
        let mut answer = [0; 4];
        let n = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty())
            .map_err(|errno| RestoreError::system("hear from the first process")(errno.into()))?;
        let pid = if n == 4 { i32::from_ne_bytes(answer) } else { -(Errno::EPIPE as i32) };
        match pid {
            pid if pid > 0 => Ok(pid),
            errno if errno == -libc::EEXIST => Err(RestoreError::PidTaken {
                pid: request.pid,
                holder: super::pids::holder(request.pid),
                remedy: "end that process, or restore in a pid namespace of its own",
            }),
            errno => Err(RestoreError::Task {
                pid: request.pid,
                name: String::new(),
                operation: "fork the root task".into(),
                source: io::Error::from_raw_os_error(-errno),
            }),
        }
    }
}

/// What the first process knows when the command has ended.
#[derive(Default)]
struct Seen {
    root: Option<i32>,
    last: Option<Message>,
}

enum Attempt {
    Done(RestoreReport),
    Again,
}

/// How often our own processes are started anew when their pids are in the way.
const ATTEMPTS: usize = 8;

/// Restores an image. The calling process must have one thread.
pub fn restore(options: &RestoreOptions) -> Result<RestoreReport> {
    let watch = HookWatch::new().map_err(RestoreError::system("map shared memory"))?;
    for _ in 0..ATTEMPTS {
        match attempt(options, watch)? {
            Attempt::Done(report) => return Ok(report),
            // Process numbers grow, so the next ones are others.
            Attempt::Again => {}
        }
    }
    Err(RestoreError::PidTaken {
        pid: std::process::id() as i32,
        holder: "by stasis itself".into(),
        remedy: "run it again",
    })
}

fn attempt(options: &RestoreOptions, watch: &'static HookWatch) -> Result<Attempt> {
    let shared = Shared::new().map_err(RestoreError::system("map shared memory"))?;
    // First, so that it inherits none of the channels below, whose ends tell that the command is gone.
    let guardian = Guardian::spawn_holding(Some(shared.names()))?;
    let guardian_pid = guardian.pid();
    let system = |operation: &'static str| move |errno: Errno| RestoreError::system(operation)(errno.into());
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(system("make a socket pair"))?;
    let (permission, permit) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(system("make a pipe"))?;
    let mut own = vec![std::process::id() as i32, guardian_pid];
    let supervision =
        Supervision { watch, plugin_timeout: options.plugin_timeout, aftermath: "nothing was left behind" };
    let seen = RefCell::new(Seen::default());
    let mut permission = Some(permission);
    let mut serve = || {
        let mut buffer = vec![0; LARGEST];
        let n = match recv(ours.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(n) if n > 0 => n,
            _ => return false,
        };
        let mut seen = seen.borrow_mut();
        match postcard::from_bytes(&buffer[..n]) {
            Ok(Message::Clone(request)) => {
                let answer = clone_root(request, &mut permission, options, shared, watch);
                seen.root = (answer > 0).then_some(answer);
                // If the command is gone, so is the need for an answer.
                let _ = send(ours.as_raw_fd(), &answer.to_ne_bytes(), MsgFlags::MSG_NOSIGNAL);
            }
            Ok(message) => seen.last = Some(message),
            Err(_) => return false,
        }
        true
    };
    let command = move || {
        own.push(std::process::id() as i32);
        let front = Channel::new(theirs);
        let guardian = RefCell::new(guardian);
        command::run(Command { options, front, guardian, shared, watch, permission: permit, own })
    };
    let ended = supervise_serving(&supervision, command, Some((ours.as_fd(), &mut serve)));
    // Messages that came with the end.
    while more(&ours) && serve() {}
    shared.news().log();
    // It ends when it has cleared away what is not to stay.
    reap(guardian_pid);
    let Seen { root, last } = seen.into_inner();
    let result = match (ended, last) {
        (Ok(0), Some(Message::Restored(report))) => return Ok(Attempt::Done(report)),
        (Ok(0), Some(Message::Again)) => return Ok(Attempt::Again),
        (Ok(_), Some(Message::Failed(failure))) => RestoreError::Elsewhere(failure),
        (Ok(status), _) => {
            let message = format!("the command ended with status {status} and without a word");
            RestoreError::Elsewhere(Failure { message, pid: 0, errno: 0, status: 1 })
        }
        (Err(error), _) => error.into(),
    };
    if let Some(root) = root.filter(|_| !options.sibling) {
        reap(root);
    }
    Err(result)
}

fn more(socket: &OwnedFd) -> bool {
    let mut fds = [nix::poll::PollFd::new(socket.as_fd(), nix::poll::PollFlags::POLLIN)];
    nix::poll::poll(&mut fds, nix::poll::PollTimeout::ZERO).is_ok_and(|n| n > 0)
}

/// Forks the root task, which never comes back from here.
fn clone_root(
    request: CloneRequest,
    permission: &mut Option<OwnedFd>,
    options: &RestoreOptions,
    shared: Shared,
    watch: &'static HookWatch,
) -> i32 {
    let Some(permission) = permission.take() else { return -libc::EINVAL };
    let parent = if request.sibling { libc::CLONE_PARENT as u64 } else { 0 };
    match sys::fork(request.flags | parent, libc::SIGCHLD, request.pid) {
        Ok(0) => root::run(RootSetup { options, shared, watch, permission }),
        Ok(pid) => pid,
        Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
    }
}

/// How long a killed process may take to go.
const PATIENCE: Duration = Duration::from_secs(10);

/// Waits for a child that is about to end: the guardian, or the root task, which the guardian kills, or which ends by
/// itself when the command is gone before it was let go on.
fn reap(pid: i32) {
    let started = Instant::now();
    let flags = WaitPidFlag::WNOHANG | WaitPidFlag::__WALL;
    while let Ok(WaitStatus::StillAlive) = waitpid(Pid::from_raw(pid), Some(flags)) {
        if started.elapsed() > PATIENCE {
            tracing::warn!(pid, "a process of the restore does not end");
            return;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}
