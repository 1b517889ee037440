//! Types of file systems that show something else: overlay with its layers, mqueue, sysfs, devpts, and those of the kernel where
//! they can be mounted.

use std::fs;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::mounts::{self, tmpfs};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    mounts::needs_own()?;
    let real = mounts::is_real_root()?;
    let mut made = Vec::new();
    let mut new = |fstype: &str, options: Option<&str>, needed: bool| -> Outcome {
        let place = ctl.work(fstype);
        fs::create_dir(&place)?;
        match mount(Some(fstype), &place, Some(fstype), MsFlags::MS_NOSUID, options) {
            Ok(()) => made.push(fstype.to_owned()),
            Err(errno) if needed => return Err(errno.into()),
            // Not in this kernel, or not for this user.
            Err(_) => {}
        }
        Ok(())
    };
    new("mqueue", None, true)?;
    new("proc", Some("hidepid=2"), true)?;
    new("devpts", Some("ptmxmode=0666,mode=0620,max=7"), true)?;
    for fstype in ["sysfs", "binfmt_misc", "debugfs", "tracefs", "securityfs", "hugetlbfs", "cgroup2", "bpf"] {
        if real {
            new(fstype, None, false)?;
        }
    }
    // On a tmpfs, whose files come first.
    tmpfs(&ctl.work("layers"), "size=4m")?;
    for name in ["lower", "upper", "work", "merged", "merged/sub"] {
        fs::create_dir_all(ctl.work("layers").join(name))?;
    }
    let layer = |name: &str| ctl.work("layers").join(name);
    fs::write(layer("lower/below"), "below")?;
    fs::write(layer("lower/removed"), "removed")?;
    fs::create_dir(layer("lower/sub"))?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={},userxattr",
        layer("lower").display(),
        layer("upper").display(),
        layer("work").display()
    );
    let merged = layer("merged");
    mount(Some("layers"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str()))?;
    fs::write(merged.join("above"), "above")?;
    fs::write(merged.join("below"), "changed")?;
    fs::remove_file(merged.join("removed"))?;
    tmpfs(&merged.join("sub"), "size=1m")?;
    fs::write(merged.join("sub/inside"), "inside")?;
    let open = fs::File::open(merged.join("below"))?;
    let before = mounts::shown()?;

    if ctl.wait()? {
        fs::remove_file(merged.join("above"))?;
    }

    same("mounts", mounts::shown()?, before)?;
    let read = |path: &str| fs::read_to_string(merged.join(path));
    same("the upper file", read("above")?.as_str(), "above")?;
    same("the changed file", read("below")?.as_str(), "changed")?;
    same("the lower file", fs::read_to_string(layer("lower/below"))?.as_str(), "below")?;
    ensure(!merged.join("removed").exists(), "the removed file is back")?;
    same("a file of a mount on it", read("sub/inside")?.as_str(), "inside")?;
    same("a descriptor", sys::read(&open, 7)?.as_slice(), b"changed")?;
    fs::write(merged.join("new"), "new")?;
    ensure(layer("upper/new").exists(), "a new file is not in the upper layer")?;
    ensure(ctl.work("proc/1/status").exists(), "proc shows nothing")?;
    ensure(Path::new(&ctl.work("devpts/ptmx")).exists(), "devpts has no ptmx")
}
