//! Pseudoterminals: pty(7), pts(4), ioctl_tty(2).
//!
//! An object is one terminal; its handles are its master, descriptors of its slave, those opened as /dev/tty, and
//! descriptors of the slave that have hung up. A terminal keeps its number: the lower ones are taken meanwhile.
//!
//! **Outside ends.** A terminal whose master is outside the tree is refused, unless the user says where it comes from at the
//! restore: `--shell-job` takes the terminal that restore is started from; `--external tty[RDEV:DEV]` (hexadecimal, as
//! stat(2) gives them for the slave) takes the one that is given with `--inherit-fd fd[N]:tty[RDEV:DEV]`. A terminal whose slave
//! is the controlling terminal of a session outside is refused, unless named so.
//!
//! **Data.** What was not read yet, in both directions, is kept when the tree is killed by the dump. It can only be copied by
//! taking it out, so a dump that leaves the tree alive refuses it; a line half typed does not show there, and is missing in
//! that image. **Not kept:** the cursor column by which tabs are expanded, and a literal-next character just typed.

mod contents;
mod dump;
mod external;
mod identity;
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

/// Major number of /dev/tty (0), /dev/console (1) and /dev/ptmx (2) (Documentation/admin-guide/devices.txt).
const AUX_MAJOR: u32 = 5;
/// Major numbers of slaves; the kernel uses the first.
const SLAVE_MAJORS: std::ops::RangeInclusive<u32> = 136..=143;
/// Highest minor number (20 bits).
const LAST_MINOR: u32 = (1 << 20) - 1;
/// Owner of a node that is none of the tree's user namespace.
const NOBODY: u32 = u32::MAX;

/// Roles of handles.
const MASTER: u32 = 0;
const SLAVE: u32 = 1;
const DEV_TTY: u32 = 2;
const HUNG_UP: u32 = 3;
const CONSOLE: u32 = 4;

/// The switch of core by which the tree's terminal may be outside.
const SHELL_JOB: &str = "shell-job";
const SHELL_JOB_REMEDY: &str = "--shell-job puts the tree on the terminal that restore is started from";

struct Pty;

impl Descriptor for Pty {
    type Record = Terminal;
    const KIND: &'static str = "pty";

    fn selectors(&self) -> Vec<Selector> {
        let mut selectors = vec![Selector::CharDevice { major: AUX_MAJOR, first: 0, last: 2 }];
        let slave = |major| Selector::CharDevice { major, first: 0, last: LAST_MINOR };
        selectors.extend(SLAVE_MAJORS.map(slave));
        selectors
    }

    fn describe(&self, host: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
        identity::describe(host, handle, fd)
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Terminal>> {
        dump::dump(host, object)
    }

    fn commit(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<()> {
        dump::commit(host, object)
    }

    fn create(&self, host: &Host<'_>, object: &ObjectInfo, record: &Terminal) -> Result<Vec<OwnedFd>> {
        restore::create(host, object, record)
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
        identity::describe_session(host, session)
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
    use std::os::fd::AsFd;

    fn handle(role: u32) -> HandleInfo {
        HandleInfo { role, status_flags: libc::O_RDWR as u32, ..HandleInfo::default() }
    }

    /// A session leader gets its controlling terminal, and /dev/tty is that terminal.
    fn leader() -> std::result::Result<(), String> {
        setsid().map_err(|errno| errno.to_string())?;
        // Closing the master at the end hangs up on the session.
        // SAFETY: no handler is installed.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
        let (master, index) = restore::tests::any_terminal().ok_or("no terminal")?;
        let termios = ioctl::termios(master.as_fd()).map_err(|e| e.to_string())?;
        let record = Terminal {
            index,
            termios: Some(termios),
            mode: 0o600,
            session: getpid().as_raw(),
            ..Terminal::default()
        };
        let handles = vec![handle(DEV_TTY), handle(MASTER), handle(SLAVE)];
        let object = ObjectInfo { handles: handles.into(), ..ObjectInfo::default() };
        let fds = restore::make(&object, master, &record, &Default::default()).map_err(|e| e.to_string())?;
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
        if restore::tests::any_terminal().is_none() {
            eprintln!("skipped: no terminals here");
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
