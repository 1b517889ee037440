//! From a record to a live terminal.

use crate::{DEV_TTY, MASTER, Terminal, dump, ioctl};
use stasis_plugin_api::{HandleInfo, HookError, Host, ObjectInfo, Result};
use std::{
    fs::{self, File, OpenOptions, Permissions},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    },
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// How long to wait for a number that another task of the tree may hold on the way to its own.
const PATIENCE: Duration = Duration::from_secs(3);

pub(crate) fn create(object: &ObjectInfo, record: &Terminal) -> Result<Vec<OwnedFd>> {
    if record.external {
        return object.handles.iter().map(own_terminal).collect();
    }
    let mut master = Some(open_master(record)?);
    let mut fds = Vec::new();
    let mut slaves = Vec::new();
    if let Some(master) = &master {
        configure(master, record)?;
        if record.session != 0 || record.slave_closed {
            slaves.push(ioctl::open_peer(master.as_fd(), libc::O_RDWR | libc::O_NOCTTY)?);
        }
        if let (true, Some(slave)) = (record.session != 0, slaves.first()) {
            ioctl::set_controlling(slave.as_fd())?;
        }
        for handle in object.handles.iter().filter(|handle| handle.role != MASTER) {
            slaves.push(match handle.role {
                DEV_TTY => open("/dev/tty", handle)?,
                _ => ioctl::open_peer(master.as_fd(), flags(handle))?,
            });
        }
        finish(master, slaves.first(), record)?;
    }
    let mut slaves = slaves.split_off(usize::from(record.session != 0 || record.slave_closed)).into_iter();
    for handle in &object.handles {
        let fd = if handle.role == MASTER { master.take() } else { slaves.next() };
        fds.push(fd.ok_or_else(|| HookError::invalid("a terminal with more than one master"))?);
    }
    Ok(fds)
}

/// The kernel's O_LARGEFILE, which the C library defines as 0: open(2) adds it by itself, TIOCGPTPEER does not.
const LARGEFILE: i32 = 0o100_000;

/// Access mode and what an open must not do. Without O_CLOEXEC: TIOCGPTPEER would keep it among the file's own flags.
fn flags(handle: &HandleInfo) -> i32 {
    (handle.status_flags as i32 & (libc::O_ACCMODE | LARGEFILE)) | libc::O_NOCTTY | libc::O_NONBLOCK
}

fn open(path: &str, handle: &HandleInfo) -> Result<OwnedFd> {
    let access = handle.status_flags as i32 & libc::O_ACCMODE;
    OpenOptions::new()
        .read(access != libc::O_WRONLY)
        .write(access != libc::O_RDONLY)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
        .open(path)
        .map(OwnedFd::from)
        .map_err(|error| HookError::failed(format!("opening {path}"), error))
}

/// The terminal that restore was started from.
fn own_terminal(handle: &HandleInfo) -> Result<OwnedFd> {
    let no_terminal = |error: HookError| error.remedy("start restore from a terminal");
    if handle.role == DEV_TTY {
        return open("/dev/tty", handle).map_err(no_terminal);
    }
    for fd in 0..3 {
        // SAFETY: asks about a number only.
        if unsafe { libc::isatty(fd) } == 1 {
            return open(&format!("/proc/self/fd/{fd}"), handle);
        }
    }
    let tty = open("/dev/tty", handle).map_err(no_terminal)?;
    // By its own name, as it was, if it is a pseudoterminal.
    let index = ioctl::TIOCGDEV.get(tty.as_fd())?;
    let index = (index & 0xff) | ((index >> 12) & 0xfff00);
    Ok(open(&format!("/dev/pts/{index}"), handle).unwrap_or(tty))
}

/// A master with the recorded index. The kernel gives out the lowest free one, so those below are taken meanwhile.
fn open_master(record: &Terminal) -> Result<OwnedFd> {
    let start = Instant::now();
    loop {
        let mut lower = Vec::new();
        loop {
            let master: OwnedFd = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NOCTTY)
                .open(&record.ptmx)
                .map_err(|error| HookError::failed(format!("opening {}", record.ptmx), error))?
                .into();
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

fn configure(master: &OwnedFd, record: &Terminal) -> Result<()> {
    ioctl::TIOCSPTLCK.call(master.as_fd(), &mut 0)?;
    if let Some(termios) = &record.termios {
        ioctl::set_termios(master.as_fd(), termios)?;
    }
    // Before there is a foreground group that would get SIGWINCH.
    let mut size = [0; 4];
    for (to, from) in size.iter_mut().zip([record.rows, record.columns, record.xpixel, record.ypixel]) {
        *to = u16::try_from(from).map_err(|_| HookError::invalid("the image's window size is malformed"))?;
    }
    ioctl::TIOCSWINSZ.call(master.as_fd(), &mut size)
}

/// What would hinder the opens, or show in packet mode, comes last.
fn finish(master: &OwnedFd, slave: Option<&OwnedFd>, record: &Terminal) -> Result<()> {
    if let (true, Some(slave)) = (record.exclusive, slave) {
        ioctl::set_exclusive(slave.as_fd())?;
    }
    set_owner(record)?;
    if record.master_exclusive {
        ioctl::set_exclusive(master.as_fd())?;
    }
    ioctl::TIOCPKT.call(master.as_fd(), &mut i32::from(record.packet))?;
    ioctl::TIOCSPTLCK.call(master.as_fd(), &mut i32::from(record.locked))
}

fn set_owner(record: &Terminal) -> Result<()> {
    let path = Path::new(&dump::ptmx_directory(&record.ptmx)).join(record.index.to_string());
    let failed = |error| HookError::failed(format!("owner and mode of {}", path.display()), error);
    let stat = fs::metadata(&path).map_err(failed)?;
    if (stat.uid(), stat.gid()) != (record.uid, record.gid) {
        chown(&path, Some(record.uid), Some(record.gid)).map_err(failed)?;
    }
    if stat.mode() & 0o7777 != record.mode {
        fs::set_permissions(&path, Permissions::from_mode(record.mode)).map_err(failed)?;
    }
    Ok(())
}

pub(crate) fn settle(host: &Host<'_>, object: &ObjectInfo, record: &Terminal) -> Result<()> {
    let Some(handle) = object.handles.first() else { return Ok(()) };
    let fd = host.open_handle(handle.id)?;
    if record.external
        && let Some(termios) = &record.termios
    {
        ioctl::set_termios(fd.as_fd(), termios)?;
    }
    let ours = fs::exists("/dev/tty").unwrap_or(false) && File::open("/dev/tty").is_ok();
    if record.foreground > 0 && (record.session != 0 || ours) {
        ioctl::TIOCSPGRP.call(fd.as_fd(), &mut { record.foreground })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SLAVE;
    use std::io::Write;

    fn handle(role: u32) -> HandleInfo {
        HandleInfo { role, status_flags: libc::O_RDWR as u32, ..HandleInfo::default() }
    }

    fn any_terminal() -> Option<(OwnedFd, u32)> {
        let master: OwnedFd = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open("/dev/ptmx")
            .ok()?
            .into();
        let index = ioctl::TIOCGPTN.get(master.as_fd()).ok()?;
        Some((master, index))
    }

    #[test]
    fn a_terminal_is_as_it_was() {
        let Some((master, index)) = any_terminal() else { return };
        ioctl::TIOCSPTLCK.call(master.as_fd(), &mut 0).unwrap();
        let slave = ioctl::open_peer(master.as_fd(), libc::O_RDWR | libc::O_NOCTTY).unwrap();
        ioctl::TIOCSWINSZ.call(master.as_fd(), &mut [24, 80, 3, 4]).unwrap();
        ioctl::TIOCPKT.call(master.as_fd(), &mut 1).unwrap();
        let mut termios = ioctl::termios(slave.as_fd()).unwrap();
        termios.lflag &= !(libc::ICANON | libc::ECHO);
        termios.cc[3] = 9;
        ioctl::set_termios(slave.as_fd(), &termios).unwrap();

        let read = |master: &OwnedFd, slave: &OwnedFd| {
            let mut record = Terminal { index, ptmx: "/dev/ptmx".into(), mode: 0o620, ..Terminal::default() };
            dump::read_pair(&mut record, master.as_fd(), Some(slave.as_fd()), "t").map(|()| record)
        };
        let record = match read(&master, &slave) {
            Ok(record) => record,
            // Packet mode tells the master of the changed termios.
            Err(error) => {
                assert!(error.what.contains("packet-mode"), "{error}");
                let mut packet = [0; 1];
                assert_eq!(nix::unistd::read(&master, &mut packet).unwrap(), 1);
                read(&master, &slave).unwrap()
            }
        };
        assert!(record.packet && !record.locked && !record.exclusive);
        assert_eq!((record.rows, record.columns, record.xpixel, record.ypixel), (24, 80, 3, 4));
        drop((master, slave));

        let object =
            ObjectInfo { handles: vec![handle(SLAVE), handle(MASTER)].into(), ..ObjectInfo::default() };
        let fds = create(&object, &record).unwrap();
        assert_eq!(ioctl::TIOCGPTN.get(fds[1].as_fd()).unwrap(), index);
        assert_eq!(read(&fds[1], &fds[0]).unwrap(), record);
        assert_eq!(ioctl::termios(fds[0].as_fd()).unwrap(), termios);
        assert_eq!(fs::metadata(format!("/dev/pts/{index}")).unwrap().mode() & 0o777, 0o620);

        // Unread data are refused by name, in both directions.
        File::from(fds[1].try_clone().unwrap()).write_all(b"typed").unwrap();
        thread::sleep(Duration::from_millis(20));
        assert!(read(&fds[1], &fds[0]).unwrap_err().what.contains("5 bytes of input"));
    }
}
