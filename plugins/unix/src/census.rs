//! What is known of every socket of the tree when all are described: who belongs to whom.

use crate::{
    diag::{self, Diag},
    queue::Message,
    sys::{self, PeerCredentials},
};
use stasis_plugin_api::{HandleInfo, HookError, Result};
use std::{collections::BTreeMap, os::fd::BorrowedFd};

/// One socket.
#[derive(Debug)]
pub(crate) struct Socket {
    /// Handle in the image.
    pub handle: u32,
    /// Inode number in sockfs, by which sockets know each other.
    pub ino: u64,
    /// `SOCK_*`.
    pub kind: i32,
    /// What sock_diag says.
    pub diag: Diag,
    /// Bound address without the family; empty if it is not bound.
    pub own: Vec<u8>,
    /// Address of the peer, likewise.
    pub peer: Vec<u8>,
    /// SO_PEERCRED, in our namespaces.
    pub credentials: PeerCredentials,
    /// SO_ACCEPTCONN.
    pub listening: bool,
    /// Both ends of one socketpair(2) that is still connected.
    pub paired: bool,
    /// What waits to be received. Seen once: an empty datagram is not shown to a second look (net/core/datagram.c,
    /// `peeked`).
    pub queue: Vec<Queued>,
}

/// A message in a queue.
#[derive(Debug)]
pub(crate) struct Queued {
    /// Without its descriptors, which core has.
    pub message: Message,
    /// Their number.
    pub fds: usize,
}

impl Socket {
    /// Looks at a socket.
    pub fn read(handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Self> {
        let int = |option, label: &str| {
            sys::get_int(fd, option).map_err(|error| HookError::failed(format!("reading {label}"), error))
        };
        let mut socket = Self {
            handle: handle.id,
            ino: handle.ino,
            kind: int(libc::SO_TYPE, "SO_TYPE")?,
            diag: diag::query(fd, handle.ino)?,
            own: sys::local_address(fd)?,
            peer: sys::peer_address(fd)?,
            credentials: sys::peer_credentials(fd)?,
            listening: int(libc::SO_ACCEPTCONN, "SO_ACCEPTCONN")? != 0,
            paired: false,
            queue: Vec::new(),
        };
        socket.paired = match socket.peer_ino() {
            None => false,
            Some(peer) if socket.kind == libc::SOCK_DGRAM => {
                // A datagram socket has such credentials from socketpair(2) alone. The peer may have gone over to another.
                socket.credentials.is_known()
                    && diag::query(fd, peer)?.peer.map(u64::from) == Some(socket.ino)
            }
            // Who was connected through a listener has its name, or the peer has.
            Some(_) => socket.own.is_empty() && socket.peer.is_empty(),
        };
        Ok(socket)
    }

    /// Inode number of a peer that lives.
    pub fn peer_ino(&self) -> Option<u64> {
        self.diag.peer.filter(|peer| *peer != 0).map(u64::from)
    }

    /// Whether it is or was connected through a listener of this abstract name: that is its peer's, or its own.
    fn knows(&self, kind: i32, address: &[u8]) -> bool {
        self.kind == kind && !self.listening && !self.paired && (self.peer == address || self.own == address)
    }

    /// Whether its peer was closed. A peer that was not accepted yet has no inode number either.
    pub fn peer_closed(&self) -> bool {
        self.diag.peer == Some(0) && (self.kind == libc::SOCK_DGRAM || self.diag.shutdown == 3)
    }
}

/// All of them, by inode number.
#[derive(Debug, Default)]
pub(crate) struct Census {
    sockets: BTreeMap<u64, Socket>,
}

impl Census {
    /// Enters one.
    pub fn insert(&mut self, socket: Socket) {
        self.sockets.insert(socket.ino, socket);
    }

    /// The one with this inode number.
    pub fn get(&self, ino: u64) -> Option<&Socket> {
        self.sockets.get(&ino)
    }

    /// Its peer, if that is in the tree.
    pub fn peer(&self, socket: &Socket) -> Option<&Socket> {
        self.get(socket.peer_ino()?)
    }

    /// A socket bound to this name.
    pub fn bound(&self, kind: i32, address: &[u8]) -> Option<&Socket> {
        let named = |socket: &&Socket| socket.kind == kind && socket.own == address;
        self.sockets.values().filter(|_| !address.is_empty()).find(named)
    }

    /// The listener of this name.
    pub fn listener(&self, kind: i32, address: &[u8]) -> Option<&Socket> {
        let fits = |socket: &&Socket| socket.listening && socket.kind == kind && socket.own == address;
        self.sockets.values().find(fits)
    }

    /// The listener in whose backlog a client waits.
    pub fn waits_at(&self, client: &Socket) -> Option<&Socket> {
        let waits = |socket: &&Socket| socket.diag.waiting.iter().any(|ino| u64::from(*ino) == client.ino);
        self.sockets.values().find(waits)
    }

    /// Whether it was accepted by a listener, whose name it has then.
    pub fn was_accepted(&self, socket: &Socket) -> bool {
        let connected = socket.kind != libc::SOCK_DGRAM && !socket.own.is_empty();
        connected
            && match self.peer(socket) {
                Some(peer) => !self.is_client(socket, peer),
                None => socket.diag.peer.is_some() && socket.peer.is_empty(),
            }
    }

    /// Whether this one of two connected sockets, both in the tree, is the client; else it was accepted. Where both have
    /// names it is mostly the older one: an accepted socket gets its inode number last.
    pub fn is_client(&self, socket: &Socket, peer: &Socket) -> bool {
        match (socket.own.is_empty(), peer.own.is_empty()) {
            (true, _) => true,
            (false, true) => false,
            (false, false) => {
                let listens = |one: &Socket| self.listener(one.kind, &one.own).is_some();
                match (listens(socket), listens(peer)) {
                    (true, false) => false,
                    (false, true) => true,
                    _ => socket.ino < peer.ino,
                }
            }
        }
    }

    /// The client among those connected to `address` with these credentials that makes the private listener for all.
    /// One whose peer was closed can do it too, but for a path it uses its own.
    pub fn host(&self, kind: i32, address: &[u8], credentials: PeerCredentials) -> Option<&Socket> {
        let client = |socket: &Socket| self.peer(socket).is_some_and(|peer| self.is_client(socket, peer));
        let lost = |socket: &Socket| crate::name::path(address).is_none() && socket.peer_closed();
        let fits = |socket: &&Socket| {
            socket.knows(kind, address)
                && socket.peer == address
                && socket.credentials == credentials
                && (client(socket) || lost(socket))
        };
        self.sockets.values().filter(fits).min_by_key(|socket| (!client(socket), socket.handle))
    }

    /// The socket that makes the private listener of this abstract name for accepted sockets whose clients are gone.
    pub fn host_of_lost(&self, kind: i32, address: &[u8]) -> Option<&Socket> {
        let known = || self.sockets.values().filter(|socket| socket.knows(kind, address));
        let client = known().find(|socket| socket.peer == address);
        let host = client.and_then(|client| self.host(kind, address, client.credentials));
        host.or_else(|| known().filter(|socket| socket.peer_closed()).min_by_key(|socket| socket.handle))
    }
}
