//! Sockets in flight: in each other's queues, in their own, and several deep; held by nobody else.

use std::os::fd::AsRawFd;

use libc::{SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM};

use crate::ctl::{Ctl, Outcome, changed, ensure, same};
use crate::{sys, unix};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let address = unix::path(&ctl.work("socket"));
    let listener = unix::listener(SOCK_STREAM, &address, 3)?;
    // A connection whose accepted side is in flight, in a message whose receiver is in flight, too.
    let (client, accepted) = (unix::client(SOCK_STREAM, &address)?, unix::accept(&listener)?);
    let (outer_in, outer_out) = unix::pair(SOCK_SEQPACKET)?;
    let (inner_in, inner_out) = unix::pair(SOCK_DGRAM)?;
    unix::send(&inner_in, &[], b"inner", &[accepted.as_raw_fd()])?;
    unix::send(&outer_in, &[], b"outer", &[inner_out.as_raw_fd(), inner_in.as_raw_fd()])?;
    unix::send(&client, &[], b"to the far side", &[])?;
    drop((accepted, inner_in, inner_out));
    // Each in the queue of the other; and one in its own.
    let (a_in, a_out) = unix::pair(SOCK_STREAM)?;
    let (b_in, b_out) = unix::pair(SOCK_STREAM)?;
    unix::send(&a_in, &[], b"ab", &[b_out.as_raw_fd()])?;
    unix::send(&b_in, &[], b"ba", &[a_out.as_raw_fd()])?;
    let (own_in, own_out) = unix::pair(SOCK_STREAM)?;
    unix::send(&own_in, &[], b"own", &[own_out.as_raw_fd()])?;
    // A stream with descriptors between plain data.
    let (s_in, s_out) = unix::pair(SOCK_STREAM)?;
    let (reader, writer) = sys::pipe(0)?;
    sys::write(&writer, b"piped")?;
    unix::send(&s_in, &[], b"plain ", &[])?;
    unix::send(&s_in, &[], b"carrier ", &[reader.as_raw_fd(), listener.as_raw_fd()])?;
    unix::send(&s_in, &[], b"tail", &[])?;
    drop((reader, listener));

    if ctl.wait()? {
        unix::receive(&outer_out)?;
    }

    let outer = unix::receive(&outer_out)?;
    same("outer", outer.data, b"outer".to_vec())?;
    let inner_out = outer.fds.into_iter().next().ok_or_else(|| changed("nothing in the outer message".into()))?;
    let inner = unix::receive(&inner_out)?;
    same("inner", inner.data, b"inner".to_vec())?;
    let accepted = inner.fds.into_iter().next().ok_or_else(|| changed("nothing in the inner message".into()))?;
    same("name of what flew", unix::name(&accepted)?, address.clone())?;
    same("to the far side", unix::data(&accepted)?, b"to the far side".to_vec())?;
    unix::send(&accepted, &[], b"and back", &[])?;
    same("and back", unix::data(&client)?, b"and back".to_vec())?;

    let from_a = unix::receive(&a_out)?;
    let from_b = unix::receive(&b_out)?;
    same("ab", from_a.data, b"ab".to_vec())?;
    same("ba", from_b.data, b"ba".to_vec())?;
    // What flew is the very same open file description: a flag set here is seen there.
    sys::fcntl(&b_out, libc::F_SETFL, 0)?;
    same("flags of b", sys::fcntl(&from_a.fds[0], libc::F_GETFL, 0)? & libc::O_NONBLOCK, 0)?;
    unix::send(&a_in, &[], b"more", &[])?;
    same("more", unix::data(&from_b.fds[0])?, b"more".to_vec())?;
    let own = unix::receive(&own_out)?;
    same("own", (own.data, own.fds.len()), (b"own".to_vec(), 1))?;

    same("plain", sys::read(&s_out, 3)?, b"pla".to_vec())?;
    same("plain", sys::read(&s_out, 3)?, b"in ".to_vec())?;
    let carrier = unix::receive(&s_out)?;
    same("descriptors of the carrier", carrier.fds.len(), 2)?;
    ensure(carrier.data.starts_with(b"carrier "), "descriptors came with other data")?;
    same("piped", sys::read(&carrier.fds[0], 9)?, b"piped".to_vec())?;
    let late = unix::client(SOCK_STREAM, &address)?;
    unix::send(&late, &[], b"late", &[])?;
    same("late", unix::data(unix::accept(&carrier.fds[1])?)?, b"late".to_vec())
}
