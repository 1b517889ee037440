//! The command line of CRIU.

use super::{expect, tool};
use stasis_tests::{
    launch::Flavour,
    scenario::{Doing, Failure, Stage, Variant, play_with},
    suite::Test,
    tool::{self, Done, Tool},
    workloads,
};
use std::{fs, path::Path, process::Command, time::Duration};

const PATIENCE: Duration = Duration::from_secs(30);

/// Workloads that are played by the other name, with what only CRIU's command line can say.
const WORKLOADS: &[&str] =
    &["pipe_data", "tree_groups", "mem_cow_children", "tcp_connected", "locks_all", "pty_shell"];

pub fn tests() -> Vec<Test> {
    let mut tests = vec![
        Test::new("name::version", version),
        Test::new("name::check", check),
        Test::new("name::mistakes", mistakes),
        Test::new("name::lxc_flags", lxc_flags),
        Test::new("name::directories", directories),
    ];
    for flavour in [Flavour::Host, Flavour::Ns] {
        for workload in WORKLOADS.iter().filter_map(|name| workloads::find(name)) {
            for variant in [Variant::Kill, Variant::Running] {
                let name = format!("name::{}::{}::{}", flavour.name(), workload.name, variant.name());
                tests.push(Test::new(name, move |test| {
                    let mut stage = Stage::start(test, workload.name, flavour, PATIENCE)?;
                    stage.steady = workload.steady;
                    stage.flags = workload.flags;
                    play_with(Some(tool(&stage)?), &mut stage, variant)?;
                    stage.kill_tree()
                }));
            }
        }
    }
    tests
}

fn empty(test: &str) -> Result<(Stage, Tool), Failure> {
    let dir = Stage::fresh_dir(test)?;
    let stage = Stage::idle(dir, PATIENCE);
    let tool = tool(&stage)?;
    Ok((stage, tool))
}

fn say(stage: &Stage, tool: &Tool, arguments: &[&str]) -> Result<Done, Failure> {
    let mut command = Command::new(&tool.bin);
    Ok(tool::run(command.args(arguments).current_dir(&stage.dir), &stage.dir.join("tool.out"), PATIENCE)?)
}

/// LXC wants at least 2.0 on the first line.
fn version(test: &str) -> Result<(), Failure> {
    let (stage, tool) = empty(test)?;
    let said = say(&stage, &tool, &["--version"])?.ok()?.said;
    let mut lines = said.lines();
    let number = lines.next().and_then(|line| line.strip_prefix("Version: "));
    let number =
        number.and_then(|number| number.split_once('.')).map(|(major, minor)| (major.parse(), minor.parse()));
    let holds = matches!(number, Some((Ok(major), Ok(0..))) if (2..100).contains::<i32>(&major));
    expect(holds && lines.next().is_some_and(|line| line.starts_with("GitID: ")), || said.clone())
}

fn check(test: &str) -> Result<(), Failure> {
    let (stage, tool) = empty(test)?;
    let done = say(&stage, &tool, &["check"])?.ok()?;
    expect(done.said.contains("Looks good."), || done.said.clone())?;
    // Dumps in steps are not there, and LXC asks before it tries.
    let done = say(&stage, &tool, &["check", "--feature", "mem_dirty_track"])?;
    expect(done.status.code() == Some(1), || done.said.clone())
}

fn mistakes(test: &str) -> Result<(), Failure> {
    let (stage, tool) = empty(test)?;
    let table: &[(&[&str], &str)] = &[
        (&["dump", "-t", "1", "--frobnicate"], "unknown flag --frobnicate"),
        (&["pre-dump", "-t", "1"], "pre-dump: every dump is a whole one"),
        (&["page-server"], "page-server: pages cannot be sent"),
        (
            &["dump", "-t", "1", "--page-server", "--address", "a", "--port", "1"],
            "--page-server: pages cannot be sent",
        ),
        (&["restore", "-D", "nowhere"], "nowhere: No such file"),
        (&["swrk", "77"], "swrk 77: Bad file descriptor"),
        (&["dump", "-D", "img", "-t", "2147483647"], "dump: "),
        (&[], "an action"),
    ];
    for (arguments, message) in table {
        let done = say(&stage, &tool, arguments)?;
        expect(done.status.code() == Some(1) && done.said.contains(message), || {
            format!("{arguments:?}: {} {}", done.status, done.said)
        })?;
        expect(done.said.trim().lines().count() == 1, || format!("more than one line: {}", done.said))?;
    }
    expect(!stage.dir.join("img/inventory.img").exists(), || "an inventory without a dump".into())
}

/// The two magic numbers of a file.
pub fn magics(path: &Path) -> Result<[u32; 2], Failure> {
    let bytes = fs::read(path).doing("reading a file beside the image")?;
    let word =
        |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
    expect(word(8) as usize + 12 == bytes.len(), || format!("{}: size {}", path.display(), word(8)))?;
    Ok([word(0), word(4)])
}

/// Everything LXC says, keys that mean nothing here among it.
fn lxc_flags(test: &str) -> Result<(), Failure> {
    let mut stage = Stage::start(test, "files_offsets", Flavour::Ns, PATIENCE)?;
    let tool = tool(&stage)?;
    let images = stage.dir.join("img");
    let log = stage.dir.join("img/dump.log");
    let common = [
        "--tcp-established",
        "--file-locks",
        "--link-remap",
        "--manage-cgroups=ignore",
        "--enable-external-sharing",
        "--enable-external-masters",
        "--enable-fs",
        "hugetlbfs",
        "--enable-fs",
        "tracefs",
        "-v4",
    ];
    let dump = [
        "--skip-in-flight",
        "--external",
        "tty[7b03:17]",
        "--ghost-limit",
        "256M",
        "--prev-images-dir",
        "../none",
        "--track-mem",
        "--force-irmap",
    ];
    let before = stage.look_when_still()?;
    let pids = stage.pids();
    let mut command = Command::new(&tool.bin);
    command.arg("dump").args(common).arg("-D").arg(&images).arg("-o").arg(&log).args(dump);
    stage.tool(command.args(["-t", &stage.root.to_string()]))?.ok()?;
    stage.assert_gone(&pids)?;
    let text = fs::read_to_string(&log).doing("reading the log")?;
    for flag in ["--track-mem has no effect", "--prev-images-dir has no effect"] {
        expect(text.contains(flag), || format!("no warning of {flag} in {text}"))?;
    }
    expect(magics(&images.join("inventory.img"))? == [0x5456_4319, 0x5831_3116], || "inventory.img".into())?;
    expect(magics(&images.join("stats-dump"))? == [0x5510_5940, 0x5709_3306], || "stats-dump".into())?;
    let restore = [
        "--restore-detached",
        "--restore-sibling",
        "--external",
        "veth[eth9]:none@nowhere",
        "--external",
        "mnt[/x]:/y",
    ];
    let mut command = Command::new(&tool.bin);
    command
        .arg("restore")
        .args(common)
        .args(restore)
        .arg("-D")
        .arg(&images)
        .arg("-o")
        .arg(images.join("restore.log"));
    let pidfile = stage.dir.join("root.pid");
    stage.tool(command.arg("--pidfile").arg(&pidfile))?.ok()?;
    stage.root = fs::read_to_string(&pidfile).doing("reading the pid file")?.trim().parse().unwrap_or(0);
    expect(magics(&images.join("stats-restore"))? == [0x5510_5940, 0x5709_3306], || "stats-restore".into())?;
    stage.compare(&before, "the restore")?;
    let status = fs::read_to_string(format!("/proc/{}/status", stage.root)).unwrap_or_default();
    let parent = format!("PPid:\t{}\n", std::process::id());
    expect(status.contains(&parent), || format!("the restored root is nobody's sibling: {status}"))?;
    stage.check("the restore")
}

/// Logs, pid file and statistics go to the work directory, the image and its inventory do not.
fn directories(test: &str) -> Result<(), Failure> {
    let mut stage = Stage::start(test, "eventfd", Flavour::Host, PATIENCE)?;
    let tool = tool(&stage)?;
    let dir = stage.dir.clone();
    for name in ["img", "logs"] {
        fs::create_dir_all(dir.join(name)).doing("making a directory")?;
    }
    let pids = stage.pids();
    let common = ["-D", "img", "-W", "logs", "-vvv"];
    let root = stage.root.to_string();
    say(&stage, &tool, &[&["dump", "-t", &root, "-o", "d.log"], &common[..]].concat())?.ok()?;
    stage.assert_gone(&pids)?;
    say(&stage, &tool, &[&["restore", "-d", "--pidfile", "p", "-o", "r.log"], &common[..]].concat())?.ok()?;
    for name in
        ["logs/d.log", "logs/r.log", "logs/stats-dump", "logs/stats-restore", "logs/p", "img/inventory.img"]
    {
        expect(dir.join(name).exists(), || format!("no {name}"))?;
    }
    for name in ["img/stats-dump", "img/p", "logs/inventory.img"] {
        expect(!dir.join(name).exists(), || format!("{name} should not be there"))?;
    }
    stage.root =
        fs::read_to_string(dir.join("logs/p")).doing("reading the pid file")?.trim().parse().unwrap_or(0);
    stage.check("the restore")
}
