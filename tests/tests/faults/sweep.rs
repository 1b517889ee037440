//! The command is ended at points spread over a dump and over a restore, and each time all must be well.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use stasis_tests::scenario::{Doing, Failure};
use stasis_tests::suite::Test;
use stasis_tests::tool;

use crate::common::{Case, all_pids, succeeded};

/// Points of a dump.
const DUMP_POINTS: u32 = 200;
/// Points of a restore.
const RESTORE_POINTS: u32 = 100;
/// After so many points the workload checks itself and a new one starts.
const CHECK_EVERY: u32 = 20;

/// All tests of this file.
pub fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for (name, signal, share) in
        [("kill", Signal::SIGKILL, 1), ("term", Signal::SIGTERM, 5), ("int", Signal::SIGINT, 5)]
    {
        for leave_running in [true, false] {
            let mode = if leave_running { "running" } else { "kill" };
            // Half of the points for each way to end a dump.
            let points = DUMP_POINTS / 2 / share;
            tests.push(Test::new(format!("sweep::{name}_in_dump_{mode}"), move |test| {
                over_dump(test, signal, points, leave_running)
            }));
        }
        let points = RESTORE_POINTS / share;
        tests.push(Test::new(format!("sweep::{name}_in_restore"), move |test| {
            over_restore(test, "mixture", signal, points)
        }));
    }
    // What has no descriptor and no owner: only the guardian can take it away.
    tests.push(Test::new("sweep::kill_in_restore_segments", move |test| {
        over_restore(test, "sysv_shm", Signal::SIGKILL, RESTORE_POINTS / 2)
    }));
    for test in &mut tests {
        test.heavy = true;
    }
    tests
}

/// Starts the command, ends it after `delay`, and waits for it. Every other time its whole process group is hit.
fn interrupt(
    case: &Case,
    mut command: Command,
    delay: Duration,
    signal: Signal,
    group: bool,
) -> Result<(), Failure> {
    let mut child = tool::start(&mut command, &case.stage.dir.join("tool.out"))?;
    let began = Instant::now();
    while began.elapsed() < delay {
        std::hint::spin_loop();
    }
    let pid = Pid::from_raw(child.id() as i32);
    // It may have ended by itself; it is not reaped yet, so the number is still its own.
    let _ = if group { killpg(pid, signal) } else { kill(pid, signal) };
    let began = Instant::now();
    while child.try_wait().doing("waiting for the command")?.is_none() {
        if began.elapsed() > Duration::from_secs(20) {
            let why = format!("the command ignores {signal}: {}", whereabouts());
            let _ = killpg(pid, Signal::SIGKILL);
            return Err(Failure::Changed("the signal", why));
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    Ok(())
}

/// What keeps the processes of stasis: state and kernel function of each.
fn whereabouts() -> String {
    let read = |pid: i32, file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    let ours = all_pids().into_iter().filter(|&pid| is_ours(pid));
    let one = |pid| {
        let status = read(pid, "status");
        let state = status.lines().find(|line| line.starts_with("State:")).unwrap_or_default();
        let stack: Vec<String> = read(pid, "stack").lines().take(8).map(str::to_owned).collect();
        format!("{pid} {} {state} {}", read(pid, "comm").trim(), stack.join(" "))
    };
    ours.map(one).collect::<Vec<_>>().join("; ")
}

/// Whether the tree is gone, once nobody works on it any more.
fn tree_gone(case: &Case) -> bool {
    let pids = all_pids();
    case.before.pids.iter().all(|pid| !pids.contains(pid))
}

fn over_dump(test: &str, signal: Signal, points: u32, leave_running: bool) -> Result<(), Failure> {
    let flags: &[&str] = if leave_running { &["-R"] } else { &[] };
    let mut case = Case::start(test, "mixture")?;
    // Twice: the first run also warms up.
    let mut length = Duration::ZERO;
    for n in 0..2 {
        length = succeeded(case.dump(&format!("measure{n}"), &["-R"])?)?.took;
    }
    for point in 0..points {
        let delay = length * point / points;
        let images = case.images("img")?;
        let command = case.tool.dump(case.stage.root, &images, flags);
        interrupt(&case, command, delay, signal, point % 2 == 1)?;
        let at =
            |failure: Failure| Failure::Changed("the sweep", format!("point {point} ({delay:?}): {failure}"));
        if !leave_running && images.join("manifest").exists() {
            // Too late to stop it: then the whole tree is in the image, and all or nothing of it may still run.
            settle(&case).map_err(at)?;
            if tree_gone(&case) {
                succeeded(case.restore("img", &[]).map_err(at)?).map_err(at)?;
            }
        }
        case.unharmed().map_err(at)?;
        fs::remove_dir_all(&images).doing("removing the half image")?;
        if point % CHECK_EVERY == CHECK_EVERY - 1 {
            case.stage.check("the sweep").map_err(at)?;
            case.end()?;
            case = Case::start(test, "mixture")?;
        }
    }
    case.finish()
}

/// Waits until nobody works on the tree any more: the guardian goes on when the command is dead.
fn settle(case: &Case) -> Result<(), Failure> {
    let began = Instant::now();
    let (mut last, mut since) = (all_pids(), Instant::now());
    while since.elapsed() < Duration::from_millis(50) || last.iter().any(|&pid| is_ours(pid)) {
        std::thread::sleep(Duration::from_millis(5));
        let now = all_pids();
        if now != last {
            (last, since) = (now, Instant::now());
        }
        if began.elapsed() > case.stage.patience {
            return Err(Failure::Changed("the sweep", "processes come and go without end".into()));
        }
    }
    Ok(())
}

/// Whether it is a process of stasis, dead ones included.
fn is_ours(pid: i32) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    matches!(name.trim(), "stasis" | "stasis-guardian")
}

/// System V segments of the test's namespace.
fn segments() -> Result<Vec<i32>, Failure> {
    let table = fs::read_to_string("/proc/sysvipc/shm").doing("reading the table of segments")?;
    Ok(table.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().nth(1)?.parse().ok()).collect())
}

/// Removes them all: a dump leaves those that processes outside its tree could use.
fn remove_segments() -> Result<(), Failure> {
    for id in segments()? {
        // SAFETY: takes no structure.
        unsafe { nix::libc::shmctl(id, nix::libc::IPC_RMID, std::ptr::null_mut()) };
    }
    Ok(())
}

fn over_restore(test: &str, workload: &str, signal: Signal, points: u32) -> Result<(), Failure> {
    let case = Case::start(test, workload)?;
    succeeded(case.dump("img", &[])?)?;
    case.stage.assert_gone(&case.before.pids)?;
    remove_segments()?;
    let length = succeeded(case.restore("img", &[])?)?.took;
    case.unharmed()?;
    case.stage.kill_tree()?;
    for point in 0..points {
        remove_segments()?;
        let delay = length * point / points;
        let command = case.tool.restore(&case.stage.dir.join("img"), &[]);
        interrupt(&case, command, delay, signal, point % 2 == 1)?;
        let at =
            |failure: Failure| Failure::Changed("the sweep", format!("point {point} ({delay:?}): {failure}"));
        settle(&case).map_err(at)?;
        if tree_gone(&case) {
            case.nothing_left().map_err(at)?;
            if let left @ [_, ..] = segments()?.as_slice() {
                return Err(at(Failure::Changed("segments", format!("some are left: {left:?}"))));
            }
        } else {
            // The restore had ended, or as good as: then all of it must be there.
            case.unharmed().map_err(at)?;
            case.stage.kill_tree().map_err(at)?;
        }
    }
    succeeded(case.restore("img", &[])?)?;
    case.unharmed()?;
    case.finish()
}
