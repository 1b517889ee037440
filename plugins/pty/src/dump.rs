//! From a live terminal to a record.

use crate::{
    CONSOLE, DEV_TTY, HUNG_UP, MASTER, NOBODY, SHELL_JOB, SHELL_JOB_REMEDY, SLAVE, Terminal,
    contents::{self, MOST_INPUT},
    identity::{self, Name},
    ioctl,
    record::stasis::pty::v1::Flow,
};
use stasis_plugin_api::{
    Actor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, SessionInfo, namespace::IdMap,
};
use std::{
    fs,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::Path,
};

pub(crate) fn dump(host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Terminal>> {
    let of_role = |wanted: &[u32]| object.handles.iter().find(|handle| wanted.contains(&handle.role));
    if let Some(console) = of_role(&[CONSOLE]) {
        return Ok(Dumped::new(Terminal { console: console.link.to_string(), ..Terminal::default() }));
    }
    let name = Name::parse(&object.identity)?;
    let label = name.to_string();
    let key = name.external(host);
    let session = name.session(host);
    let leader = session.as_ref().filter(|session| session.leader_in_tree);
    let mut record =
        Terminal { index: name.index, key: key.clone().unwrap_or_default(), ..Terminal::default() };
    match (of_role(&[MASTER]), of_role(&[SLAVE, DEV_TTY])) {
        (Some(master), slave) => {
            record.ptmx = master.link.to_string();
            let fd = host.open_handle(master.id)?;
            let slave = slave.map(|slave| host.open_handle(slave.id)).transpose()?;
            read_pair(host, &mut record, fd.as_fd(), slave.as_ref().map(AsFd::as_fd), &label)?;
            owner(host, master, &mut record, fd.as_fd())?;
            if session.is_none() && slave.is_none() && key.is_none() {
                refuse_outside(fd.as_fd(), name)?;
            }
        }
        (None, None) if leader.is_none() && of_role(&[HUNG_UP]).is_some() => {
            record.ptmx = of_role(&[HUNG_UP]).map(|handle| ptmx_beside(&handle.link)).unwrap_or_default();
            // Of nobody's interest, and gone when the last descriptor is closed.
            (record.uid, record.gid, record.mode) = (NOBODY, NOBODY, 0o600);
        }
        (None, slave) if key.is_some() || leader.is_none() && host.has_option(SHELL_JOB) => {
            record.external = true;
            if let Some(slave) = slave {
                let fd = host.open_handle(slave.id)?;
                record.termios = Some(ioctl::termios(fd.as_fd())?);
            }
        }
        _ => {
            let remedy = format!(
                "dump a tree that holds its master, or give --external {key}, and at the restore \
                 --inherit-fd fd[N]:{key}{or}",
                key = name.key(),
                or = if leader.is_none() { format!("; {SHELL_JOB_REMEDY}") } else { String::new() },
            );
            return Err(HookError::unsupported(label, "its master is outside the tree", remedy));
        }
    }
    let as_tty = of_role(&[DEV_TTY]).is_some();
    if as_tty && leader.is_none() && !(record.external && host.has_option(SHELL_JOB)) {
        let why = "it is open as /dev/tty, but no session of the tree has it as controlling terminal";
        return Err(HookError::unsupported(label, why, ""));
    }
    record.foreground = foreground(host, session.as_ref(), &label)?;
    let mut dumped = Dumped::new(record);
    if let Some(session) = leader {
        dumped.record.session = session.sid;
        dumped.create_as = Actor::session_leader(session.sid);
        dumped.settle_as = Actor::task(session.sid);
    }
    dumped.uses = object.handles.iter().map(|handle| handle.id).collect();
    Ok(dumped)
}

/// The foreground process group, or 0 if that is no matter of the tree.
fn foreground(host: &Host<'_>, session: Option<&SessionInfo>, label: &str) -> Result<i32> {
    let Some(session) = session.filter(|session| session.foreground > 0) else { return Ok(0) };
    let alive = host.tasks().iter().any(|task| task.pgid == session.foreground);
    match (alive, session.leader_in_tree) {
        (true, _) => Ok(session.foreground),
        // With --shell-job the group belongs to the terminal's own session.
        (false, false) => Ok(0),
        (false, true) => {
            let why = format!("its foreground process group {} has no task in the tree", session.foreground);
            Err(HookError::unsupported(label, why, "let the shell take its terminal back first"))
        }
    }
}

/// The slave may be the terminal of a session outside, which the end of the tree would hang up.
fn refuse_outside(master: BorrowedFd<'_>, name: Name) -> Result<()> {
    match ioctl::TIOCGSID.get(master) {
        Ok(sid) => Err(HookError::unsupported(
            name.to_string(),
            format!("it is the controlling terminal of session {sid}, which is outside the tree"),
            format!("dump that session too, or give --external {} and let it be hung up", name.key()),
        )),
        // No session has it.
        Err(error) if error.errno == libc::ENOTTY => Ok(()),
        Err(error) => Err(error),
    }
}

/// The master device of the devpts in which a slave is.
fn ptmx_beside(link: &str) -> String {
    match Path::new(link).parent() {
        Some(directory) if directory != Path::new("/dev/pts") => directory.join("ptmx").display().to_string(),
        _ => "/dev/ptmx".into(),
    }
}

/// Owner and mode of the slave's node, as ids of the tree's user namespace.
fn owner(host: &Host<'_>, handle: &HandleInfo, record: &mut Terminal, master: BorrowedFd<'_>) -> Result<()> {
    let of_tree = || host.tasks().first().map(|task| task.pid);
    let pid = handle.holders.first().map(|holder| holder.pid).or_else(of_tree);
    let pid = pid.ok_or_else(|| HookError::invalid("the tree has no task"))?;
    let proc = host.open_proc(pid)?;
    let node = identity::node(master)?;
    let id = |file: &str, outside: u32| -> Result<u32> {
        let map = fs::read_to_string(format!("/proc/self/fd/{}/{file}", proc.as_raw_fd()))
            .map_err(|error| HookError::failed(format!("reading {file} of task {pid}"), error))?;
        Ok(IdMap::parse(&map).inside(outside).unwrap_or(NOBODY))
    };
    (record.uid, record.gid, record.mode) =
        (id("uid_map", node.st_uid)?, id("gid_map", node.st_gid)?, node.st_mode & 0o7777);
    Ok(())
}

fn read_size(record: &mut Terminal, fd: BorrowedFd<'_>) -> Result<()> {
    [record.rows, record.columns, record.xpixel, record.ypixel] = ioctl::TIOCGWINSZ.get(fd)?.map(u32::from);
    Ok(())
}

/// Reads what both ends say, and refuses what cannot be kept. Takes nothing out.
pub(crate) fn read_pair(
    host: &Host<'_>,
    record: &mut Terminal,
    master: BorrowedFd<'_>,
    slave: Option<BorrowedFd<'_>>,
    label: &str,
) -> Result<()> {
    let state = ioctl::poll(master, libc::POLLIN | libc::POLLPRI | libc::POLLOUT)?;
    record.packet = ioctl::TIOCGPKT.get(master)? != 0;
    if state & libc::POLLPRI != 0 {
        let remedy = "let its program read it first";
        return Err(HookError::unsupported(label, "its master has an unread packet-mode event", remedy));
    }
    let output = ioctl::FIONREAD.get(master)?;
    unread(host, label, output, "output", "read from its master")?;
    record.termios = Some(ioctl::termios(master)?);
    record.locked_termios = ioctl::locked_termios(master)?;
    read_size(record, master)?;
    record.locked = ioctl::TIOCGPTLCK.get(master)? != 0;
    record.master_exclusive = ioctl::TIOCGEXCL.get(master)? != 0;
    record.slave_closed = slave.is_none() && state & libc::POLLHUP != 0;
    let Some(slave) = slave else { return Ok(()) };
    record.exclusive = ioctl::TIOCGEXCL.get(slave)? != 0;
    let discipline = ioctl::TIOCGETD.get(slave)?;
    if discipline != 0 {
        return Err(HookError::unsupported(label, format!("it has line discipline {discipline}"), ""));
    }
    // This makes the kernel handle what was just typed, so it comes before counting.
    let state = ioctl::poll(slave, libc::POLLIN | libc::POLLOUT)?;
    let input = ioctl::FIONREAD.get(slave)?;
    if input >= MOST_INPUT as i32 {
        let why = format!("{input} bytes of input were not read, which fills its line discipline");
        return Err(HookError::unsupported(label, why, "let the program on the terminal read them first"));
    }
    let end = i32::from(state & libc::POLLIN != 0);
    unread(host, label, input.max(end), "input", "read")?;
    // What hinders output, if the master's buffer is empty, is a stop; `commit` tells the two kinds apart.
    if state & libc::POLLOUT == 0 && output == 0 {
        let by_character = record.termios.as_ref().is_some_and(|termios| termios.iflag & libc::IXON != 0);
        record.set_flow(if by_character { Flow::Stopped } else { Flow::Suspended });
    }
    Ok(())
}

/// What can only be read by taking it out waits for `commit`, which runs only when the tree is killed.
fn unread(host: &Host<'_>, label: &str, bytes: i32, of: &str, how: &str) -> Result<()> {
    if bytes == 0 || host.ends_tree() {
        return Ok(());
    }
    Err(HookError::unsupported(
        label,
        format!("{bytes} bytes of {of} were not {how}, and can only be copied by taking them out"),
        "let the terminal's program read them first, or dump without leaving the tree alive",
    ))
}

/// Copies what is in the buffers into the image.
pub(crate) fn commit(host: &Host<'_>, object: &ObjectInfo) -> Result<()> {
    let Some(master) = object.handles.iter().find(|handle| handle.role == MASTER) else { return Ok(()) };
    if Name::parse(&object.identity)?.external(host).is_some() {
        return Ok(());
    }
    let contents = contents::copy(host.open_handle(master.id)?.as_fd())?;
    match contents.is_empty() {
        true => Ok(()),
        false => contents::save(host, object.id, &contents),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masters_are_beside_their_slaves() {
        assert_eq!(ptmx_beside("/dev/pts/3 (deleted)"), "/dev/ptmx");
        assert_eq!(ptmx_beside("/jail/pts/3"), "/jail/pts/ptmx");
    }
}
