//! What the fault tests share: a stage whose tree must survive, and looks at what a failed command left behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use stasis_tests::external::plugin_dir;
use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{Doing, Failure, Stage};
use stasis_tests::snapshot::Snapshot;
use stasis_tests::tool::{Done, Tool, target_dir};

/// A tree, how it looked, and the tool.
pub struct Case {
    pub stage: Stage,
    pub before: Snapshot,
    pub tool: Tool,
    mounts: String,
    bystanders: BTreeSet<i32>,
}

impl Case {
    /// Starts a workload on the host.
    pub fn start(test: &str, workload: &str) -> Result<Case, Failure> {
        Case::of(Stage::start(test, workload, Flavour::Host, Duration::from_secs(40))?)
    }

    /// Takes over a stage.
    pub fn of(stage: Stage) -> Result<Case, Failure> {
        let tool = Tool::discover().doing("finding the tool")?;
        let before = stage.look_when_still()?;
        let tree: BTreeSet<i32> = before.pids.iter().copied().collect();
        let bystanders = all_pids().difference(&tree).copied().collect();
        Ok(Case { stage, before, tool, mounts: mounts(), bystanders })
    }

    /// An image directory of the scenario.
    pub fn images(&self, name: &str) -> Result<PathBuf, Failure> {
        let dir = self.stage.dir.join(name);
        fs::create_dir_all(&dir).doing("making the image directory")?;
        Ok(dir)
    }

    /// Runs `dump` with more arguments, whatever comes of it.
    pub fn dump(&self, name: &str, more: &[&str]) -> Result<Done, Failure> {
        let images = self.images(name)?;
        self.stage.tool(&mut self.tool.dump(self.stage.root, &images, more))
    }

    /// Runs `restore` with more arguments, whatever comes of it.
    pub fn restore(&self, name: &str, more: &[&str]) -> Result<Done, Failure> {
        self.stage.tool(&mut self.tool.restore(&self.stage.dir.join(name), more))
    }

    /// The tree is there as it was, nobody else is, and no mount is new.
    pub fn unharmed(&self) -> Result<(), Failure> {
        self.nobody_else(&self.before.pids)?;
        self.stage.compare(&self.before, "the failed command")
    }

    /// No task of the tree is there, nor anybody else new.
    pub fn nothing_left(&self) -> Result<(), Failure> {
        self.nobody_else(&[])
    }

    /// Waits until exactly the bystanders and `tree` are left: the guardian may need a moment.
    fn nobody_else(&self, tree: &[i32]) -> Result<(), Failure> {
        let began = Instant::now();
        loop {
            let strangers: Vec<i32> = all_pids()
                .into_iter()
                .filter(|pid| !self.bystanders.contains(pid) && !tree.contains(pid) && !is_launcher(*pid))
                .collect();
            let missing: Vec<i32> =
                tree.iter().copied().filter(|pid| !Path::new(&format!("/proc/{pid}")).exists()).collect();
            if !missing.is_empty() {
                return Err(Failure::Changed("the failed command", format!("pids {missing:?} are gone")));
            }
            if strangers.is_empty() {
                break;
            }
            if began.elapsed() > Duration::from_secs(10) {
                let names: Vec<String> = strangers.iter().map(|&pid| describe(pid)).collect();
                return Err(Failure::Changed(
                    "the failed command",
                    format!("left behind: {}", names.join(", ")),
                ));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        match mounts() == self.mounts {
            true => Ok(()),
            false => Err(Failure::Changed("the failed command", format!("mounts are now:\n{}", mounts()))),
        }
    }

    /// Asks the workload, and ends it.
    pub fn finish(self) -> Result<(), Failure> {
        self.stage.check("the faults")?;
        self.end()
    }

    /// Ends whatever is there and removes the directory.
    pub fn end(self) -> Result<(), Failure> {
        if Path::new(&format!("/proc/{}", self.stage.root)).exists() {
            self.stage.kill_tree()?;
        }
        fs::remove_dir_all(&self.stage.dir).doing("removing the directory")
    }
}

/// Fails unless the command ended with an error that names all of `words` and is neither a panic nor a death.
pub fn refused(done: &Done, words: &[&str]) -> Result<(), Failure> {
    let complain =
        |why: String| Err(Failure::Changed("a refusal", format!("{}: {why}\n{}", done.command, done.said)));
    match done.status.code() {
        Some(0) => return complain("it succeeded".into()),
        None => return complain(format!("it ended with {}", done.status)),
        Some(_) => {}
    }
    let said = done.said.to_lowercase();
    if said.contains("panicked at") {
        return complain("it panicked".into());
    }
    if said.trim().is_empty() {
        return complain("it says nothing".into());
    }
    match words.iter().find(|word| !said.contains(&word.to_lowercase())) {
        Some(word) => complain(format!("it does not say {word:?}")),
        None => Ok(()),
    }
}

/// Fails unless the command succeeded.
pub fn succeeded(done: Done) -> Result<Done, Failure> {
    Ok(done.ok()?)
}

/// Every pid of the sandbox.
pub fn all_pids() -> BTreeSet<i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// The launchers end a moment after their trees.
fn is_launcher(pid: i32) -> bool {
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&command).contains("stasis-workload\0launch")
}

fn describe(pid: i32) -> String {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    format!("pid {pid} ({}) {}", read("comm").trim(), read("cmdline").replace('\0', " "))
}

fn mounts() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()
}

/// The plugins of the build and the one that misbehaves, in one directory.
pub fn plugins_with_fault(dir: &Path) -> Result<PathBuf, Failure> {
    let fault = target_dir().doing("finding the plugins")?.join("libstasis_fault_plugin.so");
    if !fault.exists() {
        return Err(Failure::Skipped("libstasis_fault_plugin.so is not built".into()));
    }
    plugin_dir(dir, &[(&fault, "libstasis_plugin_fault.so")])
}

/// Adds an environment variable to a command.
pub fn with_fault(command: &mut Command, wish: &str) {
    command.env("STASIS_FAULT", wish);
}
