//! What was in flight is sent again.

use super::{FLAGS, Restoration};
use crate::{
    dump::blob,
    name,
    queue::{self, Message},
    record::stasis::unix::v1::{End, Message as Saved, Shape},
    sandbox, sys,
};
use nix::sys::socket::{AddressFamily, SockType, socket};
use stasis_plugin_api::{HookError, Result};
use std::{
    io::Read,
    os::fd::{AsFd, OwnedFd},
};

impl Restoration<'_, '_> {
    /// Fills the queues of all ends.
    pub(super) fn fill(&self) -> Result<()> {
        match self.record.shape() {
            Shape::Pair => {
                for (role, other) in [(0, 1), (1, 0)] {
                    self.fill_end(role, Some(self.host.open_handle(self.handle(other)?)?))?;
                }
                Ok(())
            }
            Shape::Orphan | Shape::LostClient | Shape::LostAccepted => {
                let peer = self.host.open_auxiliary(self.handle(0)?, 0)?;
                if self.record.ends.first().is_some_and(|end| end.reset) {
                    // A peer that is closed with unread data leaves ECONNRESET (net/unix/af_unix.c, unix_release_sock).
                    let end = self.host.open_handle(self.handle(0)?)?;
                    sys::send(end.as_fd(), b"x", &[]).map_err(|error| HookError::failed("sendmsg", error))?;
                }
                self.fill_end(0, Some(peer))
            }
            Shape::Client | Shape::Accepted => {
                self.fill_end(0, Some(self.host.open_handle(self.record.peer_handle)?))
            }
            Shape::Single => self.fill_end(0, None),
            Shape::Listener | Shape::Waiting => Ok(()),
        }
    }

    /// Puts the queue of one end back, by way of its peer, or of whoever sent it.
    fn fill_end(&self, role: u32, peer: Option<OwnedFd>) -> Result<()> {
        let end: &End = self
            .record
            .ends
            .get(role as usize)
            .ok_or_else(|| HookError::invalid(format!("no end with role {role}")))?;
        if end.queue.is_empty() {
            return Ok(());
        }
        if let Some(peer) = &peer {
            queue::widen(peer.as_fd());
        }
        let (to, _file) = match (&peer, &end.name) {
            (None, Some(name)) => self.address(self.handle(role)?, &name.address)?,
            (None, None) => return Err(HookError::invalid("a queue that nobody could have filled")),
            (Some(_), _) => (Vec::new(), None),
        };
        let name = blob(self.object.id, role);
        let mut reader = self.host.blob_reader(&name);
        for saved in &end.queue {
            let mut data = Vec::new();
            reader
                .by_ref()
                .take(saved.length)
                .read_to_end(&mut data)
                .map_err(|error| HookError::failed("reading queued data", error))?;
            if data.len() as u64 != saved.length {
                return Err(HookError::invalid("the image has less queued data than its record says"));
            }
            let fds =
                saved.in_flight.iter().map(|id| self.host.open_handle(*id)).collect::<Result<Vec<_>>>()?;
            let message = Message { fds, ..Message::of(data, saved.credentials) };
            match &peer {
                Some(peer) => queue::send(peer.as_fd(), &[], self.kind == SockType::Stream, &message)?,
                None => queue::send(self.sender(saved)?.as_fd(), &to, false, &message)?,
            }
        }
        Ok(())
    }

    /// The socket that a datagram came from, or another one of its name.
    fn sender(&self, message: &Saved) -> Result<OwnedFd> {
        if message.sender_handle != 0 {
            return self.host.open_handle(message.sender_handle);
        }
        let sender = socket(AddressFamily::Unix, SockType::Datagram, FLAGS, None)
            .map_err(|errno| HookError::failed("socket", errno))?;
        queue::widen(sender.as_fd());
        if name::path(&message.sender).is_some() {
            sandbox::bind(sender.as_fd(), &message.sender)?;
        } else if !message.sender.is_empty() {
            let bound = sys::bind(sender.as_fd(), &message.sender);
            bound.map_err(|error| {
                HookError::failed(format!("bind to {}, as a sender", name::shown(&message.sender)), error)
                    .remedy("end the process that has this name now")
            })?;
        }
        Ok(sender)
    }
}
