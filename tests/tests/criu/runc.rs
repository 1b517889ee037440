//! runc of Debian, unchanged: a container with namespaces and cgroups of its own is checkpointed and restored by its own commands.

use super::{expect, tool};
use stasis_tests::{
    scenario::{Doing, Failure, Stage},
    suite::Test,
    tool::{self, Done},
};
use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(30);
/// How often a container goes through it.
const ROUNDS: u32 = 3;

pub fn tests() -> Vec<Test> {
    vec![
        Test::new("runc::checkpoint", |test| container(test, false, |_, _| {})),
        Test::new("runc::leave_running", |test| container(test, true, |_, _| {})),
        Test::new("runc::cgroup_namespace", |test| container(test, false, cgroup_namespace)),
        Test::new("runc::volume", |test| container(test, false, volume)),
    ]
}

/// Changes a configuration; the directory is the bundle's.
type Change = fn(config: &mut serde_json::Value, bundle: &Path);

fn push(list: &mut serde_json::Value, item: serde_json::Value) {
    if let Some(list) = list.as_array_mut() {
        list.push(item);
    }
}

fn cgroup_namespace(config: &mut serde_json::Value, _: &Path) {
    push(&mut config["linux"]["namespaces"], serde_json::json!({ "type": "cgroup" }));
}

/// A directory of the machine, on which the counter writes.
fn volume(config: &mut serde_json::Value, bundle: &Path) {
    let source = bundle.join("rootfs/tmp");
    let mount = serde_json::json!({
        "destination": "/data", "type": "bind", "source": source, "options": ["rbind", "rw"]
    });
    push(&mut config["mounts"], mount);
    let command = config["process"]["args"][2].as_str().unwrap_or_default().replace("/tmp/", "/data/");
    // Open all the time, as a log is.
    config["process"]["args"][2] = format!("exec 5>>/data/log; {command}").into();
}

/// A container that counts in a shell variable and writes the number down.
struct Container {
    stage: Stage,
    path: String,
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.runc(&["delete", "--force", "counter"]);
    }
}

impl Container {
    fn new(test: &str, change: Change) -> Result<Self, Failure> {
        for program in ["/usr/sbin/runc", "/bin/busybox"] {
            if !Path::new(program).exists() {
                return Err(Failure::Skipped(format!("there is no {program}")));
            }
        }
        let dir = Stage::fresh_dir(test)?;
        let bin = dir.join("rootfs/bin");
        fs::create_dir_all(&bin).doing("making the bundle")?;
        for name in ["proc", "sys", "dev", "tmp"] {
            fs::create_dir_all(dir.join("rootfs").join(name)).doing("making the bundle")?;
        }
        fs::copy("/bin/busybox", bin.join("busybox")).doing("copying busybox")?;
        for name in ["sh", "sleep"] {
            symlink("busybox", bin.join(name)).doing("linking busybox")?;
        }
        let stage = Stage { keeps_pids: false, ..Stage::idle(dir, PATIENCE) };
        tool(&stage)?;
        let path = format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", stage.dir.display());
        let container = Self { stage, path };
        container.runc(&["spec"])?.ok()?;
        container.configure(change)?;
        Ok(container)
    }

    /// runc's own default, but for what runs and for the change.
    fn configure(&self, change: Change) -> Result<(), Failure> {
        let file = self.stage.dir.join("config.json");
        let text = fs::read_to_string(&file).doing("reading config.json")?;
        let mut config: serde_json::Value =
            serde_json::from_str(&text).map_err(std::io::Error::other).doing("reading config.json")?;
        let count =
            "i=0; while :; do i=$((i+1)); echo $i >/tmp/new; mv /tmp/new /tmp/count; sleep 0.02; done";
        let count = count.replace("mv /tmp/new /tmp/count", "/bin/busybox mv /tmp/new /tmp/count");
        config["process"]["args"] = serde_json::json!(["/bin/sh", "-c", count]);
        config["process"]["terminal"] = false.into();
        config["root"]["readonly"] = false.into();
        config["linux"]["cgroupsPath"] = self.cgroup().into();
        change(&mut config, &self.stage.dir);
        fs::write(&file, config.to_string()).doing("writing config.json")
    }

    /// A name that no other test has.
    fn cgroup(&self) -> String {
        self.stage.dir.to_string_lossy().replace('/', "-").replace("-tmp-", "/")
    }

    fn runc(&self, arguments: &[&str]) -> Result<Done, Failure> {
        // What starts a container gives it its descriptors, which must not lead out of its mounts.
        let script = match arguments {
            ["run" | "restore", ..] => "exec \"$@\" >/dev/null 2>&1",
            _ => "exec \"$@\"",
        };
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script, "sh", "/usr/sbin/runc"]);
        command.arg("--root").arg(self.stage.dir.join("state"));
        command.arg("--log").arg(self.stage.dir.join("runc.log")).args(arguments);
        command.env("PATH", &self.path).current_dir(&self.stage.dir);
        Ok(tool::run(&mut command, &self.stage.dir.join("tool.out"), PATIENCE)?)
    }

    fn state(&self) -> Result<serde_json::Value, Failure> {
        let said = self.runc(&["state", "counter"])?.ok()?.said;
        serde_json::from_str(&said).map_err(std::io::Error::other).doing("reading what runc says")
    }

    fn count(&self) -> u64 {
        let text = fs::read_to_string(self.stage.dir.join("rootfs/tmp/count")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    /// Waits until it has counted further, and gives the number.
    fn counts_on(&self, from: u64) -> Result<u64, Failure> {
        let began = Instant::now();
        loop {
            let now = self.count();
            if now > from {
                return Ok(now);
            }
            expect(began.elapsed() < PATIENCE, || format!("it stays at {from}: {:?}", self.state()))?;
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn cgroups(&self) -> Result<String, Failure> {
        let pid = self.state()?["pid"].as_i64().unwrap_or(0);
        fs::read_to_string(format!("/proc/{pid}/cgroup")).doing("reading the cgroups of the container")
    }
}

fn container(test: &str, running: bool, change: Change) -> Result<(), Failure> {
    let container = Container::new(test, change)?;
    container.runc(&["run", "--detach", "counter"])?.ok()?;
    let mut count = container.counts_on(3)?;
    let cgroups = container.cgroups()?;
    let places: Vec<&str> = ["--work-path", "work", "--image-path", "img"].into();
    for round in 0..ROUNDS {
        let _ = fs::remove_dir_all(container.stage.dir.join("img"));
        let more: &[&str] = if running { &["--leave-running"] } else { &[] };
        container.runc(&[&["checkpoint"], &places[..], more, &["counter"]].concat())?.ok()?;
        if running {
            // The snapshot is older, by so much that it shows.
            container.counts_on(container.count() + 50)?;
            container.runc(&["delete", "--force", "counter"])?.ok()?;
            let last = container.count();
            container.runc(&[&["restore", "--detach"], &places[..], &["counter"]].concat())?.ok()?;
            let began = Instant::now();
            while container.count() >= last && began.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(1));
            }
            let now = container.count();
            expect(now > 3 && now < last, || {
                format!("round {round}: it went on at {now}, not before {last}")
            })?;
            count = container.counts_on(now)?;
        } else {
            let gone = container.runc(&["state", "counter"])?;
            expect(!gone.status.success(), || format!("round {round}: still there: {}", gone.said))?;
            let last = container.count();
            expect(last >= count, || format!("round {round}: it stopped at {last}"))?;
            container.runc(&[&["restore", "--detach"], &places[..], &["counter"]].concat())?.ok()?;
            count = container.counts_on(last)?;
            expect(count < last + 200, || format!("round {round}: from {last} to {count}"))?;
        }
        let status = container.state()?["status"].clone();
        expect(status == "running", || format!("round {round}: {status}"))?;
        let now = container.cgroups()?;
        expect(now == cgroups, || format!("round {round}: cgroups were {cgroups} are {now}"))?;
        // A process that joins all its namespaces.
        let said = container.runc(&["exec", "counter", "/bin/busybox", "cat", "/tmp/count"])?.ok()?.said;
        expect(said.trim().parse::<u64>().is_ok(), || said.clone())?;
    }
    container.runc(&["delete", "--force", "counter"])?.ok()?;
    Ok(())
}
