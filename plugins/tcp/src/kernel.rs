//! Raw interfaces of TCP sockets: linux/tcp.h, tcp(7), net/ipv4/tcp.c.

use stasis_plugin_api::{
    HookError, Result,
    socket::{self, options::Spec},
};
use std::{io, os::fd::BorrowedFd};

const TCP: i32 = libc::IPPROTO_TCP;

/// States (net/tcp_states.h).
#[allow(dead_code)]
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
#[allow(dead_code)]
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
