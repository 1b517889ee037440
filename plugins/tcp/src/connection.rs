//! Connections, through `TCP_REPAIR`: a socket in repair mode tells and takes its sequence numbers and queues, sends
//! nothing, and is closed without a word to the peer (net/ipv4/tcp.c).

use crate::{
    dump::tables,
    kernel::{self, Queue, state},
    lock,
    record::stasis::tcp::v1::{Connection, Locked, Shape, Socket, Window},
    restore::{bind, saved},
};
use stasis_plugin_api::{
    HandleInfo, HookError, Host, ObjectInfo, Result, UndoStep,
    prost::Message,
    socket::{self, inject, options},
};
use std::{
    io::{Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

/// Room for queues while they are filled.
const WIDE: i32 = 256 << 20;
/// A receive window into which an injected segment fits.
const SOME_WINDOW: u32 = 65_535;
/// How long an injected segment may take through the loopback device.
const ARRIVAL_TIME: Duration = Duration::from_secs(5);

fn blob(queue: &str, object: u32) -> String {
    format!("{queue}/{object}")
}

/// Puts the socket into repair mode, in which it stays until it is gone or the tree runs on, and reads it.
pub(crate) fn dump(
    host: &Host<'_>,
    object: &ObjectInfo,
    handle: &HandleInfo,
    fd: BorrowedFd<'_>,
    record: &mut Socket,
) -> Result<()> {
    let label = object.description.as_str();
    if !lock::covers(handle.ino) {
        let why = "it was connected just while the tree was being frozen";
        return Err(HookError::unsupported(label, why, "try again"));
    }
    let inside = lock::is_inside(handle.ino)?;
    let failed = |what: &'static str| move |error| HookError::failed(what, error);
    let get = |name| socket::get_int(fd, libc::SOL_SOCKET, name).map_err(failed("reading an option"));
    let (reuse, peek_offset) = (get(libc::SO_REUSEADDR)?, get(libc::SO_PEEK_OFF).unwrap_or(-1));
    let undo = |level, name, value: i32| UndoStep::SetOption {
        level,
        name,
        value: value.to_ne_bytes().as_slice().into(),
    };
    let mut steps = vec![
        undo(libc::IPPROTO_TCP, libc::TCP_REPAIR, kernel::REPAIR_OFF_NO_PROBE),
        // Repair mode ends with this option off.
        undo(libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse),
    ];
    if peek_offset >= 0 {
        steps.push(undo(libc::SOL_SOCKET, libc::SO_PEEK_OFF, peek_offset));
    }
    host.undo(fd, &steps)?;
    if peek_offset >= 0 {
        socket::set_int(fd, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1)
            .map_err(failed("setting SO_PEEK_OFF"))?;
    }
    kernel::set_repair(fd, kernel::REPAIR_ON)?;

    let info = kernel::info(fd)?;
    if !state::CONNECTED.contains(&info.state) {
        let why = format!("it went to TCP state {} while the tree was being frozen", info.state);
        return Err(HookError::unsupported(label, why, "try again"));
    }
    record.peer = socket::peer_address(fd).map_err(failed("getpeername"))?.unwrap_or_default();
    let length = |request, what| -> Result<u32> {
        Ok(socket::ioctl_int(fd, request).map_err(failed(what))?.max(0) as u32)
    };
    let unread = length(libc::FIONREAD, "SIOCINQ")?;
    // Both count the FIN, where there is one.
    let unacknowledged = length(libc::TIOCOUTQ, "SIOCOUTQ")?;
    let unsent = length(kernel::SIOCOUTQNSD, "SIOCOUTQNSD")?;
    let (read_to, written_to) = (kernel::sequence(fd, Queue::Receive)?, kernel::sequence(fd, Queue::Send)?);
    let fin = u32::from(state::fin_queued(info.state));
    let fin_unsent = fin.min(unsent);
    let data = unacknowledged.saturating_sub(fin);
    let unsent_length = unsent - fin_unsent;
    let fin_received = u32::from(state::fin_received(info.state));
    // In FIN_WAIT2 the FIN is acknowledged, and will be once more.
    let fin_done = u32::from(info.state == state::FIN_WAIT2);
    save(host, &blob("receive", object.id), kernel::peek(fd, Queue::Receive, unread)?)?;
    save(host, &blob("send", object.id), kernel::peek(fd, Queue::Send, data)?)?;
    record.connection = Some(Connection {
        state: info.state,
        receive_sequence: read_to.wrapping_sub(fin_received).wrapping_sub(unread),
        receive_length: unread,
        send_sequence: written_to.wrapping_sub(unacknowledged).wrapping_sub(fin_done),
        sent_length: data.saturating_sub(unsent_length),
        unsent_length,
        fin_unsent: fin_unsent != 0,
        negotiated: info.negotiated,
        mss_clamp: kernel::mss_clamp(fd)?,
        send_scale: info.send_scale,
        receive_scale: info.receive_scale,
        timestamp: kernel::timestamp(fd)?,
        window: Some(kernel::window(fd)?),
        inside,
    });
    let locked = Locked {
        handle: handle.id,
        local: record.local.clone(),
        peer: record.peer.clone(),
        reuse_address: reuse != 0,
        inside,
    };
    let list = locked.encode_length_delimited_to_vec();
    host.blob_writer(lock::CONNECTIONS).write_all(&list).map_err(failed("writing the list of connections"))
}

fn save(host: &Host<'_>, name: &str, data: Vec<u8>) -> Result<()> {
    let written = host.blob_writer(name).write_all(&data);
    written.map_err(|error| HookError::failed("writing queued data", error))
}

fn load(host: &Host<'_>, name: &str, length: u64) -> Result<Vec<u8>> {
    let mut data = Vec::new();
    let read = host.blob_reader(name).take(length).read_to_end(&mut data);
    read.map_err(|error| HookError::failed("reading queued data", error))?;
    match data.len() as u64 {
        read if read == length => Ok(data),
        _ => Err(HookError::invalid("the image has less queued data than its record says")),
    }
}

/// Makes the connection, in repair mode: it sends nothing until all of the tree is in place.
pub(crate) fn create(
    host: &Host<'_>,
    object: &ObjectInfo,
    record: &Socket,
    fd: BorrowedFd<'_>,
) -> Result<()> {
    let connection = record.connection.as_ref().ok_or_else(|| HookError::invalid("no connection"))?;
    if !state::CONNECTED.contains(&connection.state) {
        return Err(HookError::invalid(format!("{} is no state of a connection", connection.state)));
    }
    if connection.inside {
        lock::lock_inside(host)?;
    }
    kernel::set_repair(fd, kernel::REPAIR_ON)?;
    options::write(fd, tables(record.domain, Shape::Connected), &saved(record))?;
    bind(fd, &record.local)?;
    kernel::set_sequence(fd, Queue::Send, connection.send_sequence)?;
    kernel::set_sequence(fd, Queue::Receive, connection.receive_sequence)?;
    socket::connect(fd, &record.peer).map_err(|error| {
        HookError::failed(format!("connecting to TCP {}", socket::shown(&record.peer)), error)
            .remedy("give this machine a route to the peer first")
    })?;
    kernel::set_negotiated(fd, connection)?;
    // Only a power over the whole machine gives more room than net.core.rmem_max and wmem_max.
    let room = [
        (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, "SO_RCVBUF"),
        (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, "SO_SNDBUF"),
    ];
    for (force, ask, what) in room {
        let set = |name| socket::set_int(fd, libc::SOL_SOCKET, name, WIDE);
        set(force).or_else(|_| set(ask)).map_err(|error| HookError::failed(what, error))?;
    }
    Filling { host, object, record, connection, fd }.fill()?;
    // The room that was made for the queues is given back.
    options::write(fd, &[options::SOCKET], &saved(record))
}

/// What brings a fresh connection to where the dumped one was.
struct Filling<'a, 'h> {
    host: &'a Host<'h>,
    object: &'a ObjectInfo,
    record: &'a Socket,
    connection: &'a Connection,
    fd: BorrowedFd<'a>,
}

impl Filling<'_, '_> {
    fn fill(&self) -> Result<()> {
        let Self { host, object, connection, fd, .. } = self;
        let received = load(host, &blob("receive", object.id), connection.receive_length.into())?;
        let total = u64::from(connection.sent_length) + u64::from(connection.unsent_length);
        let written = load(host, &blob("send", object.id), total)?;
        let (sent, unsent) = written.split_at(connection.sent_length as usize);
        kernel::select(*fd, Queue::Receive)?;
        kernel::send_all(*fd, &received)?;
        self.close_windows()?;
        let state = connection.state;
        if matches!(state, state::CLOSE_WAIT | state::LAST_ACK) {
            self.inject(true, connection.send_sequence, state::CLOSE_WAIT)?;
        }
        kernel::select(*fd, Queue::Send)?;
        kernel::send_all(*fd, sent)?;
        if !unsent.is_empty() {
            // The peer's window is closed, so this stays where it is.
            kernel::set_repair(*fd, kernel::REPAIR_OFF_NO_PROBE)?;
            let queued = kernel::send_all(*fd, unsent);
            kernel::set_repair(*fd, kernel::REPAIR_ON)?;
            queued?;
        }
        if state::fin_queued(state) || state == state::FIN_WAIT2 {
            kernel::select(*fd, if connection.fin_unsent { Queue::None } else { Queue::Send })?;
            socket::shutdown(*fd, libc::SHUT_WR).map_err(|error| HookError::failed("shutdown", error))?;
        }
        match state {
            state::CLOSING => self.inject(true, connection.send_sequence, state)?,
            state::FIN_WAIT2 => self.inject(false, connection.send_sequence.wrapping_add(1), state)?,
            _ => {}
        }
        if self.record.shutdown & 1 != 0 {
            socket::shutdown(*fd, libc::SHUT_RD).map_err(|error| HookError::failed("shutdown", error))?;
        }
        let window = connection.window.ok_or_else(|| HookError::invalid("a connection without windows"))?;
        kernel::set_window(*fd, &window)?;
        let reached = kernel::info(*fd)?.state;
        if reached == state {
            return Ok(());
        }
        Err(HookError::invalid(format!("the connection is in TCP state {reached} instead of {state}")))
    }

    /// Sequence number of what comes after all that was received, but the FIN.
    fn next_sequence(&self) -> u32 {
        self.connection.receive_sequence.wrapping_add(self.connection.receive_length)
    }

    /// Ours has room for a segment, the peer's for nothing.
    fn close_windows(&self) -> Result<()> {
        let next = self.next_sequence();
        let window = Window {
            snd_wl1: next,
            snd_wnd: 0,
            max_window: self.connection.window.map_or(0, |window| window.max_window),
            rcv_wnd: SOME_WINDOW,
            rcv_wup: next,
        };
        kernel::set_window(self.fd, &window)
    }

    /// A segment of the peer's, which the lock lets pass, and that brings the socket into a state.
    fn inject(&self, fin: bool, acknowledgement: u32, state: u32) -> Result<()> {
        let path = inject::Path::new(&self.record.peer, &self.record.local)
            .ok_or_else(|| HookError::invalid("a connection without addresses"))?;
        let segment = inject::Segment { sequence: self.next_sequence(), acknowledgement, fin, window: 0 };
        inject::segment(&path, &segment)?;
        let began = Instant::now();
        while kernel::info(self.fd)?.state != state {
            if began.elapsed() > ARRIVAL_TIME {
                let what = format!("the connection did not get to TCP state {state}");
                return Err(HookError::invalid(what).remedy("a packet filter on the loopback device?"));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }
}

/// A connection that no task holds, but another socket's queue: nobody else could take it out of repair mode.
pub(crate) fn settle(object: &ObjectInfo, owned: &OwnedFd, reuse: bool) -> Result<()> {
    match socket::only_handle(object)?.holders.is_empty() {
        true => kernel::leave_repair(owned.as_fd(), kernel::REPAIR_OFF_NO_PROBE, reuse),
        false => Ok(()),
    }
}
