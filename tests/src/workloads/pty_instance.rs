//! A devpts of the tree's own, with a terminal of the same number as one of the common devpts: each is in its place.

use std::fs;
use std::os::fd::AsFd;

use nix::mount::{MsFlags, mount};
use nix::sys::stat::fstat;
use nix::sys::termios::tcgetsid;
use nix::unistd::setsid;

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys;
use crate::terminal::Terminal;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let directory = ctl.work("pts");
    fs::create_dir(&directory)?;
    let options = Some("newinstance,ptmxmode=0666,mode=0620");
    mount(Some("devpts"), &directory, Some("devpts"), MsFlags::empty(), options)?;
    let common = Terminal::open()?;
    let mut own = loop {
        let terminal = Terminal::open_in(&directory.join("ptmx"), &directory)?;
        if terminal.slave.file_name() == common.slave.file_name() {
            break terminal;
        }
        // Keeps the number, so that the next one gets another.
        std::mem::forget(terminal);
    };
    let slaves = (common.open_slave()?, own.open_slave()?);
    let leader = ctl.child("leader", |ctl| {
        setsid()?;
        let tty = own.open_controlling()?;
        ctl.wait_as("leader")?;
        same("session", tcgetsid(&tty)?, nix::unistd::getpid())?;
        sys::write(std::fs::OpenOptions::new().write(true).open("/dev/tty")?, b"from the leader")?;
        Ok(())
    })?;
    ctl.await_ready("leader")?;

    if ctl.wait()? {
        own = Terminal::open()?;
    }

    let device = |end: &fs::File| Ok::<_, crate::ctl::Fail>(fstat(end.as_fd())?.st_dev);
    ensure(device(&slaves.0)? != device(&slaves.1)?, "both are of one devpts")?;
    same("the place of one's own", fs::metadata(&own.slave)?.is_file(), false)?;
    own.until("from the leader")?;
    sys::write(&slaves.1, b"own")?;
    own.until("own")?;
    leader.join()
}
