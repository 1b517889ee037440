//! Connections: made through a listener that had the name, as whom SO_PEERCRED tells.

use super::{FLAGS, MANY, Restoration, bind, start_listening};
use crate::{
    diag, name,
    queue::{self, Message},
    record::stasis::unix::v1::{Source, Waiting},
    sandbox, sys,
};
use nix::sys::socket::{AddressFamily, SockType, socket};
use prost::Message as _;
use stasis_plugin_api::{HookError, Result};
use std::{
    io::Read,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

/// How long a name may be taken by another task of the tree that needs it for the while.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most that may wait in a connection before it is accepted: the buffer of its sender bounds it.
const LARGEST: u64 = 64 << 20;

/// A listening socket, and an address that leads there.
struct Listener {
    socket: OwnedFd,
    address: Vec<u8>,
    file: Option<OwnedFd>,
}

impl Restoration<'_, '_> {
    /// A client that is not connected yet; with it, if others count on it, the listener for its connection.
    pub(super) fn client(&self) -> Result<Vec<OwnedFd>> {
        let client = self.own_socket()?;
        let mut made = vec![client];
        if self.record.hosts {
            let listener = self.private_listener(&self.peer_name()?)?;
            made.push(listener.socket);
            made.extend(listener.file);
        }
        Ok(made)
    }

    fn own_socket(&self) -> Result<OwnedFd> {
        let client = self.socket()?;
        if let Some(name) = self.name(0) {
            bind(client.as_fd(), name, self.kind)?;
        }
        Ok(client)
    }

    /// The address through which it was connected.
    fn peer_name(&self) -> Result<Vec<u8>> {
        match self.record.peer_address.is_empty() {
            false => Ok(self.record.peer_address.clone()),
            true => Err(HookError::invalid("the image does not say how it was connected")),
        }
    }

    fn private_listener(&self, name: &[u8]) -> Result<Listener> {
        let socket = self.socket()?;
        let file = match name::path(name) {
            Some(_) => Some(sandbox::bind(socket.as_fd(), name)?),
            None => {
                bind_patiently(socket.as_fd(), name)?;
                None
            }
        };
        start_listening(socket.as_fd(), MANY)?;
        let address = file.as_ref().map_or_else(|| name.to_vec(), |file| sys::address_of(file.as_fd()));
        Ok(Listener { socket, address, file })
    }

    /// The listener of a record, or a private one.
    fn listener(&self, source: Option<Source>, name: &[u8]) -> Result<Listener> {
        let socket = match source {
            Some(Source { listener, .. }) if listener != 0 => self.host.open_handle(listener)?,
            Some(Source { host, auxiliary, .. }) if host != 0 => self.host.open_auxiliary(host, auxiliary)?,
            _ => return self.private_listener(name),
        };
        let file = match (source, name::path(name)) {
            (Some(source), Some(_)) => Some(self.host.open_auxiliary(source.host, source.auxiliary + 1)?),
            _ => None,
        };
        let address = file.as_ref().map_or_else(|| name.to_vec(), |file| sys::address_of(file.as_fd()));
        Ok(Listener { socket, address, file })
    }

    /// Connects the client and takes its connection out of the listener's backlog.
    fn connect(&self, client: BorrowedFd<'_>, listener: &Listener) -> Result<OwnedFd> {
        // Other tasks may be about to do the same.
        sys::lock(listener.socket.as_fd()).map_err(|error| HookError::failed("locking a listener", error))?;
        sys::connect(client, &listener.address).map_err(|error| HookError::failed("connect", error))?;
        let wanted = inode(client)?;
        loop {
            let accepted =
                sys::accept(listener.socket.as_fd()).map_err(|error| HookError::failed("accept", error))?;
            let peer = diag::query_here(inode(accepted.as_fd())?)?.peer;
            if peer.map(u64::from) == Some(wanted) {
                return Ok(accepted);
            }
            self.host.warn("a process outside connected while the tree was being restored; it was cut off");
        }
    }

    pub(super) fn accepted(&self) -> Result<OwnedFd> {
        let name = self.name(0).ok_or_else(|| HookError::invalid("an accepted socket without a name"))?;
        let client = self.host.open_handle(self.record.peer_handle)?;
        let listener = self.listener(self.record.source, &name.address)?;
        self.connect(client.as_fd(), &listener)
    }

    pub(super) fn lost_client(&self) -> Result<Vec<OwnedFd>> {
        let client = self.own_socket()?;
        let listener = self.listener(self.record.source, &self.peer_name()?)?;
        let accepted = self.connect(client.as_fd(), &listener)?;
        Ok(self.with_listener(vec![client, accepted], listener))
    }

    /// An accepted socket has its listener's name, but the file is not its own.
    pub(super) fn lost_accepted(&self) -> Result<Vec<OwnedFd>> {
        let name = self.name(0).ok_or_else(|| HookError::invalid("an accepted socket without a name"))?;
        if self.record.source.is_some() || self.record.hosts {
            let client = self.socket()?;
            let listener = self.listener(self.record.source, &name.address)?;
            let accepted = self.connect(client.as_fd(), &listener)?;
            return Ok(self.with_listener(vec![accepted, client], listener));
        }
        // As several sockets can have one path.
        let (accepted, client) = self.pair()?;
        drop(sandbox::bind(accepted.as_fd(), &name.address)?);
        Ok(vec![accepted, client])
    }

    /// Others may count on it.
    fn with_listener(&self, mut made: Vec<OwnedFd>, listener: Listener) -> Vec<OwnedFd> {
        if self.record.hosts {
            made.push(listener.socket);
        }
        made
    }

    /// Datagram sockets: whoever is at the other end does not notice.
    pub(super) fn connect_datagram(&self) -> Result<()> {
        let record = self.record;
        if record.peer_address.is_empty() {
            return Ok(());
        }
        let fd = self.host.open_handle(self.handle(0)?)?;
        let connect = |address: &[u8]| {
            let what = || format!("connect to {}", name::shown(&record.peer_address));
            sys::connect(fd.as_fd(), address).map_err(|error| HookError::failed(what(), error))
        };
        if record.peer_closed {
            let gone = socket(AddressFamily::Unix, SockType::Datagram, FLAGS, None)
                .map_err(|errno| HookError::failed("socket", errno))?;
            return match name::path(&record.peer_address) {
                Some(_) => {
                    let file = sandbox::bind(gone.as_fd(), &record.peer_address)?;
                    connect(&sys::address_of(file.as_fd()))
                }
                None => {
                    bind_patiently(gone.as_fd(), &record.peer_address)?;
                    connect(&record.peer_address)
                }
            };
        }
        if record.peer_handle != 0 {
            let (address, _file) = self.address(record.peer_handle, &record.peer_address)?;
            return connect(&address);
        }
        match record.peer_path.is_empty() {
            true => connect(&record.peer_address),
            false => connect(&[record.peer_path.as_bytes(), b"\0"].concat()),
        }
        .map_err(|error| error.remedy("start the service that has this socket, then restore"))
    }

    /// A client goes into the backlog again, with what it had sent.
    pub(super) fn wait_again(&self) -> Result<()> {
        let client = self.host.open_handle(self.handle(0)?)?;
        let (address, _file) = self.address(self.record.peer_handle, &self.record.peer_address)?;
        sys::connect(client.as_fd(), &address).map_err(|error| HookError::failed("connect", error))?;
        let name = crate::waiting::blob(self.record.inode);
        let mut bytes = Vec::new();
        let read = self.host.blob_reader(&name).take(LARGEST).read_to_end(&mut bytes);
        read.map_err(|error| HookError::failed("reading queued data", error))?;
        let waiting = Waiting::decode(bytes.as_slice())
            .map_err(|error| HookError::invalid(format!("the image's waiting data: {error}")))?;
        queue::widen(client.as_fd());
        for parcel in waiting.parcels {
            let message = Message::of(parcel.data, parcel.credentials);
            queue::send(client.as_fd(), &[], self.kind == SockType::Stream, &message)?;
        }
        Ok(())
    }
}

fn inode(fd: BorrowedFd<'_>) -> Result<u64> {
    sys::inode(fd).map_err(|error| HookError::failed("fstat", error))
}

/// Binds to an abstract name that another task may have for an instant.
fn bind_patiently(socket: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    let began = Instant::now();
    loop {
        match sys::bind(socket, name) {
            Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) && began.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(1));
            }
            result => {
                return result.map_err(|error| {
                    HookError::failed(format!("bind to {}", name::shown(name)), error)
                        .remedy("end the process that has this name now")
                });
            }
        }
    }
}
