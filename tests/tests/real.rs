//! Real programs through dump and restore: `PROGRAM::VARIANT`.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{Doing, Failure, Stage, Variant, play};
use stasis_tests::suite::{self, Test};

/// A program, and how it is started in a directory.
struct Program {
    name: &'static str,
    interpreter: &'static str,
    argv: fn(interpreter: &str, dir: &str) -> Vec<String>,
    /// Whether `/proc` holds still while it runs.
    steady: bool,
    /// Whether it verifies itself; else its tasks must go on using the processor.
    verifies: bool,
    /// Flags that a dump of it needs.
    flags: &'static [&'static str],
}

const PROGRAMS: [Program; 10] = [
    Program {
        name: "python",
        interpreter: "python3",
        argv: |exe, dir| vec![exe.into(), script("threads.py"), dir.into()],
        steady: false,
        verifies: true,
        flags: &[],
    },
    Program {
        name: "sqlite",
        interpreter: "python3",
        argv: |exe, dir| vec![exe.into(), script("database.py"), dir.into()],
        steady: false,
        verifies: true,
        flags: &["--file-locks"],
    },
    Program {
        name: "yes_gzip",
        interpreter: "bash",
        argv: |exe, dir| {
            let script = format!("echo >{dir}/ready; yes | gzip >/dev/null");
            vec![exe.into(), "-c".into(), script]
        },
        steady: false,
        verifies: false,
        flags: &[],
    },
    Program {
        name: "pipeline",
        interpreter: "bash",
        argv: |exe, dir| vec![exe.into(), script("pipeline.sh"), dir.into()],
        steady: false,
        verifies: true,
        flags: &[],
    },
    Program {
        name: "perl",
        interpreter: "perl",
        argv: |exe, dir| vec![exe.into(), script("counter.pl"), dir.into()],
        steady: false,
        verifies: true,
        flags: &[],
    },
    Program {
        name: "python_unix_server",
        interpreter: "python3",
        argv: |exe, dir| vec![exe.into(), script("unix_server.py"), dir.into()],
        steady: false,
        verifies: true,
        flags: &[],
    },
    Program {
        name: "redis_unix",
        interpreter: "redis-server",
        argv: |exe, dir| {
            let python = find("python3").unwrap_or_else(|| "/usr/bin/python3".into());
            vec![python.to_string_lossy().into(), script("redis.py"), dir.into(), exe.into()]
        },
        steady: false,
        verifies: true,
        flags: &[],
    },
    Program {
        name: "unshare",
        interpreter: "unshare",
        argv: |exe, dir| {
            let python = find("python3").unwrap_or_else(|| "/usr/bin/python3".into());
            let python = python.to_string_lossy();
            [exe, "-m", "-u", "-i", "-n", "-C", &python, &script("threads.py"), dir].map(str::to_owned).into()
        },
        steady: false,
        verifies: true,
        flags: &[],
    },
    Program {
        name: "chroot",
        interpreter: "unshare",
        argv: |exe, dir| {
            let python = find("python3").unwrap_or_else(|| "/usr/bin/python3".into());
            let script = format!(
                "mkdir {dir}/root && mount --rbind / {dir}/root && exec chroot {dir}/root {} {} {dir}",
                python.display(),
                script("threads.py")
            );
            [exe, "-m", "sh", "-c", &script].map(str::to_owned).into()
        },
        steady: false,
        verifies: true,
        flags: &[],
    },
    Program {
        name: "node",
        interpreter: "node",
        argv: |exe, dir| vec![exe.into(), script("counter.js"), dir.into()],
        steady: false,
        verifies: true,
        flags: &[],
    },
];

const VARIANTS: [Variant; 5] =
    [Variant::Straight, Variant::Kill, Variant::Running, Variant::Stopped, Variant::Rounds];

fn script(name: &str) -> String {
    format!("{}/real/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// The interpreter itself, not a shell script of that name (pyenv's shims).
fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())?;
    if name != "python3" {
        return Some(found);
    }
    let output = Command::new(found).args(["-c", "import sys; print(sys.executable)"]).output().ok()?;
    Some(PathBuf::from(String::from_utf8(output.stdout).ok()?.trim()))
}

fn main() -> ExitCode {
    let mut tests = Vec::new();
    for program in &PROGRAMS {
        for variant in VARIANTS {
            let name = format!("{}::{}", program.name, variant.name());
            tests.push(Test::new(name, move |test| run(program, variant, test)));
        }
    }
    suite::main(tests)
}

fn run(program: &Program, variant: Variant, test: &str) -> Result<(), Failure> {
    let interpreter = find(program.interpreter)
        .ok_or_else(|| Failure::Skipped(format!("{} is not installed", program.interpreter)))?;
    let dir = Stage::fresh_dir(test)?;
    let argv = (program.argv)(&interpreter.to_string_lossy(), &dir.to_string_lossy());
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let mut stage = Stage::start_command(&dir, Flavour::Host, &argv, Duration::from_secs(40))?;
    stage.steady = program.steady;
    stage.flags = program.flags;
    stage.growing = program.verifies;
    if program.verifies {
        play(&mut stage, variant)?;
    } else {
        stage.verify = Some(everybody_works);
        std::thread::sleep(Duration::from_millis(100));
        play(&mut stage, variant)?;
    }
    stage.kill_tree()?;
    std::fs::remove_dir_all(&dir).doing("removing the directory")
}

/// Every task but the waiting root must have run between two looks.
fn everybody_works(stage: &Stage) -> Result<(), Failure> {
    // Ticks would be too coarse for one that mostly waits for a slower neighbour.
    let used = |pid: i32| -> u64 {
        let status = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"));
        let status = status.unwrap_or_default();
        let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
        lines.filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok()).sum()
    };
    let pids = stage.pids();
    if pids.len() < 3 {
        return Err(Failure::Changed("the restore", format!("only pids {pids:?} are there")));
    }
    let before: Vec<u64> = pids.iter().map(|&pid| used(pid)).collect();
    std::thread::sleep(Duration::from_millis(500));
    for (&pid, before) in pids.iter().zip(before).skip(1) {
        if used(pid) <= before {
            return Err(Failure::Changed("the restore", format!("pid {pid} does nothing")));
        }
    }
    Ok(())
}
