//! Pseudoterminals for workloads and tests: pty(7).

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::ctl::{Outcome, changed, pause};
use crate::sys;

/// How long a program on a terminal may take to say what is waited for.
const PATIENCE: Duration = Duration::from_secs(15);

/// The master of a terminal, not blocking.
#[derive(Debug)]
pub struct Terminal {
    /// The master.
    pub master: File,
    /// Where its slave is.
    pub slave: PathBuf,
}

impl Terminal {
    /// A new terminal of the devpts at /dev/pts, unlocked.
    pub fn open() -> io::Result<Self> {
        Self::open_in(Path::new("/dev/ptmx"), Path::new("/dev/pts"))
    }

    /// A new terminal of any devpts.
    pub fn open_in(ptmx: &Path, directory: &Path) -> io::Result<Self> {
        let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
        let master = OpenOptions::new().read(true).write(true).custom_flags(flags).open(ptmx)?;
        set(&master, libc::TIOCSPTLCK, 0)?;
        let index: u32 = get(&master, libc::TIOCGPTN)?;
        Ok(Self { master, slave: directory.join(index.to_string()) })
    }

    /// The slave, not as a controlling terminal, not blocking.
    pub fn open_slave(&self) -> io::Result<File> {
        let flags = libc::O_NOCTTY | libc::O_NONBLOCK;
        OpenOptions::new().read(true).write(true).custom_flags(flags).open(&self.slave)
    }

    /// The slave for a program's standard descriptors.
    pub fn open_plain(&self) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&self.slave)
    }

    /// The slave, as the controlling terminal of this process, which has just called setsid(2).
    pub fn open_controlling(&self) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(&self.slave)
    }

    /// Types.
    pub fn send(&mut self, text: &[u8]) -> io::Result<()> {
        self.master.write_all(text)
    }

    /// Reads until `mark` has appeared; gives all that came.
    pub fn until(&mut self, mark: &str) -> Outcome<String> {
        let (mut all, began) = (String::new(), Instant::now());
        loop {
            let mut piece = [0; 4096];
            match self.master.read(&mut piece) {
                Ok(n) => all.push_str(&String::from_utf8_lossy(&piece[..n])),
                // Nothing yet, or nobody has the slave open yet.
                Err(error) if [libc::EAGAIN, libc::EIO].map(Some).contains(&error.raw_os_error()) => {
                    pause(Duration::from_millis(5));
                }
                Err(error) => return Err(error.into()),
            }
            if all.contains(mark) {
                return Ok(all);
            }
            if began.elapsed() > PATIENCE {
                return Err(changed(format!("{mark:?} is not said, but {all:?}")));
            }
        }
    }

    /// Reads whatever is there until nothing more comes for a while.
    pub fn drain(&mut self) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        while ready_within(self.master.as_fd(), libc::POLLIN, 100)? & libc::POLLIN != 0 {
            match sys::read(&self.master, 4096) {
                Ok(piece) => all.extend(piece),
                Err(error) if error.raw_os_error() == Some(libc::EIO) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }
}

/// poll(2) with a timeout in milliseconds.
pub fn ready_within(fd: BorrowedFd<'_>, events: i16, timeout: i32) -> io::Result<i16> {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: one valid entry.
    sys::cvt(unsafe { libc::poll(&raw mut entry, 1, timeout) })?;
    Ok(entry.revents)
}

/// An ioctl(2) that writes a `T`; the caller knows that the request does.
pub fn get<T: Copy>(fd: impl AsFd, request: libc::c_ulong) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: by the contract above; the integers and structures asked for are valid when zero.
    sys::cvt(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, value.as_mut_ptr()) })?;
    // SAFETY: as above.
    Ok(unsafe { value.assume_init() })
}

/// An ioctl(2) that reads a `T`; the caller knows that the request does.
pub fn set<T>(fd: impl AsFd, request: libc::c_ulong, value: T) -> io::Result<()> {
    // SAFETY: by the contract above.
    sys::cvt(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, &raw const value) }).map(drop)
}

/// An ioctl(2) that takes a plain number.
pub fn call(fd: impl AsFd, request: libc::c_ulong, number: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: the requests that it is used with take no pointer.
    sys::cvt(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, number) })
}

/// TCGETS2.
pub fn termios(fd: impl AsFd) -> io::Result<libc::termios2> {
    get(fd, libc::TCGETS2 as libc::c_ulong)
}

/// TCSETS2.
pub fn set_termios(fd: impl AsFd, termios: libc::termios2) -> io::Result<()> {
    set(fd, libc::TCSETS2 as libc::c_ulong, termios)
}

/// What can be compared of a termios.
pub fn settings(termios: &libc::termios2) -> impl PartialEq + std::fmt::Debug + use<> {
    let flags = [termios.c_iflag, termios.c_oflag, termios.c_cflag, termios.c_lflag, termios.c_ospeed];
    (flags, termios.c_cc)
}
