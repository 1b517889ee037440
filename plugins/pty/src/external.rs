//! Terminals that stay outside, with another one in their place after restore: the one that restore is started from
//! (`--shell-job`), or one that the user gives (`--inherit-fd`).

use crate::{DEV_TTY, MASTER, Terminal, ioctl, restore};
use stasis_plugin_api::{HandleInfo, HookError, Host, ObjectInfo, Result};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

pub(crate) fn create(host: &Host<'_>, object: &ObjectInfo, record: &Terminal) -> Result<Vec<OwnedFd>> {
    if record.key.is_empty() {
        return object.handles.iter().map(own_terminal).collect();
    }
    let given = host.inherited(&record.key)?.ok_or_else(|| {
        HookError::invalid(format!("terminal {} is outside, and none was given in its place", record.key))
            .remedy(format!("give one with --inherit-fd fd[N]:{}", record.key))
    })?;
    let is_master = ioctl::TIOCGPTN.get(given.as_fd()).is_ok();
    if record.session != 0 {
        let slave = slave(&given, is_master, libc::O_RDWR)?;
        ioctl::set_controlling(slave.as_fd()).map_err(|error| {
            error.remedy("give a terminal that is not the controlling terminal of another session")
        })?;
    }
    let handle = |handle: &HandleInfo| match handle.role {
        MASTER => Err(HookError::invalid("a terminal that is outside with a master inside")),
        DEV_TTY => restore::open("/dev/tty", handle),
        _ => slave(&given, is_master, restore::flags(handle)),
    };
    object.handles.iter().map(handle).collect()
}

/// A description of its own of the slave, if possible.
fn slave(given: &OwnedFd, is_master: bool, flags: i32) -> Result<OwnedFd> {
    if is_master {
        return ioctl::open_peer(given.as_fd(), flags | libc::O_NOCTTY);
    }
    restore::open_flags(&format!("/proc/self/fd/{}", given.as_raw_fd()), flags).or_else(|error| {
        match error.errno {
            // Its node is not of this user namespace, or there is no /proc.
            libc::EACCES | libc::EPERM | libc::ENOENT | libc::EIO | libc::ENXIO => {
                given.try_clone().map_err(|error| HookError::failed("duplicating the given terminal", error))
            }
            _ => Err(error),
        }
    })
}

/// The terminal that restore was started from.
fn own_terminal(handle: &HandleInfo) -> Result<OwnedFd> {
    let tty =
        restore::open("/dev/tty", handle).map_err(|error| error.remedy("start restore from a terminal"))?;
    if handle.role == DEV_TTY {
        return Ok(tty);
    }
    // By its own name, as it was, if it is a pseudoterminal.
    let index = ioctl::TIOCGDEV.get(tty.as_fd())?;
    let index = (index & 0xff) | ((index >> 12) & 0xfff00);
    Ok(restore::open(&format!("/dev/pts/{index}"), handle).unwrap_or(tty))
}

/// Takes the settings of the old terminal over. Its size is its own.
pub(crate) fn settle(fd: &OwnedFd, record: &Terminal) -> Result<()> {
    match &record.termios {
        Some(termios) => ioctl::set_termios(fd.as_fd(), termios),
        None => Ok(()),
    }
}
