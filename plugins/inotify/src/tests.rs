use super::*;
use stasis_plugin_api::testing::Kit;
use std::{
    fs::{self, File},
    io::Read,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

/// Events of an instance as (watch, mask), names left out.
fn events(fd: BorrowedFd<'_>) -> Vec<(i32, u32)> {
    let mut file = File::from(fd.try_clone_to_owned().unwrap());
    let mut buffer = vec![0; 1 << 16];
    let n = file.read(&mut buffer).unwrap_or(0);
    let (mut found, mut at) = (Vec::new(), 0);
    let word = |at: usize| u32::from_ne_bytes(buffer[at..at + 4].try_into().unwrap());
    while at < n {
        found.push((word(at).cast_signed(), word(at + 4)));
        at += 16 + word(at + 12) as usize;
    }
    found
}

struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("stasis-inotify-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
    fn file(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, name).unwrap();
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn kit() -> Kit {
    let mut kit = Kit::new();
    kit.plugin(Watches);
    kit
}

fn watch(inotify: &OwnedFd, path: &Path, mask: u32) -> i32 {
    kernel::add(inotify.as_fd(), path, mask).unwrap()
}

#[test]
fn fdinfo_is_hexadecimal_and_backwards() {
    let fdinfo = "inotify wd:1f ino:2 sdev:fe00001 mask:4000fff ignored_mask:0 \
                  fhandle-bytes:8 fhandle-type:1 f_handle:e10200000000000a\n\
                  inotify wd:2 ino:1 sdev:1b mask:2 ignored_mask:0 \n";
    let handle = HandleInfo { fdinfo: fdinfo.into(), ..HandleInfo::default() };
    let watches = dump::listed(&handle).unwrap();
    assert_eq!((watches[0].number, watches[0].dev, &watches[0].handle), (2, libc::makedev(0, 0x1b), &None));
    assert_eq!((watches[1].number, watches[1].mask), (31, 0x400_0fff));
    assert_eq!(watches[1].dev, libc::makedev(254, 1));
    assert_eq!(watches[1].handle, Some((1, vec![0xe1, 2, 0, 0, 0, 0, 0, 10])));
    let damaged = HandleInfo { fdinfo: "inotify wd:x ino:1\n".into(), ..HandleInfo::default() };
    assert!(dump::listed(&damaged).unwrap_err().to_string().contains("wd:x"));
}

#[test]
fn numbers_masks_and_files_come_back() {
    let directory = Directory::new("numbers");
    let file = directory.file("a");
    let link = directory.0.join("link");
    std::os::unix::fs::symlink("a", &link).unwrap();
    let inotify = kernel::create().unwrap();
    assert_eq!(watch(&inotify, &file, libc::IN_MODIFY), 1);
    assert_eq!(watch(&inotify, &directory.0, libc::IN_ALL_EVENTS | libc::IN_EXCL_UNLINK), 2);
    kernel::remove(inotify.as_fd(), 1).unwrap();
    assert_eq!(watch(&inotify, &link, libc::IN_DONT_FOLLOW | libc::IN_ATTRIB | libc::IN_ONESHOT), 3);
    kernel::set_next(inotify.as_fd(), 1_000_000).unwrap();
    assert_eq!(watch(&inotify, &file, libc::IN_CLOSE_WRITE), 1_000_000);
    assert_eq!(events(inotify.as_fd()), [(1, libc::IN_IGNORED)]);
    let mut kit = kit();
    let number = kit.hold(inotify, Watches::KIND).unwrap();
    let listed = |kit: &Kit| {
        let fdinfo =
            fs::read_to_string(kernel::magic_link(kit.fd(number)).to_string_lossy().replace("fd", "fdinfo"));
        dump::listed(&HandleInfo { fdinfo: fdinfo.unwrap().into(), ..HandleInfo::default() }).unwrap()
    };
    let before = listed(&kit);
    assert_eq!(kit.dump().unwrap(), 1);
    kit.restore().unwrap();
    assert_eq!(events(kit.fd(number)), [], "restore made events");
    assert_eq!(listed(&kit), before);
    fs::write(&file, "b").unwrap();
    assert!(events(kit.fd(number)).contains(&(1_000_000, libc::IN_CLOSE_WRITE)));
    assert_eq!(kernel::add(kit.fd(number), Path::new("/"), libc::IN_MODIFY).unwrap(), 1_000_001);
    assert!(kit.host.warnings.borrow().is_empty());
}

#[test]
fn a_removed_file_is_watched_through_its_descriptor() {
    let directory = Directory::new("removed");
    let path = directory.file("gone");
    let inotify = kernel::create().unwrap();
    assert_eq!(watch(&inotify, &path, libc::IN_MODIFY), 1);
    let mut kit = kit();
    let held = kit.keep(fs::OpenOptions::new().write(true).open(&path).unwrap()).unwrap();
    fs::remove_file(&path).unwrap();
    let number = kit.hold(inotify, Watches::KIND).unwrap();
    kit.dump().unwrap();
    kit.restore().unwrap();
    let mut file = File::from(kit.fd(held).try_clone_to_owned().unwrap());
    std::io::Write::write_all(&mut file, b"x").unwrap();
    assert_eq!(events(kit.fd(number)), [(1, libc::IN_MODIFY)]);
}

#[test]
fn a_file_that_nobody_holds_is_refused_by_name() {
    let directory = Directory::new("refused");
    let path = directory.file("gone");
    let held = File::open(&path).unwrap();
    let inotify = kernel::create().unwrap();
    watch(&inotify, &path, libc::IN_MODIFY);
    fs::remove_file(&path).unwrap();
    let mut kit = kit();
    kit.hold(inotify, Watches::KIND).unwrap();
    let error = kit.dump().unwrap_err().to_string();
    assert!(error.contains("watch 1 on inode"), "{error}");
    drop(held);
}

#[test]
fn queued_events_become_one_overflow() {
    let directory = Directory::new("overflow");
    let file = directory.file("a");
    let inotify = kernel::create().unwrap();
    watch(&inotify, &file, libc::IN_MODIFY | libc::IN_ATTRIB);
    fs::write(&file, "b").unwrap();
    let mut kit = kit();
    let number = kit.hold(inotify, Watches::KIND).unwrap();
    kit.dump().unwrap();
    assert!(kernel::queued(kit.fd(number)).unwrap() > 0, "the dump has taken events");
    assert!(kit.host.warnings.borrow()[0].contains("IN_Q_OVERFLOW"));
    kit.restore().unwrap();
    assert_eq!(events(kit.fd(number)), [(-1, libc::IN_Q_OVERFLOW)]);
    fs::write(&file, "c").unwrap();
    assert_eq!(events(kit.fd(number))[0].0, 1);
}

#[test]
fn a_missing_file_is_named() {
    let directory = Directory::new("missing");
    let file = directory.file("a");
    let inotify = kernel::create().unwrap();
    watch(&inotify, &file, libc::IN_MODIFY);
    let mut kit = kit();
    kit.hold(inotify, Watches::KIND).unwrap();
    kit.dump().unwrap();
    fs::remove_file(&file).unwrap();
    let error = kit.restore().unwrap_err().to_string();
    assert!(error.contains(&*file.to_string_lossy()), "{error}");
}
