//! From a live terminal to a record.

use crate::{AUX_MAJOR, DEV_TTY, MASTER, SLAVE, SLAVE_MAJORS, Terminal, ioctl};
use nix::sys::stat::{major, makedev, minor};
use stasis_plugin_api::{
    Actor, Described, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, SessionInfo,
};
use std::{
    fs,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::MetadataExt,
    },
    path::Path,
};

const SHELL_JOB: &str = "shell-job";
const SHELL_JOB_REMEDY: &str = "--shell-job puts the tree on the terminal that restore is started from";

fn name(index: u32) -> String {
    format!("/dev/pts/{index}")
}

/// `st_dev` of the devpts that a task sees at a directory.
fn instance(host: &Host<'_>, pid: i32, directory: &Path) -> Result<u64> {
    let proc = host.open_proc(pid)?;
    let path = format!("/proc/self/fd/{}/root{}", proc.as_raw_fd(), directory.display());
    fs::metadata(&path)
        .map(|stat| stat.dev())
        .map_err(|error| HookError::failed(format!("stat of {} in task {pid}", directory.display()), error))
}

/// A terminal is named by its devpts instance and its index.
fn identity(instance: u64, index: u32) -> String {
    format!("{instance}:{index}")
}

fn holder(host: &Host<'_>, handle: &HandleInfo) -> Result<i32> {
    let of_tree = || host.tasks().first().map(|task| task.pid);
    let holder = handle.holders.first().map(|holder| holder.pid).or_else(of_tree);
    holder.ok_or_else(|| HookError::invalid("the tree has no task"))
}

pub(crate) fn describe(host: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
    let (dev, index, role) = match (major(handle.rdev) as u32, minor(handle.rdev) as u32) {
        (AUX_MAJOR, 2) => {
            let directory = ptmx_directory(&handle.link);
            let dev = instance(host, holder(host, handle)?, Path::new(&directory))?;
            (dev, ioctl::TIOCGPTN.get(fd)?, MASTER)
        }
        (AUX_MAJOR, _) => {
            let device = device(fd, &handle.link)?;
            (instance(host, holder(host, handle)?, Path::new("/dev/pts"))?, minor(device) as u32, DEV_TTY)
        }
        _ => (handle.dev, minor(device(fd, &handle.link)?) as u32, SLAVE),
    };
    Ok(Described {
        identity: identity(dev, index).into(),
        role,
        description: name(index).into(),
        ..Described::default()
    })
}

/// Where the slaves of a master are: /dev/ptmx belongs to /dev/pts (drivers: fs/devpts/inode.c, devpts_mntget), and
/// each devpts has its own ptmx.
pub(crate) fn ptmx_directory(link: &str) -> String {
    let directory = Path::new(link).parent().unwrap_or(Path::new("/dev"));
    match directory.ends_with("pts") {
        true => directory.display().to_string(),
        false => directory.join("pts").display().to_string(),
    }
}

/// The device number of the terminal behind a descriptor.
fn device(fd: BorrowedFd<'_>, link: &str) -> Result<u64> {
    let encoded = ioctl::TIOCGDEV.get(fd).map_err(|error| match error.errno {
        libc::EIO => HookError::unsupported(link, "it has hung up: its master was closed", "close it"),
        _ => error,
    })?;
    // new_encode_dev (linux/kdev_t.h): 12 bits of major number between the minor number's 8 low and 12 high bits.
    let device =
        makedev(((encoded >> 8) & 0xfff).into(), ((encoded & 0xff) | ((encoded >> 12) & 0xfff00)).into());
    match SLAVE_MAJORS.contains(&(major(device) as u32)) {
        true => Ok(device),
        false => Err(HookError::unsupported(
            link,
            format!("it is terminal {}:{}, no pseudoterminal", major(device), minor(device)),
            "",
        )),
    }
}

pub(crate) fn describe_session(host: &Host<'_>, session: &SessionInfo) -> Result<Option<Described>> {
    let index = minor(session.terminal) as u32;
    if !session.leader_in_tree {
        if host.has_option(SHELL_JOB) {
            return Ok(None);
        }
        return Err(HookError::unsupported(
            name(index),
            format!(
                "it is the controlling terminal of session {}, whose leader is outside the tree",
                session.sid
            ),
            SHELL_JOB_REMEDY,
        ));
    }
    let dev = instance(host, session.sid, Path::new("/dev/pts"))?;
    Ok(Some(Described {
        identity: identity(dev, index).into(),
        role: SLAVE,
        description: name(index).into(),
        ..Described::default()
    }))
}

pub(crate) fn dump(host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Terminal>> {
    let index = object.identity.rsplit(':').next().and_then(|index| index.parse().ok());
    let index: u32 = index.ok_or_else(|| HookError::invalid(format!("identity {}", object.identity)))?;
    let label = name(index);
    let mut record = Terminal { index, ..Terminal::default() };
    let session = host.sessions().into_iter().find(|session| {
        SLAVE_MAJORS.contains(&(major(session.terminal) as u32)) && minor(session.terminal) as u32 == index
    });
    let leader = session.as_ref().filter(|session| session.leader_in_tree);
    let master = object.handles.iter().find(|handle| handle.role == MASTER);
    let slave = object.handles.iter().find(|handle| handle.role != MASTER);

    match (master, slave) {
        (Some(master), _) => {
            record.ptmx = master.link.to_string();
            let fd = host.open_handle(master.id)?;
            let slave = slave.map(|slave| host.open_handle(slave.id)).transpose()?;
            read_pair(&mut record, fd.as_fd(), slave.as_ref().map(AsFd::as_fd), &label)?;
        }
        (None, Some(slave)) if leader.is_none() && host.has_option(SHELL_JOB) => {
            record.external = true;
            let fd = host.open_handle(slave.id)?;
            record.termios = Some(ioctl::termios(fd.as_fd())?);
        }
        _ => {
            let remedy =
                if leader.is_none() { SHELL_JOB_REMEDY } else { "dump a tree that holds its master" };
            return Err(HookError::unsupported(label, "its master is outside the tree", remedy));
        }
    }
    owner(host, object, &mut record)?;
    if leader.is_none() && !record.external && object.handles.iter().any(|handle| handle.role == DEV_TTY) {
        let why = "it is open as /dev/tty, but no session of the tree has it as controlling terminal";
        return Err(HookError::unsupported(label, why, ""));
    }
    if let Some(session) = &session
        && session.foreground > 0
    {
        let alive = host.tasks().iter().any(|task| task.pgid == session.foreground);
        match (alive, session.leader_in_tree) {
            (true, _) => record.foreground = session.foreground,
            // With --shell-job the group belongs to the terminal's own session.
            (false, false) => {}
            (false, true) => {
                let why =
                    format!("its foreground process group {} has no task in the tree", session.foreground);
                return Err(HookError::unsupported(label, why, ""));
            }
        }
    }
    let mut dumped = Dumped::new(record);
    if let Some(session) = leader {
        dumped.record.session = session.sid;
        dumped.create_as = Actor::session_leader(session.sid);
        dumped.settle_as = Actor::task(session.sid);
    }
    dumped.uses = object.handles.iter().map(|handle| handle.id).collect();
    Ok(dumped)
}

/// Owner and mode of the slave's node, as ids of the tree's user namespace.
fn owner(host: &Host<'_>, object: &ObjectInfo, record: &mut Terminal) -> Result<()> {
    let Some(master) = object.handles.iter().find(|handle| handle.role == MASTER) else { return Ok(()) };
    let pid = holder(host, master)?;
    let proc = host.open_proc(pid)?;
    let path = format!("{}/{}", ptmx_directory(&master.link), record.index);
    let stat = fs::metadata(format!("/proc/self/fd/{}/root{path}", proc.as_raw_fd()))
        .map_err(|error| HookError::failed(format!("stat of {path} in task {pid}"), error))?;
    let id = |file: &str, outside: u32| -> Result<u32> {
        let map = fs::read_to_string(format!("/proc/self/fd/{}/{file}", proc.as_raw_fd()))
            .map_err(|error| HookError::failed(format!("reading {file} of task {pid}"), error))?;
        inside(&map, outside).ok_or_else(|| {
            let why = format!("its owner {outside} does not exist in the tree's user namespace");
            HookError::unsupported(name(record.index), why, "")
        })
    };
    (record.uid, record.gid, record.mode) =
        (id("uid_map", stat.uid())?, id("gid_map", stat.gid())?, stat.mode() & 0o7777);
    Ok(())
}

/// An id of our user namespace as one of the namespace that an id map belongs to.
fn inside(map: &str, outside: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_whitespace().map(|number| number.parse::<u32>().ok());
        let (first, start, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let offset = outside.checked_sub(start).filter(|offset| *offset < count)?;
        first.checked_add(offset)
    })
}

/// Reads what both ends say, and refuses what cannot be kept.
pub(crate) fn read_pair(
    record: &mut Terminal,
    master: BorrowedFd<'_>,
    slave: Option<BorrowedFd<'_>>,
    label: &str,
) -> Result<()> {
    let state = ioctl::poll(master)?;
    record.packet = ioctl::TIOCGPKT.get(master)? != 0;
    let pending = ioctl::FIONREAD.get(master)?;
    if pending > 0 {
        return Err(HookError::unsupported(
            label,
            format!("{pending} bytes of output were not read from its master"),
            "let the terminal's program read them first",
        ));
    }
    if state & libc::POLLPRI != 0 || (record.packet && state & libc::POLLIN != 0) {
        return Err(HookError::unsupported(label, "its master has an unread packet-mode event", ""));
    }
    record.termios = Some(ioctl::termios(master)?);
    [record.rows, record.columns, record.xpixel, record.ypixel] =
        ioctl::TIOCGWINSZ.get(master)?.map(u32::from);
    record.locked = ioctl::TIOCGPTLCK.get(master)? != 0;
    record.master_exclusive = ioctl::TIOCGEXCL.get(master)? != 0;
    record.slave_closed = slave.is_none() && state & libc::POLLHUP != 0;
    let Some(slave) = slave else { return Ok(()) };
    record.exclusive = ioctl::TIOCGEXCL.get(slave)? != 0;
    let discipline = ioctl::TIOCGETD.get(slave)?;
    if discipline != 0 {
        return Err(HookError::unsupported(label, format!("it has line discipline {discipline}"), ""));
    }
    let pending = ioctl::FIONREAD.get(slave)?;
    if pending > 0 {
        return Err(HookError::unsupported(
            label,
            format!("{pending} bytes of input were not read"),
            "let the program on the terminal read them first",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masters_know_their_directory() {
        assert_eq!(ptmx_directory("/dev/ptmx"), "/dev/pts");
        assert_eq!(ptmx_directory("/dev/pts/ptmx"), "/dev/pts");
        assert_eq!(ptmx_directory("/jail/dev/ptmx"), "/jail/dev/pts");
    }

    #[test]
    fn owners_are_translated() {
        assert_eq!(inside("0 100000 10\n", 100_005), Some(5));
        assert_eq!(inside("0 100000 10\n", 5), None);
    }
}
