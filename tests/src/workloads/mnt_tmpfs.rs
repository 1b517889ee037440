//! A tmpfs with every kind of file: owners, modes, attributes, hard links, holes, links, fifos, sockets, devices, and files
//! that are open; another one that is read-only, one of which only a part is seen, and limits of size and inodes.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::mounts::{self, change, tmpfs};
use crate::sys::{self, Map};

fn look(root: &Path) -> Outcome<Vec<String>> {
    let (mut found, mut todo) = (Vec::new(), vec![root.to_owned()]);
    while let Some(path) = todo.pop() {
        let stat = fs::symlink_metadata(&path)?;
        // A socket that is in use is bound again.
        let bound = path.components().any(|part| part.as_os_str() == "bound");
        let times = if bound { (0, 0) } else { (stat.mtime(), stat.mtime_nsec()) };
        let what = (stat.mode(), stat.uid(), stat.gid(), stat.nlink(), stat.rdev(), stat.len(), times);
        found.push(format!("{} {what:?} {}", path.display(), stat.blocks()));
        if stat.is_dir() {
            for entry in fs::read_dir(&path)? {
                todo.push(entry?.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    mounts::needs_own()?;
    let (all, frozen, part) = (ctl.work("all"), ctl.work("frozen"), ctl.work("part"));
    tmpfs(&all, "size=12m,nr_inodes=400,mode=1751,uid=3,gid=4")?;
    fs::create_dir_all(all.join("d/e"))?;
    fs::write(all.join("d/data"), sys::bytes(3, 100_000))?;
    fs::set_permissions(all.join("d/data"), fs::Permissions::from_mode(0o6750))?;
    chown(all.join("d/data"), Some(11), Some(12))?;
    fs::set_permissions(all.join("d/data"), fs::Permissions::from_mode(0o6750))?;
    fs::hard_link(all.join("d/data"), all.join("twin"))?;
    symlink("d/data", all.join("link"))?;
    let holes = fs::File::create(all.join("holes"))?;
    holes.set_len(64 << 20)?;
    std::os::unix::fs::FileExt::write_all_at(&holes, b"middle", 32 << 20)?;
    nix::unistd::mkfifo(&all.join("fifo"), Mode::from_bits_truncate(0o604))?;
    if mounts::is_real_root()? {
        mknod(&all.join("null"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o620), makedev(1, 3))?;
    }
    // One that is listened to, one whose socket is gone.
    fs::create_dir(all.join("bound"))?;
    let listener = UnixListener::bind(all.join("bound/socket"))?;
    drop(UnixListener::bind(all.join("dead"))?);
    mounts::set_attribute(&all.join("d"), b"\0kept\xff")?;
    let mut open = fs::OpenOptions::new().read(true).write(true).open(all.join("d/data"))?;
    std::io::Seek::seek(&mut open, std::io::SeekFrom::Start(70_000))?;
    let gone = fs::File::create(all.join("gone"))?;
    sys::write(&gone, b"nameless")?;
    fs::remove_file(all.join("gone"))?;
    let map = Map::new(4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, open.as_raw_fd(), 0)?;

    tmpfs(&frozen, "size=1m,ro")?;
    change(&frozen, MsFlags::MS_REMOUNT)?;
    fs::write(frozen.join("file"), "frozen")?;
    change(&frozen, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NODEV)?;

    // The file system goes on with a part of it.
    let whole = ctl.work("whole");
    tmpfs(&whole, "size=1m")?;
    fs::create_dir_all(whole.join("x/y"))?;
    fs::write(whole.join("x/y/file"), "part")?;
    fs::create_dir(&part)?;
    mounts::bind(&whole.join("x/y"), &part)?;
    umount2(&whole, MntFlags::MNT_DETACH)?;
    let before = (mounts::shown()?, look(&all)?, look(&frozen)?, look(&part)?);

    if ctl.wait()? {
        fs::remove_file(all.join("fifo"))?;
    }

    let after = (mounts::shown()?, look(&all)?, look(&frozen)?, look(&part)?);
    same("mounts", &after.0, &before.0)?;
    same("files", &after.1, &before.1)?;
    same("frozen files", &after.2, &before.2)?;
    same("files of a part", &after.3, &before.3)?;
    same("attribute", mounts::attribute(&all.join("d"))?.as_slice(), b"\0kept\xff")?;
    ensure(fs::symlink_metadata(all.join("dead"))?.file_type().is_socket(), "the dead socket is none")?;
    let client = UnixStream::connect(all.join("bound/socket"))?;
    sys::write(&client, b"hello")?;
    same("a connection", sys::read(listener.accept()?.0, 5)?.as_slice(), b"hello")?;
    sys::write(&open, b"changed")?;
    same("the same file", &fs::read(all.join("twin"))?[70_000..70_007], b"changed")?;
    map.put(8, 77);
    same("the mapped file", fs::read(all.join("twin"))?[8], 77)?;
    same("the nameless file", gone.metadata()?.len(), 8)?;
    ensure(fs::write(frozen.join("new"), "").is_err(), "the read-only file system can be written")?;
    ensure(fs::write(all.join("large"), vec![1; 14 << 20]).is_err(), "the limit of its size is gone")
}
