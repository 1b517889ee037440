//! ioctl_tty(2), typed.

use crate::record::stasis::pty::v1::Termios;
use stasis_plugin_api::{HookError, Result};
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// A request whose argument is a pointer to `T`, and its name for messages.
pub(crate) struct Request<T> {
    number: libc::c_ulong,
    name: &'static str,
    argument: std::marker::PhantomData<T>,
}

impl<T> Request<T> {
    const fn new(number: libc::c_ulong, name: &'static str) -> Self {
        Self { number, name, argument: std::marker::PhantomData }
    }

    /// Calls it with a pointer to `argument`, which the kernel reads or writes.
    pub(crate) fn call(&self, fd: BorrowedFd<'_>, argument: &mut T) -> Result<()> {
        // SAFETY: each constant below names the type that the kernel copies for this request.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), self.number, std::ptr::from_mut(argument)) };
        if result < 0 {
            return Err(HookError::failed(self.name, io::Error::last_os_error()));
        }
        Ok(())
    }

    /// Calls it with an argument that the kernel fills.
    pub(crate) fn get(&self, fd: BorrowedFd<'_>) -> Result<T>
    where
        T: Default,
    {
        let mut argument = T::default();
        self.call(fd, &mut argument)?;
        Ok(argument)
    }
}

/// `struct winsize`: rows, columns, pixels.
pub(crate) type Winsize = [u16; 4];

pub(crate) const TIOCGPTN: Request<u32> = Request::new(libc::TIOCGPTN as libc::c_ulong, "TIOCGPTN");
pub(crate) const TIOCGDEV: Request<u32> = Request::new(0x8004_5432, "TIOCGDEV");
pub(crate) const TIOCSPTLCK: Request<i32> = Request::new(libc::TIOCSPTLCK as libc::c_ulong, "TIOCSPTLCK");
pub(crate) const TIOCGPTLCK: Request<i32> = Request::new(0x8004_5439, "TIOCGPTLCK");
pub(crate) const TIOCPKT: Request<i32> = Request::new(libc::TIOCPKT as libc::c_ulong, "TIOCPKT");
pub(crate) const TIOCGPKT: Request<i32> = Request::new(0x8004_5438, "TIOCGPKT");
pub(crate) const TIOCGEXCL: Request<i32> = Request::new(0x8004_5440, "TIOCGEXCL");
pub(crate) const TIOCGETD: Request<i32> = Request::new(0x5424, "TIOCGETD");
pub(crate) const TIOCGWINSZ: Request<Winsize> = Request::new(libc::TIOCGWINSZ, "TIOCGWINSZ");
pub(crate) const TIOCSWINSZ: Request<Winsize> = Request::new(libc::TIOCSWINSZ, "TIOCSWINSZ");
pub(crate) const TIOCSPGRP: Request<i32> = Request::new(libc::TIOCSPGRP, "TIOCSPGRP");
pub(crate) const FIONREAD: Request<i32> = Request::new(libc::FIONREAD, "FIONREAD");
pub(crate) const TIOCGSID: Request<i32> = Request::new(libc::TIOCGSID, "TIOCGSID");
const TCGETS2: Request<libc::termios2> = Request::new(libc::TCGETS2 as libc::c_ulong, "TCGETS2");
const TCSETS2: Request<libc::termios2> = Request::new(libc::TCSETS2 as libc::c_ulong, "TCSETS2");
const TIOCGLCKTRMIOS: Request<libc::termios2> =
    Request::new(libc::TIOCGLCKTRMIOS as libc::c_ulong, "TIOCGLCKTRMIOS");
const TIOCSLCKTRMIOS: Request<libc::termios2> =
    Request::new(libc::TIOCSLCKTRMIOS as libc::c_ulong, "TIOCSLCKTRMIOS");
/// 19 bytes of control characters (asm-generic/termbits.h).
const CONTROL_CHARACTERS: usize = 19;

fn zero() -> libc::termios2 {
    libc::termios2 {
        c_iflag: 0,
        c_oflag: 0,
        c_cflag: 0,
        c_lflag: 0,
        c_line: 0,
        c_cc: [0; CONTROL_CHARACTERS],
        c_ispeed: 0,
        c_ospeed: 0,
    }
}

/// Asked of a master, the kernel answers for the slave (drivers/tty/tty_ioctl.c, tty_mode_ioctl); likewise below.
pub(crate) fn termios(fd: BorrowedFd<'_>) -> Result<Termios> {
    let mut termios = zero();
    TCGETS2.call(fd, &mut termios)?;
    Ok(from_kernel(&termios))
}

pub(crate) fn set_termios(fd: BorrowedFd<'_>, saved: &Termios) -> Result<()> {
    TCSETS2.call(fd, &mut to_kernel(saved)?)
}

/// Which settings ordinary users cannot change: bits and characters that are not 0. `None` if there are none.
pub(crate) fn locked_termios(fd: BorrowedFd<'_>) -> Result<Option<Termios>> {
    // The kernel fills a struct ktermios, which is a termios2.
    let mut locks = zero();
    TIOCGLCKTRMIOS.call(fd, &mut locks)?;
    let locks = Termios { ispeed: 0, ospeed: 0, ..from_kernel(&locks) };
    let none = Termios { cc: vec![0; CONTROL_CHARACTERS], ..Termios::default() };
    Ok((locks != none).then_some(locks))
}

pub(crate) fn lock_termios(fd: BorrowedFd<'_>, locks: &Termios) -> Result<()> {
    TIOCSLCKTRMIOS.call(fd, &mut to_kernel(locks)?)
}

fn from_kernel(termios: &libc::termios2) -> Termios {
    Termios {
        iflag: termios.c_iflag,
        oflag: termios.c_oflag,
        cflag: termios.c_cflag,
        lflag: termios.c_lflag,
        line: termios.c_line.into(),
        cc: termios.c_cc.to_vec(),
        ispeed: termios.c_ispeed,
        ospeed: termios.c_ospeed,
    }
}

fn to_kernel(saved: &Termios) -> Result<libc::termios2> {
    let bad = || HookError::invalid("the image's termios is malformed");
    Ok(libc::termios2 {
        c_iflag: saved.iflag,
        c_oflag: saved.oflag,
        c_cflag: saved.cflag,
        c_lflag: saved.lflag,
        c_line: u8::try_from(saved.line).map_err(|_| bad())?,
        c_cc: saved.cc.as_slice().try_into().map_err(|_| bad())?,
        c_ispeed: saved.ispeed,
        c_ospeed: saved.ospeed,
    })
}

/// Requests with a plain number, or none.
fn plain(fd: BorrowedFd<'_>, number: libc::c_ulong, name: &str, argument: libc::c_ulong) -> Result<i32> {
    // SAFETY: these requests take no pointer.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, argument) };
    if result < 0 { Err(HookError::failed(name, io::Error::last_os_error())) } else { Ok(result) }
}

pub(crate) fn set_controlling(slave: BorrowedFd<'_>) -> Result<()> {
    plain(slave, libc::TIOCSCTTY as libc::c_ulong, "TIOCSCTTY", 0).map(drop)
}

pub(crate) fn set_exclusive(fd: BorrowedFd<'_>) -> Result<()> {
    plain(fd, libc::TIOCEXCL as libc::c_ulong, "TIOCEXCL", 0).map(drop)
}

/// Opens the slave of a master.
pub(crate) fn open_peer(master: BorrowedFd<'_>, flags: i32) -> Result<OwnedFd> {
    let fd = plain(master, 0x5441, "TIOCGPTPEER", flags as libc::c_ulong)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// tcflow(3): TCOOFF, TCOON.
pub(crate) fn flow(slave: BorrowedFd<'_>, action: i32) -> Result<()> {
    plain(slave, libc::TCXONC, "TCXONC", action as libc::c_ulong).map(drop)
}

/// Hangs up on everybody who has the slave open; needs CAP_SYS_ADMIN in the initial user namespace.
pub(crate) fn hang_up(slave: BorrowedFd<'_>) -> Result<()> {
    const TIOCVHANGUP: libc::c_ulong = 0x5437;
    plain(slave, TIOCVHANGUP, "TIOCVHANGUP", 0).map(drop)
}

/// What of `events` is the case.
pub(crate) fn poll(fd: BorrowedFd<'_>, events: i16) -> Result<i16> {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: one valid entry.
    if unsafe { libc::poll(std::ptr::from_mut(&mut entry), 1, 0) } < 0 {
        return Err(HookError::failed("poll", io::Error::last_os_error()));
    }
    Ok(entry.revents)
}

/// read(2).
pub(crate) fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize> {
    // SAFETY: the kernel writes at most the length of the buffer.
    let n = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(n).map_err(|_| HookError::failed("reading a terminal", io::Error::last_os_error()))
}

/// write(2).
pub(crate) fn write(fd: BorrowedFd<'_>, data: &[u8]) -> Result<usize> {
    // SAFETY: the kernel reads at most the length of the buffer.
    let n = unsafe { libc::write(fd.as_raw_fd(), data.as_ptr().cast(), data.len()) };
    usize::try_from(n).map_err(|_| HookError::failed("writing to a terminal", io::Error::last_os_error()))
}
