//! Which terminal a descriptor or a session refers to.

use crate::{
    AUX_MAJOR, CONSOLE, DEV_TTY, HUNG_UP, MASTER, SHELL_JOB, SHELL_JOB_REMEDY, SLAVE, SLAVE_MAJORS, ioctl,
};
use nix::sys::stat::{fstat, major, makedev, minor, stat};
use stasis_plugin_api::{Described, HandleInfo, HookError, Host, Result, SessionInfo};
use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::OnceLock,
};

/// A terminal is named by its devpts instance and its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Name {
    /// `st_dev` of the devpts; 0 if the tree does not see it.
    instance: u64,
    /// N of `/dev/pts/N`.
    pub index: u32,
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "/dev/pts/{}", self.index)
    }
}

impl Name {
    /// As it stands in [`Described::identity`].
    fn identity(self) -> String {
        format!("{}:{}", self.instance, self.index)
    }

    /// The other way.
    pub fn parse(identity: &str) -> Result<Self> {
        let numbers = identity.split_once(':');
        let name = numbers.and_then(|(instance, index)| {
            Some(Self { instance: instance.parse().ok()?, index: index.parse().ok()? })
        });
        name.ok_or_else(|| HookError::invalid(format!("identity {identity}")))
    }

    /// Device number of the slave.
    fn rdev(self) -> u64 {
        makedev((*SLAVE_MAJORS.start()).into(), self.index.into())
    }

    /// What `--external` calls it.
    pub fn key(self) -> String {
        format!("tty[{:x}:{:x}]", self.rdev(), self.instance)
    }

    /// The `--external` that names it, in the user's words.
    pub fn external(self, host: &Host<'_>) -> Option<String> {
        self.named_by(host.externals())
    }

    fn named_by(self, keys: Vec<String>) -> Option<String> {
        let names = |key: &str| {
            let inside = key.strip_prefix("tty[").and_then(|rest| rest.strip_suffix(']'));
            let (rdev, dev) = inside?.split_once(':')?;
            let number = |text: &str| u64::from_str_radix(text, 16).ok();
            Some(number(rdev)? == self.rdev() && (self.instance == 0 || number(dev)? == self.instance))
        };
        keys.into_iter().find(|key| names(key) == Some(true))
    }

    /// The session of the tree whose controlling terminal it is.
    pub fn session(self, host: &Host<'_>) -> Option<SessionInfo> {
        sessions(host).iter().find(|(_, name)| *name == self).map(|(session, _)| session.clone())
    }
}

/// The node of a master's slave, without opening the slave.
pub(crate) fn node(master: BorrowedFd<'_>) -> Result<nix::sys::stat::FileStat> {
    let path = ioctl::open_peer(master, libc::O_PATH | libc::O_CLOEXEC)?;
    fstat(path.as_fd()).map_err(|errno| HookError::failed("fstat of a slave", errno))
}

pub(crate) fn describe(host: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
    if handle.status_flags & libc::O_PATH as u32 != 0 {
        return Err(HookError::unsupported(handle.link.as_str(), "it is a terminal opened with O_PATH", ""));
    }
    let (name, role) = match (major(handle.rdev) as u32, minor(handle.rdev) as u32) {
        (AUX_MAJOR, 1) => {
            return Ok(Described {
                identity: format!("console {}", handle.link).into(),
                role: CONSOLE,
                description: handle.link.clone(),
                ..Described::default()
            });
        }
        (AUX_MAJOR, 2) => {
            let node = node(fd)?;
            (Name { instance: node.st_dev, index: minor(node.st_rdev) as u32 }, MASTER)
        }
        (AUX_MAJOR, _) => {
            let device = device(fd, &handle.link)?.ok_or_else(|| {
                let remedy = "close it, or end the program";
                HookError::unsupported(handle.link.as_str(), "the terminal behind it has hung up", remedy)
            })?;
            (behind_dev_tty(host, handle, device), DEV_TTY)
        }
        _ => {
            let role = if device(fd, &handle.link)?.is_some() { SLAVE } else { HUNG_UP };
            (Name { instance: handle.dev, index: minor(handle.rdev) as u32 }, role)
        }
    };
    Ok(Described {
        identity: name.identity().into(),
        role,
        description: name.to_string().into(),
        ..Described::default()
    })
}

/// The device number of the terminal behind a descriptor; `None` if it has hung up.
fn device(fd: BorrowedFd<'_>, link: &str) -> Result<Option<u64>> {
    let encoded = match ioctl::TIOCGDEV.get(fd) {
        Ok(encoded) => encoded,
        // hung_up_tty_ioctl in drivers/tty/tty_io.c.
        Err(error) if error.errno == libc::EIO => return Ok(None),
        Err(error) => return Err(error),
    };
    // new_encode_dev (linux/kdev_t.h): 12 bits of major number between the minor number's 8 low and 12 high bits.
    let device =
        makedev(((encoded >> 8) & 0xfff).into(), ((encoded & 0xff) | ((encoded >> 12) & 0xfff00)).into());
    match SLAVE_MAJORS.contains(&(major(device) as u32)) {
        true => Ok(Some(device)),
        false => Err(HookError::unsupported(
            link,
            format!("it is terminal {}:{}, no pseudoterminal", major(device), minor(device)),
            "",
        )),
    }
}

/// The terminal of a descriptor opened as /dev/tty: that of its holder's session, or of any other with this number.
fn behind_dev_tty(host: &Host<'_>, handle: &HandleInfo, device: u64) -> Name {
    let candidates = || sessions(host).iter().filter(|(session, _)| session.terminal == device);
    let holder = handle.holders.first().map(|holder| holder.pid);
    let sid = host.tasks().iter().find(|task| Some(task.pid) == holder).map(|task| task.sid);
    let own = candidates().find(|(session, _)| Some(session.sid) == sid).or_else(|| candidates().next());
    own.map_or(Name { instance: 0, index: minor(device) as u32 }, |(_, name)| *name)
}

/// Sessions on pseudoterminals, with their terminals. Found out once: this process makes one dump.
fn sessions(host: &Host<'_>) -> &'static [(SessionInfo, Name)] {
    static SESSIONS: OnceLock<Vec<(SessionInfo, Name)>> = OnceLock::new();
    SESSIONS.get_or_init(|| {
        let sessions = host.sessions();
        if sessions.is_empty() {
            return Vec::new();
        }
        let masters = masters(host);
        let named = |session: SessionInfo| Some((session.clone(), of_session(host, &session, &masters)?));
        sessions.into_iter().filter_map(named).collect()
    })
}

/// The terminals whose masters the tree holds, by the leader of their session as this process sees it.
fn masters(host: &Host<'_>) -> Vec<(i32, Name)> {
    let handles = (1..).map_while(|id| host.handle(id));
    let masters = handles.filter(|handle| handle.rdev == makedev(AUX_MAJOR.into(), 2));
    let terminal = |handle: HandleInfo| {
        let fd = host.open_handle(handle.id).ok()?;
        let sid = ioctl::TIOCGSID.get(fd.as_fd()).ok()?;
        let node = node(fd.as_fd()).ok()?;
        Some((sid, Name { instance: node.st_dev, index: minor(node.st_rdev) as u32 }))
    };
    masters.filter_map(terminal).collect()
}

/// A session's terminal. /proc tells its number, but not the devpts: that is told by its master, else by who has it open,
/// else it is the usual one.
fn of_session(host: &Host<'_>, session: &SessionInfo, masters: &[(i32, Name)]) -> Option<Name> {
    if !SLAVE_MAJORS.contains(&(major(session.terminal) as u32)) {
        return None;
    }
    let index = minor(session.terminal) as u32;
    let tasks = host.tasks();
    let leader = tasks.iter().find(|task| task.pid == session.sid).map(|task| task.host_pid);
    let told = masters.iter().find(|(sid, name)| Some(*sid) == leader && name.index == index);
    if let Some((_, name)) = told {
        return Some(*name);
    }
    let mut members: Vec<i32> =
        tasks.iter().filter(|task| task.sid == session.sid).map(|task| task.pid).collect();
    members.sort_by_key(|pid| *pid != session.sid);
    // Standard descriptors, and where shells keep their own.
    const USUAL: [i32; 5] = [0, 1, 2, 10, 255];
    let open = members.iter().flat_map(|&pid| USUAL.map(|fd| (pid, fd))).find_map(|(pid, fd)| {
        let handle = host.handle(host.handle_at(pid, fd)?)?;
        (handle.rdev == session.terminal).then_some(handle.dev)
    });
    let instance = open.or_else(|| {
        let proc = host.open_proc(*members.first()?).ok()?;
        let path = format!("/proc/self/fd/{}/root/dev/pts/{index}", proc.as_raw_fd());
        stat(path.as_str()).ok().filter(|stat| stat.st_rdev == session.terminal).map(|stat| stat.st_dev)
    });
    Some(Name { instance: instance.unwrap_or(0), index })
}

pub(crate) fn describe_session(host: &Host<'_>, session: &SessionInfo) -> Result<Option<Described>> {
    let known = sessions(host).iter().find(|(known, _)| known.sid == session.sid);
    let Some((_, name)) = known else { return Ok(None) };
    if !session.leader_in_tree {
        if host.has_option(SHELL_JOB) || name.external(host).is_some() {
            return Ok(None);
        }
        let why = format!(
            "it is the controlling terminal of session {}, whose leader is outside the tree",
            session.sid
        );
        return Err(HookError::unsupported(name.to_string(), why, SHELL_JOB_REMEDY));
    }
    Ok(Some(Described {
        identity: name.identity().into(),
        role: SLAVE,
        description: name.to_string().into(),
        ..Described::default()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_keys() {
        let name = Name { instance: 0x18, index: 300 };
        assert_eq!(Name::parse(&name.identity()).unwrap(), name);
        assert!(Name::parse("x:1").is_err() && Name::parse("1").is_err());
        assert_eq!(Name { index: 2, ..name }.key(), "tty[8802:18]");
    }

    #[test]
    fn externals_are_compared_as_numbers() {
        let name = Name { instance: 0x18, index: 2 };
        let keys = ["unix[3]", "tty[zz:1]", "tty[8803:18]", "tty[8802:019]", "tty[08802:0018]"];
        let found = name.named_by(keys.map(String::from).to_vec());
        assert_eq!(found.as_deref(), Some("tty[08802:0018]"));
    }
}
