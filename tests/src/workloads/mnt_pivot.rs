//! A root of its own: a directory of the machine, entered by pivot_root(2), with the program's files bound into it; a child that
//! goes further down by chroot(2).

use std::fs;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, chroot, pivot_root};

use crate::ctl::{Ctl, Outcome, ensure, same};
use crate::mounts::{self, NONE, bind, change, tmpfs};
use crate::sys;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    mounts::needs_own()?;
    let root = ctl.work("root");
    let below = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    let program = std::env::current_exe()?;
    let libraries: Vec<_> = ["/lib", "/lib64", "/usr/lib"].map(Path::new).into();
    fs::create_dir_all(&root)?;
    bind(&root, &root)?;
    for directory in libraries.into_iter().chain([ctl.dir()]) {
        fs::create_dir_all(below(directory))?;
        bind(&directory.canonicalize()?, &below(directory))?;
    }
    fs::create_dir_all(below(program.parent().unwrap_or(Path::new("/"))))?;
    fs::write(below(&program), "")?;
    bind(&program, &below(&program))?;
    change(&below(&program), MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY)?;
    for name in ["proc", "scratch", "old"] {
        fs::create_dir(root.join(name))?;
    }
    mount(Some("proc"), &root.join("proc"), Some("proc"), MsFlags::MS_NOSUID, NONE)?;
    tmpfs(&root.join("scratch"), "size=1m")?;
    fs::create_dir_all(root.join("scratch/jail/inner"))?;
    fs::create_dir(root.join("scratch/jail/proc"))?;
    fs::write(root.join("scratch/jail/inner/mark"), "mark")?;
    chdir(&root)?;
    pivot_root(".", "old")?;
    umount2("/old", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    let file = fs::OpenOptions::new().create(true).append(true).open("/scratch/log")?;
    let on_disk = fs::OpenOptions::new().create(true).append(true).open("/kept")?;
    let child = ctl.child("rooted", |ctl| {
        bind(ctl.dir(), Path::new("/scratch/jail/inner"))?;
        fs::write("/scratch/jail/inner/mark", "mark")?;
        chroot("/scratch/jail")?;
        std::env::set_current_dir("/inner")?;
        let ctl = ctl.moved(Path::new("/inner"));
        let open = fs::File::open("/inner/mark")?;
        if ctl.wait_as("rooted")? {
            std::env::set_current_dir("/")?;
        }
        same("file below the new root", fs::read_to_string("/inner/mark")?.as_str(), "mark")?;
        same("file in the working directory", fs::read_to_string("mark")?.as_str(), "mark")?;
        same("descriptor", sys::read(&open, 4)?.as_slice(), b"mark")?;
        ensure(!Path::new("/usr").exists(), "the old root can be seen")
    })?;
    ctl.await_ready("rooted")?;
    let before = mounts::shown()?;

    ctl.wait()?;

    same("mounts", mounts::shown()?, before)?;
    sys::write(&file, b"line")?;
    sys::write(&on_disk, b"line")?;
    same("the log", fs::read_to_string("/scratch/log")?.as_str(), "line")?;
    ensure(Path::new("/kept").exists() && !Path::new("/etc").exists(), "it is another root")?;
    child.join()
}
