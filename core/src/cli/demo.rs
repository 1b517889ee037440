//! `stasis demo`: the two-minute tour as one command. Dumps a real program, shows that it is gone, restores it, shows
//! that it went on without a gap or a repeat; then the same from a snapshot of the running program.
//!
//! It uses nothing but the commands that a user has: it calls this very binary.

mod journal;

use self::journal::{Counters, Journal};
use clap::Args;
use nix::{
    errno::Errno,
    sys::{
        prctl,
        signal::{Signal, kill, killpg},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

/// Shows a dump, a restore and a snapshot of a running program, and checks each
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Keep the directory with the images and the program's file
    #[arg(long)]
    keep: bool,
}

const WORKLOAD: &str = include_str!("demo/workload.py");
/// How long anything may take that should take a moment.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often a wait looks again.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Why the demonstration ended early.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// A system call or a file operation.
    #[error("{what}: {source}")]
    Io {
        /// The operation and its object.
        what: String,
        /// The errno.
        source: io::Error,
    },
    /// A command failed.
    #[error("`{command}` failed ({status}):\n{said}")]
    Command {
        /// The command line.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it wrote.
        said: String,
    },
    /// A command is not there.
    #[error("{0} is not installed; on Debian: apt install {1}")]
    Missing(&'static str, &'static str),
    /// Something did not happen in time.
    #[error("waited {PATIENCE:?} in vain until {0}")]
    Late(&'static str),
    /// The program is not as it was.
    #[error("{0}")]
    Broken(#[from] journal::Break),
    /// Processes that should be gone are there, or the reverse.
    #[error("process {0} is {1}")]
    Process(i32, &'static str),
    /// The image does not say where the program was in its file.
    #[error("`stasis inspect` does not show {0}")]
    NotInImage(String),
}

/// Names the operation of an I/O error.
trait Doing<T> {
    fn doing(self, what: impl Into<String>) -> Result<T, DemoError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl Into<String>) -> Result<T, DemoError> {
        self.map_err(|source| DemoError::Io { what: what.into(), source: source.into() })
    }
}

/// Runs it.
pub fn run(args: &DemoArgs) -> ExitCode {
    // Not the pid alone: in a pid namespace of its own every demonstration has the same.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let name = format!("stasis-demo-{}-{}", std::process::id(), now.as_millis());
    let dir = std::env::temp_dir().join(name);
    let outcome = Demo::start(&dir).and_then(|mut demo| {
        let outcome = demo.play();
        demo.end();
        outcome
    });
    if args.keep || outcome.is_err() {
        println!("\nkept: {}", dir.display());
    } else if let Err(error) = fs::remove_dir_all(&dir) {
        eprintln!("stasis demo: {}: {error}", dir.display());
    }
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stasis demo: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A running program and where it writes.
struct Demo {
    stasis: PathBuf,
    dir: PathBuf,
    root: Pid,
}

impl Demo {
    fn start(dir: &Path) -> Result<Demo, DemoError> {
        let stasis = std::env::current_exe().doing("finding this executable")?;
        build_plugins(&stasis)?;
        let python = find("python3").ok_or(DemoError::Missing("python3", "python3"))?;
        fs::create_dir_all(dir).doing(format!("making {}", dir.display()))?;
        let script = dir.join("workload.py");
        fs::write(&script, WORKLOAD).doing(format!("writing {}", script.display()))?;
        // Restored processes are nobody's children; as a subreaper we get them and can reap them.
        prctl::set_child_subreaper(true).doing("becoming a child subreaper")?;
        let output = fs::File::create(dir.join("output")).doing("making a file for the program's output")?;
        let errors = output.try_clone().doing("making a file for the program's output")?;
        let child = Command::new(python)
            .arg(&script)
            .arg(dir)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .doing("starting python3")?;
        Ok(Demo { stasis, dir: dir.to_path_buf(), root: Pid::from_raw(child.id().cast_signed()) })
    }

    fn play(&mut self) -> Result<(), DemoError> {
        let journal = Journal::new(self.dir.join("journal"));
        self.wait("the program counts", || journal.read().is_ok_and(|now| now.all_reached(100)))?;
        title("A program at work");
        println!(
            "python3, four threads that compute and a child that answers; processes {}",
            list(&self.processes())
        );
        println!("its counters: {}", journal.read()?);

        title("stasis dump: into an image, and gone");
        let pids = self.processes();
        let took = self.dump("image", &[])?;
        self.reap();
        if let Some(&pid) = pids.iter().find(|&&pid| is_there(pid)) {
            return Err(DemoError::Process(pid, "still there"));
        }
        let frozen_at = journal.read()?;
        println!("dumped in {}; the image has {}", millis(took), mebibytes(&self.dir.join("image")));
        println!("processes {} are gone; the counters stand still at: {frozen_at}", list(&pids));

        title("stasis restore: it goes on");
        let took = self.restore("image")?;
        self.went_on(&journal, &frozen_at)?;
        println!("restored in {}; processes {}", millis(took), list(&self.processes()));
        println!("its counters: {}", journal.read()?);
        println!("every counter went on without a gap or a repeat");

        title("stasis dump --leave-running: a snapshot");
        self.longest_gap()?;
        let took = self.dump("snapshot", &["--leave-running"])?;
        let frozen = self.longest_gap()?;
        let then = journal.read()?;
        self.went_on(&journal, &then)?;
        println!("taken in {}; the program itself was frozen for {}", millis(took), millis(frozen));
        println!("the original runs on unharmed: {}", journal.read()?);

        title("The original is killed, its file put back, the snapshot restored");
        let pids = self.processes();
        self.kill_all();
        println!("killed: processes {}", list(&pids));
        let length = self.position_in("snapshot")?;
        let file =
            fs::OpenOptions::new().write(true).open(self.dir.join("journal")).doing("opening the journal")?;
        file.set_len(length).doing("putting the journal back")?;
        let snapshot = journal.read()?;
        println!("the file is as it was at the snapshot: {snapshot}");
        let took = self.restore("snapshot")?;
        self.went_on(&journal, &snapshot)?;
        println!("restored in {}: {}", millis(took), journal.read()?);
        println!("every counter went on from the snapshot without a gap or a repeat");
        Ok(())
    }

    /// Waits until every counter is 50 further than at `then`; the journal checks each step.
    fn went_on(&self, journal: &Journal, then: &Counters) -> Result<(), DemoError> {
        let began = Instant::now();
        while !journal.read()?.all_beyond(then, 50) {
            if began.elapsed() > PATIENCE {
                return Err(DemoError::Late("every counter went on"));
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// The longest time between two of the program's heartbeats since the last question.
    fn longest_gap(&self) -> Result<Duration, DemoError> {
        let gap = self.dir.join("gap");
        fs::write(self.dir.join("ask"), "").doing("asking the program")?;
        self.wait("the program answers", || gap.exists())?;
        let text = fs::read_to_string(&gap).doing("reading the answer")?;
        fs::remove_file(gap).doing("removing the answer")?;
        Ok(Duration::from_secs_f64(text.trim().parse().unwrap_or(0.0)))
    }

    fn wait(&self, what: &'static str, mut done: impl FnMut() -> bool) -> Result<(), DemoError> {
        let began = Instant::now();
        while !done() {
            if began.elapsed() > PATIENCE {
                return Err(DemoError::Late(what));
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    fn dump(&self, name: &str, more: &[&str]) -> Result<Duration, DemoError> {
        let images = self.dir.join(name);
        fs::create_dir_all(&images).doing(format!("making {}", images.display()))?;
        let mut command = Command::new(&self.stasis);
        command.args(["dump", "-t", &self.root.to_string(), "-D"]).arg(&images).args(more);
        call(&mut command).map(|(took, _)| took)
    }

    fn restore(&self, name: &str) -> Result<Duration, DemoError> {
        let mut command = Command::new(&self.stasis);
        command.args(["restore", "--restore-detached", "-D"]).arg(self.dir.join(name));
        call(&mut command).map(|(took, _)| took)
    }

    /// Where the program was in its journal, as the image has it.
    fn position_in(&self, name: &str) -> Result<u64, DemoError> {
        let (_, said) = call(Command::new(&self.stasis).arg("inspect").arg(self.dir.join(name)))?;
        let path = self.dir.join("journal").to_string_lossy().into_owned();
        said.lines()
            .filter(|line| line.contains(&path))
            .find_map(|line| line.rsplit("position ").next()?.split_whitespace().next()?.parse().ok())
            .ok_or(DemoError::NotInImage(path))
    }

    /// The pids of the tree.
    fn processes(&self) -> Vec<i32> {
        let mut found = vec![self.root.as_raw()];
        let mut next = 0;
        while let Some(&pid) = found.get(next) {
            for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
                let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
                found.extend(children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
            }
            next += 1;
        }
        found
    }

    /// Reaps whoever has ended among our children, until nobody is left that has.
    fn reap(&self) {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Err(Errno::ECHILD) => return,
                Ok(WaitStatus::StillAlive) => std::thread::sleep(LOOK_EVERY),
                _ => {}
            }
        }
    }

    fn kill_all(&self) {
        // The program leads a session; its child is in the same group.
        if killpg(self.root, Signal::SIGKILL).is_err() {
            // Killed before it had come as far as setsid(2).
            let _ = kill(self.root, Signal::SIGKILL);
        }
        self.reap();
    }

    fn end(&self) {
        if is_there(self.root.as_raw()) {
            self.kill_all();
        }
    }
}

/// `cargo run -p stasis -- demo` builds no plugin, for nothing depends on them: this builds them, once.
fn build_plugins(stasis: &Path) -> Result<(), DemoError> {
    let beside = stasis.parent().unwrap_or(Path::new("/"));
    let is_plugin = |name: &str| name.starts_with("libstasis_plugin_") && name.ends_with(".so");
    let entries = fs::read_dir(beside).doing(format!("reading {}", beside.display()))?;
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    if entries.flatten().any(|entry| is_plugin(&entry.file_name().to_string_lossy())) || !workspace.exists() {
        return Ok(());
    }
    println!("building the plugins ...");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--workspace", "--manifest-path"]).arg(workspace);
    if beside.ends_with("release") {
        cargo.arg("--release");
    }
    call(&mut cargo).map(drop)
}

/// The program of that name; a launcher script of a version manager leads to the real one.
fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())?;
    let (_, said) = call(Command::new(&found).args(["-c", "import sys; print(sys.executable)"])).ok()?;
    Some(PathBuf::from(said.trim()))
}

/// Runs a command to its end: how long it took, and what it wrote to stdout.
fn call(command: &mut Command) -> Result<(Duration, String), DemoError> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line = words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ");
    let began = Instant::now();
    let output = command.stdin(Stdio::null()).output().doing(format!("starting `{line}`"))?;
    let took = began.elapsed();
    if output.status.success() {
        return Ok((took, String::from_utf8_lossy(&output.stdout).into_owned()));
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(DemoError::Command { command: line, status: output.status, said })
}

fn is_there(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

fn title(text: &str) {
    println!("\n== {text}");
    // Whoever reads along sees each step when it begins.
    let _ = io::stdout().flush();
}

fn list(pids: &[i32]) -> String {
    pids.iter().map(i32::to_string).collect::<Vec<_>>().join(", ")
}

fn millis(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

fn mebibytes(dir: &Path) -> String {
    let bytes: u64 = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.metadata().ok())
        .map(|m| m.len())
        .sum();
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
