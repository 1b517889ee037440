//! From a record to live sockets.

use crate::{
    dump::blob,
    options,
    queue::{self, Message},
    record::stasis::unix::v1::{End, Node, Shape, Sockets},
    sys,
};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, listen, shutdown, socket, socketpair,
};
use stasis_plugin_api::{HookError, Host, ObjectInfo, Result};
use std::{
    fs,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{MetadataExt, PermissionsExt},
    },
};

pub(crate) fn create(host: &Host<'_>, object: &ObjectInfo, record: &Sockets) -> Result<Vec<OwnedFd>> {
    let kind = SockType::try_from(record.r#type)
        .map_err(|_| HookError::invalid(format!("{} is no socket type", record.r#type)))?;
    let wanted = if record.shape() == Shape::Pair { 2 } else { 1 };
    if record.ends.len() != wanted || object.handles.len() != wanted {
        return Err(HookError::invalid(format!("a record with {} ends of {wanted}", record.ends.len())));
    }
    let pair = || {
        socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|errno| HookError::failed("socketpair", errno))
    };
    match record.shape() {
        Shape::Pair => {
            let (first, second) = pair()?;
            Ok(if object.handles[0].role == 0 { vec![first, second] } else { vec![second, first] })
        }
        Shape::Orphan => {
            let (end, peer) = pair()?;
            let state = &record.ends[0];
            fill(host, object, 0, state, peer.as_fd(), kind)?;
            if state.reset {
                // A peer that is closed with unread data leaves ECONNRESET (net/unix/af_unix.c, unix_release_sock).
                sys::send(end.as_fd(), b"x", &[], None)
                    .map_err(|error| HookError::failed("sendmsg", error))?;
            }
            drop(peer);
            Ok(vec![end])
        }
        Shape::Single | Shape::Listener => {
            let socket = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)
                .map_err(|errno| HookError::failed("socket", errno))?;
            if !record.address.is_empty() {
                bind(&socket, record)?;
            }
            if record.shape() == Shape::Listener {
                let backlog = i32::try_from(record.backlog).unwrap_or(i32::MAX);
                Backlog::new(backlog)
                    .and_then(|backlog| listen(&socket, backlog))
                    .map_err(|errno| HookError::failed("listen", errno))?;
            }
            Ok(vec![socket])
        }
    }
}

/// Binds. The file of the dumped socket is still there, unless somebody removed it: it is replaced, but nothing else.
fn bind(socket: &OwnedFd, record: &Sockets) -> Result<()> {
    let Some(node) = &record.node else {
        return sys::bind(socket.as_fd(), &record.address).map_err(|error| HookError::failed("bind", error));
    };
    remove_old(node)?;
    let fail = |error: io::Error| HookError::failed(format!("bind to {}", node.path), error);
    sys::bind(socket.as_fd(), &record.address).map_err(fail)?;
    let failed = |error: io::Error| HookError::failed(format!("mode and owner of {}", node.path), error);
    std::os::unix::fs::lchown(&node.path, Some(node.uid), Some(node.gid)).map_err(failed)?;
    fs::set_permissions(&node.path, fs::Permissions::from_mode(node.mode)).map_err(failed)
}

fn remove_old(node: &Node) -> Result<()> {
    let stat = match fs::symlink_metadata(&node.path) {
        Ok(stat) => stat,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(HookError::failed(format!("stat of {}", node.path), error)),
    };
    if stat.mode() & libc::S_IFMT != libc::S_IFSOCK || (stat.dev(), stat.ino()) != (node.dev, node.ino) {
        return Err(HookError::invalid(format!(
            "{} exists and is not the socket that was dumped",
            node.path
        ))
        .remedy("move it away"));
    }
    fs::remove_file(&node.path).map_err(|error| HookError::failed(format!("removing {}", node.path), error))
}

pub(crate) fn link(host: &Host<'_>, object: &ObjectInfo, record: &Sockets) -> Result<()> {
    let kind = SockType::try_from(record.r#type)
        .map_err(|_| HookError::invalid(format!("{} is no socket type", record.r#type)))?;
    let mut ends = Vec::new();
    for (role, state) in (0u32..).zip(&record.ends) {
        let handle = object.handles.iter().find(|handle| handle.role == role);
        let handle = handle.ok_or_else(|| HookError::invalid(format!("no handle with role {role}")))?;
        ends.push((host.open_handle(handle.id)?, role, state));
    }
    if let [(first, ..), (second, ..)] = &ends[..] {
        fill(host, object, 0, &record.ends[0], second.as_fd(), kind)?;
        fill(host, object, 1, &record.ends[1], first.as_fd(), kind)?;
    }
    for (fd, _, state) in &ends {
        for (bit, how) in [(1, Shutdown::Read), (2, Shutdown::Write)] {
            // Of an orphan the closed peer did it.
            if state.shutdown & bit != 0 && !(record.shape() == Shape::Orphan && kind != SockType::Datagram) {
                shutdown(fd.as_raw_fd(), how).map_err(|errno| HookError::failed("shutdown", errno))?;
            }
        }
    }
    ends.iter().try_for_each(|(fd, _, state)| options::write(fd.as_fd(), &state.options))
}

/// Puts the queue of the end with this role back, by way of its peer.
fn fill(
    host: &Host<'_>,
    object: &ObjectInfo,
    role: u32,
    state: &End,
    peer: BorrowedFd<'_>,
    kind: SockType,
) -> Result<()> {
    if state.queue.is_empty() {
        return Ok(());
    }
    queue::widen(peer);
    let name = blob(object.id, role);
    let mut reader = host.blob_reader(&name);
    for saved in &state.queue {
        let mut data = Vec::new();
        reader
            .by_ref()
            .take(saved.length)
            .read_to_end(&mut data)
            .map_err(|error| HookError::failed("reading queued data", error))?;
        if data.len() as u64 != saved.length {
            return Err(HookError::invalid("the image has less queued data than its record says"));
        }
        let fds = saved.in_flight.iter().map(|id| host.open_handle(*id)).collect::<Result<Vec<_>>>()?;
        let credentials = saved.credentials.map(|c| libc::ucred { pid: c.pid, uid: c.uid, gid: c.gid });
        queue::send(peer, kind == SockType::Stream, &Message { data, fds, credentials })?;
    }
    Ok(())
}
