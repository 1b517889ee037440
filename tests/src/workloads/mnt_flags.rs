//! Flags of mounts, and descriptors of every kind on them.

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd};

use nix::mount::MsFlags;

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::mounts::{self, bind, change, tmpfs};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    mounts::needs_own()?;
    let flags = [
        ("plain", MsFlags::empty()),
        ("ro", MsFlags::MS_RDONLY),
        ("nosuid", MsFlags::MS_NOSUID | MsFlags::MS_NODEV),
        ("noexec", MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY),
        ("noatime", MsFlags::MS_NOATIME),
        ("nodiratime", MsFlags::MS_NODIRATIME | MsFlags::MS_RELATIME),
        ("strictatime", MsFlags::MS_STRICTATIME),
        ("nosymfollow", MsFlags::from_bits_retain(256)),
    ];
    tmpfs(&ctl.work("all"), "size=1m")?;
    fs::write(ctl.work("all/file"), sys::bytes(5, 1000))?;
    std::os::unix::fs::symlink("file", ctl.work("all/link"))?;
    let mut open = Vec::new();
    for (name, flags) in flags {
        fs::create_dir(ctl.work(name))?;
        bind(&ctl.work("all"), &ctl.work(name))?;
        change(&ctl.work(name), MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags)?;
        open.push((fs::File::open(ctl.work(name).join("file"))?, fs::File::open(ctl.work(name))?));
    }
    // A file as a mount, and a directory of the machine.
    fs::write(ctl.work("single"), "")?;
    bind(&ctl.work("all/file"), &ctl.work("single"))?;
    fs::create_dir(ctl.work("etc"))?;
    bind("/etc".as_ref(), &ctl.work("etc"))?;
    change(&ctl.work("etc"), MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY)?;
    let single = fs::OpenOptions::new().read(true).write(true).open(ctl.work("single"))?;
    fs::create_dir(ctl.work("watched"))?;
    fs::write(ctl.work("watched/file"), "")?;
    fs::write(ctl.work("on-disk"), "")?;
    bind(&ctl.work("watched/file"), &ctl.work("on-disk"))?;
    // Watches are found by the mounts of their file system, of which one is no directory.
    // SAFETY: takes a number.
    let watch = sys::cvt(unsafe { libc::inotify_init1(libc::IN_NONBLOCK) })?;
    // SAFETY: the kernel just made this descriptor.
    let watch = unsafe { std::os::fd::OwnedFd::from_raw_fd(watch) };
    let watched = std::ffi::CString::new(ctl.work("watched").into_os_string().into_encoded_bytes());
    let watched = watched.map_err(std::io::Error::other)?;
    // SAFETY: a NUL-terminated path.
    sys::cvt(unsafe { libc::inotify_add_watch(watch.as_raw_fd(), watched.as_ptr(), libc::IN_CREATE) })?;
    let links = || -> Outcome<Vec<String>> {
        let link = |fd: &fs::File| {
            let number = std::os::fd::AsRawFd::as_raw_fd(fd);
            Ok(fs::read_link(format!("/proc/self/fd/{number}"))?.display().to_string())
        };
        open.iter().flat_map(|(file, directory)| [file, directory]).chain([&single]).map(link).collect()
    };
    let before = (mounts::shown()?, links()?);

    if ctl.wait()? {
        change(&ctl.work("noatime"), MsFlags::MS_BIND | MsFlags::MS_REMOUNT)?;
    }

    same("mounts", mounts::shown()?, before.0)?;
    same("where the descriptors are", links()?, before.1)?;
    for (file, directory) in &open {
        same("a file", sys::read(file, 1000)?, sys::bytes(5, 1000))?;
        ensure(directory.metadata()?.is_dir(), "no directory")?;
    }
    sys::write(&single, b"through the single one")?;
    ensure(fs::read(ctl.work("all/file"))?.starts_with(b"through the single one"), "it is another file")?;
    ensure(fs::write(ctl.work("ro/file"), "").is_err(), "ro can be written")?;
    let _ = fs::remove_file(ctl.work("watched/noticed"));
    fs::write(ctl.work("watched/noticed"), "")?;
    ensure(sys::read(&watch, 4096)?.windows(7).any(|name| name == b"noticed"), "the watch notices nothing")?;
    ensure(fs::read(ctl.work("nosymfollow/link")).is_err(), "nosymfollow follows")?;
    ensure(fs::read(ctl.work("plain/link")).is_ok(), "plain does not follow")
}
