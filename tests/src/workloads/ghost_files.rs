//! Files opened and then unlinked: several descriptors of one, of one description and of many, in two tasks; small, empty
//! and sparse ones; with owner, mode, extended attributes and times. No name of them may come back.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys::{self, cvt};

/// What stat(2) tells and must still tell.
fn facts(file: &File) -> Outcome<([u32; 3], [u64; 2], [i64; 3])> {
    let now = file.metadata()?;
    let times = [now.atime(), now.mtime(), now.mtime_nsec()];
    Ok(([now.mode(), now.uid(), now.gid()], [now.nlink(), now.len()], times))
}

fn attribute(file: &File) -> Outcome<Option<Vec<u8>>> {
    let mut value = vec![0u8; 64];
    // SAFETY: the name is NUL-terminated, the buffer has 64 bytes.
    let got = unsafe {
        libc::fgetxattr(file.as_raw_fd(), c"user.stasis".as_ptr(), value.as_mut_ptr().cast(), value.len())
    };
    match sys::cvt_long(got as i64) {
        Ok(n) => {
            value.truncate(n as usize);
            Ok(Some(value))
        }
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let open = |name: &str| OpenOptions::new().read(true).write(true).create(true).truncate(false).open(ctl.work(name));
    // One file, two descriptions of it and a duplicate.
    let mut small = open("small")?;
    small.write_all(b"a small file with some contents")?;
    small.seek(SeekFrom::Start(8))?;
    let mut reader = File::open(ctl.work("small"))?;
    let mut writer = OpenOptions::new().append(true).open(ctl.work("small"))?;
    let twin = small.try_clone()?;
    small.set_permissions(fs::Permissions::from_mode(0o4751))?;
    std::os::unix::fs::fchown(&small, Some(12), Some(34))?;
    small.set_permissions(fs::Permissions::from_mode(0o4751))?;
    // SAFETY: NUL-terminated name and a value of 5 bytes; EOPNOTSUPP on file systems without.
    unsafe { libc::fsetxattr(small.as_raw_fd(), c"user.stasis".as_ptr(), c"value".as_ptr().cast(), 5, 0) };
    // Sparse: 200 MiB, three pages of it on the disk.
    let sparse = open("sparse")?;
    sparse.set_len(200 << 20)?;
    for (n, offset) in [0, 77 << 20, (200 << 20) - 4096].into_iter().enumerate() {
        sparse.write_all_at(&sys::bytes(n as u64, 4096), offset)?;
    }
    let empty = open("empty")?;
    // Nearly as large as is allowed unasked.
    let large = open("large")?;
    large.write_all_at(&sys::bytes(50, 900 << 10), 0)?;
    for (file, second) in [(&small, 1_000_000_000), (&sparse, 1_100_000_000), (&empty, 1_200_000_000)] {
        let time = libc::timespec { tv_sec: second, tv_nsec: 123_456_789 };
        // SAFETY: two times, which outlive the call.
        cvt(unsafe { libc::futimens(file.as_raw_fd(), [time, time].as_ptr()) })?;
    }
    for name in ["small", "sparse", "empty", "large"] {
        fs::remove_file(ctl.work(name))?;
    }
    let files = [&small, &sparse, &empty, &large];
    let before: Vec<_> = files.iter().map(|file| facts(file)).collect::<Outcome<_>>()?;
    let (attribute_was, blocks) = (attribute(&small)?, sparse.metadata()?.blocks());
    let names = || -> Outcome<Vec<String>> {
        let mut names: Vec<String> = fs::read_dir(ctl.work(""))?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<std::io::Result<_>>()?;
        names.sort();
        Ok(names)
    };
    let names_before = names()?;
    let directory_time = fs::metadata(ctl.work(""))?.mtime_nsec();

    // A child with the description by fork, and one of its own.
    let child = ctl.child("reader", |ctl| {
        // Its reading must not change what the parent compares.
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NOATIME);
        let mut own = options.open(format!("/proc/self/fd/{}", sparse.as_raw_fd()))?;
        own.seek(SeekFrom::Start(77 << 20))?;
        ctl.wait_as("reader")?;
        let mut page = vec![0; 4096];
        own.read_exact(&mut page)?;
        same("page read by the child", page, sys::bytes(1, 4096))?;
        crate::ctl::poll_until("the parent has written", || {
            let mut byte = [0];
            own.read_exact_at(&mut byte, 5 << 20).is_ok() && byte[0] == b'!'
        })
    })?;
    ctl.await_ready("reader")?;

    if ctl.wait()? {
        writer.write_all(b"spoilt")?;
    }

    for (file, was) in files.iter().zip(before) {
        same("link count, mode, owner, size and times", facts(file)?, was)?;
    }
    same("extended attribute", attribute(&small)?, attribute_was)?;
    same("names in the directory", names()?, names_before)?;
    same("time of the directory", fs::metadata(ctl.work(""))?.mtime_nsec(), directory_time)?;
    let mut text = String::new();
    (&twin).read_to_string(&mut text)?;
    same("rest of the small file", text.as_str(), "file with some contents")?;
    same("shared offset", sys::position(&small)?, 31)?;
    same("offset of the other description", sys::position(&reader)?, 0)?;
    writer.write_all(b", and more")?;
    text.clear();
    reader.read_to_string(&mut text)?;
    same("by another description", text.as_str(), "a small file with some contents, and more")?;
    ensure(sparse.metadata()?.blocks() <= blocks + 64, "the holes are filled")?;
    let mut page = vec![1; 4096];
    sparse.read_exact_at(&mut page, 100 << 20)?;
    same("a hole", page.clone(), vec![0; 4096])?;
    sparse.read_exact_at(&mut page, (200 << 20) - 4096)?;
    same("the last page", page, sys::bytes(2, 4096))?;
    let mut all = vec![0; 900 << 10];
    large.read_exact_at(&mut all, 0)?;
    ensure(all == sys::bytes(50, 900 << 10), "the large file differs")?;
    sparse.write_all_at(b"!", 5 << 20)?;
    child.join()
}
