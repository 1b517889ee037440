//! A program whose executable was unlinked (an upgrade in place): `cat`, which must go on copying.

use std::fs;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use crate::ctl::{Ctl, Outcome, same};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let program = ctl.work("program");
    fs::copy("/bin/cat", &program)?;
    let mut child = Command::new(&program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(crate::ctl::changed("no pipes".into()));
    };
    sys::write(&input, b"before")?;
    same("before", sys::read(&output, 100)?, b"before".to_vec())?;
    fs::remove_file(&program)?;
    let exe = format!("/proc/{}/exe", child.id());
    let shown = fs::read_link(&exe)?;

    if ctl.wait()? {
        child.kill()?;
        child.wait()?;
    }

    same("executable", fs::read_link(&exe)?, shown)?;
    same("its contents", fs::read(&exe)? == fs::read("/bin/cat")?, true)?;
    sys::write(&input, b"after")?;
    same("after", sys::read(&output, 100)?, b"after".to_vec())?;
    same("descriptor", output.as_raw_fd() > 2, true)?;
    drop(input);
    same("end", child.wait()?.code(), Some(0))
}
