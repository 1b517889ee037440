//! Called by the name `criu`: command lines as LXC writes them, the files that callers look for, requests by socket as runc and
//! crun send them, and runc itself.

mod client;
mod names;
mod requests;
mod runc;

use stasis_tests::{
    scenario::{Doing, Failure, Stage},
    suite,
    tool::Tool,
};
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut tests = names::tests();
    tests.extend(requests::tests());
    tests.extend(runc::tests());
    suite::main(tests)
}

/// The tool by its other name: a link in a directory of the test.
pub fn tool(stage: &Stage) -> Result<Tool, Failure> {
    let Tool { bin, .. } = Tool::discover().doing("finding the tool")?;
    let link = stage.dir.join("criu");
    if !link.is_symlink() {
        std::os::unix::fs::symlink(bin, &link).doing("making the link")?;
    }
    // Flags of stasis alone are not tried.
    Ok(Tool { bin: link, peer: true })
}

/// Fails unless something holds.
pub fn expect(holds: bool, why: impl FnOnce() -> String) -> Result<(), Failure> {
    if holds { Ok(()) } else { Err(Failure::Changed("criu", why())) }
}
