//! The socket to the caller: one record per packet, one answer per notification.

use crate::criu::records::{Notification, Request, RequestType, Response};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, getsockopt, recv, send, sockopt::PeerCredentials},
};
use prost::Message;
use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::Arc,
};

/// Requests beyond this are refused: those of engines have a few kilobytes.
const LARGEST: usize = 4 << 20;

/// The caller.
#[derive(Debug, Clone)]
pub struct Client {
    socket: Arc<OwnedFd>,
}

impl Client {
    /// Takes over a socket that was inherited.
    pub fn inherited(number: RawFd) -> io::Result<Self> {
        let flags = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC);
        // SAFETY: whether it is open, the next call says; nobody else in this process knows the number.
        let socket = unsafe { OwnedFd::from_raw_fd(number) };
        if let Err(errno) = nix::fcntl::fcntl(&socket, flags) {
            // Not open, so not ours to close.
            std::mem::forget(socket);
            return Err(errno.into());
        }
        Ok(Self { socket: Arc::new(socket) })
    }

    /// The process that made the socket, as this one sees it.
    pub fn pid(&self) -> io::Result<i32> {
        Ok(getsockopt(&self.socket, PeerCredentials)?.pid())
    }

    /// The next request; none if the caller has closed or shut down its end.
    pub fn receive(&self) -> io::Result<Option<Request>> {
        let socket = self.socket.as_raw_fd();
        let length = loop {
            match recv(socket, &mut [], MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC) {
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNRESET) => return Ok(None),
                other => break other?,
            }
        };
        if length > LARGEST {
            return Err(io::Error::other(format!("a request of {length} bytes")));
        }
        let mut packet = vec![0; length];
        let n = recv(socket, &mut packet, MsgFlags::empty())?;
        if n == 0 {
            return Ok(None);
        }
        Request::decode(&packet[..n]).map(Some).map_err(io::Error::other)
    }

    /// Sends an answer.
    pub fn send(&self, response: &Response) -> io::Result<()> {
        send(self.socket.as_raw_fd(), &response.encode_to_vec(), MsgFlags::MSG_NOSIGNAL)?;
        Ok(())
    }

    /// Tells the caller that a point is reached, and waits until he has done what he does then.
    pub fn notify(&self, script: &str, pid: Option<i32>) -> io::Result<()> {
        self.send(&Response {
            r#type: RequestType::Notify.into(),
            success: true,
            notify: Some(Notification { script: Some(script.into()), pid }),
            ..Response::default()
        })?;
        match self.receive()? {
            Some(answer)
                if answer.r#type == i32::from(RequestType::Notify) && answer.notify_success == Some(true) =>
            {
                Ok(())
            }
            Some(_) => Err(io::Error::other("the caller says that it failed")),
            None => Err(io::Error::other("the caller has gone away")),
        }
    }
}
