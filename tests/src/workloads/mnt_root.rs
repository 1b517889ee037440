//! A tmpfs as root, as bubblewrap makes it: what the program needs is bound into it.

use std::fs;
use std::path::Path;

use nix::mount::{MntFlags, umount2};
use nix::unistd::{chdir, pivot_root};

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::mounts::{self, bind, tmpfs};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    mounts::needs_own()?;
    let root = ctl.work("root");
    let below = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    let program = std::env::current_exe()?;
    tmpfs(&root, "size=2m,mode=755")?;
    let binaries = program.parent().unwrap_or(Path::new("/"));
    for directory in ["/lib", "/lib64", "/usr/lib"].map(Path::new).into_iter().chain([ctl.dir(), binaries]) {
        fs::create_dir_all(below(directory))?;
        bind(&directory.canonicalize()?, &below(directory))?;
    }
    fs::create_dir(root.join("home"))?;
    fs::write(root.join("home/data"), sys::bytes(1, 5000))?;
    chdir(&root)?;
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/home")?;
    let open = fs::File::open("data")?;

    if ctl.wait()? {
        fs::write("data", "")?;
    }

    same("content", fs::read("/home/data")?, sys::bytes(1, 5000))?;
    same("content by the working directory", fs::read("data")?, sys::bytes(1, 5000))?;
    same("descriptor", sys::read(&open, 5000)?, sys::bytes(1, 5000))?;
    ensure(!Path::new("/proc/self").exists() && !Path::new("/etc").exists(), "there is more than there was")
}
