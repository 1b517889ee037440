//! Waiting for tracees without missing that the command has gone away.

use crate::inject::run::Patience;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, sigaction, sigprocmask};
use std::{
    os::fd::RawFd,
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
    /// The command has closed its end.
    pub command_gone: bool,
}

impl Waiter {
    /// Watches this channel.
    pub fn new(channel: RawFd) -> Self {
        Self { channel, command_gone: false }
    }

    /// Waits for a tracee, or for what `events` say of the channel.
    pub fn poll(&mut self, events: i16, timeout: Option<Duration>) -> Wake {
        let mut fd = libc::pollfd { fd: self.channel, events, revents: 0 };
        let timeout =
            timeout.map(|t| libc::timespec { tv_sec: t.as_secs() as i64, tv_nsec: t.subsec_nanos().into() });
        let pointer = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: zeros are an empty set.
        let mask: libc::sigset_t = unsafe { std::mem::zeroed() };
        // A channel that is closed is always ready: leave it out, or we would spin.
        let count = if self.command_gone { 0 } else { 1 };
        // SAFETY: one pollfd, a timeout or null, and a mask.
        let ready = unsafe { libc::ppoll(&mut fd, count, pointer, &mask) };
        match ready {
            1.. => {
                self.command_gone |= fd.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0;
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
