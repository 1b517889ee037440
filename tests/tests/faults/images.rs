//! Restores that must be refused, of images that are damaged or of pids that are taken; nothing may be left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use stasis_tests::scenario::{Doing, Failure, Stage};
use stasis_tests::suite::Test;
use stasis_tests::tool::{self, Tool};

use crate::common::{Case, refused, succeeded};

/// All tests of this file.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new("image::missing", missing),
        Test::new("image::truncated", truncated),
        Test::new("image::bits_flipped", bits_flipped),
        Test::new("image::files_missing", files_missing),
        Test::new("image::files_exchanged", files_exchanged),
        Test::new("image::other_format_version", other_version),
        Test::new("restore::pid_taken", pid_taken),
        Test::new("restore::plugin_missing", plugin_missing),
        Test::new("restore::file_gone", file_gone),
        Test::new("restore::twice", twice),
    ]
}

/// Restores that directory, which holds nothing.
fn missing(test: &str) -> Result<(), Failure> {
    let dir = Stage::fresh_dir(test)?;
    let tool = Tool::discover().doing("finding the tool")?;
    fs::create_dir(dir.join("empty")).doing("making a directory")?;
    fs::write(dir.join("file"), "no directory").doing("making a file")?;
    for name in ["absent", "empty", "file"] {
        let mut command = Command::new(&tool.bin);
        command.args(["restore", "-d", "-D"]).arg(dir.join(name));
        refused(
            &tool::run(&mut command, &dir.join("tool.out"), std::time::Duration::from_secs(20))?,
            &[name],
        )?;
    }
    fs::remove_dir_all(&dir).doing("removing the directory")
}

/// Paths and contents.
type Files = Vec<(PathBuf, Vec<u8>)>;

/// A tree dumped and gone, and the files of its image.
fn dumped(test: &str, workload: &str) -> Result<(Case, Files), Failure> {
    let case = Case::start(test, workload)?;
    succeeded(case.dump("img", &[])?)?;
    case.stage.assert_gone(&case.before.pids)?;
    let mut files = Vec::new();
    for entry in fs::read_dir(case.stage.dir.join("img")).doing("reading the image")?.flatten() {
        let content = fs::read(entry.path()).doing("reading the image")?;
        if !content.is_empty() {
            files.push((entry.path(), content));
        }
    }
    if files.len() < 2 {
        return Err(Failure::Changed("the dump", format!("the image has {} files", files.len())));
    }
    Ok((case, files))
}

/// The damaged image must be refused with nothing left; then the file is mended.
fn must_refuse(case: &Case, file: &Path, good: &[u8], what: &str) -> Result<(), Failure> {
    let done = case.restore("img", &[])?;
    let outcome = refused(&done, &[]).and_then(|()| case.nothing_left());
    if let Err(failure) = outcome {
        let text = format!("{} with {what}: {failure}", file.display());
        return Err(Failure::Changed("a damaged image", text));
    }
    fs::write(file, good).doing("mending the image")
}

/// The mended image must work, so that the refusals were for the damage.
fn still_good(case: Case) -> Result<(), Failure> {
    succeeded(case.restore("img", &[])?)?;
    case.unharmed()?;
    case.finish()
}

fn truncated(test: &str) -> Result<(), Failure> {
    let (case, files) = dumped(test, "pipe_data")?;
    for (file, good) in &files {
        let length = good.len();
        for keep in [0, 1, 7, 12, length / 3, length / 2, length - 1] {
            if keep < length {
                fs::write(file, &good[..keep]).doing("cutting the image")?;
                must_refuse(&case, file, good, &format!("{keep} of {length} bytes"))?;
            }
        }
        fs::write(file, [good.as_slice(), b"\0more"].concat()).doing("lengthening the image")?;
        must_refuse(&case, file, good, "five bytes too many")?;
    }
    still_good(case)
}

/// Flips one bit at points that lie dense at both ends and spread in between.
fn bits_flipped(test: &str) -> Result<(), Failure> {
    let (case, files) = dumped(test, "pipe_data")?;
    for (file, good) in &files {
        let length = good.len();
        let mut places: Vec<usize> = (0..48.min(length)).chain(length.saturating_sub(16)..length).collect();
        places.extend((0..48).map(|n| length * n / 48));
        places.sort_unstable();
        places.dedup();
        for place in places {
            let mut bad = good.clone();
            bad[place] ^= 1 << (place % 8);
            fs::write(file, &bad).doing("damaging the image")?;
            must_refuse(&case, file, good, &format!("bit {} of byte {place} flipped", place % 8))?;
        }
    }
    still_good(case)
}

fn files_missing(test: &str) -> Result<(), Failure> {
    let (case, files) = dumped(test, "pipe_data")?;
    for (file, good) in &files {
        fs::remove_file(file).doing("removing a file of the image")?;
        must_refuse(&case, file, good, "the file missing")?;
    }
    still_good(case)
}

/// A file of another image in the place of one's own.
fn files_exchanged(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "mem_private")?;
    succeeded(case.dump("other", &["-R"])?)?;
    // The second image holds another state: the first restored and dumped again.
    succeeded(case.dump("img", &[])?)?;
    case.stage.assert_gone(&case.before.pids)?;
    for entry in fs::read_dir(case.stage.dir.join("img")).doing("reading the image")?.flatten() {
        let good = fs::read(entry.path()).doing("reading the image")?;
        let other = fs::read(case.stage.dir.join("other").join(entry.file_name())).unwrap_or_default();
        if good != other {
            fs::write(entry.path(), other).doing("damaging the image")?;
            must_refuse(&case, &entry.path(), &good, "another image's file in its place")?;
        }
    }
    still_good(case)
}

/// The format's version stands after the eight magic bytes of `core.img`.
fn other_version(test: &str) -> Result<(), Failure> {
    let (case, files) = dumped(test, "pipe_data")?;
    let Some((file, good)) = files.iter().find(|(path, _)| path.ends_with("core.img")) else {
        return Err(Failure::Skipped("another tool's image".into()));
    };
    for version in [0u32, 99] {
        let mut bad = good.clone();
        bad[8..12].copy_from_slice(&version.to_le_bytes());
        fs::write(file, &bad).doing("changing the version")?;
        refused(&case.restore("img", &[])?, &["version", &version.to_string()])?;
        case.nothing_left()?;
        fs::write(file, good).doing("mending the image")?;
    }
    still_good(case)
}

fn pid_taken(test: &str) -> Result<(), Failure> {
    let (case, _) = dumped(test, "tree_groups")?;
    for &pid in &case.before.pids {
        let taken = occupy(pid).doing("taking the pid")?;
        let done = case.restore("img", &[])?;
        let verdict = refused(&done, &[&pid.to_string()]);
        nix::sys::signal::kill(taken, nix::sys::signal::Signal::SIGKILL).doing("freeing the pid")?;
        nix::sys::wait::waitpid(taken, None).doing("freeing the pid")?;
        verdict?;
        case.nothing_left()?;
    }
    still_good(case)
}

/// A process with just that pid (clone3(2), `set_tid`).
fn occupy(pid: i32) -> std::io::Result<nix::unistd::Pid> {
    // SAFETY: `clone_args` is plain data; without CLONE_VM this is a fork of a process with one thread.
    unsafe {
        let mut arguments: libc::clone_args = std::mem::zeroed();
        arguments.exit_signal = libc::SIGCHLD as u64;
        arguments.set_tid = &raw const pid as u64;
        arguments.set_tid_size = 1;
        let got = libc::syscall(libc::SYS_clone3, &arguments, std::mem::size_of::<libc::clone_args>());
        if got == 0 {
            loop {
                libc::pause();
            }
        }
        stasis_tests::sys::cvt_long(got).map(|pid| nix::unistd::Pid::from_raw(pid as i32))
    }
}

fn plugin_missing(test: &str) -> Result<(), Failure> {
    let (case, _) = dumped(test, "pipe_data")?;
    refused(&case.restore("img", &["--without", "pipe"])?, &["pipe"])?;
    case.nothing_left()?;
    still_good(case)
}

/// A regular file that the tree had open is gone, or has become shorter: said by name.
fn file_gone(test: &str) -> Result<(), Failure> {
    let (case, _) = dumped(test, "files_offsets")?;
    let (file, away) = (case.stage.dir.join("work/data"), case.stage.dir.join("away"));
    fs::rename(&file, &away).doing("moving a file away")?;
    refused(&case.restore("img", &[])?, &["work/data"])?;
    case.nothing_left()?;
    fs::rename(&away, &file).doing("putting the file back")?;
    still_good(case)
}

/// What has been restored is in the way of a second restore.
fn twice(test: &str) -> Result<(), Failure> {
    let (case, _) = dumped(test, "pipe_data")?;
    succeeded(case.restore("img", &[])?)?;
    refused(&case.restore("img", &[])?, &[&case.stage.root.to_string()])?;
    case.unharmed()?;
    case.finish()
}
