//! A listener and a pair whose creator has ended: SO_PEERCRED still names it.

use libc::SOCK_STREAM;

use crate::ctl::{Ctl, Outcome, changed, ensure, same};
use crate::{sys, unix};
use std::os::fd::AsRawFd;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let address = unix::path(&ctl.work("socket"));
    let (here, there) = unix::pair(SOCK_STREAM)?;
    let child = ctl.child("creator", |_| {
        let listener = unix::listener(SOCK_STREAM, &address, 5)?;
        let (left, right) = unix::pair(SOCK_STREAM)?;
        let fds = [listener.as_raw_fd(), left.as_raw_fd(), right.as_raw_fd()];
        unix::send(&there, &[], b"take these", &fds).map(drop).map_err(Into::into)
    })?;
    let dead = child.pid.as_raw();
    child.join()?;
    drop(there);
    let mut fds = unix::receive(&here)?.fds.into_iter();
    let mut next = || fds.next().ok_or_else(|| changed("the child sent too little".into()));
    let (listener, left, right) = (next()?, next()?, next()?);
    drop(here);
    let client = unix::client(SOCK_STREAM, &address)?;
    let accepted = unix::accept(&listener)?;
    unix::send(&left, &[], b"to the right", &[])?;

    if ctl.wait()? {
        unix::data(&right)?;
    }

    let me = std::process::id() as i32;
    for (who, socket, pid) in
        [("client", &client, dead), ("accepted", &accepted, me), ("left", &left, dead), ("right", &right, dead)]
    {
        same(who, unix::peer_pid(socket)?, pid)?;
    }
    same("to the right", unix::data(&right)?, b"to the right".to_vec())?;
    unix::send(&client, &[], b"question", &[])?;
    same("question", unix::data(&accepted)?, b"question".to_vec())?;
    same("a new client", unix::peer_pid(unix::client(SOCK_STREAM, &address)?)?, dead)?;
    let again = sys::readiness(&listener, libc::POLLIN)?;
    ensure(again == libc::POLLIN, "the new client does not wait at the listener")
}
