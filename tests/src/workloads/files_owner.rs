//! Owner and signal of files, as another user: who asked for the signal decides whom it may reach.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};

use crate::ctl::{Ctl, Outcome, same};
use crate::sys::{self, cvt};

const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;
const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_GETOWNER_UIDS: i32 = 17;

/// Kind, process and uids of the owner, and the signal.
fn facts(fd: impl AsFd) -> Outcome<([i32; 2], [u32; 2], i32)> {
    let (mut owner, mut uids) = ([0; 2], [0; 2]);
    let number = fd.as_fd().as_raw_fd();
    // SAFETY: struct f_owner_ex is two ints, and two uids are written.
    unsafe {
        cvt(libc::fcntl(number, F_GETOWN_EX, owner.as_mut_ptr()))?;
        cvt(libc::fcntl(number, F_GETOWNER_UIDS, uids.as_mut_ptr()))?;
    }
    Ok((owner, uids, sys::fcntl(fd, F_GETSIG, 0)?))
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    fs::write(ctl.work("data"), "data")?;
    let own = std::process::id() as i32;
    let child = ctl.child("owner", |ctl| ctl.wait_as("owner").map(drop))?;
    ctl.await_ready("owner")?;
    let owners = [(0, own, 0, 0), (1, child.pid.as_raw(), 33, 44), (2, own, 1000, 0), (1, own, 0, 7)];
    let mut files = Vec::new();
    for (n, (kind, pid, uid, euid)) in owners.into_iter().enumerate() {
        let file = fs::File::open(ctl.work("data"))?;
        let owner = [kind, pid];
        // SAFETY: takes numbers; struct f_owner_ex is two ints, which outlive the call.
        unsafe {
            cvt(libc::setresuid(uid, euid, 0))?;
            let set = cvt(libc::fcntl(file.as_raw_fd(), F_SETOWN_EX, owner.as_ptr()));
            cvt(libc::setresuid(0, 0, 0))?;
            set?;
            cvt(libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0))?;
        }
        sys::fcntl(&file, F_SETSIG, if n % 2 == 0 { libc::SIGRTMIN() + n as i32 } else { 0 })?;
        files.push(file);
    }
    let before: Vec<_> = files.iter().map(facts).collect::<Outcome<_>>()?;
    same("uids", before[1].1, [33, 44])?;

    if ctl.wait()? {
        sys::fcntl(&files[0], F_SETSIG, 0)?;
    }

    for (file, was) in files.iter().zip(before) {
        same("owner, uids and signal", facts(file)?, was)?;
    }
    child.join()
}
