//! Starts the root task of a tree that is to be dumped: a session leader whose descriptors 0, 1 and 2 are regular files
//! of the scenario's directory, in the namespaces of its flavour.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::ExitCode;

use nix::mount::{MsFlags, mount};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, chdir, execv, setresgid, setresuid, setsid};

use crate::sandbox::bring_loopback_up;
use crate::sys::{self, cvt_long};

/// Where a tree lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// In the namespaces of the harness' sandbox.
    Host,
    /// In fresh pid, mount, IPC, UTS and network namespaces, with a proc of its own and `lo` up.
    Ns,
    /// As `Ns`, and in a user namespace besides.
    User,
}

/// The namespaces of [`Flavour::Ns`].
const FRESH: i32 =
    libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWNET;

/// Exit status of a root task that did not get as far as execve(2).
const NOT_STARTED: i32 = 112;

/// The host's id of root in the user namespace of [`Flavour::User`].
pub const USER_BASE: u32 = 100_000;

impl Flavour {
    /// All of them.
    pub const ALL: [Flavour; 3] = [Flavour::Host, Flavour::Ns, Flavour::User];

    /// Its name in tests and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Flavour::Host => "host",
            Flavour::Ns => "ns",
            Flavour::User => "user",
        }
    }

    /// The flavour of a name.
    pub fn parse(name: &str) -> Option<Flavour> {
        Flavour::ALL.into_iter().find(|flavour| flavour.name() == name)
    }

    /// The namespaces it unshares (clone(2)).
    fn clone_flags(self) -> i32 {
        match self {
            Flavour::Host => 0,
            Flavour::Ns => FRESH,
            Flavour::User => FRESH | libc::CLONE_NEWUSER,
        }
    }
}

/// Starts `command` in `flavour`, writes its pid to `DIR/pid`, waits for it to end, and ends likewise.
pub fn launch(flavour: Flavour, command: &[&str], dir: &Path) -> ExitCode {
    match try_launch(flavour, command, dir) {
        Ok(code) => code,
        Err(error) => {
            // In the place of the verdict, so that nobody waits for one.
            let said = format!("FAIL: launching {command:?}: {error}");
            eprintln!("{said}");
            let _ = fs::write(dir.join("result"), said);
            ExitCode::from(111)
        }
    }
}

fn try_launch(flavour: Flavour, command: &[&str], dir: &Path) -> io::Result<ExitCode> {
    fs::create_dir_all(dir.join("work"))?;
    if flavour == Flavour::User {
        for path in [dir.to_owned(), dir.join("work")] {
            chown(path, Some(USER_BASE), Some(USER_BASE))?;
        }
    }
    let (wait, go) = sys::pipe(libc::O_CLOEXEC)?;
    // SAFETY: clone(2) without CLONE_VM and with no stack is fork(2); this process has one thread.
    let pid = cvt_long(unsafe {
        libc::syscall(libc::SYS_clone, flavour.clone_flags() | libc::SIGCHLD, 0usize, 0usize, 0usize, 0usize)
    })?;
    if pid == 0 {
        drop(go);
        let error = match sys::read(&wait, 1) {
            Ok(_) => become_root_task(flavour, command, dir),
            Err(error) => error,
        };
        eprintln!("launching {command:?}: {error}");
        std::process::exit(NOT_STARTED);
    }
    let pid = pid as i32;
    if flavour == Flavour::User {
        let map = format!("0 {USER_BASE} 65536\n");
        fs::write(format!("/proc/{pid}/uid_map"), &map)?;
        fs::write(format!("/proc/{pid}/gid_map"), &map)?;
    }
    fs::write(dir.join(".pid"), pid.to_string())?;
    fs::rename(dir.join(".pid"), dir.join("pid"))?;
    sys::write(&go, b"g")?;
    Ok(match waitpid(Pid::from_raw(pid), None)? {
        WaitStatus::Exited(_, NOT_STARTED) => {
            fs::write(dir.join("result"), format!("FAIL: {command:?} was not started"))?;
            ExitCode::from(NOT_STARTED as u8)
        }
        WaitStatus::Exited(_, code) => ExitCode::from(code as u8),
        _ => ExitCode::from(113),
    })
}

/// In the new task: everything up to execve(2). Returns only when that failed.
fn become_root_task(flavour: Flavour, command: &[&str], dir: &Path) -> io::Error {
    let setup = || -> io::Result<()> {
        if flavour == Flavour::User {
            nix::unistd::setgroups(&[])?;
            setresgid(0.into(), 0.into(), 0.into())?;
            setresuid(0.into(), 0.into(), 0.into())?;
        }
        if flavour != Flavour::Host {
            own_mounts()?;
            bring_loopback_up();
        }
        setsid()?;
        let open =
            |name: &str| fs::OpenOptions::new().create(true).append(true).read(true).open(dir.join(name));
        let (input, output) = (open("work/.in")?, open("work/.out")?);
        for (file, number) in [(&input, 0), (&output, 1), (&output, 2)] {
            std::mem::forget(sys::dup_to(file, number)?);
        }
        std::mem::forget((input, output));
        // Whatever the shell that started the tests had open leads out of the tree.
        // SAFETY: nothing above 2 is used any more, for execve(2) comes next.
        sys::cvt(unsafe { libc::close_range(3, u32::MAX, 0) })?;
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
        chdir("/")?;
        Ok(())
    };
    if let Err(error) = setup() {
        return error;
    }
    let argv: Result<Vec<CString>, _> = command.iter().map(|arg| CString::new(*arg)).collect();
    match argv {
        Ok(argv) => match execv(&argv[0], &argv) {
            Ok(never) => match never {},
            Err(errno) => errno.into(),
        },
        Err(error) => error.into(),
    }
}

/// What `unshare --mount-proc` does: the machine's mounts, none of which tells the others of changes, and a fresh proc.
fn own_mounts() -> io::Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    Ok(mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)?)
}
