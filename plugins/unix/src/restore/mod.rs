//! From a record to live sockets.
//!
//! `create` makes and connects, `link` fills the queues and lets listeners listen, `settle` does what would stand in the
//! way of that: connections of datagram sockets, shutdowns, options, filters.

mod connection;
mod fill;

use crate::{
    name, options,
    record::stasis::unix::v1::{Name, Node, Shape, Sockets},
    sandbox, sys,
};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, listen, shutdown, socket, socketpair,
};
use stasis_plugin_api::{HookError, Host, ObjectInfo, Result};
use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{MetadataExt, PermissionsExt},
    },
};

/// Nothing here may wait; core sets the flags of the image at the end.
const FLAGS: SockFlag = SockFlag::SOCK_CLOEXEC.union(SockFlag::SOCK_NONBLOCK);
/// More than ever wait while a tree is restored.
const MANY: i32 = 4096;

/// An object that is being restored.
struct Restoration<'a, 'h> {
    host: &'a Host<'h>,
    object: &'a ObjectInfo,
    record: &'a Sockets,
    kind: SockType,
}

impl<'a, 'h> Restoration<'a, 'h> {
    fn new(host: &'a Host<'h>, object: &'a ObjectInfo, record: &'a Sockets) -> Result<Self> {
        let kind = SockType::try_from(record.r#type)
            .map_err(|_| HookError::invalid(format!("{} is no socket type", record.r#type)))?;
        let wanted = if record.shape() == Shape::Pair { 2 } else { 1 };
        if record.ends.len() != wanted || object.handles.len() != wanted {
            return Err(HookError::invalid(format!("a record with {} ends of {wanted}", record.ends.len())));
        }
        // As another user this process has put its capabilities away.
        sys::raise_capabilities().map_err(|error| HookError::failed("capset", error))?;
        Ok(Self { host, object, record, kind })
    }

    /// The handle of an end.
    fn handle(&self, role: u32) -> Result<u32> {
        let handle = self.object.handles.iter().find(|handle| handle.role == role);
        let handle = handle.ok_or_else(|| HookError::invalid(format!("no handle with role {role}")))?;
        Ok(handle.id)
    }

    fn name(&self, role: usize) -> Option<&'a Name> {
        self.record.ends.get(role)?.name.as_ref()
    }

    fn socket(&self) -> Result<OwnedFd> {
        socket(AddressFamily::Unix, self.kind, FLAGS, None)
            .map_err(|errno| HookError::failed("socket", errno))
    }

    fn pair(&self) -> Result<(OwnedFd, OwnedFd)> {
        socketpair(AddressFamily::Unix, self.kind, None, FLAGS)
            .map_err(|errno| HookError::failed("socketpair", errno))
    }

    /// A socket with the name of the first end; the file, if there is one, by an O_PATH descriptor.
    fn named_socket(&self) -> Result<Vec<OwnedFd>> {
        let socket = self.socket()?;
        let file = match self.name(0) {
            Some(name) => bind(socket.as_fd(), name, self.kind)?,
            None => None,
        };
        Ok([socket].into_iter().chain(file).collect())
    }

    /// An address that leads to a socket of the tree, which has given the file of its name as its first auxiliary. What
    /// is returned besides must stay open as long as the address is used.
    fn address(&self, handle: u32, name: &[u8]) -> Result<(Vec<u8>, Option<OwnedFd>)> {
        if name::path(name).is_none() {
            return Ok((name.to_vec(), None));
        }
        let file = self.host.open_auxiliary(handle, 0)?;
        Ok((sys::address_of(file.as_fd()), Some(file)))
    }
}

pub(crate) fn create(host: &Host<'_>, object: &ObjectInfo, record: &Sockets) -> Result<Vec<OwnedFd>> {
    let this = Restoration::new(host, object, record)?;
    match record.shape() {
        Shape::Pair => {
            let (first, second) = this.pair()?;
            for (role, end) in [&first, &second].into_iter().enumerate() {
                if let Some(name) = this.name(role) {
                    bind(end.as_fd(), name, this.kind)?;
                }
            }
            Ok(if this.handle(0)? == object.handles[0].id {
                vec![first, second]
            } else {
                vec![second, first]
            })
        }
        Shape::Orphan => {
            let (end, peer) = this.pair()?;
            if let Some(name) = this.name(0) {
                bind(end.as_fd(), name, this.kind)?;
            }
            Ok(vec![end, peer])
        }
        Shape::Single => this.named_socket(),
        Shape::Listener => {
            let made = this.named_socket()?;
            // Through an abstract name the tree's own connections are made, in `create` of others.
            if made.len() == 1 {
                start_listening(made[0].as_fd(), MANY)?;
            }
            Ok(made)
        }
        Shape::Client => this.client(),
        Shape::Accepted => Ok(vec![this.accepted()?]),
        Shape::LostClient => this.lost_client(),
        Shape::LostAccepted => this.lost_accepted(),
        Shape::Waiting => {
            let socket = this.socket()?;
            if let Some(name) = this.name(0) {
                bind(socket.as_fd(), name, this.kind)?;
            }
            Ok(vec![socket])
        }
    }
}

fn start_listening(socket: BorrowedFd<'_>, backlog: i32) -> Result<()> {
    let socket = socket.try_clone_to_owned().map_err(|error| HookError::failed("dup", error))?;
    Backlog::new(backlog)
        .and_then(|backlog| listen(&socket, backlog))
        .map_err(|errno| HookError::failed("listen", errno))
}

/// Binds a socket, with its file where it was, or with the name alone if the file was removed. Gives the file.
fn bind(socket: BorrowedFd<'_>, name: &Name, kind: SockType) -> Result<Option<OwnedFd>> {
    if name::path(&name.address).is_none() {
        let failed = |error| HookError::failed(format!("bind to {}", name::shown(&name.address)), error);
        sys::bind(socket, &name.address).map_err(failed)?;
        return Ok(None);
    }
    let Some(node) = &name.node else { return sandbox::bind(socket, &name.address).map(Some) };
    remove_old(node, kind)?;
    bind_at(socket, name, node)?;
    let failed = |error: io::Error| HookError::failed(format!("mode and owner of {}", node.path), error);
    std::os::unix::fs::lchown(&node.path, Some(node.uid), Some(node.gid)).map_err(failed)?;
    fs::set_permissions(&node.path, fs::Permissions::from_mode(node.mode)).map_err(failed)?;
    let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_CLOEXEC;
    let file = nix::fcntl::open(node.path.as_str(), flags, nix::sys::stat::Mode::empty());
    file.map(Some).map_err(|errno| HookError::failed(format!("open {}", node.path), errno))
}

/// The address may be relative to a directory of then: from there on the paths must agree.
fn bind_at(socket: BorrowedFd<'_>, name: &Name, node: &Node) -> Result<()> {
    let failed = |error: io::Error| HookError::failed(format!("bind to {}", node.path), error);
    let address = name::path(&name.address).unwrap_or_default();
    let below = match address.starts_with(b"/") {
        true => "/",
        false => {
            let relative = String::from_utf8_lossy(address);
            let directory = node.path.strip_suffix(relative.trim_start_matches("./"));
            directory.ok_or_else(|| {
                HookError::invalid(format!(
                    "{relative} is the name of {}, but does not lead there",
                    node.path
                ))
            })?
        }
    };
    let before = nix::fcntl::open(
        ".",
        nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_DIRECTORY | nix::fcntl::OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    );
    let before = before.map_err(|errno| HookError::failed("open the working directory", errno))?;
    nix::unistd::chdir(below).map_err(|errno| HookError::failed(format!("chdir to {below}"), errno))?;
    let bound = sys::bind(socket, &name.address).map_err(failed);
    nix::unistd::fchdir(before.as_fd()).map_err(|errno| HookError::failed("fchdir", errno))?;
    bound
}

/// The file of the dumped socket is still there, unless somebody removed it: it is replaced, but nothing else is.
fn remove_old(node: &Node, kind: SockType) -> Result<()> {
    let stat = match fs::symlink_metadata(&node.path) {
        Ok(stat) => stat,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(HookError::failed(format!("stat of {}", node.path), error)),
    };
    let refuse = |what: &str| {
        Err(HookError::invalid(format!("{} exists and {what}", node.path)).remedy("move it away"))
    };
    if stat.mode() & libc::S_IFMT != libc::S_IFSOCK {
        return refuse("is no socket");
    }
    if (stat.dev(), stat.ino()) != (node.dev, node.ino) && in_use(&node.path, kind)? {
        return refuse("is a socket that somebody uses, not the one that was dumped");
    }
    fs::remove_file(&node.path).map_err(|error| HookError::failed(format!("removing {}", node.path), error))
}

/// Whether a live socket is behind a file. Asked by a socket of another type, which none takes notice of.
fn in_use(path: &str, kind: SockType) -> Result<bool> {
    let other = if kind == SockType::Datagram { SockType::Stream } else { SockType::Datagram };
    let probe = socket(AddressFamily::Unix, other, FLAGS, None)
        .map_err(|errno| HookError::failed("socket", errno))?;
    let address = [path.as_bytes(), b"\0"].concat();
    let answer = sys::connect(probe.as_fd(), &address);
    Ok(!answer.is_err_and(|error| error.raw_os_error() == Some(libc::ECONNREFUSED)))
}

pub(crate) fn link(host: &Host<'_>, object: &ObjectInfo, record: &Sockets) -> Result<()> {
    let this = Restoration::new(host, object, record)?;
    this.fill()?;
    match record.shape() {
        Shape::Listener => {
            let backlog = i32::try_from(record.backlog).unwrap_or(i32::MAX);
            start_listening(host.open_handle(this.handle(0)?)?.as_fd(), backlog)
        }
        Shape::Single if !record.late => this.connect_datagram(),
        _ => Ok(()),
    }
}

pub(crate) fn settle(host: &Host<'_>, object: &ObjectInfo, record: &Sockets) -> Result<()> {
    let this = Restoration::new(host, object, record)?;
    match record.shape() {
        Shape::Single if record.late => this.connect_datagram()?,
        Shape::Waiting => this.wait_again()?,
        _ => {}
    }
    // Of these the closed peer does it.
    let by_peer = matches!(record.shape(), Shape::Orphan | Shape::LostClient | Shape::LostAccepted)
        && this.kind != SockType::Datagram;
    for (role, end) in (0..).zip(&record.ends) {
        let fd = host.open_handle(this.handle(role)?)?;
        for (bit, how) in [(1, Shutdown::Read), (2, Shutdown::Write)] {
            if end.shutdown & bit != 0 && !by_peer {
                shutdown(fd.as_raw_fd(), how).map_err(|errno| HookError::failed("shutdown", errno))?;
            }
        }
        options::write(fd.as_fd(), end)?;
    }
    Ok(())
}
