//! A child whose root is another directory, with its working directory inside.

use std::fs;
use std::path::Path;

use crate::ctl::{Ctl, Outcome, ensure, same};

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let dir = ctl.dir().to_owned();
    fs::create_dir_all(ctl.work("inner"))?;
    fs::write(ctl.work("inner/mark"), "mark")?;
    let child = ctl.child("rooted", |ctl| {
        nix::unistd::chroot(&dir)?;
        std::env::set_current_dir("/work/inner")?;
        let ctl = ctl.moved(Path::new("/"));
        if ctl.wait_as("rooted")? {
            std::env::set_current_dir("/")?;
        }
        same("file below the new root", fs::read_to_string("/work/inner/mark")?.as_str(), "mark")?;
        same("file in the working directory", fs::read_to_string("mark")?.as_str(), "mark")?;
        ensure(!Path::new("/usr").exists(), "the old root can be seen")
    })?;
    ctl.await_ready("rooted")?;

    ctl.wait()?;

    child.join()
}
