//! Runs one test in fresh pid, mount and network namespaces, below an init that reaps.
//!
//! The test executable starts itself again with [`ENTER`]; what it then does happens in the sandbox, which ends
//! with it: the kernel kills every task of the pid namespace with its init.

use std::io;
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, wait, waitpid};
use nix::unistd::{ForkResult, Pid, fork, setsid};

/// The argument with which a test executable enters the sandbox: `EXE --in-sandbox TEST`.
pub const ENTER: &str = "--in-sandbox";
/// Exit status of a test that this machine cannot run.
pub const SKIPPED: i32 = 77;

/// How a sandboxed test ended.
#[derive(Debug)]
pub enum Verdict {
    /// As it should.
    Passed,
    /// Not run, and why.
    Skipped(String),
    /// What it printed.
    Failed(String),
}

/// Runs `EXE --in-sandbox TEST` and returns its verdict. Called by the listing process.
pub fn run(test: &str) -> io::Result<Verdict> {
    let output = Command::new(std::env::current_exe()?).arg(ENTER).arg(test).output()?;
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said.push_str(&String::from_utf8_lossy(&output.stderr));
    Ok(match output.status.code() {
        Some(0) => Verdict::Passed,
        Some(SKIPPED) => Verdict::Skipped(said),
        _ => Verdict::Failed(format!("{said}\n{}", output.status)),
    })
}

/// Enters the sandbox and does `body` there; never returns. The process must have one thread.
pub fn enter(body: impl FnOnce() -> i32) -> ! {
    let code = enter_or_fail(body).unwrap_or_else(|error| {
        eprintln!("no sandbox: {error}");
        if error.kind() == io::ErrorKind::PermissionDenied { SKIPPED } else { 1 }
    });
    std::process::exit(code)
}

fn enter_or_fail(body: impl FnOnce() -> i32) -> io::Result<i32> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    // Trees under test may keep every processor busy: harness and tool shall get their turn all the same. Weights are per
    // session (sched(7), "The autogroup feature"), so this is one of its own; who leads a group already does without.
    if setsid().is_ok() {
        let _ = std::fs::write("/proc/self/autogroup", "-10");
    }
    let own = CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC;
    unshare(own)?;
    // SAFETY: one thread.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(code_of(waitpid(child, None)?)),
        ForkResult::Child => {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            let none: Option<&str> = None;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
            mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)?;
            // Terminals keep their numbers, which another test may take meanwhile.
            let options = Some("newinstance,ptmxmode=0666,mode=0620,gid=5");
            mount(Some("devpts"), "/dev/pts", Some("devpts"), MsFlags::empty(), options)?;
            bring_loopback_up();
            // SAFETY: one thread.
            match unsafe { fork() }? {
                ForkResult::Child => std::process::exit(body()),
                ForkResult::Parent { child } => std::process::exit(reap_until(child)),
            }
        }
    }
}

/// What an init does: reap whoever ends, until the one that counts has.
fn reap_until(main: Pid) -> i32 {
    loop {
        match wait() {
            Ok(status) if status.pid() == Some(main) => return code_of(status),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(_) => return 1,
        }
    }
}

fn code_of(status: WaitStatus) -> i32 {
    match status {
        WaitStatus::Exited(_, code) => code,
        _ => 101,
    }
}

/// A fresh network namespace has its `lo` down. Failure only matters to workloads with sockets, which say so.
pub fn bring_loopback_up() {
    // SAFETY: SIOCSIFFLAGS takes an ifreq (netdevice(7)), which lives through the call.
    unsafe {
        let socket = libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as i8;
        request.ifr_name[1] = b'o' as i8;
        request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
        libc::ioctl(socket, libc::SIOCSIFFLAGS, &request);
        libc::close(socket);
    }
}
