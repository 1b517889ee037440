//! From a record to a live terminal.

use crate::{
    CONSOLE, DEV_TTY, HUNG_UP, MASTER, NOBODY, SLAVE, Terminal, contents, external, ioctl,
    record::stasis::pty::v1::{Contents, Flow},
};
use stasis_plugin_api::{HandleInfo, HookError, Host, ObjectInfo, Result};
use std::{
    fs::{self, OpenOptions},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::{OpenOptionsExt, PermissionsExt, chown},
    },
    thread,
    time::{Duration, Instant},
};

/// How long to wait for a number that another task of the tree may hold on the way to its own.
const PATIENCE: Duration = Duration::from_secs(3);

pub(crate) fn create(host: &Host<'_>, object: &ObjectInfo, record: &Terminal) -> Result<Vec<OwnedFd>> {
    if object.handles.iter().any(|handle| handle.role == CONSOLE) {
        return object.handles.iter().map(|handle| open(&record.console, handle)).collect();
    }
    if record.external {
        return external::create(host, object, record);
    }
    if let Some(given) = given_master(host, record)? {
        return handles(object, given, record);
    }
    let master = open_master(record)?;
    make(object, master, record, &contents::load(host, object.id)?)
}

/// A terminal whose slave is outside goes on with the master that the user gives, if he does.
fn given_master(host: &Host<'_>, record: &Terminal) -> Result<Option<OwnedFd>> {
    if record.key.is_empty() {
        return Ok(None);
    }
    let Some(given) = host.inherited(&record.key)? else { return Ok(None) };
    ioctl::TIOCGPTN
        .get(given.as_fd())
        .map_err(|error| error.remedy(format!("give the master of a terminal for {}", record.key)))?;
    Ok(Some(given))
}

/// A new terminal with everything as it was.
pub(crate) fn make(
    object: &ObjectInfo,
    master: OwnedFd,
    record: &Terminal,
    contents: &Contents,
) -> Result<Vec<OwnedFd>> {
    ioctl::TIOCSPTLCK.call(master.as_fd(), &mut 0)?;
    let mut hung_up = open_slaves(&master, object, &[HUNG_UP])?;
    let closes_master = !object.handles.iter().any(|handle| handle.role == MASTER);
    if let (Some(slave), false) = (hung_up.first(), closes_master) {
        // Before all settings: it resets them.
        ioctl::hang_up(slave.as_fd())?;
    }
    let (spare, flow) = configure(&master, record, contents)?;
    let mut slaves = open_slaves(&master, object, &[SLAVE, DEV_TTY])?;
    if let (true, Some(slave)) = (record.exclusive, slaves.first().or(spare.as_ref())) {
        ioctl::set_exclusive(slave.as_fd())?;
    }
    if let (Some(slave), Flow::Suspended) = (spare.as_ref(), flow) {
        ioctl::flow(slave.as_fd(), libc::TCOOFF)?;
    }
    finish(&master, record)?;
    let mut master = Some(master);
    let mut fds = Vec::new();
    for handle in &object.handles {
        let fd = match handle.role {
            MASTER => master.take(),
            HUNG_UP => (!hung_up.is_empty()).then(|| hung_up.remove(0)),
            _ => (!slaves.is_empty()).then(|| slaves.remove(0)),
        };
        fds.push(fd.ok_or_else(|| HookError::invalid("a terminal with more than one master"))?);
    }
    Ok(fds)
}

/// The handles of a terminal that somebody else has set up.
fn handles(object: &ObjectInfo, master: OwnedFd, record: &Terminal) -> Result<Vec<OwnedFd>> {
    let slaves = open_slaves(&master, object, &[SLAVE, DEV_TTY])?;
    let mut slaves = slaves.into_iter();
    let mut master = Some(master);
    let fd = |handle: &HandleInfo| {
        let fd = if handle.role == MASTER { master.take() } else { slaves.next() };
        fd.ok_or_else(|| HookError::invalid(format!("a handle of {} that cannot be outside", record.key)))
    };
    object.handles.iter().map(fd).collect()
}

/// Descriptors of the slave for all handles with one of these roles.
fn open_slaves(master: &OwnedFd, object: &ObjectInfo, roles: &[u32]) -> Result<Vec<OwnedFd>> {
    let handles = object.handles.iter().filter(|handle| roles.contains(&handle.role));
    handles
        .map(|handle| match handle.role {
            DEV_TTY => open("/dev/tty", handle),
            _ => ioctl::open_peer(master.as_fd(), flags(handle)),
        })
        .collect()
}

/// The kernel's O_LARGEFILE, which the C library defines as 0: open(2) adds it by itself, TIOCGPTPEER does not.
const LARGEFILE: i32 = 0o100_000;

/// Access mode and what an open must not do. Without O_CLOEXEC: TIOCGPTPEER would keep it among the file's own flags.
pub(crate) fn flags(handle: &HandleInfo) -> i32 {
    (handle.status_flags as i32 & (libc::O_ACCMODE | LARGEFILE)) | libc::O_NOCTTY | libc::O_NONBLOCK
}

pub(crate) fn open(path: &str, handle: &HandleInfo) -> Result<OwnedFd> {
    open_flags(path, flags(handle))
}

pub(crate) fn open_flags(path: &str, flags: i32) -> Result<OwnedFd> {
    let access = flags & libc::O_ACCMODE;
    OpenOptions::new()
        .read(access != libc::O_WRONLY)
        .write(access != libc::O_RDONLY)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
        .open(path)
        .map(OwnedFd::from)
        .map_err(|error| HookError::failed(format!("opening {path}"), error))
}

/// A master with the recorded index. The kernel gives out the lowest free one, so those below are taken meanwhile.
fn open_master(record: &Terminal) -> Result<OwnedFd> {
    let start = Instant::now();
    loop {
        let mut lower = Vec::new();
        loop {
            let master = open_flags(&record.ptmx, libc::O_RDWR)?;
            let index = ioctl::TIOCGPTN.get(master.as_fd())?;
            if index == record.index {
                return Ok(master);
            }
            if index > record.index {
                break;
            }
            lower.push(master);
        }
        if start.elapsed() > PATIENCE {
            return Err(HookError::invalid(format!("terminal {} is in use", record.index)).remedy(
                "close the program that uses it, or restore in a mount namespace with its own devpts",
            ));
        }
        drop(lower);
        thread::sleep(Duration::from_millis(5));
    }
}

/// Settings, contents, controlling terminal; gives a slave of its own, if it needed one, and what becomes of the output.
fn configure(master: &OwnedFd, record: &Terminal, contents: &Contents) -> Result<(Option<OwnedFd>, Flow)> {
    let flow = if contents.flow() == Flow::Running { record.flow() } else { contents.flow() };
    let needed =
        record.session != 0 || record.slave_closed || !contents.output.is_empty() || flow == Flow::Suspended;
    let spare = needed.then(|| contents::open_slave(master.as_fd())).transpose()?;
    if let Some(termios) = &record.termios {
        // A suspension would hinder the opens that follow: it comes last.
        let mut contents = contents.clone();
        contents.set_flow(if flow == Flow::Stopped { flow } else { Flow::Running });
        contents::put(master.as_fd(), spare.as_ref().map(AsFd::as_fd), termios, &contents)?;
    }
    // Before there is a foreground group that would get SIGWINCH.
    let mut size = [0; 4];
    for (to, from) in size.iter_mut().zip([record.rows, record.columns, record.xpixel, record.ypixel]) {
        *to = u16::try_from(from).map_err(|_| HookError::invalid("the image's window size is malformed"))?;
    }
    ioctl::TIOCSWINSZ.call(master.as_fd(), &mut size)?;
    if let (true, Some(slave)) = (record.session != 0, &spare) {
        ioctl::set_controlling(slave.as_fd())?;
    }
    Ok((spare, flow))
}

/// What would hinder the opens, or show in packet mode, comes last.
fn finish(master: &OwnedFd, record: &Terminal) -> Result<()> {
    set_owner(master.as_fd(), record)?;
    if let Some(locks) = &record.locked_termios {
        ioctl::lock_termios(master.as_fd(), locks).map_err(|error| {
            error.remedy("settings of a terminal are locked with CAP_SYS_ADMIN of the initial user namespace")
        })?;
    }
    if record.master_exclusive {
        ioctl::set_exclusive(master.as_fd())?;
    }
    ioctl::TIOCPKT.call(master.as_fd(), &mut i32::from(record.packet))?;
    ioctl::TIOCSPTLCK.call(master.as_fd(), &mut i32::from(record.locked))
}

fn set_owner(master: BorrowedFd<'_>, record: &Terminal) -> Result<()> {
    let failed = |error| HookError::failed(format!("owner and mode of /dev/pts/{}", record.index), error);
    let node = ioctl::open_peer(master, libc::O_PATH | libc::O_CLOEXEC)?;
    let stat = nix::sys::stat::fstat(&node).map_err(|errno| HookError::failed("fstat of a slave", errno))?;
    let path = format!("/proc/self/fd/{}", node.as_raw_fd());
    let id = |wanted: u32, present: u32| (![present, NOBODY].contains(&wanted)).then_some(wanted);
    let (uid, gid) = (id(record.uid, stat.st_uid), id(record.gid, stat.st_gid));
    if uid.or(gid).is_some() {
        chown(&path, uid, gid).map_err(failed)?;
    }
    if stat.st_mode & 0o7777 != record.mode {
        fs::set_permissions(&path, fs::Permissions::from_mode(record.mode)).map_err(failed)?;
    }
    Ok(())
}

pub(crate) fn settle(host: &Host<'_>, object: &ObjectInfo, record: &Terminal) -> Result<()> {
    if !record.external && record.foreground <= 0 {
        return Ok(());
    }
    let fd = match object.handles.first() {
        Some(handle) => host.open_handle(handle.id)?,
        // Of a session that has closed it.
        None => open_flags("/dev/tty", libc::O_RDWR)?,
    };
    let ours = open_flags("/dev/tty", libc::O_RDWR).is_ok();
    if record.foreground > 0 && (record.session != 0 || ours && record.key.is_empty()) {
        ioctl::TIOCSPGRP.call(fd.as_fd(), &mut { record.foreground })?;
    }
    if record.external { external::settle(&fd, record) } else { Ok(()) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::identity;

    fn handle(role: u32) -> HandleInfo {
        HandleInfo { role, status_flags: libc::O_RDWR as u32, ..HandleInfo::default() }
    }

    fn object(roles: &[u32]) -> ObjectInfo {
        ObjectInfo { handles: roles.iter().map(|role| handle(*role)).collect(), ..ObjectInfo::default() }
    }

    /// A new terminal and its index, if there can be one here.
    pub(crate) fn any_terminal() -> Option<(OwnedFd, u32)> {
        let master = open_flags("/dev/ptmx", libc::O_RDWR).ok()?;
        let index = ioctl::TIOCGPTN.get(master.as_fd()).ok()?;
        Some((master, index))
    }

    #[test]
    fn settings_are_as_they_were() {
        let Some((master, index)) = any_terminal() else { return };
        let record = Terminal {
            index,
            termios: Some({
                let termios = ioctl::termios(master.as_fd()).unwrap();
                crate::record::stasis::pty::v1::Termios { lflag: libc::ISIG, iflag: libc::IXON, ..termios }
            }),
            rows: 24,
            columns: 80,
            xpixel: 3,
            packet: true,
            mode: 0o640,
            ..Terminal::default()
        };
        let contents = Contents { output: b"out".to_vec(), partial: b"in".to_vec(), ..Contents::default() };
        let fds = make(&object(&[SLAVE, MASTER]), master, &record, &contents).unwrap();
        let (slave, master) = (fds[0].as_fd(), fds[1].as_fd());
        assert_eq!(Some(ioctl::termios(slave).unwrap()), record.termios);
        assert_eq!(ioctl::TIOCGWINSZ.get(slave).unwrap(), [24, 80, 3, 0]);
        assert_eq!(ioctl::TIOCGPKT.get(master).unwrap(), 1);
        assert_eq!(identity::node(master).unwrap().st_mode & 0o777, 0o640);
        let mut buffer = [9; 8];
        assert_eq!(ioctl::read(slave, &mut buffer).unwrap(), 2);
        assert_eq!(&buffer[..2], b"in");
        // In packet mode, with a zero before data.
        assert_eq!(ioctl::read(master, &mut buffer).unwrap(), 4);
        assert_eq!(&buffer[..4], b"\0out");
    }

    #[test]
    fn a_hung_up_slave_beside_a_good_one() {
        let Some((master, index)) = any_terminal() else { return };
        let termios = Some(ioctl::termios(master.as_fd()).unwrap());
        let record = Terminal { index, termios, mode: 0o620, ..Terminal::default() };
        let made = make(&object(&[HUNG_UP, MASTER, SLAVE]), master, &record, &Contents::default());
        let fds = match made {
            Err(error) if error.errno == libc::EPERM => return,
            made => made.unwrap(),
        };
        assert_eq!(ioctl::TIOCGDEV.get(fds[0].as_fd()).unwrap_err().errno, libc::EIO);
        assert!(ioctl::TIOCGDEV.get(fds[2].as_fd()).is_ok());
        assert_eq!(ioctl::write(fds[2].as_fd(), b"x").unwrap(), 1);
    }

    #[test]
    fn a_terminal_without_master_has_hung_up() {
        let Some((master, index)) = any_terminal() else { return };
        let record = Terminal { index, uid: NOBODY, gid: NOBODY, mode: 0o600, ..Terminal::default() };
        let fds = make(&object(&[HUNG_UP]), master, &record, &Contents::default()).unwrap();
        assert_eq!(ioctl::TIOCGDEV.get(fds[0].as_fd()).unwrap_err().errno, libc::EIO);
    }
}
