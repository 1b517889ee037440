//! From a record to a live socket.

use crate::{
    CLOSE, connection,
    dump::tables,
    record::stasis::tcp::v1::{Option as Recorded, Shape, Socket},
};
use stasis_plugin_api::{
    HookError, Host, ObjectInfo, Result,
    socket::{
        self, filter,
        options::{self, REUSE, Saved},
    },
};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

pub(crate) fn saved(record: &Socket) -> Vec<Saved> {
    let one = |o: &Recorded| Saved { level: o.level, name: o.name, value: o.value.clone() };
    record.options.iter().map(one).collect()
}

/// What becomes of a socket: connections may be ended instead of kept.
fn shape(host: &Host<'_>, record: &Socket) -> Shape {
    match record.shape() {
        Shape::Connected if host.has_option(CLOSE) => Shape::Ended,
        shape => shape,
    }
}

fn reuse_address(record: &Socket) -> bool {
    let is = |option: &&Recorded| (option.level, option.name) == (libc::SOL_SOCKET, libc::SO_REUSEADDR);
    record.options.iter().find(is).is_some_and(|option| option.value.iter().any(|byte| *byte != 0))
}

/// Bound and listening. Until all sockets have their ports they may share them.
pub(crate) fn create(host: &Host<'_>, object: &ObjectInfo, record: &Socket) -> Result<OwnedFd> {
    if !matches!(record.domain, libc::AF_INET | libc::AF_INET6) {
        return Err(HookError::invalid(format!("{} is no domain of TCP", record.domain)));
    }
    let owned = socket::socket(record.domain, libc::SOCK_STREAM, libc::IPPROTO_TCP)
        .map_err(|error| HookError::failed("socket", error))?;
    let fd = owned.as_fd();
    let shape = shape(host, record);
    if shape == Shape::Connected {
        connection::create(host, object, record, fd)?;
        return Ok(owned);
    }
    options::write(fd, tables(record.domain, shape), &saved(record))?;
    share_port(fd)?;
    if shape == Shape::Ended || !is_bound(&record.local) {
        return Ok(owned);
    }
    bind(fd, &record.local)?;
    listen(fd, record)?;
    Ok(owned)
}

fn share_port(fd: BorrowedFd<'_>) -> Result<()> {
    socket::set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1)
        .map_err(|error| HookError::failed("setting SO_REUSEADDR", error))
}

fn listen(fd: BorrowedFd<'_>, record: &Socket) -> Result<()> {
    if record.shape() != Shape::Listener {
        return Ok(());
    }
    let backlog = i32::try_from(record.backlog).unwrap_or(i32::MAX);
    socket::listen(fd, backlog).map_err(|error| {
        HookError::failed(format!("listening at TCP {}", socket::shown(&record.local)), error)
    })
}

pub(crate) fn bind(fd: BorrowedFd<'_>, local: &[u8]) -> Result<()> {
    socket::bind(fd, local).map_err(|error| {
        let remedy = match error.raw_os_error() {
            Some(libc::EADDRINUSE) => {
                "another program has the port, or a connection of it that ended less than a minute ago"
            }
            Some(libc::EADDRNOTAVAIL) => "give this machine the address first",
            _ => "",
        };
        HookError::failed(format!("binding to TCP {}", socket::shown(local)), error).remedy(remedy)
    })
}

fn is_bound(local: &[u8]) -> bool {
    socket::port(local) != 0 || socket::host(local).is_some_and(|host| !host.is_unspecified())
}

pub(crate) fn link(host: &Host<'_>, object: &ObjectInfo, record: &Socket) -> Result<()> {
    let owned = host.open_handle(socket::only_handle(object)?.id)?;
    let fd = owned.as_fd();
    filter::write(fd, &record.filter, record.filter_locked)?;
    match shape(host, record) {
        Shape::Connecting => connect_again(fd, &record.peer),
        Shape::Ended => {
            // ENOTCONN, but shut down all the same (net/ipv4/af_inet.c, inet_shutdown).
            let _ = socket::shutdown(fd, libc::SHUT_RDWR);
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Without waiting for the answer. A refusal is the program's to see.
fn connect_again(fd: BorrowedFd<'_>, peer: &[u8]) -> Result<()> {
    let failed = |error| HookError::failed(format!("connecting to TCP {}", socket::shown(peer)), error);
    set_nonblocking(fd).map_err(failed)?;
    match socket::connect(fd, peer) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(failed(error)),
        _ => Ok(()),
    }
}

/// Core puts the flags of the image back later.
fn set_nonblocking(fd: BorrowedFd<'_>) -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: no pointers.
    let flags = socket::check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: no pointers.
    socket::check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) }).map(drop)
}

/// Every port is taken.
pub(crate) fn settle(host: &Host<'_>, object: &ObjectInfo, record: &Socket) -> Result<()> {
    let owned = host.open_handle(socket::only_handle(object)?.id)?;
    if shape(host, record) == Shape::Connected {
        connection::settle(object, &owned, reuse_address(record))?;
    } else {
        options::write(owned.as_fd(), &[REUSE], &saved(record))?;
    }
    match record.uid {
        Some(uid) => socket::give_to(owned.as_fd(), uid),
        None => Ok(()),
    }
}
