//! Looking at mounts from inside of their namespace, in a thread that enters it.

use crate::{
    kernel::{clone_mount, mount_id, open_place},
    mountinfo::{self, Line},
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use stasis_plugin_api::{HookError, Result};
use std::{
    collections::HashMap,
    fs::File,
    io::Read,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

/// A mount namespace of the tree.
#[derive(Debug)]
pub(crate) struct Space {
    /// /proc directory of a task in it.
    pub proc: File,
    /// Inode number.
    pub ino: u64,
}

/// The thread's own /proc directory, which can be reached whatever the root is.
pub(crate) struct OwnProc(OwnedFd);

impl OwnProc {
    pub fn open(path: &str) -> Result<Self> {
        let failed = |error| HookError::failed(format!("opening {path}"), error);
        Ok(Self(File::open(path).map_err(failed)?.into()))
    }

    /// The mounts below the present root.
    pub fn mounts(&self) -> Result<Vec<Line>> {
        let open = || -> std::io::Result<String> {
            let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
            let file = rustix::fs::openat(&self.0, "mountinfo", flags, rustix::fs::Mode::empty())?;
            let mut text = Vec::new();
            File::from(file).read_to_end(&mut text)?;
            Ok(String::from_utf8_lossy(&text).into_owned())
        };
        mountinfo::parse(&open().map_err(|error| HookError::failed("reading mountinfo", error))?)
    }
}

fn failed(what: &'static str) -> HookError {
    HookError::failed(what, std::io::Error::last_os_error())
}

impl Space {
    /// Runs `f` in a thread that has entered the namespace; its root directory is that of the namespace.
    pub fn run<T: Send>(&self, f: impl FnOnce(&OwnProc) -> Result<T> + Send) -> Result<T> {
        let path = format!("/proc/self/fd/{}/ns/mnt", self.proc.as_raw_fd());
        let opened = File::open(&path);
        let namespace = opened.map_err(|error| HookError::failed(format!("opening {path}"), error))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let own = OwnProc::open("/proc/thread-self")?;
                // SAFETY: changes this thread alone, which ends below.
                if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
                    return Err(failed("unshare(CLONE_FS)"));
                }
                // SAFETY: likewise.
                if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNS) } < 0 {
                    return Err(failed("entering the mount namespace of a task"));
                }
                f(&own)
            });
            // A panic of the hook goes on in the thread that called it.
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// All mounts; `own` is that of the thread. Roots of cgroup mounts are called as in the cgroup namespace of the task, which may be
    /// their only name when they are mounted anew; those above its root keep the name that stasis has for them.
    pub fn mounts(&self, own: &OwnProc) -> Result<Vec<Line>> {
        let mut lines = own.mounts()?;
        let is_cgroup = |line: &Line| line.fstype.starts_with("cgroup");
        if !lines.iter().any(is_cgroup) {
            return Ok(lines);
        }
        let open = |directory: BorrowedFd<'_>| {
            let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
            let file = rustix::fs::openat(directory, "ns/cgroup", flags, rustix::fs::Mode::empty())
                .map_err(|errno| HookError::failed("opening the cgroup namespace of a task", errno))?;
            let ino = rustix::fs::fstat(&file)
                .map_err(|errno| HookError::failed("stat of a cgroup namespace", errno))?
                .st_ino;
            Ok::<_, HookError>((file, ino))
        };
        let ((namespace, theirs), (_, ours)) = (open(self.proc.as_fd())?, open(own.0.as_fd())?);
        if theirs == ours {
            return Ok(lines);
        }
        // SAFETY: changes this thread alone, which ends soon.
        if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWCGROUP) } < 0 {
            return Err(failed("entering the cgroup namespace of a task"));
        }
        let roots: HashMap<u32, String> =
            own.mounts()?.into_iter().map(|line| (line.id, line.root)).collect();
        for line in lines.iter_mut().filter(|line| is_cgroup(line)) {
            if let Some(root) = roots.get(&line.id).filter(|root| !root.starts_with("/..")) {
                line.root.clone_from(root);
            }
        }
        Ok(lines)
    }

    /// Detached copies of mounts, without those that lie on them, by their numbers.
    pub fn open_mounts(&self, wanted: &[&Line]) -> Result<HashMap<u32, OwnedFd>> {
        if wanted.is_empty() {
            return Ok(HashMap::new());
        }
        self.run(|own| {
            let mut found = HashMap::new();
            for line in wanted {
                if let Some(fd) = open_visible(line)? {
                    found.insert(line.id, fd);
                }
            }
            let hidden: Vec<&Line> = wanted.iter().copied().filter(|l| !found.contains_key(&l.id)).collect();
            if !hidden.is_empty() {
                uncover(own, hidden, &mut found)?;
            }
            Ok(found)
        })
    }
}

/// A copy of a mount that its path leads to.
fn open_visible(line: &Line) -> Result<Option<OwnedFd>> {
    let Ok(place) = open_place(&line.mountpoint) else { return Ok(None) };
    let seen = mount_id(place.as_fd()).is_ok_and(|id| id == line.id);
    // An unbindable one cannot be copied before it is something else.
    if !seen || line.propagation.iter().any(|tag| tag == "unbindable") {
        return Ok(None);
    }
    let copied = clone_mount(place.as_fd(), "");
    copied.map(Some).map_err(|error| HookError::failed(format!("copying the {}", line.label()), error))
}

/// Finds mounts that others cover: in a copy of the namespace, from which those are taken away one by one.
fn uncover(own: &OwnProc, mut hidden: Vec<&Line>, found: &mut HashMap<u32, OwnedFd>) -> Result<()> {
    const NONE: Option<&str> = None;
    // SAFETY: changes this thread alone, which ends soon.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } < 0 {
        return Err(failed("copying the mount namespace of a task"));
    }
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(NONE, "/", NONE, private, NONE)
        .map_err(|errno| HookError::failed("making copied mounts private", errno))?;
    while !hidden.is_empty() {
        let copy = own.mounts()?;
        let mut left = Vec::new();
        for line in hidden {
            let place = open_place(&line.mountpoint).ok();
            let id = place.as_ref().and_then(|place| mount_id(place.as_fd()).ok());
            let seen = copy.iter().find(|other| Some(other.id) == id).filter(|other| {
                (&other.mountpoint, &other.root, &other.dev) == (&line.mountpoint, &line.root, &line.dev)
            });
            match (place, seen) {
                (Some(place), Some(_)) => {
                    let copied = clone_mount(place.as_fd(), "")
                        .map_err(|error| HookError::failed(format!("copying the {}", line.label()), error))?;
                    found.insert(line.id, copied);
                }
                _ => left.push(line),
            }
        }
        hidden = left;
        // The last is one that nothing lies on.
        let Some(last) = copy.last().filter(|_| !hidden.is_empty()) else { break };
        if umount2(last.mountpoint.as_str(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_err() {
            break;
        }
    }
    match hidden.first() {
        None => Ok(()),
        Some(line) => {
            Err(HookError::unsupported(line.label(), "another mount hides it", "unmount that other one"))
        }
    }
}
