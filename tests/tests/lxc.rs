//! Containers of LXC, whose own `lxc-checkpoint` drives us: it runs the first `criu` on the path.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use stasis_tests::scenario::{Doing, Failure, Stage};
use stasis_tests::suite::{self, Test};
use stasis_tests::tool::{self, Tool};

const PATIENCE: Duration = Duration::from_secs(40);
const CGROUPS: &str = "/sys/fs/cgroup";

/// The program of the container: a counter, and a logger for which syslogd is started. Nothing that asks for an address.
const START: &str = "#!/bin/sh
/bin/syslogd
(n=0; while :; do n=$((n+1)); echo $n >/count.new; mv /count.new /count; usleep 20000; done) &
";

struct Container {
    dir: PathBuf,
    name: String,
    path: String,
    /// How many programs were run: what a monitor prints later must not be taken for the output of another.
    runs: Cell<usize>,
}

impl Container {
    /// Makes a container below a directory, and starts it.
    fn start(dir: &Path) -> Result<Container, Failure> {
        let bin = dir.join("bin");
        fs::create_dir_all(&bin).doing("making a directory")?;
        symlink(Tool::discover().doing("finding the tool")?.bin, bin.join("criu"))
            .doing("making the link criu")?;
        let mut hasher = std::hash::DefaultHasher::new();
        dir.hash(&mut hasher);
        // Cgroups are the machine's.
        let name = format!("stasis-{:08x}", hasher.finish() as u32);
        let path = std::env::var("PATH").unwrap_or_default();
        let this = Container {
            dir: dir.to_owned(),
            name,
            path: format!("{}:{path}", bin.display()),
            runs: Cell::new(0),
        };
        this.run("lxc-create", &["-t", "busybox"])?;
        let root = this.root();
        let config = root.with_file_name("config");
        let text = fs::read_to_string(&config).doing("reading the container's configuration")?;
        let unwanted = ["lxc.apparmor", "lxc.net.", "lxc.tty.max"];
        let kept = text.lines().filter(|line| !unwanted.iter().any(|name| line.starts_with(name)));
        let ours = ["lxc.tty.max = 0", "lxc.net.0.type = empty"];
        let lines: Vec<&str> = kept.chain(ours).collect();
        fs::write(&config, lines.join("\n") + "\n").doing("writing the container's configuration")?;
        fs::write(root.join("etc/init.d/rcS"), START).doing("writing the container's program")?;
        this.run("lxc-start", &[])?;
        Ok(this)
    }

    fn root(&self) -> PathBuf {
        self.dir.join(&self.name).join("rootfs")
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String, Failure> {
        let mut command = Command::new(program);
        command.env("PATH", &self.path).arg("-P").arg(&self.dir).args(["-n", &self.name]).args(arguments);
        self.runs.set(self.runs.get() + 1);
        let output = self.dir.join(format!("lxc.out.{}", self.runs.get()));
        Ok(tool::run(&mut command, &output, PATIENCE)?.ok()?.said)
    }

    /// A number that grows as long as the container runs.
    fn count(&self) -> u64 {
        let text = fs::read_to_string(self.root().join("count")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    /// Waits until the counter has gone on from a number; gives the new one.
    fn goes_on(&self, from: u64, after: &'static str) -> Result<u64, Failure> {
        let began = Instant::now();
        loop {
            match self.count() {
                now if now > from + 2 => return Ok(now),
                now if began.elapsed() > PATIENCE => {
                    return Err(Failure::Changed(after, format!("the counter stands at {now}, was {from}")));
                }
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    fn init(&self) -> Result<i32, Failure> {
        let said = self.run("lxc-info", &["-p", "-H"])?;
        said.trim().parse().map_err(|_| Failure::Changed("lxc-info", format!("it said {said:?}")))
    }

    /// Mounts of the container without numbers, programs, and where their descriptors are.
    fn look(&self) -> Result<Vec<String>, Failure> {
        let init = self.init()?;
        let proc = PathBuf::from(format!("/proc/{init}"));
        let mounts = fs::read_to_string(proc.join("mounts")).doing("reading mounts")?;
        let mut seen: Vec<String> = mounts.lines().map(str::to_owned).collect();
        seen.sort();
        let said = self.run("lxc-attach", &["--", "ps"])?;
        // Without ps itself, and the sleeping helpers of the counter.
        let programs =
            said.lines().filter(|line| !["ps", "usleep", "mv", "sh"].iter().any(|p| line.contains(p)));
        seen.extend(programs.map(|line| line.trim().to_owned()));
        seen.push(fs::read_to_string(proc.join("cgroup")).doing("reading cgroups")?);
        Ok(seen)
    }

    fn round(&self, images: &Path) -> Result<(), Failure> {
        fs::create_dir_all(images).doing("making the image directory")?;
        let images = images.to_string_lossy();
        let log = |error: Failure, file: &str| {
            let text = fs::read_to_string(format!("{images}/{file}")).unwrap_or_default();
            if text.contains("cgroup") && text.contains("claimed by no enabled plugin") {
                return Failure::Skipped("cgroup namespaces are not kept by these plugins".into());
            }
            let last: Vec<&str> = text.lines().rev().take(5).collect();
            Failure::Changed("lxc-checkpoint", format!("{error}\n{file} ends: {}", last.join("\n")))
        };
        let (before, shown) = (self.count(), self.look()?);
        self.run("lxc-checkpoint", &["-s", "-v", "-D", &images]).map_err(|error| log(error, "dump.log"))?;
        let stopped = self.count();
        self.run("lxc-checkpoint", &["-r", "-v", "-D", &images])
            .map_err(|error| log(error, "restore.log"))?;
        if stopped < before {
            return Err(Failure::Changed("the dump", format!("the counter went from {before} to {stopped}")));
        }
        let now = self.goes_on(stopped, "the restore")?;
        if now > stopped + 5000 {
            return Err(Failure::Changed("the restore", format!("the counter went from {stopped} to {now}")));
        }
        let after = self.look()?;
        let list = |one: &[String], other: &[String], what: &str| -> Vec<String> {
            one.iter().filter(|line| !other.contains(line)).map(|line| format!("{what} {line}")).collect()
        };
        let differences = [list(&shown, &after, "was"), list(&after, &shown, "is")].concat();
        match differences.is_empty() {
            true => Ok(()),
            false => Err(Failure::Differs("dump and restore", differences)),
        }
    }

    fn stop(&self) -> Result<(), Failure> {
        self.run("lxc-stop", &["-k"])?;
        self.run("lxc-destroy", &[]).map(drop)
    }
}

/// What a container could leave behind: mounts, cgroups, tasks.
fn host(name: &str) -> Result<BTreeSet<String>, Failure> {
    let mut all = BTreeSet::new();
    let mounts = fs::read_to_string("/proc/self/mountinfo").doing("reading mountinfo")?;
    all.extend(mounts.lines().map(|line| format!("mount {line}")));
    for controller in fs::read_dir(CGROUPS).doing("reading the cgroups")?.flatten() {
        let groups = fs::read_dir(controller.path()).into_iter().flatten().flatten();
        let groups = groups.map(|group| group.path()).filter(|path| path.to_string_lossy().contains(name));
        all.extend(groups.map(|path| format!("cgroup {}", path.display())));
    }
    let tasks = fs::read_dir("/proc").doing("reading /proc")?.flatten();
    let pids = tasks.filter(|entry| entry.file_name().to_string_lossy().parse::<i32>().is_ok());
    all.extend(pids.map(|entry| format!("task {}", entry.file_name().to_string_lossy())));
    Ok(all)
}

/// Ten times dump, restore, dump again.
fn busybox(test: &str) -> Result<(), Failure> {
    for program in ["lxc-create", "lxc-checkpoint", "busybox"] {
        if !std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .any(|d| d.join(program).exists())
        {
            return Err(Failure::Skipped(format!("{program} is not installed")));
        }
    }
    let dir = Stage::fresh_dir(test)?;
    let before = host("stasis-")?;
    let container = Container::start(&dir)?;
    let outcome = container.goes_on(0, "the start").and_then(|_| {
        (0..10).try_for_each(|round| container.round(&dir.join(format!("img{round}"))))?;
        // Its socket is listened to, and its file is open.
        container.run("lxc-attach", &["--", "logger", "after all that"])?;
        let log = fs::read_to_string(container.root().join("var/log/messages")).unwrap_or_default();
        match log.contains("after all that") {
            true => Ok(()),
            false => Err(Failure::Changed("ten restores", format!("syslogd wrote {log:?}"))),
        }
    });
    let stopped = container.stop();
    outcome?;
    stopped?;
    let began = Instant::now();
    loop {
        let left: Vec<String> = host("stasis-")?.difference(&before).cloned().collect();
        if left.is_empty() {
            return fs::remove_dir_all(&dir).doing("removing the directory");
        }
        if began.elapsed() > Duration::from_secs(10) {
            return Err(Failure::Differs("the end of the container", left));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn main() -> ExitCode {
    suite::main(vec![Test::new("lxc::busybox", busybox)])
}
