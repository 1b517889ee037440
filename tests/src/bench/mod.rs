//! The benchmark: fixed cases, one or two tools in turn, no assertions about time.
//!
//! Frozen time is what the workload itself saw: the longest gap between two of its heartbeats, 0.2 ms apart, during
//! a dump with `--leave-running`.

pub mod cases;
pub mod report;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::launch::Flavour;
use crate::scenario::{Doing, Failure, Stage};
use crate::tool::Tool;
use cases::Case;

/// What one run of one case with one tool measured.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Sample {
    /// Longest gap between heartbeats during `dump --leave-running`, in seconds.
    pub frozen: f64,
    /// Wall-clock time of `dump --leave-running`, in seconds.
    pub snapshot: f64,
    /// Wall-clock time of a dump that kills the tree, in seconds.
    pub dump: f64,
    /// Wall-clock time of `restore --restore-detached`, in seconds.
    pub restore: f64,
    /// Disk space of the image, in MiB.
    pub image: f64,
}

/// How long any step may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// Runs a case once.
pub fn run(case: &Case, tool: &Tool, label: &str) -> Result<Sample, Failure> {
    let dir = Stage::fresh_dir(&format!("bench.{}.{label}", case.name))?;
    let exe = std::env::current_exe().doing("finding this executable")?;
    let (exe, dir_text) = (exe.to_string_lossy().into_owned(), dir.to_string_lossy().into_owned());
    let argv = [exe.as_str(), "--workload", case.name, "--dir", &dir_text];
    let mut stage = Stage::start_command(&dir, Flavour::Host, &argv, PATIENCE)?;
    // Let the page cache of earlier runs and the start-up noise settle, then forget the gaps until now.
    heartbeat_gap(&stage)?;
    let snapshot = stage.dump(tool, "snapshot", &["-R"])?;
    let frozen = heartbeat_gap(&stage)?;
    let _ = fs::remove_dir_all(dir.join("snapshot"));
    let pids = stage.pids();
    let dump = stage.dump(tool, "img", &[])?;
    stage.assert_gone(&pids)?;
    let image = size_of(&dir.join("img"));
    let restore = stage.restore(tool, "img", &[])?;
    // The restored workload answers: it is alive, and its contents were compared.
    heartbeat_gap(&stage)?;
    stage.kill_tree()?;
    let _ = fs::remove_dir_all(&dir);
    Ok(Sample {
        frozen,
        snapshot: snapshot.took.as_secs_f64(),
        dump: dump.took.as_secs_f64(),
        restore: restore.took.as_secs_f64(),
        image: image as f64 / f64::from(1 << 20),
    })
}

/// Asks the workload for the longest gap since the last question, in seconds.
fn heartbeat_gap(stage: &Stage) -> Result<f64, Failure> {
    stage.reset();
    let said = stage.verdict("gap")?;
    stage.reset();
    said.trim().parse().map_err(|_| Failure::Changed("a heartbeat", said))
}

/// The disk space of all files below a directory.
fn size_of(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => size_of(&entry.path()),
            Ok(meta) => meta.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

/// What the machine itself can do, to see the figures in proportion.
#[derive(Debug, serde::Serialize)]
pub struct Limits {
    /// memcpy of 256 MiB, GiB/s.
    pub memcpy: f64,
    /// write(2) of 1 GiB into the page cache of the image's file system, GiB/s.
    pub write: f64,
    /// The same until fdatasync(2) has returned, GiB/s.
    pub write_sync: f64,
    /// fork(2) and wait, in milliseconds.
    pub fork: f64,
}

/// Measures the machine.
pub fn limits(dir: &Path) -> Result<Limits, Failure> {
    let from = vec![1u8; 256 << 20];
    let mut to = vec![0u8; 256 << 20];
    to.copy_from_slice(&from);
    let began = Instant::now();
    to.copy_from_slice(std::hint::black_box(&from));
    let memcpy = 0.25 / began.elapsed().as_secs_f64();
    std::hint::black_box(&to);
    let path: PathBuf = dir.join("bench.limits");
    let file = fs::File::create(&path).doing("making a file beside the images")?;
    let began = Instant::now();
    for n in 0..1024u64 {
        std::os::unix::fs::FileExt::write_all_at(&file, &from[..1 << 20], n << 20)
            .doing("writing beside the images")?;
    }
    let write = 1.0 / began.elapsed().as_secs_f64();
    file.sync_data().doing("writing beside the images")?;
    let write_sync = 1.0 / began.elapsed().as_secs_f64();
    let _ = fs::remove_file(&path);
    drop((from, to));
    let began = Instant::now();
    for _ in 0..20 {
        // SAFETY: one thread; the child ends at once.
        match unsafe { nix::unistd::fork() }.doing("forking")? {
            nix::unistd::ForkResult::Parent { child } => {
                nix::sys::wait::waitpid(child, None).doing("waiting")?;
            }
            // SAFETY: ends the copy.
            nix::unistd::ForkResult::Child => unsafe { libc::_exit(0) },
        }
    }
    Ok(Limits { memcpy, write, write_sync, fork: began.elapsed().as_secs_f64() * 1000.0 / 20.0 })
}
