//! Connected unix sockets: data in both directions, credentials of the peer, a message with a pipe's end in flight.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, getsockopt, recvmsg, sendmsg,
    socketpair, sockopt,
};

use crate::ctl::{Ctl, Outcome, changed, ensure, same};
use crate::sys;

fn pair(kind: SockType) -> Outcome<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_NONBLOCK)?)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let (left, right) = pair(SockType::Stream)?;
    let (packet_left, packet_right) = pair(SockType::SeqPacket)?;
    let (flying, writer) = sys::pipe(0)?;
    sys::write(&writer, b"through the pipe")?;
    sys::write(&left, b"to the right")?;
    sys::write(&right, b"to the left")?;
    sys::write(&packet_left, b"one")?;
    sys::write(&packet_left, b"two")?;
    sendmsg::<()>(
        packet_left.as_raw_fd(),
        &[IoSlice::new(b"with a pipe")],
        &[ControlMessage::ScmRights(&[flying.as_raw_fd()])],
        MsgFlags::empty(),
        None,
    )?;
    // Nobody but the message holds the reading end now.
    drop(flying);
    let me = std::process::id() as i32;
    let child = ctl.child("peer", |ctl| {
        ctl.wait_as("peer")?;
        sys::write(&left, b"!").map(drop).map_err(Into::into)
    })?;
    ctl.await_ready("peer")?;

    if ctl.wait()? {
        sys::read(&packet_right, 100)?;
    }

    child.join()?;
    same("pid of the peer", getsockopt(&right, sockopt::PeerCredentials)?.pid(), me)?;
    same("to the left", sys::read(&left, 100)?, b"to the left".to_vec())?;
    same("to the right", sys::read(&right, 100)?, b"to the right!".to_vec())?;
    same("packet", sys::read(&packet_right, 100)?, b"one".to_vec())?;
    same("packet", sys::read(&packet_right, 100)?, b"two".to_vec())?;
    let mut buffer = [0; 100];
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut room = [IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<()>(packet_right.as_raw_fd(), &mut room, Some(&mut space), MsgFlags::empty())?;
    let landed = message.cmsgs()?.find_map(|m| match m {
        // SAFETY: the kernel has just made this descriptor for us.
        ControlMessageOwned::ScmRights(fds) => Some(unsafe { OwnedFd::from_raw_fd(fds[0]) }),
        _ => None,
    });
    let landed = landed.ok_or_else(|| changed("the message brought no descriptor".into()))?;
    same("through the pipe", sys::read(&landed, 100)?, b"through the pipe".to_vec())?;
    drop((packet_left, left));
    ensure(sys::read(&right, 1)?.is_empty(), "the closed connection is not at its end")
}
