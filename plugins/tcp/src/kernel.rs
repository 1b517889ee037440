//! Raw interfaces of TCP sockets: linux/tcp.h, tcp(7), net/ipv4/tcp.c.

use crate::record::stasis::tcp::v1::{Connection, Window};
use stasis_plugin_api::{
    HookError, Result,
    socket::{self, options::Spec},
};
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

const TCP: i32 = libc::IPPROTO_TCP;

/// States (net/tcp_states.h).
pub(crate) mod state {
    pub(crate) const ESTABLISHED: u32 = 1;
    pub(crate) const SYN_SENT: u32 = 2;
    pub(crate) const FIN_WAIT1: u32 = 4;
    pub(crate) const FIN_WAIT2: u32 = 5;
    pub(crate) const CLOSE: u32 = 7;
    pub(crate) const CLOSE_WAIT: u32 = 8;
    pub(crate) const LAST_ACK: u32 = 9;
    pub(crate) const LISTEN: u32 = 10;
    pub(crate) const CLOSING: u32 = 11;

    /// All in which the two ends know each other.
    pub(crate) const CONNECTED: [u32; 6] = [ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING];

    /// Whether the peer has sent its last byte, and we know.
    pub(crate) fn fin_received(state: u32) -> bool {
        matches!(state, CLOSE_WAIT | LAST_ACK | CLOSING)
    }

    /// Whether our end was shut down, and the peer has not acknowledged that.
    pub(crate) fn fin_queued(state: u32) -> bool {
        matches!(state, FIN_WAIT1 | LAST_ACK | CLOSING)
    }
}

macro_rules! table {
    ($($name:expr, $label:literal, $size:literal;)*) => {
        &[$(Spec { level: TCP, name: $name, label: $label, size: $size }),*]
    };
}

/// Options that can be set at any time.
pub(crate) const OPTIONS: &[Spec] = table! {
    libc::TCP_NODELAY, "TCP_NODELAY", 4;
    libc::TCP_CORK, "TCP_CORK", 4;
    libc::TCP_KEEPIDLE, "TCP_KEEPIDLE", 4;
    libc::TCP_KEEPINTVL, "TCP_KEEPINTVL", 4;
    libc::TCP_KEEPCNT, "TCP_KEEPCNT", 4;
    libc::TCP_SYNCNT, "TCP_SYNCNT", 4;
    libc::TCP_LINGER2, "TCP_LINGER2", 4;
    libc::TCP_CONGESTION, "TCP_CONGESTION", 16;
    libc::TCP_THIN_LINEAR_TIMEOUTS, "TCP_THIN_LINEAR_TIMEOUTS", 4;
    libc::TCP_THIN_DUPACK, "TCP_THIN_DUPACK", 4;
    libc::TCP_USER_TIMEOUT, "TCP_USER_TIMEOUT", 4;
    25, "TCP_NOTSENT_LOWAT", 4;
    36, "TCP_INQ", 4;
    37, "TCP_TX_DELAY", 4;
    44, "TCP_RTO_MAX_MS", 4;
};

/// Options of sockets that are not connected.
pub(crate) const UNCONNECTED: &[Spec] = table! {
    libc::TCP_MAXSEG, "TCP_MAXSEG", 4;
    libc::TCP_DEFER_ACCEPT, "TCP_DEFER_ACCEPT", 4;
    libc::TCP_WINDOW_CLAMP, "TCP_WINDOW_CLAMP", 4;
    libc::TCP_FASTOPEN, "TCP_FASTOPEN", 4;
    27, "TCP_SAVE_SYN", 4;
    30, "TCP_FASTOPEN_CONNECT", 4;
    34, "TCP_FASTOPEN_NO_COOKIE", 4;
};

/// What is wanted of `struct tcp_info`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Info {
    /// See [`state`].
    pub state: u32,
    /// `TCPI_OPT_*`.
    pub negotiated: u32,
    /// Window scale that the peer wants.
    pub send_scale: u32,
    /// Window scale that we announced.
    pub receive_scale: u32,
    /// Listening: connections that wait.
    pub waiting: u32,
    /// Listening: how many may wait.
    pub backlog: u32,
}

pub(crate) fn info(fd: BorrowedFd<'_>) -> Result<Info> {
    let failed = |error| HookError::failed("reading TCP_INFO", error);
    let bytes = socket::get_option(fd, TCP, libc::TCP_INFO, 104).map_err(failed)?;
    let byte = |at: usize| bytes.get(at).copied().map(u32::from);
    let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let parse = || {
        Some(Info {
            state: byte(0)?,
            negotiated: byte(5)?,
            send_scale: byte(6)? & 15,
            receive_scale: byte(6)? >> 4,
            waiting: word(24)?,
            backlog: word(28)?,
        })
    };
    parse().ok_or_else(|| failed(io::Error::from_raw_os_error(libc::EPROTO)))
}

/// Whether an upper layer such as TLS sits on the socket.
pub(crate) fn has_upper_layer(fd: BorrowedFd<'_>) -> bool {
    socket::get_option(fd, TCP, libc::TCP_ULP, 16)
        .is_ok_and(|name| name.first().is_some_and(|byte| *byte != 0))
}

/// Values of `TCP_REPAIR`. In repair mode the port may be shared with anybody.
pub(crate) const REPAIR_ON: i32 = 1;
/// Off, and the peer is asked where it is.
pub(crate) const REPAIR_OFF: i32 = 0;
/// Off, without a word.
pub(crate) const REPAIR_OFF_NO_PROBE: i32 = -1;
/// linux/sockios.h: bytes that were never sent.
pub(crate) const SIOCOUTQNSD: libc::c_ulong = 0x894b;

/// `TCP_REPAIR_QUEUE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Queue {
    None = 0,
    Receive = 1,
    Send = 2,
}

fn get(fd: BorrowedFd<'_>, name: i32, label: &'static str) -> Result<u32> {
    let value = socket::get_int(fd, TCP, name).map_err(|error| HookError::failed(label, error))?;
    Ok(value as u32)
}

fn set(fd: BorrowedFd<'_>, name: i32, label: &'static str, value: u32) -> Result<()> {
    socket::set_int(fd, TCP, name, value as i32).map_err(|error| HookError::failed(label, error))
}

pub(crate) fn set_repair(fd: BorrowedFd<'_>, value: i32) -> Result<()> {
    socket::set_int(fd, TCP, libc::TCP_REPAIR, value).map_err(|error| {
        HookError::failed("TCP_REPAIR", error)
            .remedy("connections need CAP_NET_ADMIN in the user namespace that owns the network namespace")
    })
}

/// Repair mode ends with `SO_REUSEADDR` off.
pub(crate) fn leave_repair(fd: BorrowedFd<'_>, how: i32, reuse: bool) -> Result<()> {
    set_repair(fd, how)?;
    socket::set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse.into())
        .map_err(|error| HookError::failed("setting SO_REUSEADDR", error))
}

pub(crate) fn select(fd: BorrowedFd<'_>, queue: Queue) -> Result<()> {
    set(fd, libc::TCP_REPAIR_QUEUE, "TCP_REPAIR_QUEUE", queue as u32)
}

/// The sequence number after the last byte of a queue.
pub(crate) fn sequence(fd: BorrowedFd<'_>, queue: Queue) -> Result<u32> {
    select(fd, queue)?;
    get(fd, libc::TCP_QUEUE_SEQ, "TCP_QUEUE_SEQ")
}

/// Only before the socket is connected.
pub(crate) fn set_sequence(fd: BorrowedFd<'_>, queue: Queue, sequence: u32) -> Result<()> {
    select(fd, queue)?;
    set(fd, libc::TCP_QUEUE_SEQ, "TCP_QUEUE_SEQ", sequence)
}

/// The `length` bytes of a queue; nothing is taken.
pub(crate) fn peek(fd: BorrowedFd<'_>, queue: Queue, length: u32) -> Result<Vec<u8>> {
    let mut data = vec![0; length as usize];
    if length == 0 {
        return Ok(data);
    }
    select(fd, queue)?;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes at most the vector's length.
    let read = unsafe { libc::recv(fd.as_raw_fd(), data.as_mut_ptr().cast(), data.len(), flags) };
    match read {
        ..0 => Err(HookError::failed("peeking at a queue", io::Error::last_os_error())),
        read if read as usize == data.len() => Ok(data),
        read => Err(HookError::invalid(format!("only {read} of {length} queued bytes could be seen"))),
    }
}

/// Appends to the selected queue, or sends.
pub(crate) fn send_all(fd: BorrowedFd<'_>, mut data: &[u8]) -> Result<()> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    while !data.is_empty() {
        let part = &data[..data.len().min(1 << 16)];
        // SAFETY: the kernel reads the slice.
        let sent = unsafe { libc::send(fd.as_raw_fd(), part.as_ptr().cast(), part.len(), flags) };
        match sent {
            ..0 => return Err(HookError::failed("filling a queue", io::Error::last_os_error())),
            sent => data = &data[sent as usize..],
        }
    }
    Ok(())
}

/// The largest segment that the peer takes; in repair mode this option gives that.
pub(crate) fn mss_clamp(fd: BorrowedFd<'_>) -> Result<u32> {
    get(fd, libc::TCP_MAXSEG, "TCP_MAXSEG")
}

/// The clock of the timestamps that the peer sees.
pub(crate) fn timestamp(fd: BorrowedFd<'_>) -> Result<u32> {
    get(fd, libc::TCP_TIMESTAMP, "TCP_TIMESTAMP")
}

pub(crate) fn window(fd: BorrowedFd<'_>) -> Result<Window> {
    let failed = |error| HookError::failed("TCP_REPAIR_WINDOW", error);
    let bytes = socket::get_option(fd, TCP, libc::TCP_REPAIR_WINDOW, 20).map_err(failed)?;
    let word = |at: usize| {
        let bytes = bytes.get(4 * at..4 * at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u32::from_ne_bytes).ok_or_else(|| failed(io::Error::from_raw_os_error(libc::EPROTO)))
    };
    Ok(Window {
        snd_wl1: word(0)?,
        snd_wnd: word(1)?,
        max_window: word(2)?,
        rcv_wnd: word(3)?,
        rcv_wup: word(4)?,
    })
}

pub(crate) fn set_window(fd: BorrowedFd<'_>, window: &Window) -> Result<()> {
    let words = [window.snd_wl1, window.snd_wnd, window.max_window, window.rcv_wnd, window.rcv_wup];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    socket::set_option(fd, TCP, libc::TCP_REPAIR_WINDOW, &bytes)
        .map_err(|error| HookError::failed("TCP_REPAIR_WINDOW", error))
}

/// What the two ends agreed on: pairs of option and value, as in the SYN (tcp_repair_options_est).
pub(crate) fn set_negotiated(fd: BorrowedFd<'_>, connection: &Connection) -> Result<()> {
    const TIMESTAMPS: u32 = 1;
    const SACK: u32 = 2;
    const WSCALE: u32 = 4;
    let scales = connection.send_scale | connection.receive_scale << 16;
    let has = |bit: u32| connection.negotiated & bit != 0;
    let options = [
        (has(WSCALE), 3, scales),
        (true, 2, connection.mss_clamp),
        (has(SACK), 4, 0),
        (has(TIMESTAMPS), 8, 0),
    ];
    let agreed = options.iter().filter(|(agreed, ..)| *agreed);
    let bytes: Vec<u8> =
        agreed.flat_map(|(_, code, value)| [u32::to_ne_bytes(*code), value.to_ne_bytes()].concat()).collect();
    socket::set_option(fd, TCP, libc::TCP_REPAIR_OPTIONS, &bytes)
        .map_err(|error| HookError::failed("TCP_REPAIR_OPTIONS", error))?;
    if has(TIMESTAMPS) {
        set(fd, libc::TCP_TIMESTAMP, "TCP_TIMESTAMP", connection.timestamp)?;
    }
    Ok(())
}
