//! Making an epoll and adding its entries.

use crate::{
    kernel::{self, Foreign, Params},
    records::stasis::epoll::v1::{Entry, Epoll},
};
use stasis_plugin_api::{HookError, Host, ObjectInfo, Result};
use std::{
    collections::{BTreeMap, btree_map::Entry::Vacant},
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

/// Bits of an entry that are not events (fs/eventpoll.c, EP_PRIVATE_BITS).
const PRIVATE: u32 =
    (libc::EPOLLWAKEUP | libc::EPOLLONESHOT | libc::EPOLLET | libc::EPOLLEXCLUSIVE).cast_unsigned();

/// Events that let a disarmed entry fire once more, whatever its file is ready for.
const ANY_EVENT: u32 =
    (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLPRI | libc::EPOLLRDHUP | libc::EPOLLERR | libc::EPOLLHUP)
        .cast_unsigned();

/// The epoll without entries.
pub fn create(record: &Epoll) -> Result<OwnedFd> {
    let epoll = kernel::create().map_err(|error| HookError::failed("epoll_create1", error))?;
    if let Some(busy) = &record.busy_poll {
        let budget =
            u16::try_from(busy.budget).map_err(|_| HookError::invalid("busy poll budget over 65535"))?;
        kernel::set_params(epoll.as_fd(), Params::new(busy.usecs, budget, busy.prefer))
            .map_err(|error| HookError::failed("EPIOCSPARAMS", error))?;
    }
    Ok(epoll)
}

/// A disarmed `EPOLLONESHOT` entry: the kernel has taken its events away.
fn disarmed(entry: &Entry) -> bool {
    entry.events & libc::EPOLLONESHOT.cast_unsigned() != 0 && entry.events & !PRIVATE == 0
}

/// Adds all entries, the disarmed ones first: letting them fire must not take an event of another entry.
pub fn settle(host: &Host<'_>, object: &ObjectInfo, record: &Epoll) -> Result<()> {
    let epoll = host.open_handle(object.handles[0].id)?;
    let (silent, armed): (Vec<&Entry>, Vec<&Entry>) =
        record.entries.iter().partition(|entry| disarmed(entry));
    for entry in silent {
        add(host, &epoll, &[entry], ANY_EVENT)?;
        disarm(epoll.as_fd())?;
    }
    add(host, &epoll, &armed, 0)
}

fn disarm(epoll: BorrowedFd<'_>) -> Result<()> {
    kernel::wait_one(epoll).map_err(|error| HookError::failed("epoll_wait", error)).map(drop)
}

/// Adds entries, with `more` events.
fn add(host: &Host<'_>, epoll: &OwnedFd, entries: &[&Entry], more: u32) -> Result<()> {
    let task = host.current_task();
    let mut targets: BTreeMap<u32, OwnedFd> = BTreeMap::new();
    let mut foreign: Vec<&Entry> = Vec::new();
    for entry in entries {
        if host.handle_at(task, entry.number) == Some(entry.handle) {
            kernel::add(epoll.as_raw_fd(), entry.number, entry.events | more, entry.data)
                .map_err(failed(entry))?;
        } else {
            foreign.push(entry);
        }
    }
    if foreign.is_empty() {
        return Ok(());
    }
    // Ours must be out of the way of all numbers that are going to be used.
    let free = foreign.iter().map(|entry| entry.number).max().unwrap_or(0).saturating_add(1);
    for entry in &foreign {
        if let Vacant(place) = targets.entry(entry.handle) {
            place.insert(above(host.open_handle(entry.handle)?, free)?);
        }
    }
    let epoll =
        above(epoll.try_clone().map_err(|error| HookError::failed("duplicate of an epoll", error))?, free)?;
    let mut work: Vec<Foreign> = foreign
        .iter()
        .map(|entry| Foreign {
            target: targets[&entry.handle].as_raw_fd(),
            number: entry.number,
            events: entry.events | more,
            data: entry.data,
            errno: -1,
        })
        .collect();
    kernel::add_foreign(epoll.as_raw_fd(), &mut work)
        .map_err(|error| HookError::failed("clone of a scratch descriptor table", error))?;
    for (done, entry) in work.iter().zip(&foreign) {
        match done.errno {
            0 => {}
            -1 => return Err(HookError::invalid("the helper with a scratch descriptor table was killed")),
            errno => return Err(failed(entry)(io::Error::from_raw_os_error(errno))),
        }
    }
    Ok(())
}

/// The same descriptor at a number of at least `free`.
fn above(fd: OwnedFd, free: i32) -> Result<OwnedFd> {
    if fd.as_raw_fd() >= free {
        return Ok(fd);
    }
    kernel::move_above(fd, free).map_err(|error| {
        HookError::failed(format!("duplicate above descriptor {free}"), error)
            .remedy("raise RLIMIT_NOFILE (ulimit -n) of the restored tree")
    })
}

fn failed(entry: &Entry) -> impl Fn(io::Error) -> HookError {
    let what = format!("EPOLL_CTL_ADD of handle {} as descriptor {}", entry.handle, entry.number);
    move |error| HookError::failed(what.as_str(), error)
}
