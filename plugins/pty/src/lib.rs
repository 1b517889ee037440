//! Pseudoterminals: pty(7), pts(4). An object is one terminal: its master (role 0), the descriptors of its slave (1),
//! and those opened as /dev/tty (2). Data in its buffers can only be read by taking them out and are refused for now.

mod dump;
mod ioctl;
mod restore;

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, Host, ObjectInfo, Result, Selector, Session, SessionInfo,
    export_plugin, register,
};
use std::os::fd::{BorrowedFd, OwnedFd};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::pty::v1::Terminal;

/// Major number of /dev/tty and /dev/ptmx (Documentation/admin-guide/devices.txt).
const AUX_MAJOR: u32 = 5;
/// Slaves have the major numbers 136 to 143; the kernel uses the first.
const SLAVE_MAJOR: u32 = 136;
const SLAVE_MAJORS: std::ops::RangeInclusive<u32> = SLAVE_MAJOR..=143;
/// Highest minor number (20 bits).
const LAST_MINOR: u32 = (1 << 20) - 1;

/// Roles of handles.
const MASTER: u32 = 0;
const SLAVE: u32 = 1;
const DEV_TTY: u32 = 2;

struct Pty;

impl Descriptor for Pty {
    type Record = Terminal;
    const KIND: &'static str = "pty";

    fn selectors(&self) -> Vec<Selector> {
        let mut selectors = vec![
            Selector::CharDevice { major: AUX_MAJOR, first: 0, last: 0 },
            Selector::CharDevice { major: AUX_MAJOR, first: 2, last: 2 },
        ];
        let slave = |major| Selector::CharDevice { major, first: 0, last: LAST_MINOR };
        selectors.extend(SLAVE_MAJORS.map(slave));
        selectors
    }

    fn describe(&self, host: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
        dump::describe(host, handle, fd)
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Terminal>> {
        dump::dump(host, object)
    }

    fn create(&self, _: &Host<'_>, object: &ObjectInfo, record: &Terminal) -> Result<Vec<OwnedFd>> {
        restore::create(object, record)
    }

    fn settle(&self, host: &Host<'_>, object: &ObjectInfo, record: &Terminal) -> Result<()> {
        restore::settle(host, object, record)
    }
}

impl Session for Pty {
    const KIND: &'static str = "pty";

    fn selectors(&self) -> Vec<Selector> {
        SLAVE_MAJORS.map(Selector::Terminal).collect()
    }

    fn describe(&self, host: &Host<'_>, session: &SessionInfo) -> Result<Option<Described>> {
        dump::describe_session(host, session)
    }
}

register!(descriptor: Pty);
register!(session: Pty);
export_plugin! { name: "pty", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }

#[cfg(test)]
mod tests {
    use super::*;
    use nix::{
        sys::wait::{WaitStatus, waitpid},
        unistd::{ForkResult, fork, getpid, setsid},
    };
    use std::{fs::OpenOptions, os::fd::AsFd};

    fn handle(role: u32) -> HandleInfo {
        HandleInfo { role, status_flags: libc::O_RDWR as u32, ..HandleInfo::default() }
    }

    /// A session leader gets its controlling terminal, and /dev/tty is that terminal.
    fn leader() -> std::result::Result<(), String> {
        setsid().map_err(|errno| errno.to_string())?;
        // Closing the master at the end hangs up on the session.
        // SAFETY: no handler is installed.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
        let master =
            OpenOptions::new().read(true).write(true).open("/dev/ptmx").map_err(|e| e.to_string())?;
        let index = ioctl::TIOCGPTN.get(master.as_fd()).map_err(|e| e.to_string())?;
        let termios = ioctl::termios(master.as_fd()).map_err(|e| e.to_string())?;
        drop(master);
        let record = Terminal {
            index,
            ptmx: "/dev/ptmx".into(),
            termios: Some(termios),
            mode: 0o600,
            session: getpid().as_raw(),
            ..Terminal::default()
        };
        let handles = vec![handle(DEV_TTY), handle(MASTER), handle(SLAVE)];
        let object = ObjectInfo { handles: handles.into(), ..ObjectInfo::default() };
        let fds = restore::create(&object, &record).map_err(|e| e.to_string())?;
        let session = nix::sys::termios::tcgetsid(&fds[2]).map_err(|errno| errno.to_string())?;
        let device = |fd: &OwnedFd| ioctl::TIOCGDEV.get(fd.as_fd()).map_err(|e| e.to_string());
        if session == getpid() && device(&fds[0])? == device(&fds[2])? {
            Ok(())
        } else {
            Err("not ours".into())
        }
    }

    #[test]
    fn a_session_gets_its_terminal() {
        if !std::path::Path::new("/dev/ptmx").exists() {
            eprintln!("skipped: no /dev/ptmx");
            return;
        }
        // SAFETY: the child uses the allocator, which glibc keeps usable after fork, and exits without unwinding.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => {
                assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0))
            }
            ForkResult::Child => {
                let result = leader();
                if let Err(text) = &result {
                    eprintln!("{text}");
                }
                // SAFETY: ends the child.
                unsafe { libc::_exit(i32::from(result.is_err())) }
            }
        }
    }
}
