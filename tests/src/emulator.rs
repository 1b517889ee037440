//! A terminal emulator without a screen: starts a command on a terminal of its own, types what comes from the fifo
//! `DIR/keyboard`, and appends what the command says to `DIR/screen`.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, execvp, fork, mkfifo, setsid};

use crate::scenario::Failure;
use crate::sys;
use crate::terminal::{Terminal, set};

/// The command line by which the workload binary is one.
pub const NAME: &str = "emulator";

/// Runs until the command has ended.
pub fn run(dir: &Path, command: &[&str]) -> ExitCode {
    match try_run(dir, command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let _ = fs::write(dir.join("result"), format!("FAIL: terminal of {command:?}: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn try_run(dir: &Path, command: &[&str]) -> io::Result<u8> {
    let fifo = dir.join("keyboard");
    mkfifo(&fifo, Mode::from_bits_truncate(0o600))?;
    // Open for both, so that it never ends.
    let mut keyboard = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(fifo)?;
    let mut screen = OpenOptions::new().create(true).append(true).open(dir.join("screen"))?;
    let mut terminal = Terminal::open()?;
    let size = libc::winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
    set(&terminal.master, libc::TIOCSWINSZ, size)?;
    // SAFETY: one thread.
    let child = match unsafe { fork() }? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let error = become_leader(&terminal, command);
            eprintln!("{command:?}: {error}");
            std::process::exit(112);
        }
    };
    fs::write(dir.join("ready"), std::process::id().to_string())?;
    let mut buffer = [0; 4096];
    loop {
        let mut fds = [
            PollFd::new(keyboard.as_fd(), PollFlags::POLLIN),
            PollFd::new(terminal.master.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut fds, PollTimeout::NONE)?;
        match keyboard.read(&mut buffer) {
            Ok(n) => terminal.send(&buffer[..n])?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        match terminal.master.read(&mut buffer) {
            Ok(n) => screen.write_all(&buffer[..n])?,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The last slave was closed.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(match waitpid(child, None)? {
        WaitStatus::Exited(_, code) => code as u8,
        _ => 113,
    })
}

/// In a child: leads a session on a terminal, with a command; returns only if that failed.
pub fn become_leader(terminal: &Terminal, command: &[&str]) -> io::Error {
    let start = || -> io::Result<()> {
        setsid()?;
        let slave = terminal.open_controlling()?;
        for number in 0..3 {
            std::mem::forget(sys::dup_to(&slave, number)?);
        }
        // SAFETY: nothing above 2 is used any more, for execve(2) comes next.
        sys::cvt(unsafe { libc::close_range(3, u32::MAX, 0) })?;
        std::mem::forget(slave);
        // SAFETY: this process has one thread.
        unsafe {
            std::env::set_var("TERM", "xterm");
            std::env::set_var("PS1", "");
        }
        let argv: Vec<CString> = command.iter().map(|word| CString::new(*word)).collect::<Result<_, _>>()?;
        execvp(&argv[0], &argv)?;
        Ok(())
    };
    start().err().unwrap_or_else(|| io::Error::other("execvp returned"))
}

/// The outer side of an emulator: its keyboard and its screen.
#[derive(Debug)]
pub struct Console {
    keyboard: PathBuf,
    screen: PathBuf,
    seen: usize,
}

impl Console {
    /// Of the emulator in a directory; what was said before is not looked at.
    pub fn new(dir: &Path) -> Self {
        let screen = dir.join("screen");
        let seen = fs::metadata(&screen).map_or(0, |meta| meta.len() as usize);
        Self { keyboard: dir.join("keyboard"), screen, seen }
    }

    /// Types.
    pub fn send(&mut self, text: &str) -> Result<(), Failure> {
        let type_in = || -> io::Result<()> {
            let flags = libc::O_NONBLOCK;
            let mut fifo: File = OpenOptions::new().write(true).custom_flags(flags).open(&self.keyboard)?;
            fifo.write_all(text.as_bytes())
        };
        type_in().map_err(|source| Failure::Harness { what: "typing", source })
    }

    /// Waits until `mark` is said after what was waited for last; gives what was said.
    pub fn until(&mut self, mark: &str) -> Result<String, Failure> {
        let began = Instant::now();
        loop {
            let all = fs::read(&self.screen).unwrap_or_default();
            let said = String::from_utf8_lossy(all.get(self.seen..).unwrap_or_default()).into_owned();
            if said.contains(mark) {
                self.seen = all.len();
                return Ok(said);
            }
            if began.elapsed() > Duration::from_secs(15) {
                return Err(Failure::Late(began.elapsed(), "the terminal's program", said));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
