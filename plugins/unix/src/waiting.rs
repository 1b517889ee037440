//! Data on connections that nobody has accepted yet: they can be had only by accepting, when the tree is about to be killed.

use crate::{
    census::{Census, Socket},
    credentials::Context,
    dump::label,
    receive::receive_queue,
    record::stasis::unix::v1::{Parcel, Waiting},
    sys,
};
use prost::Message as _;
use stasis_plugin_api::{HandleInfo, HookError, Host, ObjectInfo, Result};
use std::{
    io::Write,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// Where the data of a connection are that was not accepted yet.
pub(crate) fn blob(ino: u64) -> String {
    format!("waiting/{ino}")
}

/// Accepts what waits at a listener, if there is something to read, and saves that.
pub(crate) fn commit(host: &Host<'_>, census: &Census, object: &ObjectInfo) -> Result<()> {
    let Some(handle) = object.handles.first() else { return Ok(()) };
    let Some(listener) = census.get(handle.ino).filter(|socket| socket.listening) else { return Ok(()) };
    let unread = |ino: &u32| -> Result<bool> {
        let Some(client) = census.get(u64::from(*ino)) else { return Ok(false) };
        let bytes = sys::unread_by_peer(host.open_handle(client.handle)?.as_fd());
        Ok(bytes.map_err(|error| HookError::failed("SIOCOUTQ", error))? > 0)
    };
    let Some(last) = last_where(&listener.diag.waiting, unread)? else { return Ok(()) };
    let context = Context::new(host, object)?;
    let fd = host.open_handle(handle.id)?;
    for _ in 0..=last {
        let accepted = accept(fd.as_fd(), &label(listener.ino))?;
        save_waiting(&context, accepted.as_fd(), listener.kind)?;
        // Kept open: its client is not to see an end, should the dump fail after all.
        std::mem::forget(accepted);
    }
    Ok(())
}

fn last_where<T>(list: &[T], mut test: impl FnMut(&T) -> Result<bool>) -> Result<Option<usize>> {
    let mut last = None;
    for (at, one) in list.iter().enumerate() {
        if test(one)? {
            last = Some(at);
        }
    }
    Ok(last)
}

fn accept(listener: BorrowedFd<'_>, label: &str) -> Result<OwnedFd> {
    // The open file description may be in blocking mode, but somebody waits: the tree is frozen.
    let state = sys::poll(listener).map_err(|error| HookError::failed("poll", error))?;
    if state & libc::POLLIN == 0 {
        return Err(HookError::invalid(format!("nobody waits to be accepted at {label} any more")));
    }
    sys::accept(listener).map_err(|error| HookError::failed("accept", error))
}

fn save_waiting(context: &Context<'_, '_>, fd: BorrowedFd<'_>, kind: i32) -> Result<()> {
    let ino = sys::inode(fd).map_err(|error| HookError::failed("fstat", error))?;
    let info = HandleInfo { ino, ..HandleInfo::default() };
    let socket = Socket::read(&info, fd)?;
    debug_assert_eq!(socket.kind, kind, "an accepted socket is of the listener's type");
    let Some(client) = socket.peer_ino() else { return Ok(()) };
    let label = format!("a connection of {} that waited to be accepted", label(client));
    let mut waiting = Waiting::default();
    for message in receive_queue(context.host, fd, &socket, &label)? {
        if !message.fds.is_empty() {
            return Err(HookError::unsupported(label, "descriptors are in flight in it", "try again"));
        }
        let credentials = match message.credentials {
            Some(credentials) => context.sender(credentials, false, &label)?,
            None => None,
        };
        waiting.parcels.push(Parcel { data: message.data, credentials });
    }
    let name = blob(client);
    let mut blob = context.host.blob_writer(&name);
    blob.write_all(&waiting.encode_to_vec()).map_err(|error| HookError::failed("writing queued data", error))
}
