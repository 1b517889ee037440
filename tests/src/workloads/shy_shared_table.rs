//! Two processes that share one descriptor table (CLONE_FILES).

use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::ctl::{Ctl, Outcome, pause, poll_until, same};
use crate::sys::{self, Map, PAGE, cvt_long};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let shared = Map::shared(PAGE)?;
    let (reader, writer) = sys::pipe(0)?;
    // SAFETY: without CLONE_VM the child is a fork that only shares the table.
    let pid = cvt_long(unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_FILES | libc::SIGCHLD, 0, 0, 0, 0) })?;
    if pid == 0 {
        while shared.get(0) == 0 {
            pause(Duration::from_millis(2));
        }
        // Closes it for both.
        // SAFETY: a number; this copy of the process ends without running destructors.
        unsafe {
            libc::close(writer.as_raw_fd());
            shared.put(8, 1);
            libc::_exit(0);
        }
    }

    if ctl.wait()? {
        return Err(crate::ctl::changed("spoilt".into()));
    }

    shared.put(0, 1);
    poll_until("the other closes", || shared.get(8) == 1)?;
    same("end of the pipe", sys::read(&reader, 1)?, Vec::new())?;
    std::mem::forget(writer);
    nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid as i32), None).map(drop).map_err(Into::into)
}
