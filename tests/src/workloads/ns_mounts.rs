//! Mounts of the tree's own: proc, a tmpfs with content (sizes, modes, links), a bind mount, read-only flags.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::ctl::{Ctl, Fail, Outcome, ensure, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    if std::process::id() != 1 {
        return Err(Fail::Absent("needs a mount namespace of its own (flavours ns and user)".into()));
    }
    let none: Option<&str> = None;
    let (mnt, bound) = (ctl.work("mnt"), ctl.work("bound"));
    fs::create_dir(&mnt)?;
    fs::create_dir(&bound)?;
    mount(Some("mnt"), &mnt, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("size=8m,mode=750"))?;
    fs::create_dir_all(mnt.join("a/b"))?;
    fs::write(mnt.join("a/b/data"), sys::bytes(9, 300_000))?;
    fs::set_permissions(mnt.join("a/b/data"), fs::Permissions::from_mode(0o4640))?;
    fs::hard_link(mnt.join("a/b/data"), mnt.join("twin"))?;
    std::os::unix::fs::symlink("a/b/data", mnt.join("link"))?;
    nix::unistd::mkfifo(&mnt.join("fifo"), nix::sys::stat::Mode::from_bits_truncate(0o600))?;
    mount(Some(&mnt.join("a")), &bound, none, MsFlags::MS_BIND, none)?;
    mount(none, &bound, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none)?;
    let open = fs::OpenOptions::new().read(true).write(true).open(mnt.join("a/b/data"))?;
    let mounts = || -> Outcome<Vec<String>> {
        let all = fs::read_to_string("/proc/self/mounts")?;
        let mut all: Vec<String> = all.lines().map(str::to_owned).collect();
        // They are listed by numbers that each processor gives out of its own supply; what lies over another stays behind it.
        all.sort_by_key(|line| line.split(' ').nth(1).map(str::to_owned));
        Ok(all)
    };
    let before = mounts()?;

    if ctl.wait()? {
        fs::remove_file(mnt.join("link"))?;
    }

    same("mounts", mounts()?, before)?;
    same("content", fs::read(mnt.join("a/b/data"))? == sys::bytes(9, 300_000), true)?;
    same("mode", fs::metadata(mnt.join("twin"))?.permissions().mode(), 0o104640)?;
    same("links", std::os::unix::fs::MetadataExt::nlink(&fs::metadata(mnt.join("twin"))?), 2)?;
    same("symbolic link", fs::read_link(mnt.join("link"))?.as_path(), Path::new("a/b/data"))?;
    ensure(std::os::unix::fs::FileTypeExt::is_fifo(&fs::metadata(mnt.join("fifo"))?.file_type()), "no fifo")?;
    ensure(fs::write(bound.join("new"), "").is_err(), "the read-only mount can be written")?;
    sys::write(&open, b"changed")?;
    ensure(fs::read(bound.join("b/data"))?.starts_with(b"changed"), "the bind mount shows another file")
}
