//! Waiting for tracees without missing that the command has gone away.

use crate::inject::run::Patience;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask};
use std::{
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

extern "C" fn nothing(_: i32) {}

/// SIGCHLD is blocked but while we wait, so that none is missed between looking and waiting.
pub fn block_child_signals() -> Result<(), nix::errno::Errno> {
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing.
    unsafe { sigaction(Signal::SIGCHLD, &action) }?;
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&set), None)
}

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// A tracee changed, perhaps.
    Tracee,
    /// There is something on the channel, perhaps its end.
    Channel,
    /// Nothing in time.
    Timeout,
}

/// Waits with ppoll(2).
#[derive(Debug)]
pub struct Waiter {
    channel: RawFd,
    /// The command's process: forked children may hold copies of its end of the channel.
    command: Option<OwnedFd>,
    /// The command has closed its end, or ended.
    pub command_gone: bool,
}

impl Waiter {
    /// Watches this channel.
    pub fn new(channel: RawFd) -> Self {
        Self { channel, command: None, command_gone: false }
    }

    /// Watches this process, too.
    pub fn watch(&mut self, command: i32) {
        // SAFETY: takes numbers only; the result is a new descriptor or -1.
        self.command = unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, command, 0) as i32;
            (fd >= 0).then(|| OwnedFd::from_raw_fd(fd))
        };
    }

    /// Waits for a tracee, or for what `events` say of the channel.
    pub fn poll(&mut self, events: i16, timeout: Option<Duration>) -> Wake {
        let command = self.command.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let mut fds = [(self.channel, events), (command, libc::POLLIN)].map(|(fd, events)| libc::pollfd {
            fd,
            events,
            revents: 0,
        });
        let timespec =
            |t: Duration| libc::timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() };
        let timeout = timeout.map(timespec);
        let pointer = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: zeros are an empty set.
        let mask: libc::sigset_t = unsafe { std::mem::zeroed() };
        // A channel that is closed is always ready: leave it out, or we would spin.
        let count = if self.command_gone { 0 } else { fds.len() as u64 };
        // SAFETY: `count` pollfds (negative numbers are skipped), a timeout or null, and a mask.
        let ready = unsafe { libc::ppoll(fds.as_mut_ptr(), count, pointer, &mask) };
        match ready {
            1.. => {
                let [channel, command] = fds.map(|fd| fd.revents);
                self.command_gone |= channel & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0;
                self.command_gone |= command & libc::POLLIN != 0;
                Wake::Channel
            }
            0 => Wake::Timeout,
            _ => Wake::Tracee,
        }
    }
}

impl Patience for Waiter {
    fn wait(&mut self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        !left.is_zero() && self.poll(libc::POLLRDHUP, Some(left)) != Wake::Timeout
    }
}
