//! Files below /proc: of the task itself, of a child, of one that is dead; open, read half, and as directories.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use crate::ctl::{Ctl, Outcome, ensure, poll_until, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let child = ctl.child("other", |ctl| {
        ctl.wait_as("other")?;
        poll_until("the parent has looked", || ctl.dir().join("looked").exists())
    })?;
    ctl.await_ready("other")?;
    let dead = ctl.child("dead", |ctl| ctl.wait_as("dead").map(drop))?;
    ctl.await_ready("dead")?;
    let of = |pid: i32, name: &str| File::open(format!("/proc/{pid}/{name}"));
    let (dead_status, dead_dir) = (of(dead.pid.as_raw(), "status")?, of(dead.pid.as_raw(), "")?);
    nix::sys::signal::kill(dead.pid, nix::sys::signal::Signal::SIGKILL)?;
    nix::sys::wait::waitpid(dead.pid, None)?;
    let own: OwnedFd = File::open("/proc/self")?.into();
    let mut status = of(child.pid.as_raw(), "status")?;
    let mut half = [0; 10];
    status.read_exact(&mut half)?;
    let maps = of(child.pid.as_raw(), "maps")?;
    let system = File::open("/proc/sys/kernel/ostype")?;

    if ctl.wait()? {
        status.read_exact(&mut half)?;
    }

    same("position", status.stream_position()?, 10)?;
    status.seek(SeekFrom::Start(0))?;
    let mut text = String::new();
    status.read_to_string(&mut text)?;
    let line = format!("Pid:\t{}", child.pid);
    ensure(text.lines().any(|found| found == line), "the status of the child is that of another")?;
    let mut text = String::new();
    (&maps).read_to_string(&mut text)?;
    ensure(text.contains("stasis-workload"), "the mappings of the child are those of another")?;
    let comm = openat(&own, "stat", OFlag::O_RDONLY, Mode::empty())?;
    let first = sys::read(&comm, 100)?;
    let pid = format!("{} (", std::process::id());
    ensure(first.starts_with(pid.as_bytes()), "the own directory is that of another")?;
    let gone = sys::read(&dead_status, 10).map_err(|error| error.raw_os_error());
    same("status of the dead one", gone, Err(Some(libc::ESRCH)))?;
    let below = openat(&dead_dir, "status", OFlag::O_RDONLY, Mode::empty()).map(drop);
    ensure(matches!(below, Err(Errno::ENOENT | Errno::ESRCH)), "the dead one has files")?;
    ensure(dead_dir.as_raw_fd() > 2, "a descriptor")?;
    same("system file", sys::read(&system, 10)?, b"Linux\n".to_vec())?;
    ctl.announce("looked", b"")?;
    child.join()?;
    // A restored copy is asked again.
    Ok(std::fs::remove_file(ctl.dir().join("looked"))?)
}
