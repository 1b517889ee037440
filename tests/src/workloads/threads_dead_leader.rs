//! A process whose first thread has ended: it shows as a zombie while the others go on.

use crate::ctl::{Ctl, Outcome, changed, ensure};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let child = ctl.child("leaderless", |ctl| {
        let ctl = ctl.clone();
        std::thread::spawn(move || {
            let verdict = ctl.wait_as("leaderless").and_then(|sabotage| {
                let stat = std::fs::read_to_string(format!("/proc/self/task/{}/stat", std::process::id()))?;
                ensure(stat.contains(") Z ") && !sabotage, "the first thread is not a zombie")
            });
            if let Err(fail) = &verdict {
                let _ = ctl.announce("failure.leaderless", fail.to_string().as_bytes());
            }
            // SAFETY: ends the whole process.
            unsafe { libc::_exit(i32::from(verdict.is_err())) }
        });
        // SAFETY: ends this thread only (exit(2), not exit_group(2)); its stack stays for the others.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
        Err(changed("exit(2) returned".into()))
    })?;
    ctl.await_ready("leaderless")?;

    ctl.wait()?;

    child.join()
}
