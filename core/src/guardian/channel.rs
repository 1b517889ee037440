//! The stream between command and guardian: frames of a length, a count of descriptors, and a body.

use super::GuardianError;
use nix::{
    cmsg_space,
    errno::Errno,
    sys::socket::{
        AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
        socketpair,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    fs::File,
    io::{IoSlice, IoSliceMut, Read, Write},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// SCM_MAX_FD (include/net/scm.h).
const DESCRIPTORS_AT_ONCE: usize = 253;
/// No frame is larger: 10,000 threads have 27 MB of extended registers.
const MAX_FRAME: usize = 1 << 30;

/// One end.
#[derive(Debug)]
pub struct Channel {
    stream: File,
}

impl Channel {
    /// Both ends.
    pub fn pair() -> Result<(Self, Self), GuardianError> {
        let (one, two) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|errno| GuardianError::channel("socketpair", errno))?;
        Ok((Self { stream: one.into() }, Self { stream: two.into() }))
    }

    /// For poll(2).
    pub fn raw(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// For poll(2).
    pub fn stream(&self) -> &File {
        &self.stream
    }

    /// Sends one message.
    pub fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), GuardianError> {
        let body = postcard::to_allocvec(message)
            .map_err(|_| GuardianError::Malformed { what: "message to be sent".into() })?;
        let mut header = [0u8; 8];
        header[..4].copy_from_slice(&(body.len() as u32).to_ne_bytes());
        header[4..].copy_from_slice(&(fds.len() as u32).to_ne_bytes());
        let mut stream = &self.stream;
        let fail = |error: std::io::Error| send_error(Errno::from_raw(error.raw_os_error().unwrap_or(0)));
        stream.write_all(&header).map_err(fail)?;
        for group in fds.chunks(DESCRIPTORS_AT_ONCE) {
            let raw: Vec<RawFd> = group.iter().map(AsRawFd::as_raw_fd).collect();
            let control = [ControlMessage::ScmRights(&raw)];
            sendmsg::<()>(self.raw(), &[IoSlice::new(&[0])], &control, MsgFlags::MSG_NOSIGNAL, None)
                .map_err(send_error)?;
        }
        stream.write_all(&body).map_err(fail)
    }

    /// Receives one message; [`GuardianError::Ended`] if the other end is closed.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), GuardianError> {
        let mut header = [0u8; 8];
        let mut stream = &self.stream;
        stream.read_exact(&mut header).map_err(|_| GuardianError::Ended)?;
        let word =
            |at: usize| header[at..at + 4].iter().rev().fold(0usize, |n, &byte| n << 8 | usize::from(byte));
        let (len, mut expected) = (word(0), word(4));
        if len > MAX_FRAME {
            return Err(GuardianError::Malformed { what: "length of a message".into() });
        }
        let mut fds = Vec::with_capacity(expected);
        while expected > 0 {
            let group = self.receive_descriptors()?;
            expected = expected.saturating_sub(group.len());
            fds.extend(group);
        }
        let mut body = vec![0u8; len];
        stream.read_exact(&mut body).map_err(|_| GuardianError::Ended)?;
        let message = postcard::from_bytes(&body)
            .map_err(|_| GuardianError::Malformed { what: "contents of a message".into() })?;
        Ok((message, fds))
    }

    fn receive_descriptors(&self) -> Result<Vec<OwnedFd>, GuardianError> {
        let mut space = cmsg_space!([RawFd; DESCRIPTORS_AT_ONCE]);
        let mut byte = [0u8];
        let mut vector = [IoSliceMut::new(&mut byte)];
        let message = recvmsg::<()>(self.raw(), &mut vector, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
            .map_err(|errno| GuardianError::channel("receiving descriptors", errno))?;
        let mut fds = Vec::new();
        for control in
            message.cmsgs().map_err(|errno| GuardianError::channel("receiving descriptors", errno))?
        {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just installed them for us.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        // Descriptors that do not fit into our table are cut off by the kernel.
        if fds.is_empty() {
            Err(GuardianError::channel("receiving descriptors", Errno::EMFILE))
        } else {
            Ok(fds)
        }
    }
}

fn send_error(errno: Errno) -> GuardianError {
    match errno {
        Errno::EPIPE | Errno::ECONNRESET => GuardianError::Ended,
        errno => GuardianError::channel("sending", errno),
    }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::Bytes;
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_message_with_descriptors_arrives_whole() {
        let (one, two) = Channel::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let sent = vec![Bytes(vec![7; 100_000]), Bytes(vec![])];
        let reader = std::thread::spawn(move || two.receive::<Vec<Bytes>>());
        one.send(&sent, &vec![file.as_fd(); 300]).unwrap();
        let (received, fds) = reader.join().unwrap().unwrap();
        assert_eq!((received, fds.len()), (sent, 300));
    }

    #[test]
    fn a_closed_end_is_an_error() {
        let (one, two) = Channel::pair().unwrap();
        drop(one);
        assert_eq!(two.receive::<u32>().unwrap_err(), GuardianError::Ended);
        assert_eq!(two.send(&1u32, &[]).unwrap_err(), GuardianError::Ended);
    }
}
