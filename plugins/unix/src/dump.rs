//! From live sockets to a record.

use crate::{
    EXTERNAL_SOCKETS,
    census::{Census, Queued, Socket},
    credentials::Context,
    name, options,
    queue::Message,
    receive::receive_queue,
    record::stasis::unix::v1::{End, Message as Saved, Name, Shape, Sockets, Source},
    sys,
};
use stasis_plugin_api::{Described, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result};
use std::{
    io::Write,
    os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd},
};

pub(crate) fn label(ino: u64) -> String {
    format!("socket:[{ino}] (unix)")
}

/// A pair is named by the smaller inode number; that end has role 0. Queues are not looked at in a dry run: a look changes
/// options of the socket for a moment.
pub(crate) fn describe(
    host: &Host<'_>,
    census: &mut Census,
    handle: &HandleInfo,
    fd: BorrowedFd<'_>,
) -> Result<Described> {
    let socket = Socket::read(handle, fd)?;
    let (identity, role) = match socket.peer_ino().filter(|_| socket.paired) {
        Some(peer) if peer < socket.ino => (peer, 1),
        _ => (socket.ino, 0),
    };
    let mut described = Described {
        identity: identity.to_string().into(),
        role,
        description: label(socket.ino).into(),
        ..Described::default()
    };
    let mut queue = Vec::new();
    let messages = match host.is_dry_run() {
        false => receive_queue(host, fd, &socket, &label(socket.ino))?,
        true => {
            if !socket.listening && socket.diag.receive_queue > 0 {
                let why = "a dry run does not look into its queue, where descriptors may be that others seem to lack";
                host.warn(&format!("{}: {why}", label(socket.ino)));
            }
            Vec::new()
        }
    };
    for mut message in messages {
        let fds = std::mem::take(&mut message.fds);
        queue.push(Queued { fds: fds.len(), message });
        described.in_flight.extend(fds.into_iter().map(IntoRawFd::into_raw_fd));
    }
    census.insert(Socket { queue, ..socket });
    Ok(described)
}

/// One end of the object.
struct Side<'a> {
    socket: &'a Socket,
    fd: OwnedFd,
    role: u32,
}

pub(crate) fn dump(host: &Host<'_>, census: &Census, object: &ObjectInfo) -> Result<Dumped<Sockets>> {
    let context = Context::new(host, object)?;
    let unknown = || HookError::invalid("a socket that was not described");
    // Described in the order of `handles`, hence in flight in that order.
    let mut in_flight = object.in_flight.iter().copied();
    let mut sides = Vec::new();
    let mut ends = Vec::new();
    for handle in &object.handles {
        let socket = census.get(handle.ino).ok_or_else(unknown)?;
        let fd = host.open_handle(handle.id)?;
        context.check_network(fd.as_fd(), &label(socket.ino))?;
        let dumper = Dumper { context: &context, census, label: label(socket.ino) };
        ends.push((handle.role, dumper.end(object.id, handle.role, socket, fd.as_fd(), &mut in_flight)?));
        sides.push(Side { socket, fd, role: handle.role });
    }
    if in_flight.next().is_some() {
        return Err(HookError::invalid("more descriptors are in flight than the queue has"));
    }
    sides.sort_by_key(|side| side.role);
    ends.sort_by_key(|(role, _)| *role);
    let first = sides.first().ok_or_else(|| HookError::invalid("an object without handles"))?;
    let dumper = Dumper { context: &context, census, label: label(first.socket.ino) };
    let mut dumped = Dumped::new(Sockets {
        r#type: first.socket.kind,
        ends: ends.into_iter().map(|(_, end)| end).collect(),
        inode: first.socket.ino,
        ..Sockets::default()
    });
    if let [_, second] = &sides[..]
        && second.socket.credentials != first.socket.credentials
    {
        return Err(HookError::unsupported(
            dumper.label,
            "its two ends have different SO_PEERCRED",
            "close it first",
        ));
    }
    dumped.uses =
        object.handles.iter().map(|handle| handle.id).chain(object.in_flight.iter().copied()).collect();
    let senders = dumped.record.ends.iter().flat_map(|end| &end.queue).map(|message| message.sender_handle);
    dumped.uses.extend(senders.filter(|handle| *handle != 0).collect::<Vec<_>>());
    if sides.len() == 1 {
        dumper.single(first.socket, &mut dumped)?;
    }
    dumper.actors(first, &mut dumped)?;
    tracing::debug!(ino = first.socket.ino, shape = ?dumped.record.shape(), "unix socket");
    Ok(dumped)
}

/// What the records of one object are made with.
struct Dumper<'a, 'c, 'h> {
    context: &'a Context<'c, 'h>,
    census: &'a Census,
    label: String,
}

impl Dumper<'_, '_, '_> {
    fn end(
        &self,
        object: u32,
        role: u32,
        socket: &Socket,
        fd: BorrowedFd<'_>,
        in_flight: &mut impl Iterator<Item = u32>,
    ) -> Result<End> {
        let state = sys::poll(fd).map_err(|error| HookError::failed("poll", error))?;
        let mut end =
            End { shutdown: socket.diag.shutdown, reset: state & libc::POLLERR != 0, ..End::default() };
        end.name = match self.census.was_accepted(socket) {
            // The file is the listener's.
            true => Some(Name { address: socket.own.clone(), node: None }),
            false => name::read(self.context, fd, &socket.own, &self.label)?,
        };
        options::read(fd, &mut end, &self.label)?;
        // SO_PASSPIDFD (asm-generic/socket.h) gives the sender, too. Older kernels do not have it.
        let shown = [libc::SO_PASSCRED, 76].map(|option| sys::get_int(fd, option).is_ok_and(|on| on != 0));
        let blob = blob(object, role);
        let mut blob = self.context.host.blob_writer(&blob);
        for queued in &socket.queue {
            blob.write_all(&queued.message.data)
                .map_err(|error| HookError::failed("writing queued data", error))?;
            let saved = self.message(socket, queued, shown.contains(&true), in_flight)?;
            end.queue.push(saved);
        }
        Ok(end)
    }

    fn message(
        &self,
        socket: &Socket,
        Queued { message, fds }: &Queued,
        shown: bool,
        in_flight: &mut impl Iterator<Item = u32>,
    ) -> Result<Saved> {
        let handles: Vec<u32> = in_flight.by_ref().take(*fds).collect();
        if handles.len() != *fds {
            return Err(HookError::invalid("fewer descriptors are in flight than were described"));
        }
        let credentials = match message.credentials {
            Some(credentials) => self.context.sender(credentials, shown, &self.label)?,
            None => None,
        };
        // Of connected ones only datagrams have senders, and those can be others than the peer.
        let sender = if socket.kind == libc::SOCK_DGRAM { message.sender.clone() } else { Vec::new() };
        let known = self.census.bound(socket.kind, &sender).map_or(0, |known| known.handle);
        Ok(Saved {
            length: message.data.len() as u64,
            in_flight: handles,
            credentials,
            sender,
            sender_handle: known,
        })
    }

    /// What a socket is to others, if it is not one end of a whole pair.
    fn single(&self, socket: &Socket, dumped: &mut Dumped<Sockets>) -> Result<()> {
        if socket.listening {
            return self.listener(socket, dumped);
        }
        let named = !(socket.own.is_empty() && socket.peer.is_empty());
        let dgram = socket.kind == libc::SOCK_DGRAM;
        let shape = match (socket.diag.peer, self.census.peer(socket)) {
            (None, _) => Shape::Single,
            (Some(0), _) if let Some(listener) = self.census.waits_at(socket) => {
                return self.waiting(socket, listener, dumped);
            }
            (Some(0), _) if !socket.peer_closed() => return self.external(socket, dumped),
            (Some(0), _) if dgram && socket.credentials.is_known() => Shape::Orphan,
            (Some(0), _) if dgram => {
                dumped.record.peer_address = socket.peer.clone();
                dumped.record.peer_closed = true;
                Shape::Single
            }
            (Some(0), _) if !named => Shape::Orphan,
            (Some(0), _) if socket.peer.is_empty() => Shape::LostAccepted,
            (Some(0), _) => Shape::LostClient,
            // The other end of a pair would be in this object, if it were in the tree.
            (Some(_), None) => return self.external(socket, dumped),
            (Some(_), Some(peer)) if dgram => return self.datagram_peer(socket, peer, dumped),
            (Some(_), Some(peer)) => {
                dumped.record.peer_handle = peer.handle;
                dumped.uses.push(peer.handle);
                match self.census.is_client(socket, peer) {
                    true => Shape::Client,
                    false => Shape::Accepted,
                }
            }
        };
        dumped.record.set_shape(shape);
        match shape {
            // Whom `create` gives an auxiliary end that is closed later.
            Shape::Orphan => dumped.auxiliaries = 1,
            Shape::LostClient => {
                dumped.auxiliaries = 1;
                dumped.record.peer_address = socket.peer.clone();
                self.source(socket, socket, dumped)?;
            }
            Shape::LostAccepted => {
                dumped.auxiliaries = 1;
                self.source_of_lost(socket, dumped);
            }
            Shape::Client => {
                dumped.record.peer_address = socket.peer.clone();
                let host = self.census.host(socket.kind, &socket.peer, socket.credentials);
                // With a tree's own listener nobody needs to make one.
                if self.own_listener(socket)?.is_none() && host.is_some_and(|host| host.ino == socket.ino) {
                    dumped.record.hosts = true;
                    dumped.auxiliaries = 1 + u32::from(name::path(&socket.peer).is_some());
                }
            }
            Shape::Accepted => {
                if let Some(client) = self.census.peer(socket) {
                    dumped.after.push(client.handle);
                    self.source(socket, client, dumped)?;
                }
            }
            _ => dumped.auxiliaries = u32::from(name::path(&socket.own).is_some()),
        }
        Ok(())
    }

    /// The listener of the tree through which a client can be connected again: where names are abstract, nobody else can
    /// have the name at the same time.
    fn own_listener(&self, client: &Socket) -> Result<Option<&Socket>> {
        let listener = self.census.listener(client.kind, &client.peer);
        match listener.filter(|_| name::path(&client.peer).is_none()) {
            Some(listener) if listener.credentials != client.credentials => Err(HookError::unsupported(
                &self.label,
                format!(
                    "it was connected at {} before another process listened there",
                    name::shown(&client.peer)
                ),
                "close the connection first",
            )),
            listener => Ok(listener),
        }
    }

    /// Through which listener `socket`, a client or its other end, comes back.
    fn source(&self, socket: &Socket, client: &Socket, dumped: &mut Dumped<Sockets>) -> Result<()> {
        if let Some(listener) = self.own_listener(client)? {
            through(dumped, Source { listener: listener.handle, ..Source::default() });
            return Ok(());
        }
        let host = self.census.host(client.kind, &client.peer, client.credentials);
        self.hosted(socket, host, dumped);
        Ok(())
    }

    fn hosted(&self, socket: &Socket, host: Option<&Socket>, dumped: &mut Dumped<Sockets>) {
        match host {
            Some(host) if host.ino == socket.ino => {
                dumped.record.hosts = true;
                dumped.auxiliaries += 1;
            }
            Some(host) => {
                // One that has lost its peer has that as the first.
                let auxiliary = u32::from(host.peer_closed());
                through(dumped, Source { listener: 0, host: host.handle, auxiliary });
            }
            None => {}
        }
    }

    /// The same for an accepted socket whose client is gone, if its name is abstract; a path can be had by several.
    fn source_of_lost(&self, accepted: &Socket, dumped: &mut Dumped<Sockets>) {
        if name::path(&accepted.own).is_some() {
            return;
        }
        match self.census.listener(accepted.kind, &accepted.own) {
            Some(listener) => through(dumped, Source { listener: listener.handle, ..Source::default() }),
            None => self.hosted(accepted, self.census.host_of_lost(accepted.kind, &accepted.own), dumped),
        }
    }

    fn listener(&self, socket: &Socket, dumped: &mut Dumped<Sockets>) -> Result<()> {
        dumped.record.set_shape(Shape::Listener);
        dumped.record.backlog = socket.diag.write_queue;
        dumped.auxiliaries = u32::from(name::path(&socket.own).is_some());
        if self.in_flight(socket) > 0 {
            return Err(HookError::unsupported(
                &self.label,
                "descriptors are in flight over connections that nobody has accepted yet",
                "let the program accept them first",
            ));
        }
        let known = |ino: &&u32| self.census.get(u64::from(**ino)).is_some();
        let strangers = socket.diag.waiting.iter().filter(|ino| !known(ino)).count();
        if strangers == 0 {
            return Ok(());
        }
        let why = format!("{strangers} connections from outside the tree wait to be accepted");
        if self.context.host.has_option(EXTERNAL_SOCKETS) {
            self.context.host.warn(&format!("{}: {why}: they will be cut", self.label));
            return Ok(());
        }
        let remedy =
            format!("let the program accept them first, or give --{EXTERNAL_SOCKETS} to have them cut");
        Err(HookError::unsupported(&self.label, why, remedy))
    }

    /// Descriptors in the queues of all connections that wait at a listener (unix_show_fdinfo in net/unix/af_unix.c).
    fn in_flight(&self, listener: &Socket) -> u32 {
        let info = self.context.host.handle(listener.handle);
        info.and_then(|info| info.field("scm_fds").ok()?.parse().ok()).unwrap_or(0)
    }

    fn waiting(&self, socket: &Socket, listener: &Socket, dumped: &mut Dumped<Sockets>) -> Result<()> {
        dumped.record.set_shape(Shape::Waiting);
        dumped.record.peer_handle = listener.handle;
        dumped.record.peer_address = socket.peer.clone();
        dumped.uses.push(listener.handle);
        let unread = sys::unread_by_peer(self.context.host.open_handle(socket.handle)?.as_fd())
            .map_err(|error| HookError::failed("SIOCOUTQ", error))?;
        if unread > 0 && !self.context.host.ends_tree() {
            return Err(HookError::unsupported(
                &self.label,
                "data was sent over it, which can be read only once the connection is accepted",
                "let the server accept it first, or do not leave the tree running",
            ));
        }
        Ok(())
    }

    fn datagram_peer(&self, socket: &Socket, peer: &Socket, dumped: &mut Dumped<Sockets>) -> Result<()> {
        dumped.record.set_shape(Shape::Single);
        dumped.auxiliaries = u32::from(name::path(&socket.own).is_some());
        dumped.record.peer_handle = peer.handle;
        dumped.record.peer_address = socket.peer.clone();
        dumped.uses.push(peer.handle);
        if socket.peer.is_empty() {
            return Err(HookError::unsupported(
                &self.label,
                format!("its peer socket:[{}] has no name, and is not connected to it in turn", peer.ino),
                "close it first",
            ));
        }
        // Nobody can connect to a socket that is connected to a third one: who is connected to is late.
        let third = |one: &Socket, by: &Socket| one.peer_ino().is_some_and(|peer| peer != by.ino);
        dumped.record.late = !third(peer, socket);
        if !dumped.record.late && self.census.peer(peer).is_some_and(|next| third(next, peer)) {
            return Err(HookError::unsupported(
                &self.label,
                "it is one of more than three datagram sockets in a row, each connected to the next",
                "close it first",
            ));
        }
        Ok(())
    }

    /// A peer outside the tree.
    fn external(&self, socket: &Socket, dumped: &mut Dumped<Sockets>) -> Result<()> {
        let peer = socket.peer_ino().unwrap_or_default();
        let host = self.context.host;
        let cut = |ino: u64| host.is_external(&format!("unix[{ino}]"));
        if cut(socket.ino) || cut(peer) {
            dumped.record.set_shape(Shape::Orphan);
            dumped.auxiliaries = 1;
            // The name of an accepted socket is its listener's, which is not ours to take.
            if let Some(end) = dumped.record.ends.first_mut() {
                end.name = None;
            }
            return Ok(());
        }
        let dgram = socket.kind == libc::SOCK_DGRAM;
        let path = name::absolute_path(&socket.peer);
        let reachable = !socket.peer.is_empty() && (path.is_some() || name::path(&socket.peer).is_none());
        if dgram && reachable && host.has_option(EXTERNAL_SOCKETS) {
            dumped.record.set_shape(Shape::Single);
            dumped.auxiliaries = u32::from(name::path(&socket.own).is_some());
            dumped.record.peer_address = socket.peer.clone();
            dumped.record.peer_path = path.unwrap_or_default();
            dumped.record.late = true;
            return Ok(());
        }
        let at = match socket.peer.is_empty() {
            true => String::new(),
            false => format!(" at {}", name::shown(&socket.peer)),
        };
        let cut = format!("--external unix[{}] to have it cut after restore", socket.ino);
        let remedy = match dgram && reachable {
            true => format!("--{EXTERNAL_SOCKETS} to have it connect again, or {cut}"),
            false => format!("dump a tree that holds both ends, or give {cut}"),
        };
        let why = format!("its peer socket:[{peer}]{at} is outside the tree");
        Err(HookError::unsupported(&self.label, why, remedy))
    }

    /// As whom the hooks run.
    fn actors(&self, first: &Side<'_>, dumped: &mut Dumped<Sockets>) -> Result<()> {
        let external = first.socket.peer_ino().is_some_and(|peer| self.census.get(peer).is_none());
        let shape = dumped.record.shape();
        // What it shows is the listener's. And those that are cut off are nobody's.
        let elsewhere = shape == Shape::Waiting || shape == Shape::Orphan && external;
        if elsewhere || shape == Shape::Client && !dumped.record.hosts {
            return Ok(());
        }
        let credentials = sys::peer_credentials(first.fd.as_fd())?;
        if let Some((actor, saved)) = self.context.creator(first.fd.as_fd(), credentials, &self.label)? {
            dumped.record.peer = Some(saved);
            dumped.create_as = actor;
            if shape == Shape::Listener {
                dumped.link_as = actor;
            }
        }
        Ok(())
    }
}

fn through(dumped: &mut Dumped<Sockets>, source: Source) {
    let handle = source.listener.max(source.host);
    dumped.after.push(handle);
    dumped.uses.push(handle);
    dumped.record.source = Some(source);
}

/// Where the data of a queue are.
pub(crate) fn blob(object: u32, role: u32) -> String {
    format!("queue/{object}/{role}")
}

impl Message {
    /// What `send` needs of a message of the image.
    pub(crate) fn of(
        data: Vec<u8>,
        credentials: Option<crate::record::stasis::unix::v1::Credentials>,
    ) -> Self {
        let credentials = credentials.map(|c| sys::PeerCredentials { pid: c.pid, uid: c.uid, gid: c.gid });
        Self { data, credentials, ..Self::default() }
    }
}
