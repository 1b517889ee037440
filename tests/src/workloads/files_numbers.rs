//! Descriptors at scattered numbers, up to near the limit; some close-on-exec; the lowest free number stays what it
//! was.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::ctl::{Ctl, Outcome, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let path = ctl.work("data");
    fs::write(&path, "x")?;
    let file = fs::File::open(&path)?;
    let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard)?;
    let top = hard.min(1 << 20) as i32 - 1;
    let numbers = [64, 65, 127, 128, 1023, 1024, 4097, top];
    let mut kept = Vec::new();
    for (n, number) in numbers.into_iter().enumerate() {
        kept.push(sys::dup_to(&file, number)?);
        sys::fcntl(&kept[n], libc::F_SETFD, (n % 2) as i32)?;
    }
    let open_numbers = || -> Outcome<Vec<i32>> {
        let mut found: Vec<i32> = Vec::new();
        for number in 0..=top {
            if sys::fcntl(Number(number), libc::F_GETFD, 0).is_ok() {
                found.push(number);
            }
        }
        Ok(found)
    };
    let before = open_numbers()?;
    let free = file.try_clone()?.as_raw_fd();

    if ctl.wait()? {
        kept.pop();
    }

    same("open numbers", open_numbers()?, before)?;
    for (n, number) in numbers.into_iter().enumerate() {
        same("close-on-exec", sys::fcntl(Number(number), libc::F_GETFD, 0)?, (n % 2) as i32)?;
    }
    same("lowest free number", file.try_clone()?.as_raw_fd(), free)
}

/// A descriptor by number, open or not.
struct Number(i32);

impl AsFd for Number {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: only handed to fcntl, to which a closed number is an error and no more.
        unsafe { BorrowedFd::borrow_raw(self.0) }
    }
}
