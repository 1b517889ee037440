//! Three sessions on terminals of their own: one whose foreground group is a child's, one whose leader has closed all of
//! its descriptors, and one that keeps only /dev/tty. The masters are in a task that is in none of them.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::fd::AsFd;

use nix::sys::termios::tcgetsid;
use nix::unistd::{Pid, getpid, getpgid, setpgid, setsid, tcgetpgrp, tcsetpgrp};

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::terminal::Terminal;

/// Stays until the root has seen that this leader leads.
fn linger(ctl: &Ctl) -> Outcome {
    let seen = ctl.dir().join("seen");
    crate::ctl::poll_until("the root has looked", || seen.exists())
}

fn tty() -> std::io::Result<std::fs::File> {
    OpenOptions::new().read(true).write(true).open("/dev/tty")
}

/// A leader with a child in the foreground.
fn with_job(ctl: &Ctl, terminal: &Terminal) -> Outcome {
    setsid()?;
    let slave = terminal.open_controlling()?;
    let job = ctl.child("job", |ctl| {
        setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
        ctl.announce("founded", b"")?;
        // Who is in the foreground may read.
        let tty = tty()?;
        crate::ctl::poll_until("the job is in the foreground", || tcgetpgrp(&tty) == Ok(getpid()))?;
        let mut line = [0; 16];
        let n = (&tty).read(&mut line)?;
        ensure(&line[..n] == b"to the job\n", &format!("the job read {:?}", &line[..n]))
    })?;
    let founded = ctl.dir().join("founded");
    crate::ctl::poll_until("the job has its group", || founded.exists())?;
    tcsetpgrp(&slave, job.pid)?;
    ctl.wait_as("with_job")?;
    same("foreground group", tcgetpgrp(&slave)?, job.pid)?;
    same("session of the terminal", tcgetsid(&slave)?, getpid())?;
    job.join()?;
    linger(ctl)
}

/// A leader without any descriptor of its terminal.
fn bare(ctl: &Ctl, terminal: &Terminal) -> Outcome {
    setsid()?;
    drop(terminal.open_controlling()?);
    ctl.wait_as("bare")?;
    let tty = tty()?;
    same("session of the terminal", tcgetsid(&tty)?, getpid())?;
    same("foreground group", tcgetpgrp(&tty)?, getpid())?;
    (&tty).write_all(b"bare is here\n")?;
    linger(ctl)
}

/// A leader that has its terminal as /dev/tty only, and hands it to a child of another session.
fn by_name(ctl: &Ctl, terminal: &Terminal) -> Outcome {
    setsid()?;
    let slave = terminal.open_controlling()?;
    let tty = tty()?;
    drop(slave);
    let stranger = ctl.child("stranger", |ctl| {
        setsid()?;
        ctl.wait_as("stranger")?;
        (&tty).write_all(b"stranger is here\n")?;
        Ok(())
    })?;
    ctl.await_ready("stranger")?;
    ctl.wait_as("by_name")?;
    same("session of the terminal", tcgetsid(&tty)?, getpid())?;
    stranger.join()?;
    linger(ctl)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut terminals = [Terminal::open()?, Terminal::open()?, Terminal::open()?];
    type Leader = fn(&Ctl, &Terminal) -> Outcome;
    let leaders: [(&str, Leader); 3] = [("with_job", with_job), ("bare", bare), ("by_name", by_name)];
    let mut children = Vec::new();
    for ((name, leader), terminal) in leaders.into_iter().zip(&terminals) {
        children.push(ctl.child(name, |ctl| leader(ctl, terminal))?);
        ctl.await_ready(name)?;
    }

    let sabotage = ctl.wait()?;

    for (child, terminal) in children.iter().zip(&terminals) {
        same("session by the master", tcgetsid(terminal.master.as_fd())?, child.pid)?;
        same("group of a leader", getpgid(Some(child.pid))?, child.pid)?;
    }
    terminals[0].send(if sabotage { b"to nobody\n" } else { b"to the job\n" })?;
    terminals[1].until("bare is here")?;
    terminals[2].until("stranger is here")?;
    ctl.announce("seen", b"")?;
    children.into_iter().try_for_each(crate::ctl::Child::join)?;
    // A restored copy is to see a word of its own.
    Ok(std::fs::remove_file(ctl.dir().join("seen"))?)
}
