//! From live sockets to a record.

use crate::{
    diag::{self, Diag},
    options,
    queue::{self, Message},
    record::stasis::unix::v1::{Credentials, End, Message as Saved, Node, Shape, Sockets},
    sys,
};
use stasis_plugin_api::{Actor, Described, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result};
use std::{
    fs::{self, File},
    io::Write,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd},
        unix::fs::MetadataExt,
    },
};

fn name(ino: u64) -> String {
    format!("socket:[{ino}] (unix)")
}

/// The pair is named by the smaller inode number; that end has role 0.
pub(crate) fn describe(handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
    let diag = diag::query(fd, handle.ino)?;
    let peer = diag.peer.map_or(0, u64::from);
    let (identity, role) = match peer {
        0 => (handle.ino, 0),
        peer if handle.ino < peer => (handle.ino, 0),
        peer => (peer, 1),
    };
    let mut described = Described {
        identity: identity.to_string().into(),
        role,
        description: name(handle.ino).into(),
        ..Described::default()
    };
    for message in receive_queue(fd, handle.ino, &diag)? {
        described.in_flight.extend(message.fds.into_iter().map(IntoRawFd::into_raw_fd));
    }
    Ok(described)
}

fn receive_queue(fd: BorrowedFd<'_>, ino: u64, diag: &Diag) -> Result<Vec<Message>> {
    let option = |option, label: &str| {
        sys::get_int(fd, option).map_err(|error| HookError::failed(format!("reading {label}"), error))
    };
    if option(libc::SO_ACCEPTCONN, "SO_ACCEPTCONN")? != 0 {
        return Ok(Vec::new());
    }
    let kind = option(libc::SO_TYPE, "SO_TYPE")?;
    let state = sys::poll(fd).map_err(|error| HookError::failed("poll", error))?;
    if state & libc::POLLIN == 0 && diag.receive_queue == 0 {
        return Ok(Vec::new());
    }
    if state & libc::POLLPRI != 0 {
        return Err(HookError::unsupported(name(ino), "out-of-band data is in its queue", ""));
    }
    // Older kernels have no such option.
    if diag.receive_queue > 0 && sys::get_int(fd, 76).is_ok_and(|on| on != 0) {
        return Err(HookError::unsupported(name(ino), "messages with SCM_PIDFD are in its queue", ""));
    }
    if kind == libc::SOCK_STREAM {
        return queue::peek_stream(fd, diag.receive_queue as usize);
    }
    if state & libc::POLLERR != 0 {
        // Any look at the queue would report the error, and so take it away from the program.
        return Err(HookError::unsupported(
            name(ino),
            "an error is pending on a message socket",
            "let the program read from the socket first",
        ));
    }
    let silent = kind == libc::SOCK_SEQPACKET && diag.shutdown & 1 != 0;
    queue::peek_messages(fd, silent.then_some(diag.receive_queue as usize))
}

pub(crate) fn dump(host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Sockets>> {
    let first = object.handles.first().ok_or_else(|| HookError::invalid("an object without handles"))?;
    let label = name(first.ino);
    let holder = holder(host, object)?;
    let context = Context { host, holder, proc: File::from(host.open_proc(holder)?) };
    // Described in the order of `handles`, hence in flight in that order.
    let mut in_flight = object.in_flight.iter().copied();
    let mut record = Sockets::default();
    let mut sides = Vec::new();
    for handle in &object.handles {
        let fd = host.open_handle(handle.id)?;
        let diag = diag::query(fd.as_fd(), handle.ino)?;
        context.check_network(fd.as_fd(), &label)?;
        let queue = receive_queue(fd.as_fd(), handle.ino, &diag)?;
        let end = context.end(object.id, handle, fd.as_fd(), &diag, queue, &mut in_flight)?;
        sides.push((handle, fd, diag, end));
    }
    if in_flight.next().is_some() {
        return Err(HookError::invalid("the queue has lost descriptors since it was described"));
    }
    sides.sort_by_key(|(handle, ..)| handle.role);
    let (handle, fd, diag, _) = &sides[0];
    let get = |option| sys::get_int(fd.as_fd(), option);
    record.r#type = get(libc::SO_TYPE).map_err(|error| HookError::failed("reading SO_TYPE", error))?;
    let listening =
        get(libc::SO_ACCEPTCONN).map_err(|error| HookError::failed("reading SO_ACCEPTCONN", error))? != 0;
    record.address = sys::local_address(fd.as_fd())?;
    record.shape = shape(&label, sides.len(), diag, listening)?.into();
    record.backlog = if listening { diag.write_queue } else { 0 };
    for (_, fd, ..) in &sides {
        if matches!(record.shape(), Shape::Pair | Shape::Orphan)
            && !sys::local_address(fd.as_fd())?.is_empty()
        {
            return Err(HookError::unsupported(
                label,
                "it was connected through a listening or named socket",
                "connections with named unix sockets are not supported yet; close them first",
            ));
        }
    }
    if record.shape() == Shape::Single && !sides[0].3.queue.is_empty() {
        return Err(HookError::unsupported(
            label,
            "datagrams of other senders are in its queue",
            "let the program read them first",
        ));
    }
    record.node = context.node(&record.address, &label)?;
    let peer = peer_credentials(fd.as_fd())?;
    if sides.len() == 2 && peer_credentials(sides[1].1.as_fd())? != peer {
        return Err(HookError::unsupported(label, "its two ends have different SO_PEERCRED", ""));
    }
    let create_as = match peer {
        (0, ..) => Actor::ANY,
        peer => {
            let (actor, credentials) = context.creator(peer, &label)?;
            record.peer = Some(credentials);
            actor
        }
    };
    tracing::debug!(ino = handle.ino, shape = ?record.shape(), "unix socket");
    record.ends = sides.into_iter().map(|(.., end)| end).collect();

    let mut dumped = Dumped::new(record);
    dumped.create_as = create_as;
    dumped.uses =
        object.handles.iter().map(|handle| handle.id).chain(object.in_flight.iter().copied()).collect();
    if dumped.record.shape() == Shape::Orphan {
        // The peer that fills the queue lives in `create` only.
        dumped.after = object.in_flight.clone();
    }
    Ok(dumped)
}

fn shape(label: &str, ends: usize, diag: &Diag, listening: bool) -> Result<Shape> {
    match (ends, diag.peer) {
        (_, None) if listening && diag.receive_queue > 0 => Err(HookError::unsupported(
            label,
            format!("{} connections wait to be accepted", diag.receive_queue),
            "let the program accept them first",
        )),
        (_, None) if listening => Ok(Shape::Listener),
        (_, None) => Ok(Shape::Single),
        (_, Some(0)) => Ok(Shape::Orphan),
        (2, Some(_)) => Ok(Shape::Pair),
        (_, Some(peer)) => Err(HookError::unsupported(
            label,
            format!("its peer socket:[{peer}] is outside the tree, or not connected to it in turn"),
            "dump a tree that holds both ends, or close the connection first",
        )),
    }
}

/// A task whose namespaces are those of the socket; sockets that are only in flight are taken for the root's.
fn holder(host: &Host<'_>, object: &ObjectInfo) -> Result<i32> {
    let of_handles = object.handles.iter().find_map(|handle| handle.holders.first()).map(|holder| holder.pid);
    let of_tree = || host.tasks().first().map(|task| task.pid);
    of_handles.or_else(of_tree).ok_or_else(|| HookError::invalid("the tree has no task"))
}

fn peer_credentials(fd: BorrowedFd<'_>) -> Result<(i32, u32, u32)> {
    let bytes = sys::get_option(fd, libc::SO_PEERCRED, size_of::<libc::ucred>())
        .map_err(|error| HookError::failed("reading SO_PEERCRED", error))?;
    let word = |at: usize| -> Result<[u8; 4]> {
        let bytes = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.ok_or_else(|| HookError::invalid("SO_PEERCRED is too short"))
    };
    Ok((i32::from_ne_bytes(word(0)?), u32::from_ne_bytes(word(4)?), u32::from_ne_bytes(word(8)?)))
}

/// An id of our user namespace as one of the namespace that an id map belongs to.
fn inside(map: &str, outside: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u32>().ok());
        let (first, start, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let offset = outside.checked_sub(start).filter(|offset| *offset < count)?;
        first.checked_add(offset)
    })
}

/// A task whose namespaces count, and ways to ask for them.
struct Context<'a, 'h> {
    host: &'a Host<'h>,
    holder: i32,
    proc: File,
}

impl Context<'_, '_> {
    fn path(&self, file: &str) -> String {
        format!("/proc/self/fd/{}/{file}", self.proc.as_raw_fd())
    }

    fn check_network(&self, fd: BorrowedFd<'_>, label: &str) -> Result<()> {
        let stat = |result: std::io::Result<fs::Metadata>| {
            result.map(|stat| stat.ino()).map_err(|error| HookError::failed("stat of a net namespace", error))
        };
        let socket = stat(diag::namespace(fd)?.metadata())?;
        let task = stat(fs::metadata(self.path("ns/net")))?;
        if socket == task {
            return Ok(());
        }
        let why = format!("it belongs to net:[{socket}], and its holder {} is in net:[{task}]", self.holder);
        Err(HookError::unsupported(label, why, ""))
    }

    fn id(&self, map: &str, outside: u32, label: &str) -> Result<u32> {
        let path = self.path(map);
        let text = fs::read_to_string(&path)
            .map_err(|error| HookError::failed(format!("reading {map} of task {}", self.holder), error))?;
        inside(&text, outside).ok_or_else(|| {
            let why =
                format!("id {outside} of its creator or sender does not exist in the tree's user namespace");
            HookError::unsupported(label, why, "")
        })
    }

    /// What a process number of ours is within the tree.
    fn task(&self, host_pid: i32) -> Option<i32> {
        self.host.tasks().iter().find(|task| task.host_pid == host_pid).map(|task| task.pid)
    }

    /// As whom `create` must run so that SO_PEERCRED is what it was.
    fn creator(&self, (pid, uid, gid): (i32, u32, u32), label: &str) -> Result<(Actor, Credentials)> {
        let uid = self.id("uid_map", uid, label)?;
        let gid = self.id("gid_map", gid, label)?;
        let actor = if let Some(task) = self.task(pid) {
            Actor::task(task)
        } else if self.host.tasks().iter().any(|task| task.host_pid != task.pid) {
            let why =
                format!("it was created by process {pid}, which is gone or not in the tree's pid namespace");
            return Err(HookError::unsupported(label, why, "dump a tree that holds the creator"));
        } else if fs::exists(format!("/proc/{pid}")).unwrap_or(true) {
            let why = format!("it was created by process {pid}, which is not part of the tree");
            return Err(HookError::unsupported(label, why, "dump a tree that holds the creator"));
        } else {
            Actor::stand_in(pid)
        };
        Ok((actor.with_ids(uid, gid), Credentials { pid: actor.pid, uid, gid }))
    }

    /// Credentials of a queued message.
    fn sender(&self, credentials: libc::ucred, label: &str) -> Result<Option<Credentials>> {
        // 0: the message was sent without, and the kernel filled in nobody.
        if credentials.pid == 0 {
            return Ok(None);
        }
        let pid = self.task(credentials.pid).ok_or_else(|| {
            let why =
                format!("a message from process {}, outside the tree, is in its queue", credentials.pid);
            HookError::unsupported(label, why, "let the program read it first")
        })?;
        let uid = self.id("uid_map", credentials.uid, label)?;
        let gid = self.id("gid_map", credentials.gid, label)?;
        Ok(Some(Credentials { pid, uid, gid }))
    }

    fn end(
        &self,
        object: u32,
        handle: &HandleInfo,
        fd: BorrowedFd<'_>,
        diag: &Diag,
        queue: Vec<Message>,
        in_flight: &mut impl Iterator<Item = u32>,
    ) -> Result<End> {
        let label = name(handle.ino);
        let state = sys::poll(fd).map_err(|error| HookError::failed("poll", error))?;
        let mut end = End {
            shutdown: diag.shutdown,
            options: options::read(fd, &label)?,
            queue: Vec::new(),
            reset: state & libc::POLLERR != 0,
        };
        let blob = blob(object, handle.role);
        let mut blob = self.host.blob_writer(&blob);
        for message in queue {
            blob.write_all(&message.data).map_err(|error| HookError::failed("writing queued data", error))?;
            let handles: Vec<u32> = in_flight.by_ref().take(message.fds.len()).collect();
            if handles.len() != message.fds.len() {
                return Err(HookError::invalid("the queue has new descriptors since it was described"));
            }
            let credentials = match message.credentials {
                Some(credentials) => self.sender(credentials, &label)?,
                None => None,
            };
            end.queue.push(Saved { length: message.data.len() as u64, in_flight: handles, credentials });
        }
        Ok(end)
    }

    /// The file behind an address that is a path.
    fn node(&self, address: &[u8], label: &str) -> Result<Option<Node>> {
        let end = address.iter().position(|byte| *byte == 0).unwrap_or(address.len());
        if end == 0 {
            return Ok(None);
        }
        let refuse = |why: &str, remedy: &str| Err(HookError::unsupported(label, why, remedy));
        let Ok(path) = std::str::from_utf8(&address[..end]) else {
            return refuse("its path is not valid UTF-8", "");
        };
        let Some(relative) = path.strip_prefix('/') else {
            return refuse(
                "its path is relative to a directory that is not known",
                "bind it to an absolute path",
            );
        };
        if fs::read_link(self.path("root")).is_ok_and(|root| root.as_os_str() != "/") {
            return refuse("its holder has another root directory", "");
        }
        let stat = match fs::symlink_metadata(self.path(&format!("root/{relative}"))) {
            Ok(stat) if stat.mode() & libc::S_IFMT == libc::S_IFSOCK => stat,
            _ => {
                return refuse(
                    &format!("its file {path} was removed"),
                    "unlinked socket files are not supported yet",
                );
            }
        };
        let (uid, gid) = (self.id("uid_map", stat.uid(), label)?, self.id("gid_map", stat.gid(), label)?);
        let mode = stat.mode() & 0o7777;
        Ok(Some(Node { path: path.to_owned(), mode, uid, gid, dev: stat.dev(), ino: stat.ino() }))
    }
}

/// Where the data of a queue are.
pub(crate) fn blob(object: u32, role: u32) -> String {
    format!("queue/{object}/{role}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_translated() {
        let map = "         0     100000      65536\n     70000       1000          1\n";
        assert_eq!(inside(map, 100_000), Some(0));
        assert_eq!(inside(map, 165_535), Some(65_535));
        assert_eq!(inside(map, 165_536), None);
        assert_eq!(inside(map, 1000), Some(70_000));
        assert_eq!(inside("0 0 4294967295", 42), Some(42));
        assert_eq!(inside("", 0), None);
    }

    #[test]
    fn shapes() {
        let shape = |ends, peer, listening, receive_queue| {
            super::shape("s", ends, &Diag { peer, receive_queue, ..Diag::default() }, listening)
        };
        assert_eq!(shape(2, Some(7), false, 0).unwrap(), Shape::Pair);
        assert_eq!(shape(1, Some(0), false, 3).unwrap(), Shape::Orphan);
        assert_eq!(shape(1, None, true, 0).unwrap(), Shape::Listener);
        assert_eq!(shape(1, None, false, 0).unwrap(), Shape::Single);
        assert!(shape(1, Some(7), false, 0).unwrap_err().what.contains("socket:[7] is outside"));
        assert!(shape(1, None, true, 2).unwrap_err().what.contains("2 connections"));
    }
}
