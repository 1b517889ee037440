//! How a workload and the harness talk: by files in the scenario's directory.
//!
//! Files, because nothing must stay open while the workload waits: a descriptor that leads out of the tree could not
//! be dumped. The workload writes `ready`, then looks every few milliseconds for `check-request`, and writes `result`.

use std::cell::Cell;
use std::fmt;
use std::fs;
use std::io;
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

/// Why a workload could not be set up, or found something changed.
#[derive(Debug, thiserror::Error)]
pub enum Fail {
    /// A system call failed that should not have.
    #[error("{at}: {source}")]
    Sys {
        /// Where in the workload.
        at: &'static Location<'static>,
        /// The errno.
        source: io::Error,
    },
    /// Something is not as it was.
    #[error("{at}: {what}")]
    Changed {
        /// Where in the workload.
        at: &'static Location<'static>,
        /// What differs, with both values.
        what: String,
    },
    /// The machine lacks what this behaviour needs; the scenario counts as skipped.
    #[error("not on this machine: {0}")]
    Absent(String),
}

impl From<io::Error> for Fail {
    #[track_caller]
    fn from(source: io::Error) -> Self {
        Fail::Sys { at: Location::caller(), source }
    }
}

impl From<Errno> for Fail {
    #[track_caller]
    fn from(errno: Errno) -> Self {
        Fail::Sys { at: Location::caller(), source: errno.into() }
    }
}

/// What a workload returns.
pub type Outcome<T = ()> = Result<T, Fail>;

/// Fails with "`what`: is `got`, was `was`" unless they are equal.
#[track_caller]
pub fn same<T: PartialEq + fmt::Debug>(what: &str, got: T, was: T) -> Outcome {
    if got == was { Ok(()) } else { Err(changed(format!("{what}: is {got:?}, was {was:?}"))) }
}

/// Fails with `what` unless `holds`.
#[track_caller]
pub fn ensure(holds: bool, what: &str) -> Outcome {
    if holds { Ok(()) } else { Err(changed(what.to_owned())) }
}

/// A [`Fail::Changed`] at the caller's line.
#[track_caller]
pub fn changed(what: String) -> Fail {
    Fail::Changed { at: Location::caller(), what }
}

/// How long a workload waits for its own children before it gives up.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often the waiting side looks.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A workload's side of the conversation.
#[derive(Debug, Clone)]
pub struct Ctl {
    dir: PathBuf,
    longest_gap: Cell<Duration>,
}

impl Ctl {
    /// Talks through the files in `dir`.
    pub fn new(dir: &Path) -> Self {
        Ctl { dir: dir.to_owned(), longest_gap: Cell::default() }
    }

    /// The path of a file for the workload's own use.
    pub fn work(&self, name: &str) -> PathBuf {
        self.dir.join("work").join(name)
    }

    /// The scenario's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The same conversation when the directory is seen under another path, after a chroot(2).
    pub fn moved(&self, dir: &Path) -> Self {
        Ctl { dir: dir.to_owned(), ..self.clone() }
    }

    /// The longest time between two looks of [`Ctl::wait`]: how long this task was frozen, within [`LOOK_EVERY`].
    pub fn longest_gap(&self) -> Duration {
        self.longest_gap.get()
    }

    /// Says that all is set up and waits for the request to check. Returns whether the state is to be spoilt first, to
    /// see that the check notices ("test the tests").
    pub fn wait(&self) -> Outcome<bool> {
        self.announce("ready", std::process::id().to_string().as_bytes())?;
        self.wait_for_request()
    }

    /// As [`Ctl::wait`], for a task other than the root of the tree.
    pub fn wait_as(&self, name: &str) -> Outcome<bool> {
        self.announce(&format!("ready.{name}"), std::process::id().to_string().as_bytes())?;
        self.wait_for_request()
    }

    /// Only the waiting, for threads that announce nothing.
    pub fn wait_for_request(&self) -> Outcome<bool> {
        let request = self.dir.join("check-request");
        let mut last = Instant::now();
        loop {
            pause(LOOK_EVERY);
            let now = Instant::now();
            self.longest_gap.set(self.longest_gap.get().max(now - last));
            last = now;
            if request.exists() {
                return Ok(fs::read(&request)? == b"sabotage");
            }
        }
    }

    /// Waits until the child `name` has called [`Ctl::wait_as`].
    pub fn await_ready(&self, name: &str) -> Outcome {
        let file = self.dir.join(format!("ready.{name}"));
        poll_until(&format!("child {name} gets ready"), || file.exists())
    }

    /// Forks a child that does `body` and then exits; what it fails with, [`Child::join`] returns.
    pub fn child(&self, name: &str, body: impl FnOnce(&Ctl) -> Outcome) -> Outcome<Child> {
        // SAFETY: workloads fork before they start threads, so the child may use all of the runtime.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => {
                Ok(Child { pid: child, failure: self.dir.join(format!("failure.{name}")) })
            }
            ForkResult::Child => {
                let code = match body(self) {
                    Ok(()) => 0,
                    Err(fail) => {
                        let _ = self.announce(&format!("failure.{name}"), fail.to_string().as_bytes());
                        1
                    }
                };
                // SAFETY: ends this forked copy without running the parent's destructors.
                unsafe { libc::_exit(code) }
            }
        }
    }

    /// Writes a file so that it appears with its whole content.
    pub fn announce(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let hidden = self.dir.join(format!(".{name}.{}", std::process::id()));
        fs::write(&hidden, content)?;
        fs::rename(hidden, self.dir.join(name))
    }
}

/// A forked child of a workload.
#[derive(Debug)]
pub struct Child {
    /// Its pid, in the workload's pid namespace.
    pub pid: Pid,
    failure: PathBuf,
}

impl Child {
    /// Waits for the child to end and takes over its verdict.
    pub fn join(self) -> Outcome {
        match waitpid(self.pid, None)? {
            WaitStatus::Exited(_, 0) => Ok(()),
            status => {
                let said = fs::read_to_string(&self.failure).unwrap_or_default();
                Err(changed(format!("child {}: {status:?} {said}", self.pid)))
            }
        }
    }
}

/// Sleeps without caring about interruptions.
pub fn pause(time: Duration) {
    let ts = libc::timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) };
    // SAFETY: `ts` outlives the call, and no remainder is asked for.
    unsafe { libc::nanosleep(&ts, std::ptr::null_mut()) };
}

/// Looks again and again until `done`, and fails when that takes too long.
pub fn poll_until(what: &str, mut done: impl FnMut() -> bool) -> Outcome {
    let start = Instant::now();
    while !done() {
        if start.elapsed() > PATIENCE {
            return Err(changed(format!("waited {PATIENCE:?} in vain until {what}")));
        }
        pause(LOOK_EVERY);
    }
    Ok(())
}
