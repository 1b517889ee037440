//! Memory files: contents with holes, positions of several descriptions, seals, modes, and one shared with a child.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::sys::{self, cvt, errno_of, fcntl};

/// memfd_create(2), with seals allowed.
pub fn create(name: &CStr) -> Outcome<File> {
    create_with(name, libc::MFD_ALLOW_SEALING)
}

fn create_with(name: &CStr, flags: u32) -> Outcome<File> {
    // SAFETY: the name ends with NUL, and the descriptor is new.
    unsafe {
        let fd = cvt(libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | flags))?;
        Ok(File::from(OwnedFd::from_raw_fd(fd)))
    }
}

/// Since Linux 6.3 (include/uapi/linux/memfd.h, fcntl.h).
const MFD_NOEXEC_SEAL: u32 = 8;
const F_SEAL_EXEC: i32 = 0x20;

/// Another description of the same file.
pub fn reopen(file: &File, options: &OpenOptions) -> Outcome<File> {
    Ok(options.open(format!("/proc/self/fd/{}", file.as_raw_fd()))?)
}

/// F_GET_SEALS.
pub fn seals(file: &File) -> Outcome<i32> {
    Ok(fcntl(file, libc::F_GET_SEALS, 0)?)
}

const SPARSE: u64 = 1 << 30;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut sparse = create(c"sparse file")?;
    sparse.set_len(SPARSE)?;
    sparse.write_all_at(&sys::bytes(1, 3 << 20), 12_345)?;
    sparse.write_all_at(b"end", SPARSE - 3)?;
    sparse.seek(SeekFrom::Start(77))?;
    let mut reader = reopen(&sparse, OpenOptions::new().read(true))?;
    reader.seek(SeekFrom::Start(12_345))?;
    let appending = reopen(&sparse, OpenOptions::new().append(true))?;
    let twin = sparse.try_clone()?;
    let blocks = sparse.metadata()?.blocks();
    let sealed = create(c"sealed")?;
    sealed.write_all_at(b"as it is", 0)?;
    let all = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL;
    fcntl(&sealed, libc::F_ADD_SEALS, all)?;
    sealed.set_permissions(fs::Permissions::from_mode(0o640))?;
    let unexecutable = create_with(c"not executable", MFD_NOEXEC_SEAL)?;
    unexecutable.write_all_at(b"data", 0)?;
    let exec_seals = seals(&unexecutable)?;
    let empty = create(c"")?;
    let shared = create(c"shared")?;
    let child = ctl.child("sharer", |ctl| {
        ctl.wait_as("sharer")?;
        Ok(shared.write_all_at(b"by the child", 5)?)
    })?;
    ctl.await_ready("sharer")?;

    if ctl.wait()? {
        sparse.write_all_at(b"spoilt", 20_000)?;
    }

    child.join()?;
    same("position", sparse.stream_position()?, 77)?;
    same("position of the duplicate", sys::position(twin.as_fd())?, 77)?;
    let mut found = vec![0; 3 << 20];
    reader.read_exact(&mut found)?;
    ensure(found == sys::bytes(1, 3 << 20), "contents have changed")?;
    ensure(sparse.metadata()?.blocks() <= blocks, "holes have been filled")?;
    same("size", sparse.metadata()?.len(), SPARSE)?;
    same("file", reader.metadata()?.ino(), sparse.metadata()?.ino())?;
    same("a reader writes", errno_of(&sys::write(reader.as_fd(), b"x")), libc::EBADF)?;
    sys::write(appending.as_fd(), b"!")?;
    let mut last = [0; 4];
    sparse.read_exact_at(&mut last, SPARSE - 3)?;
    same("end", &last, b"end!")?;
    sparse.set_len(SPARSE)?;
    same("seals", seals(&sealed)?, all)?;
    same("mode", sealed.metadata()?.mode() & 0o7777, 0o640)?;
    same("a sealed file", errno_of(&sealed.write_at(b"x", 0)), libc::EPERM)?;
    same("sealed contents", sys::read(reopen(&sealed, OpenOptions::new().read(true))?.as_fd(), 99)?, b"as it is".to_vec())?;
    same("seals against execution", seals(&unexecutable)?, exec_seals)?;
    if exec_seals & F_SEAL_EXEC != 0 {
        let executable = unexecutable.set_permissions(fs::Permissions::from_mode(0o777));
        same("making it executable", errno_of(&executable), libc::EPERM)?;
        same("writing to it", unexecutable.write_at(b"DATA", 0)?, 4)?;
    }
    same("empty", (empty.metadata()?.len(), seals(&empty)?), (0, 0))?;
    let link = fs::read_link(format!("/proc/self/fd/{}", sparse.as_raw_fd()))?;
    same("name", link.to_string_lossy().as_ref(), "/memfd:sparse file (deleted)")?;
    let mut text = [0; 17];
    shared.read_exact_at(&mut text, 0)?;
    same("shared", &text, b"\0\0\0\0\0by the child")
}
