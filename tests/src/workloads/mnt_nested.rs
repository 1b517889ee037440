//! Several mount namespaces in one tree: a child with a tmpfs of its own that hears of its parent's mounts, one with another
//! root, a grandchild in a third one, and descriptors of one namespace's files in the other.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sched::{CloneFlags, unshare};

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::mounts::{self, bind, change, tmpfs};
use crate::sys;

/// A child sees a mount that its parent makes after the restore.
fn hears(ctl: &Ctl) -> Outcome {
    ctl.announce("ready.mount", b"")?;
    let heard = ctl.work("common/late/mark");
    crate::ctl::poll_until("a mount of the parent", || heard.exists())
}

fn private(ctl: &Ctl) -> Outcome {
    let outside = fs::File::open(ctl.work("common/file"))?;
    let hidden = fs::File::open(ctl.work("own/below"))?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    change(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_SLAVE)?;
    tmpfs(&ctl.work("own"), "size=1m")?;
    fs::write(ctl.work("own/file"), sys::bytes(2, 3000))?;
    fs::write(ctl.work("own/gone"), "gone")?;
    let file = fs::OpenOptions::new().read(true).write(true).open(ctl.work("own/file"))?;
    let gone = fs::File::open(ctl.work("own/gone"))?;
    fs::remove_file(ctl.work("own/gone"))?;
    std::env::set_current_dir(ctl.work("own"))?;
    let grandchild = ctl.child("third", |ctl| {
        unshare(CloneFlags::CLONE_NEWNS)?;
        change(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
        bind(&ctl.work("common"), &ctl.work("third"))?;
        change(&ctl.work("third"), MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY)?;
        let open = fs::File::open(ctl.work("third/file"))?;
        let before = mounts::shown()?;
        ctl.wait_as("third")?;
        same("mounts of the third", mounts::shown()?, before)?;
        ensure(fs::write(ctl.work("third/new"), "").is_err(), "the read-only mount can be written")?;
        same("a file through it", sys::read(&open, 6)?.as_slice(), b"common")?;
        // That of its parent is the same file system.
        same("the parent's file", fs::read(ctl.work("own/file"))?, sys::bytes(2, 3000))
    })?;
    ctl.await_ready("third")?;
    let before = mounts::shown()?;

    if ctl.wait_as("private")? {
        umount2(&ctl.work("own"), MntFlags::MNT_DETACH)?;
    }

    same("mounts of the child", mounts::shown()?, before)?;
    same("its own file", fs::read("file")?, sys::bytes(2, 3000))?;
    same("by its descriptor", sys::read(&file, 3000)?, sys::bytes(2, 3000))?;
    same("the removed one", sys::read(&gone, 4)?.as_slice(), b"gone")?;
    same("that of the parent's namespace", sys::read(&outside, 6)?.as_slice(), b"common")?;
    same("and what the child cannot see", sys::read(&hidden, 5)?.as_slice(), b"below")?;
    grandchild.join()?;
    hears(ctl)
}

fn host_name() -> Outcome<String> {
    Ok(nix::sys::utsname::uname()?.nodename().to_string_lossy().into_owned())
}

fn rooted(ctl: &Ctl) -> Outcome {
    // With a host name of its own.
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)?;
    // SAFETY: a string of that length.
    sys::cvt(unsafe { libc::sethostname(c"rooted".as_ptr(), 6) })?;
    change(Path::new("/"), MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    let root = ctl.work("root");
    tmpfs(&root, "size=1m")?;
    for directory in ["control", "proc", "old"] {
        fs::create_dir(root.join(directory))?;
    }
    bind(ctl.dir(), &root.join("control"))?;
    bind(Path::new("/proc"), &root.join("proc"))?;
    std::env::set_current_dir(&root)?;
    nix::unistd::pivot_root(".", "old")?;
    umount2("/old", MntFlags::MNT_DETACH)?;
    std::env::set_current_dir("/")?;
    fs::write("/mark", "rooted")?;
    let (open, ctl) = (fs::File::open("/mark")?, ctl.moved(Path::new("/control")));
    ctl.wait_as("rooted")?;
    same("its host name", host_name()?.as_str(), "rooted")?;
    same("a file of the other root", fs::read_to_string("/mark")?.as_str(), "rooted")?;
    same("its descriptor", sys::read(open.as_fd(), 6)?.as_slice(), b"rooted")?;
    ensure(!Path::new("/etc").exists(), "it is another root")
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    for name in ["own", "third", "root"] {
        fs::create_dir(ctl.work(name))?;
    }
    fs::write(ctl.work("own/below"), "below")?;
    if std::process::id() == 1 {
        tmpfs(&ctl.work("common"), "size=1m")?;
        change(&ctl.work("common"), MsFlags::MS_SHARED)?;
    } else {
        // The machine's mounts stay as they are.
        fs::create_dir(ctl.work("common"))?;
    }
    fs::create_dir_all(ctl.work("common/late"))?;
    fs::write(ctl.work("common/file"), "common")?;
    let private = ctl.child("private", private)?;
    ctl.await_ready("private")?;
    let rooted = ctl.child("rooted", rooted)?;
    ctl.await_ready("rooted")?;
    let before = mounts::shown()?;

    ctl.wait()?;

    same("mounts", mounts::shown()?, before)?;
    ensure(host_name()? != "rooted", "the root task has its child's host name")?;
    rooted.join()?;
    if std::process::id() == 1 {
        ctl.await_ready("mount")?;
        tmpfs(&ctl.work("common/late"), "size=4k")?;
    }
    fs::write(ctl.work("common/late/mark"), "")?;
    private.join()?;
    if std::process::id() == 1 {
        umount2(&ctl.work("common/late"), MntFlags::MNT_DETACH)?;
    }
    Ok(())
}
