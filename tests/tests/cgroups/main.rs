//! Cgroups: every thread comes back to where it was, groups are made again with their properties, nothing is left of what fails,
//! and a group that freezes the tree is thawed whatever happens.

mod freezer;
mod groups;
mod namespaces;

use groups::{Groups, Places, places};
use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};
use stasis_tests::{
    launch::Flavour,
    scenario::{Doing, Failure, Stage},
    suite::{self, Test},
    tool::{self, Tool},
};
use std::{
    fs,
    process::ExitCode,
    time::{Duration, Instant},
};

const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let mut tests = vec![
        Test::new("cgroups::made_again::host", |test| made_again(test, Flavour::Host)),
        Test::new("cgroups::made_again::ns", |test| made_again(test, Flavour::Ns)),
        Test::new("cgroups::made_again::user", |test| made_again(test, Flavour::User)),
        Test::new("cgroups::threads", threads),
        Test::new("cgroups::modes", modes),
        Test::new("cgroups::other_root", other_root),
        Test::new("cgroups::not_asked", not_asked),
        Test::new("cgroups::failed_restore", failed_restore),
        Test::new("cgroups::killed_restore", killed_restore),
        Test::new("cgroups::mistakes", mistakes),
    ];
    tests.extend(namespaces::tests());
    tests.extend(freezer::tests());
    suite::main(tests)
}

/// Fails unless something holds.
fn expect(holds: bool, why: impl FnOnce() -> String) -> Result<(), Failure> {
    if holds { Ok(()) } else { Err(Failure::Changed("cgroups", why())) }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, now: &T, before: &T) -> Result<(), Failure> {
    expect(now == before, || format!("{what}: {now:?}, was {before:?}"))
}

/// Settings that groups get, and that this machine may lack: controller, group below the top, file, value.
const SETTINGS: &[(&str, &str, &str, &str)] = &[
    ("pids", "", "pids.max", "150"),
    ("pids", "/a", "pids.max", "90"),
    ("pids", "/empty", "pids.max", "7"),
    ("cpu", "/a", "cpu.shares", "512"),
    ("cpu", "", "cpu.cfs_quota_us", "250000"),
    ("memory", "", "memory.limit_in_bytes", "1073741824"),
    ("memory", "/a", "memory.swappiness", "11"),
    ("cpuset", "/a", "cpuset.memory_spread_page", "1"),
    ("devices", "/a", "devices.deny", "b *:* rwm"),
    ("freezer", "/a", "notify_on_release", "1"),
    ("", "/a", "cgroup.max.depth", "5"),
];

/// What is looked at besides.
const LISTS: &[(&str, &str, &str)] = &[("devices", "/a", "devices.list"), ("cpuset", "/a", "cpuset.cpus")];

fn settings(groups: &Groups) -> Vec<Option<String>> {
    let files = SETTINGS.iter().filter(|setting| !setting.2.ends_with("deny"));
    let files =
        files.map(|&(controllers, below, file, _)| (controllers, below, file)).chain(LISTS.iter().copied());
    files.map(|(controllers, below, file)| groups.get(controllers, below, file)).collect()
}

fn furnish(groups: &Groups) -> Result<(), Failure> {
    for below in ["", "/a", "/empty"] {
        groups.make(below)?;
    }
    SETTINGS
        .iter()
        .try_for_each(|&(controllers, below, file, value)| groups.set(controllers, below, file, value))
}

/// A tree of processes, the root in the top group, its first child below it.
fn tree(test: &str, workload: &str, flavour: Flavour) -> Result<(Stage, Tool, Groups), Failure> {
    let tool = Tool::discover().doing("finding the tool")?;
    let groups = Groups::of(test)?;
    furnish(&groups)?;
    let stage = Stage::start(test, workload, flavour, PATIENCE)?;
    for (index, pid) in stage.pids().into_iter().enumerate() {
        groups.put(pid, if index == 1 { "/a" } else { "" })?;
    }
    Ok((stage, tool, groups))
}

fn dump(stage: &Stage, tool: &Tool, more: &[&str]) -> Result<(), Failure> {
    let pids = stage.pids();
    stage.dump(tool, "img", more)?;
    stage.assert_gone(&pids)
}

/// The texts alone: numbers in a pid namespace of its own are others outside.
fn texts(places: &Places) -> Vec<&String> {
    places.values().collect()
}

/// All groups are gone when the restore comes.
fn made_again(test: &str, flavour: Flavour) -> Result<(), Failure> {
    let (mut stage, tool, groups) = tree(test, "tree_groups", flavour)?;
    let (before, are) = (places(&stage.pids())?, settings(&groups));
    expect(are.iter().flatten().count() >= 3, || format!("the settings are {are:?}"))?;
    dump(&stage, &tool, &["--manage-cgroups"])?;
    same("settings after the dump", &settings(&groups), &are)?;
    groups.remove(&groups.top)?;
    stage.restore(&tool, "img", &[])?;
    let now = places(&stage.pids())?;
    match flavour {
        Flavour::Host => same("memberships", &now, &before)?,
        _ => same("memberships", &texts(&now), &texts(&before))?,
    }
    same("settings", &settings(&groups), &are)?;
    stage.check("the restore")?;
    stage.kill_tree()
}

/// Threads of one process in different groups: in version 1 anywhere, in version 2 below a threaded one.
fn threads(test: &str) -> Result<(), Failure> {
    let (mut stage, tool, groups) = tree(test, "threads", Flavour::Host)?;
    let tids: Vec<i32> =
        places(&[stage.root])?.keys().map(|(_, tid)| *tid).filter(|tid| *tid != stage.root).collect();
    for (controllers, file) in [("cpu", "tasks"), ("freezer", "tasks")] {
        groups.set(controllers, "/a", file, &tids[0].to_string())?;
    }
    if let Some(threaded) = groups.directory("", "/threaded") {
        fs::create_dir(&threaded).doing("making a cgroup")?;
        fs::write(threaded.join("cgroup.type"), "threaded").doing("making it threaded")?;
        fs::write(threaded.join("cgroup.threads"), tids[1].to_string()).doing("moving a thread")?;
    }
    let before = places(&[stage.root])?;
    let different: std::collections::BTreeSet<_> = before.values().collect();
    expect(different.len() == 3, || format!("not three kinds of threads: {different:?}"))?;
    dump(&stage, &tool, &["--manage-cgroups=soft"])?;
    groups.remove(&groups.top)?;
    stage.restore(&tool, "img", &[])?;
    same("memberships", &places(&[stage.root])?, &before)?;
    stage.check("the restore")
}

/// What becomes of groups that are there, or are not.
fn modes(test: &str) -> Result<(), Failure> {
    let (mut stage, tool, groups) = tree(test, "tree_blocked", Flavour::Host)?;
    let before = places(&stage.pids())?;
    let changed = || {
        groups.set("pids", "", "pids.max", "77")?;
        groups.set("freezer", "/a", "notify_on_release", "0")
    };
    let state = || (groups.get("pids", "", "pids.max"), groups.get("freezer", "/a", "notify_on_release"));
    let text = |a: &str, b: &str| {
        let have = |controllers, value: &str| groups.directory(controllers, "").map(|_| value.to_owned());
        (have("pids", a), have("freezer", b))
    };
    dump(&stage, &tool, &["--manage-cgroups=soft"])?;
    for (mode, expected) in [
        ("soft", text("77", "0")),
        ("none", text("77", "0")),
        ("props", text("150", "1")),
        ("full", text("150", "1")),
    ] {
        changed()?;
        stage.reset();
        stage.restore(&tool, "img", &[&format!("--manage-cgroups={mode}")])?;
        same(mode, &state(), &expected)?;
        same(mode, &places(&stage.pids())?, &before)?;
        stage.kill_tree()?;
    }
    let refused = |mode: &str, words: &str| {
        let images = stage.dir.join("img");
        let done = stage.tool(&mut tool.restore(&images, &[&format!("--manage-cgroups={mode}")]))?;
        expect(!done.status.success() && done.said.contains(words), || format!("{mode}: {}", done.said))
    };
    refused("strict", "is there already")?;
    groups.remove(&groups.top)?;
    refused("none", "is not there")?;
    refused("props", "is not there")?;
    expect(groups.existing(&groups.top).is_empty(), || "groups of a refused restore".into())?;
    stage.restore(&tool, "img", &["--manage-cgroups=strict"])?;
    same("strict", &state(), &text("150", "1"))?;
    same("strict", &places(&stage.pids())?, &before)?;
    stage.check("the restore")
}

/// `--cgroup-root` for one hierarchy, and for all others; names that nobody has do not matter.
fn other_root(test: &str) -> Result<(), Failure> {
    let (mut stage, tool, groups) = tree(test, "tree_groups", Flavour::Host)?;
    let before = places(&stage.pids())?;
    dump(&stage, &tool, &["--manage-cgroups=full"])?;
    groups.remove(&groups.top)?;
    let (one, others) = (format!("{}-one", groups.top), format!("{}-others/deeper", groups.top));
    let more = [
        format!("--cgroup-root=pids:{one}"),
        format!("--cgroup-root={others}"),
        "--cgroup-root=none:/x".into(),
    ];
    stage.restore(&tool, "img", &more.each_ref().map(String::as_str))?;
    let moved = |text: &String| {
        let line = |line: &str| match line.contains(":pids:") {
            true => line.replacen(&groups.top, &one, 1) + "\n",
            false => line.replacen(&groups.top, &others, 1) + "\n",
        };
        text.lines().map(line).collect::<String>()
    };
    let expected: Places = before.iter().map(|(thread, text)| (*thread, moved(text))).collect();
    let outcome = same("memberships", &places(&stage.pids())?, &expected)
        .and_then(|()| expect(groups.existing(&groups.top).is_empty(), || "the old groups".into()))
        .and_then(|()| stage.check("the restore"));
    stage.kill_tree()?;
    groups.remove(&one)?;
    groups.remove(&format!("{}-others", groups.top))?;
    outcome
}

/// Without the flag nobody touches a group; asked at the restore alone, there is nothing to restore.
fn not_asked(test: &str) -> Result<(), Failure> {
    let (mut stage, tool, groups) = tree(test, "tree_blocked", Flavour::Host)?;
    dump(&stage, &tool, &[])?;
    groups.remove(&groups.top)?;
    let ours = fs::read_to_string("/proc/self/cgroup").doing("reading our cgroups")?;
    for more in [&[][..], &["--manage-cgroups=full"], &["--manage-cgroups=ignore"]] {
        stage.reset();
        stage.restore(&tool, "img", more)?;
        let now = places(&stage.pids())?;
        expect(now.values().all(|text| *text == ours), || format!("{more:?}: {now:?}"))?;
        expect(groups.existing(&groups.top).is_empty(), || format!("{more:?}: groups were made"))?;
        stage.check("the restore")?;
        stage.kill_tree()?;
    }
    Ok(())
}

/// Fails at several points, and leaves no group that it made and no process.
fn failed_restore(test: &str) -> Result<(), Failure> {
    let (mut stage, tool, groups) = tree(test, "tree_groups", Flavour::Host)?;
    let (before, pids) = (places(&stage.pids())?, stage.pids());
    dump(&stage, &tool, &["--manage-cgroups"])?;
    groups.remove(&groups.top)?;
    for point in ["setup-namespaces", "post-setup-namespaces", "post-restore", "pre-resume"] {
        let script = format!("--action-script=test $CRTOOLS_SCRIPT_ACTION != {point}");
        let done = stage.tool(&mut tool.restore(&stage.dir.join("img"), &[&script]))?;
        expect(!done.status.success(), || format!("{point}: it succeeded"))?;
        stage.assert_gone(&pids)?;
        let left = groups.existing(&groups.top);
        expect(left.is_empty(), || format!("{point}: left are {left:?}"))?;
    }
    stage.restore(&tool, "img", &[])?;
    same("memberships", &places(&stage.pids())?, &before)?;
    stage.check("the restore")
}

/// How many points a restore or dump is killed at.
const POINTS: u32 = 40;

/// Starts the tool, kills it after `delay`, every other time with its whole process group, and waits for its end.
fn killed(
    stage: &Stage,
    command: &mut std::process::Command,
    delay: Duration,
    group: bool,
) -> Result<(), Failure> {
    let mut child = tool::start(command, &stage.dir.join("tool.out"))?;
    std::thread::sleep(delay);
    let pid = Pid::from_raw(child.id() as i32);
    let _ = if group { killpg(pid, Signal::SIGKILL) } else { kill(pid, Signal::SIGKILL) };
    child.wait().doing("waiting for the tool").map(drop)
}

/// Waits until `left` is empty, which is the guardian's work.
fn cleared<T: std::fmt::Debug>(left: impl Fn() -> Vec<T>) -> Result<(), Failure> {
    let began = Instant::now();
    while !left().is_empty() {
        expect(began.elapsed() < Duration::from_secs(10), || format!("left are {:?}", left()))?;
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// The command dies at points spread over a restore; the guardian takes the groups away.
fn killed_restore(test: &str) -> Result<(), Failure> {
    let (mut stage, tool, groups) = tree(test, "tree_groups", Flavour::Host)?;
    let pids = stage.pids();
    dump(&stage, &tool, &["--manage-cgroups"])?;
    groups.remove(&groups.top)?;
    stage.restore(&tool, "img", &[])?;
    stage.kill_tree()?;
    groups.remove(&groups.top)?;
    let began = Instant::now();
    stage.restore(&tool, "img", &[])?;
    let whole = began.elapsed();
    stage.kill_tree()?;
    groups.remove(&groups.top)?;
    for point in 0..POINTS {
        let mut command = tool.restore(&stage.dir.join("img"), &[]);
        killed(&stage, &mut command, whole * point / POINTS, point % 2 == 1)?;
        let alive = || -> Vec<i32> {
            pids.iter().copied().filter(|pid| fs::metadata(format!("/proc/{pid}")).is_ok()).collect()
        };
        // Late points may find the tree running, which is then as good as any.
        std::thread::sleep(Duration::from_millis(20));
        if !groups.existing(&groups.top).is_empty() && alive().len() == pids.len() && !traced(pids[0]) {
            stage.kill_tree()?;
            groups.remove(&groups.top)?;
            continue;
        }
        cleared(|| groups.existing(&groups.top))?;
        cleared(alive)?;
    }
    Ok(())
}

/// Whether somebody traces a process.
fn traced(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    !status.contains("TracerPid:\t0\n")
}

fn mistakes(test: &str) -> Result<(), Failure> {
    let (stage, tool, _groups) = tree(test, "tree_blocked", Flavour::Host)?;
    let before = stage.look_when_still()?;
    let mut command = tool.dump(stage.root, &stage.dir.join("img"), &["--manage-cgroups=some"]);
    let done = stage.tool(&mut command)?;
    expect(!done.status.success() && done.said.contains("none of the modes"), || done.said.clone())?;
    stage.compare(&before, "a refused dump")?;
    stage.check("a refused dump")
}
