//! One workload, taken through dump and restore in one flavour and one variant.

use std::fs;
use std::hash::{Hash, Hasher};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::launch::Flavour;
use crate::snapshot::{Snapshot, children};
use crate::tool::{self, Tool, ToolError};

/// What is done with the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// No dump at all: the check must pass.
    Straight,
    /// No dump, but the state is spoilt: the check must fail.
    Sabotage,
    /// Dump, restore, check.
    Kill,
    /// Dump and leave running, check; kill; restore, check.
    Running,
    /// As `Running`, without the copy-on-write snapshot.
    NoCow,
    /// Dump and leave stopped, continue, check; kill; restore, check.
    Stopped,
    /// Dump and restore three times, then check.
    Rounds,
}

impl Variant {
    /// All of them.
    pub const ALL: [Variant; 7] = [
        Variant::Straight,
        Variant::Sabotage,
        Variant::Kill,
        Variant::Running,
        Variant::NoCow,
        Variant::Stopped,
        Variant::Rounds,
    ];

    /// Its name in tests.
    pub fn name(self) -> &'static str {
        match self {
            Variant::Straight => "straight",
            Variant::Sabotage => "sabotage",
            Variant::Kill => "kill",
            Variant::Running => "running",
            Variant::NoCow => "nocow",
            Variant::Stopped => "stopped",
            Variant::Rounds => "rounds",
        }
    }
}

/// Why a scenario failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A call of the tool.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// The harness itself.
    #[error("{what}: {source}")]
    Harness {
        /// The operation.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// The workload did not get as far as it should.
    #[error("waited {0:?} in vain for {1}; it said: {2}")]
    Late(Duration, &'static str, String),
    /// The workload's own verdict.
    #[error("after {0}: {1}")]
    Changed(&'static str, String),
    /// `/proc` shows a difference.
    #[error("/proc differs after {0} in {n} places:\n    {list}", n = .1.len(), list = .1.iter().take(25).cloned().collect::<Vec<_>>().join("\n    "))]
    Differs(&'static str, Vec<String>),
    /// Tasks of the tree are still there after the dump.
    #[error("still there after the dump: pids {0:?}")]
    NotGone(Vec<i32>),
    /// The workload cannot run here.
    #[error("{0}")]
    Skipped(String),
    /// The check passed although the state was spoilt.
    #[error("the check passed although the state had been spoilt")]
    Blind,
}

/// `map_err` for the harness' own calls.
pub trait Doing<T> {
    /// Names the operation.
    fn doing(self, what: &'static str) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: &'static str) -> Result<T, Failure> {
        self.map_err(|source| Failure::Harness { what, source: source.into() })
    }
}

/// A check from outside.
pub type Verify = fn(&Stage) -> Result<(), Failure>;

/// A started tree and the directory it belongs to.
#[derive(Debug)]
pub struct Stage {
    /// The scenario's directory.
    pub dir: PathBuf,
    /// How long each step may take.
    pub patience: Duration,
    /// The root task, in the harness' pid namespace.
    pub root: i32,
    /// Whether pids that run now stay the same (no fork storms and the like).
    pub steady: bool,
    /// How to tell that all is as it should be, for programs that cannot be asked.
    pub verify: Option<Verify>,
    /// Whether files of the workload grow while it runs, so that only a tree left stopped shows them as they are in the
    /// image.
    pub growing: bool,
    /// Flags that every dump of it needs.
    pub flags: &'static [&'static str],
    /// Whether the root's pid is one of the harness' own namespace.
    pub keeps_pids: bool,
}

/// The directory of all scenarios of this build: several worktrees may be tested at once.
pub fn base_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("STASIS_TEST_DIR") {
        return dir.into();
    }
    let mut hasher = std::hash::DefaultHasher::new();
    tool::target_dir().unwrap_or_default().hash(&mut hasher);
    std::env::temp_dir().join(format!("stasis-tests-{:08x}", hasher.finish() as u32))
}

/// The workload binary, copied to where a task of any user can reach it. A later build gets another name, so that none
/// is replaced under a running scenario.
pub fn workload_binary() -> io::Result<PathBuf> {
    let from = tool::target_dir()?.join("stasis-workload");
    let built = fs::metadata(&from)?;
    let dir = base_dir().join("bin").join(format!("{:x}-{:x}", built.mtime(), built.mtime_nsec()));
    let to = dir.join("stasis-workload");
    if !to.exists() {
        fs::create_dir_all(&dir)?;
        // Sandboxes have pids of their own; their pid namespaces differ.
        let sandbox = fs::metadata("/proc/self/ns/pid")?.ino();
        let temporary = dir.join(format!(".new.{sandbox}.{}", std::process::id()));
        fs::copy(&from, &temporary)?;
        // Not renamed: whoever came first has started it already, and would run a deleted file.
        let linked = fs::hard_link(&temporary, &to);
        fs::remove_file(temporary)?;
        if !to.exists() {
            linked?;
        }
    }
    Ok(to)
}

impl Stage {
    /// Starts a workload and waits until it is ready.
    pub fn start(test: &str, workload: &str, flavour: Flavour, patience: Duration) -> Result<Stage, Failure> {
        let binary = workload_binary().doing("copying the workload binary")?;
        let dir = Stage::fresh_dir(test)?;
        let dir_text = dir.to_string_lossy().into_owned();
        let binary_text = binary.to_string_lossy().into_owned();
        Stage::start_command(&dir, flavour, &[&binary_text, workload, &dir_text], patience)
    }

    /// A directory for what a test starts by itself; there is no tree yet.
    pub fn idle(dir: PathBuf, patience: Duration) -> Stage {
        Stage {
            dir,
            patience,
            root: 0,
            steady: true,
            verify: None,
            growing: false,
            flags: &[],
            keeps_pids: true,
        }
    }

    /// An empty directory for a test.
    pub fn fresh_dir(test: &str) -> Result<PathBuf, Failure> {
        let dir = base_dir().join(test.replace("::", "."));
        if dir.exists() {
            fs::remove_dir_all(&dir).doing("removing the directory of an earlier run")?;
        }
        fs::create_dir_all(dir.join("work")).doing("making the scenario's directory")?;
        Ok(dir)
    }

    /// Starts any command as the root of a tree and waits for the file `ready`.
    pub fn start_command(
        dir: &Path,
        flavour: Flavour,
        argv: &[&str],
        patience: Duration,
    ) -> Result<Stage, Failure> {
        let binary = workload_binary().doing("copying the workload binary")?;
        let output = fs::File::create(dir.join("launch.out")).doing("making launch.out")?;
        let errors = output.try_clone().doing("making launch.out")?;
        // The launcher reaps the root task; our init reaps the launcher.
        let launcher = Command::new(binary)
            .args(["launch", flavour.name()])
            .arg(dir)
            .args(argv)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .doing("starting the launcher")?;
        drop(launcher);
        let mut stage =
            Stage { keeps_pids: flavour == Flavour::Host, ..Stage::idle(dir.to_owned(), patience) };
        stage.wait_for("pid", "the launcher")?;
        stage.root = stage.read("pid").trim().parse().unwrap_or(0);
        stage.wait_for("ready", "the workload to get ready")?;
        Ok(stage)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir.join(name)).unwrap_or_default()
    }

    fn wait_for(&self, name: &str, what: &'static str) -> Result<(), Failure> {
        let (file, result, began) = (self.dir.join(name), self.dir.join("result"), Instant::now());
        while !file.exists() {
            let said = self.read("result");
            if let Some(why) = said.strip_prefix("SKIP: ") {
                return Err(Failure::Skipped(why.trim().to_owned()));
            }
            if began.elapsed() > self.patience || (name != "result" && result.exists()) {
                let said = format!("{}{}{}", said, self.read("launch.out"), self.read("work/.out"));
                return Err(Failure::Late(began.elapsed(), what, said));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Asks the workload for its verdict.
    pub fn check(&self, after: &'static str) -> Result<(), Failure> {
        if let Some(verify) = self.verify {
            return verify(self);
        }
        match self.verdict("check")?.trim() {
            "PASS" => Ok(()),
            said => Err(Failure::Changed(after, said.to_owned())),
        }
    }

    /// Writes the request and returns the workload's answer.
    pub fn verdict(&self, request: &str) -> Result<String, Failure> {
        fs::write(self.dir.join("check-request.new"), request).doing("writing the check request")?;
        fs::rename(self.dir.join("check-request.new"), self.dir.join("check-request"))
            .doing("writing the check request")?;
        self.wait_for("result", "the workload's verdict")?;
        Ok(self.read("result"))
    }

    /// Takes back a request and its answer, so that a restored copy can be asked again.
    pub fn reset(&self) {
        for name in ["check-request", "result"] {
            let _ = fs::remove_file(self.dir.join(name));
        }
    }

    /// What `/proc` shows now; empty when the tree is not one that holds still.
    pub fn look(&self) -> Result<Snapshot, Failure> {
        if self.steady {
            Snapshot::take(self.root).doing("looking at /proc")
        } else {
            Ok(Snapshot::default())
        }
    }

    /// The same, once two looks in a row agree: a thread may still be on its way to where it waits.
    pub fn look_when_still(&self) -> Result<Snapshot, Failure> {
        let began = Instant::now();
        let mut last = self.look()?;
        loop {
            std::thread::sleep(Duration::from_millis(20));
            let now = self.look()?;
            if last.differences(&now).is_empty() || began.elapsed() > Duration::from_secs(5) {
                return Ok(now);
            }
            last = now;
        }
    }

    /// Compares `/proc` with an earlier sight.
    pub fn compare(&self, before: &Snapshot, after: &'static str) -> Result<(), Failure> {
        let mut differences = before.differences(&self.look()?);
        // A freshly restored task may take a moment to fall asleep where it slept before.
        for _ in 0..20 {
            if differences.is_empty() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
            differences = before.differences(&self.look()?);
        }
        Err(Failure::Differs(after, differences))
    }

    /// After `dump --leave-stopped`: sees that every task is stopped, and continues them.
    fn continue_tree(&self) -> Result<(), Failure> {
        for pid in self.pids() {
            let began = Instant::now();
            loop {
                let stat =
                    fs::read_to_string(format!("/proc/{pid}/stat")).doing("looking at a stopped task")?;
                let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
                // One that is let go with a stop signal is on its way into the stop for an instant.
                match state {
                    Some('T' | 'Z') => break,
                    Some('R') if began.elapsed() < Duration::from_secs(1) => {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    _ => {
                        let what = format!("pid {pid} is {state:?}");
                        return Err(Failure::Changed("dump --leave-stopped", what));
                    }
                }
            }
        }
        for pid in self.pids() {
            kill(Pid::from_raw(pid), Signal::SIGCONT).doing("continuing a task")?;
        }
        Ok(())
    }

    /// The pids of the tree, parents first.
    pub fn pids(&self) -> Vec<i32> {
        let (mut pids, mut next) = (vec![self.root], 0);
        while let Some(&pid) = pids.get(next) {
            pids.extend(children(pid));
            next += 1;
        }
        pids
    }

    /// Kills the whole tree and waits until it is reaped.
    pub fn kill_tree(&self) -> Result<(), Failure> {
        let mut pids = Vec::new();
        let mut todo = vec![self.root];
        while let Some(pid) = todo.pop() {
            // Stopped first, so that nobody forks on while we go through the tree.
            let _ = kill(Pid::from_raw(pid), Signal::SIGSTOP);
            pids.push(pid);
            todo.extend(children(pid));
        }
        for &pid in pids.iter().rev() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        self.assert_gone(&pids)
    }

    /// Waits until no task of `pids` is left.
    pub fn assert_gone(&self, pids: &[i32]) -> Result<(), Failure> {
        let began = Instant::now();
        loop {
            let left: Vec<i32> =
                pids.iter().copied().filter(|pid| Path::new(&format!("/proc/{pid}")).exists()).collect();
            if left.is_empty() {
                return Ok(());
            }
            if began.elapsed() > Duration::from_secs(10) {
                return Err(Failure::NotGone(left));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Runs the tool with its output kept in the directory.
    pub fn tool(&self, command: &mut Command) -> Result<tool::Done, Failure> {
        let _ = fs::write(self.dir.join("commands"), self.read("commands") + &tool::line(command) + "\n");
        Ok(tool::run(command, &self.dir.join("tool.out"), self.patience)?)
    }

    /// Dumps into `DIR/NAME` and asserts that it worked.
    pub fn dump(&self, tool: &Tool, name: &str, more: &[&str]) -> Result<tool::Done, Failure> {
        let images = self.dir.join(name);
        fs::create_dir_all(&images).doing("making the image directory")?;
        Ok(self.tool(tool.dump(self.root, &images, more).args(self.flags))?.ok()?)
    }

    /// Restores from `DIR/NAME` and asserts that it worked.
    pub fn restore(&mut self, tool: &Tool, name: &str, more: &[&str]) -> Result<tool::Done, Failure> {
        let pidfile = self.dir.join("pidfile");
        let _ = fs::remove_file(&pidfile);
        let mut command = tool.restore(&self.dir.join(name), more);
        let done = self.tool(command.arg("--pidfile").arg(&pidfile))?.ok()?;
        let said = fs::read_to_string(&pidfile).doing("reading the pid file")?;
        let pid = said.trim().parse().unwrap_or(0);
        // In a pid namespace of its own the number outside may be another.
        if pid != self.root && self.keeps_pids {
            return Err(Failure::Changed(
                "the restore",
                format!("the root task is {said:?}, was {}", self.root),
            ));
        }
        self.root = pid;
        Ok(done)
    }

    /// Copies of the regular files that the workload keeps, to put them back before an older image is restored.
    pub fn save_files(&self) -> Result<Vec<(PathBuf, Vec<u8>)>, Failure> {
        let mut saved = Vec::new();
        for entry in fs::read_dir(self.dir.join("work")).doing("reading work/")?.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_file())
                && !entry.file_name().to_string_lossy().starts_with('.')
            {
                saved.push((entry.path(), fs::read(entry.path()).doing("reading a file of work/")?));
            }
        }
        Ok(saved)
    }
}

/// Puts saved files back, keeping their inodes.
pub fn put_back(files: &[(PathBuf, Vec<u8>)]) -> Result<(), Failure> {
    files.iter().try_for_each(|(path, content)| fs::write(path, content).doing("putting a file back"))
}

/// Runs one scenario; the directory stays when it fails.
pub fn run(
    test: &str,
    workload: &crate::workloads::Workload,
    flavour: Flavour,
    variant: Variant,
) -> Result<(), Failure> {
    let patience = Duration::from_secs(if workload.heavy { 180 } else { 30 });
    let mut stage = Stage::start(test, workload.name, flavour, patience)?;
    stage.steady = workload.steady;
    stage.flags = workload.flags;
    let outcome = play(&mut stage, variant);
    if outcome.is_ok() {
        stage.kill_tree()?;
        let _ = fs::remove_dir_all(&stage.dir);
    }
    outcome
}

/// What a variant does with a started tree.
pub fn play(stage: &mut Stage, variant: Variant) -> Result<(), Failure> {
    play_with(None, stage, variant)
}

/// The same with another tool than usual.
pub fn play_with(tool: Option<Tool>, stage: &mut Stage, variant: Variant) -> Result<(), Failure> {
    let before = stage.look_when_still()?;
    match variant {
        Variant::Straight => {
            stage.compare(&before, "nothing at all")?;
            return stage.check("nothing at all");
        }
        Variant::Sabotage => {
            let said = stage.verdict("sabotage")?;
            return if said.starts_with("FAIL") { Ok(()) } else { Err(Failure::Blind) };
        }
        _ => {}
    }
    let tool = match tool {
        Some(tool) => tool,
        None => Tool::discover().doing("finding the tool")?,
    };
    match variant {
        Variant::Running | Variant::NoCow | Variant::Stopped => {
            let flags: &[&str] = match variant {
                Variant::NoCow if !tool.peer => &["-R", "--no-cow"],
                Variant::Stopped => &["-s"],
                _ => &["-R"],
            };
            let mut files = stage.save_files()?;
            stage.dump(&tool, "img", flags)?;
            if variant == Variant::Stopped {
                files = stage.save_files()?;
                stage.continue_tree()?;
            }
            stage.compare(&before, "the dump")?;
            stage.check("the dump, in the original")?;
            stage.kill_tree()?;
            if stage.growing && variant != Variant::Stopped {
                return Ok(());
            }
            stage.reset();
            put_back(&files)?;
            stage.restore(&tool, "img", &[])?;
            stage.compare(&before, "the restore")?;
            stage.check("the restore")
        }
        _ => {
            let names: &[&str] =
                if variant == Variant::Rounds { &["img1", "img2", "img3"] } else { &["img"] };
            for name in names {
                let pids = stage.pids();
                stage.dump(&tool, name, &[])?;
                stage.assert_gone(&pids)?;
                stage.restore(&tool, name, &[])?;
                stage.compare(&before, "dump and restore")?;
            }
            stage.check("dump and restore")
        }
    }
}
