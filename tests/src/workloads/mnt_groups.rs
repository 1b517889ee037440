//! Who tells whom of changes: private, shared, slave, shared and slave, unbindable mounts; one of what was removed; some that
//! others cover.

use std::fs;
use std::path::Path;

use nix::mount::{MsFlags, umount2};

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::mounts::{self, bind, change, tmpfs};
use crate::sys;

/// Whether a mount below `from` shows below `to`, too.
fn tells(from: &Path, to: &Path) -> Outcome<bool> {
    tmpfs(&from.join("probe"), "size=4k")?;
    fs::write(from.join("probe/mark"), "")?;
    let told = to.join("probe/mark").exists();
    umount2(&from.join("probe"), nix::mount::MntFlags::MNT_DETACH)?;
    Ok(told)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    mounts::needs_own()?;
    let place = |name: &str| ctl.work(name);
    tmpfs(&place("source"), "size=1m")?;
    fs::create_dir_all(place("source/sub/probe"))?;
    fs::create_dir_all(place("source/probe"))?;
    change(&place("source"), MsFlags::MS_SHARED)?;
    for name in ["peer", "slave", "both", "lower", "part", "alone", "fixed"] {
        fs::create_dir(place(name))?;
        if name != "lower" && name != "part" {
            bind(&place("source"), &place(name))?;
        }
    }
    bind(&place("source/sub"), &place("part"))?;
    change(&place("slave"), MsFlags::MS_SLAVE)?;
    change(&place("both"), MsFlags::MS_SLAVE)?;
    change(&place("both"), MsFlags::MS_SHARED)?;
    // Receives from what receives.
    bind(&place("both"), &place("lower"))?;
    change(&place("lower"), MsFlags::MS_SLAVE)?;
    change(&place("alone"), MsFlags::MS_PRIVATE)?;
    change(&place("fixed"), MsFlags::MS_UNBINDABLE)?;

    // Of a file and a directory that are no longer there.
    fs::write(place("source/removed"), "removed")?;
    fs::create_dir(place("source/empty"))?;
    fs::write(place("file"), "")?;
    fs::create_dir(place("directory"))?;
    bind(&place("source/removed"), &place("file"))?;
    bind(&place("source/empty"), &place("directory"))?;
    fs::remove_file(place("source/removed"))?;
    fs::remove_dir(place("source/empty"))?;
    // And one on the file system below.
    fs::write(place("on-disk"), "disk")?;
    fs::write(place("shown"), "")?;
    bind(&place("on-disk"), &place("shown"))?;
    let open = fs::File::open(place("shown"))?;
    fs::remove_file(place("on-disk"))?;

    // Three at one place, and one below what covers it.
    // Inside a user namespace nobody but its own tasks can look at those.
    let covered = mounts::is_real_root()?;
    tmpfs(&place("deep/er"), "size=1m")?;
    fs::write(place("deep/er/lowest"), "lowest")?;
    if covered {
        tmpfs(&place("deep/er"), "size=2m")?;
        fs::write(place("deep/er/middle"), "middle")?;
        tmpfs(&place("deep"), "size=3m")?;
        fs::write(place("deep/top"), "top")?;
    }
    let before = mounts::shown()?;

    if ctl.wait()? {
        change(&place("slave"), MsFlags::MS_PRIVATE)?;
    }

    same("mounts", &mounts::shown()?, &before)?;
    for (from, to, told) in [
        ("source", "peer", true),
        ("peer", "source", true),
        ("source", "slave", true),
        ("slave", "source", false),
        ("source", "both", true),
        ("both", "source", false),
        ("both", "lower", true),
        ("source", "lower", true),
        ("lower", "both", false),
        ("source", "alone", false),
        ("source", "fixed", false),
        ("part", "source/sub", true),
    ] {
        same(&format!("{from} tells {to}"), tells(&place(from), &place(to))?, told)?;
    }
    fs::create_dir_all(place("again"))?;
    ensure(bind(&place("fixed"), &place("again")).is_err(), "the unbindable mount can be bound")?;
    same("the removed file", fs::read_to_string(place("file"))?.as_str(), "removed")?;
    ensure(fs::write(place("directory/new"), "").is_err(), "the removed directory lives")?;
    same("the removed file on disk", fs::read_to_string(place("shown"))?.as_str(), "disk")?;
    same("and its descriptor", sys::read(&open, 4)?.as_slice(), b"disk")?;
    let stack = [("deep/top", "deep"), ("deep/er/middle", "deep/er"), ("deep/er/lowest", "deep/er")];
    for (name, below) in &stack[if covered { 0 } else { 2 }..] {
        ensure(place(name).exists(), name)?;
        umount2(&place(below), nix::mount::MntFlags::empty())?;
    }
    Ok(())
}
