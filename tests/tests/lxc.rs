//! Containers of LXC, whose own `lxc-checkpoint` drives us: it runs the first `criu` on the path.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use stasis_tests::ctl::Outcome;
use stasis_tests::scenario::{Doing, Failure, Stage};
use stasis_tests::suite::{self, Test};
use stasis_tests::terminal::Terminal;
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
        let (bin, link) = (dir.join("bin"), dir.join("tool"));
        for directory in [&bin, &link] {
            fs::create_dir_all(directory).doing("making a directory")?;
        }
        let tool = Tool::discover().doing("finding the tool")?.bin;
        symlink(tool, link.join("criu")).doing("making the link criu")?;
        let name = name(dir);
        let path = std::env::var("PATH").unwrap_or_default();
        let this = Container {
            dir: dir.to_owned(),
            name,
            path: format!("{}:{path}", bin.display()),
            runs: Cell::new(0),
        };
        this.kill_tool_after(None)?;
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

    /// Whether it goes on after a dump whose tool was killed; else it must have ended.
    fn survives(&self) -> Result<bool, Failure> {
        let (from, began) = (self.count(), Instant::now());
        while self.count() <= from + 2 {
            if self.run("lxc-info", &["-s", "-H"]).is_ok_and(|said| said.contains("STOPPED")) {
                return Ok(false);
            }
            if began.elapsed() > PATIENCE {
                return Err(Failure::Changed("a dump whose tool was killed", format!("it stands at {from}")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(true)
    }

    /// The shell on the console answers, and knows what it was told before.
    fn console(&self, told: usize) -> Result<(), Failure> {
        let talk = || -> Outcome {
            let mut terminal = Terminal::open()?;
            let mut command = Command::new("lxc-console");
            command.arg("-P").arg(&self.dir).args(["-n", &self.name, "-t", "0"]);
            let end = terminal.open_slave()?;
            let (input, output) = (end.try_clone()?, end.try_clone()?);
            let mut child = command.stdin(input).stdout(output).stderr(end).spawn()?;
            let answer = terminal.until("Connected to tty").and_then(|_| {
                terminal.send(b"\n")?;
                terminal.until("/ # ")?;
                terminal.send(b"X=$X+; echo told$X\n")?;
                terminal.until(&format!("told{}\r", "+".repeat(told)))
            });
            child.kill()?;
            child.wait()?;
            answer.map(drop)
        };
        talk().map_err(|fail| Failure::Changed("the console", fail.to_string()))
    }

    /// Has the tool killed after this time; none: not at all.
    fn kill_tool_after(&self, time: Option<Duration>) -> Result<(), Failure> {
        let program = self.dir.join("bin/criu");
        let tool = self.dir.join("tool/criu");
        let text = match time {
            // The tool stays the child of LXC, which looks for the restored init among its own.
            Some(time) => format!(
                "(sleep {}; kill -KILL $$) </dev/null >/dev/null 2>&1 &\nexec {} \"$@\"",
                time.as_secs_f32(),
                tool.display()
            ),
            None => format!("exec {} \"$@\"", tool.display()),
        };
        // The first line lets `criu --version` pass.
        let text = format!("#!/bin/sh\n[ \"$1\" = --version ] && exec {} \"$@\"\n{text}\n", tool.display());
        fs::write(&program, text).doing("writing the program criu")?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).doing("making it executable")
    }

    fn stop(&self) -> Result<(), Failure> {
        self.run("lxc-stop", &["-k"])?;
        self.run("lxc-destroy", &[]).map(drop)
    }
}

/// The name of the container of a directory: cgroups are the machine's.
fn name(dir: &Path) -> String {
    let mut hasher = std::hash::DefaultHasher::new();
    dir.hash(&mut hasher);
    format!("stasis-{:08x}", hasher.finish() as u32)
}

/// The cgroups of a container: of some controllers they are not at the top.
fn groups(name: &str) -> impl Iterator<Item = PathBuf> {
    let (mut found, mut todo) = (Vec::new(), vec![(PathBuf::from(CGROUPS), 0)]);
    while let Some((directory, depth)) = todo.pop() {
        let below = fs::read_dir(&directory).into_iter().flatten().flatten();
        for entry in below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            if entry.file_name().to_string_lossy().contains(name) {
                found.push(entry.path());
            } else if depth < 4 {
                todo.push((entry.path(), depth + 1));
            }
        }
    }
    found.into_iter()
}

/// What a container could leave behind: mounts, cgroups, tasks.
fn host(name: &str) -> Result<BTreeSet<String>, Failure> {
    let mut all = BTreeSet::new();
    let mounts = fs::read_to_string("/proc/self/mountinfo").doing("reading mountinfo")?;
    all.extend(mounts.lines().map(|line| format!("mount {line}")));
    all.extend(groups(name).map(|path| format!("cgroup {}", path.display())));
    let tasks = fs::read_dir("/proc").doing("reading /proc")?.flatten();
    let pids = tasks.filter(|entry| entry.file_name().to_string_lossy().parse::<i32>().is_ok());
    all.extend(pids.map(|entry| format!("task {}", entry.file_name().to_string_lossy())));
    Ok(all)
}

/// Plays something with a container, which leaves nothing behind.
fn with_container(
    test: &str,
    body: impl FnOnce(&Container, &Path) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    for program in ["lxc-create", "lxc-checkpoint", "busybox"] {
        if !std::env::split_paths(&path).any(|directory| directory.join(program).exists()) {
            return Err(Failure::Skipped(format!("{program} is not installed")));
        }
    }
    let dir = Stage::fresh_dir(test)?;
    let before = host(&name(&dir))?;
    let container = Container::start(&dir)?;
    let outcome = container.goes_on(0, "the start").and_then(|_| body(&container, &dir));
    let stopped = container.stop();
    outcome?;
    stopped?;
    gone(&before, || host(&name(&dir)))?;
    fs::remove_dir_all(&dir).doing("removing the directory")
}

/// LXC makes groups before it runs the tool, and when that was killed removes them once, while tasks may still be on their way
/// out. They must be free a moment later.
fn remove_groups(name: &str) {
    for group in groups(name).filter(|path| path.to_string_lossy().contains("lxc.payload.")) {
        let _ = fs::remove_dir(group);
    }
}

/// Waits until there is no more outside than there was.
fn gone(
    before: &BTreeSet<String>,
    now: impl Fn() -> Result<BTreeSet<String>, Failure>,
) -> Result<(), Failure> {
    let began = Instant::now();
    loop {
        let left: Vec<String> = now()?.difference(before).cloned().collect();
        if left.is_empty() {
            return Ok(());
        }
        if began.elapsed() > Duration::from_secs(10) {
            return Err(Failure::Differs("its end", left));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Ten times dump, restore, dump again.
fn busybox(test: &str) -> Result<(), Failure> {
    with_container(test, |container, dir| {
        container.console(1)?;
        for round in 0..10 {
            container.round(&dir.join(format!("img{round}")))?;
            if round % 3 == 0 {
                container.console(2 + round / 3)?;
            }
        }
        // Its socket is listened to, and its file is open.
        container.run("lxc-attach", &["--", "logger", "after all that"])?;
        let began = Instant::now();
        loop {
            let log = fs::read_to_string(container.root().join("var/log/messages")).unwrap_or_default();
            if log.contains("after all that") {
                return Ok(());
            }
            if began.elapsed() > Duration::from_secs(10) {
                return Err(Failure::Changed("ten restores", format!("syslogd wrote {log:?}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    })
}

/// Dumps and restores whose tool is killed on its way: the container goes on, or is gone without a trace.
fn killed(test: &str) -> Result<(), Failure> {
    const TIMES: [u64; 5] = [4, 10, 16, 25, 40];
    with_container(test, |container, dir| {
        let outside = || host(&container.name);
        for (number, time) in TIMES.map(Duration::from_millis).into_iter().enumerate() {
            let images = dir.join(format!("img{number}"));
            fs::create_dir_all(&images).doing("making the image directory")?;
            let images = images.to_string_lossy().into_owned();
            container.kill_tool_after(Some(time))?;
            let dumped = container.run("lxc-checkpoint", &["-s", "-D", &images]).is_ok();
            container.kill_tool_after(None)?;
            // The kill may have come when the image was complete and the container gone; otherwise it goes on.
            if !dumped && container.survives()? {
                fs::remove_dir_all(&images).doing("removing images")?;
                fs::create_dir_all(&images).doing("making the image directory")?;
                container.run("lxc-checkpoint", &["-s", "-D", &images])?;
            }
            let (before, count) = (outside()?, container.count());
            container.kill_tool_after(Some(time * 3))?;
            let restored = container.run("lxc-checkpoint", &["-r", "-D", &images]).is_ok();
            container.kill_tool_after(None)?;
            if !restored {
                gone(&before, || {
                    remove_groups(&container.name);
                    outside()
                })?;
                container.run("lxc-checkpoint", &["-r", "-D", &images])?;
            }
            container.goes_on(count, "the restore")?;
        }
        Ok(())
    })
}

fn main() -> ExitCode {
    suite::main(vec![Test::new("lxc::busybox", busybox), Test::new("lxc::killed", killed)])
}
