//! Selective dumps: what a dry run tells, and what becomes of what nobody takes.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};
use serde_json::Value;
use stasis_tests::ctl::{pause, poll_until};
use stasis_tests::external::plugin_dir;
use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{Doing, Failure, Stage};
use stasis_tests::suite::Test;
use stasis_tests::tool::{Done, Tool, line, target_dir};

/// All tests of this file.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new("selective::dry_run", dry_run),
        Test::new("selective::dry_run_of_every_kind", every_kind),
        Test::new("selective::left_out", left_out),
        Test::new("selective::needed_by_another", needed_by_another),
        Test::new("selective::external", external),
    ]
}

fn wrong<T>(why: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Changed("the command", why.into()))
}

fn expect(holds: bool, why: impl Into<String>) -> Result<(), Failure> {
    if holds { Ok(()) } else { wrong(why) }
}

fn start(test: &str, workload: &str) -> Result<(Stage, Tool), Failure> {
    let tool = Tool::discover().doing("finding the tool")?;
    Ok((Stage::start(test, workload, Flavour::Host, Duration::from_secs(40))?, tool))
}

/// Runs a dry run; nothing may be written.
fn look(stage: &Stage, tool: &Tool, more: &[&str]) -> Result<Done, Failure> {
    let images = stage.dir.join("unwritten");
    let mut command = Command::new(&tool.bin);
    command.args(["dump", "--dry-run", "-t", &stage.root.to_string(), "-D"]).arg(&images).args(more);
    let done = stage.tool(&mut command)?;
    expect(!images.exists(), "a dry run made the image directory")?;
    Ok(done)
}

fn json(done: &Done) -> Result<Value, Failure> {
    serde_json::from_str(&done.said).or_else(|error| wrong(format!("{error}: {}", done.said)))
}

/// A descriptor of the first task.
fn descriptor(survey: &Value, number: i32) -> Result<&Value, Failure> {
    let place = format!("descriptor {number}");
    let found =
        survey["tasks"][0]["resources"].as_array().into_iter().flatten().find(|r| r["place"] == *place);
    found.map_or_else(|| wrong(format!("no {place} in {survey}")), Ok)
}

fn link(stage: &Stage, number: i32) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{}/fd/{number}", stage.root)).ok()
}

fn dry_run(test: &str) -> Result<(), Failure> {
    let (stage, tool) = start(test, "unclaimed")?;
    let before = stage.look_when_still()?;
    // Whoever would stop the task would fail: it has a tracer.
    // SAFETY: one thread.
    let tracer = match unsafe { fork() }.doing("forking the tracer")? {
        ForkResult::Child => {
            let _ = ptrace::seize(Pid::from_raw(stage.root), ptrace::Options::empty());
            loop {
                pause(Duration::from_secs(10));
            }
        }
        ForkResult::Parent { child } => child,
    };
    let traced = || {
        let status = fs::read_to_string(format!("/proc/{}/status", stage.root)).unwrap_or_default();
        status.contains(&format!("TracerPid:\t{tracer}\n"))
    };
    poll_until("the tracer traces", traced).or_else(|fail| wrong(fail.to_string()))?;
    let done = look(&stage, &tool, &["--json"])?;
    expect(done.status.code() == Some(3), format!("it ended with {}", done.status))?;
    let survey = json(&done)?;
    for number in [77, 78] {
        let one = descriptor(&survey, number)?;
        let remedy = one["remedy"].as_str().unwrap_or_default();
        expect(one["taken_by"].is_null() && one["what"] == "anon_inode:[fscontext]", one.to_string())?;
        expect(
            one["refusal"].as_str().is_some_and(|why| why.contains("no enabled plugin")),
            one.to_string(),
        )?;
        expect(remedy.contains("--on-unclaimed fscontext=close"), one.to_string())?;
        expect(remedy.contains("--external 'anon_inode:[fscontext]'"), one.to_string())?;
    }
    expect(descriptor(&survey, 1)?["taken_by"] == "core", survey.to_string())?;
    expect(survey["refusals"] == 2 && survey["tasks"][0]["mappings"].as_u64() > Some(5), survey.to_string())?;
    let text = look(&stage, &tool, &[])?.said;
    expect(text.contains("2 resources would be refused"), text)?;
    let left = look(&stage, &tool, &["--on-unclaimed", "all=null"])?;
    expect(left.status.success() && left.said.contains("nobody: /dev/null"), left.said)?;

    let fault = target_dir().doing("finding the plugins")?.join("libstasis_fault_plugin.so");
    let plugins = plugin_dir(&stage.dir, &[(&fault, "libstasis_plugin_fault.so")])?;
    let plugins = plugins.to_string_lossy().into_owned();
    let done = look(&stage, &tool, &["--json", "--plugin-dir", &plugins])?;
    let survey = json(&done)?;
    expect(done.status.success(), format!("it ended with {}", done.status))?;
    expect(descriptor(&survey, 77)?["taken_by"] == "fault/fault", survey.to_string())?;
    let done = look(&stage, &tool, &["--json", "--plugin-dir", &plugins, "--without", "fault"])?;
    let remedy = &json(&done)?["tasks"][0]["resources"];
    expect(remedy.to_string().contains("plugin fault would take it: enable it"), remedy.to_string())?;

    kill(tracer, Signal::SIGKILL).doing("ending the tracer")?;
    waitpid(tracer, None).doing("reaping the tracer")?;
    stage.compare(&before, "the dry runs")?;
    stage.check("the dry runs")?;
    stage.kill_tree()?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}

/// A dry run of trees with descriptors of many kinds changes nothing, and tells what the dump does.
fn every_kind(test: &str) -> Result<(), Failure> {
    let workloads = [
        "mixture",
        "unix_flight",
        "unix_datagrams",
        "udp_sockets",
        "tcp_connected",
        "memfd_mapped",
        "pty_settings",
        "epoll_nested",
        "pidfd",
        "inotify",
        "mqueue",
        "pipe_packets",
    ];
    for workload in workloads {
        let (mut stage, tool) = start(test, workload)?;
        let before = stage.look_when_still()?;
        stage.flags = stasis_tests::workloads::find(workload).map_or(&[], |workload| workload.flags);
        let done = look(&stage, &tool, stage.flags)?;
        // Ends that are in flight seem to be outside.
        let in_flight = workload == "unix_flight" && done.said.contains("does not look into its queue");
        expect(done.status.success() || in_flight, format!("{workload}: {}", done.said))?;
        stage.compare(&before, "the dry run")?;
        stage.dump(&tool, "img", &[])?;
        stage.restore(&tool, "img", &[])?;
        stage.check("the dry run, a dump and a restore")?;
        stage.kill_tree()?;
    }
    Ok(())
}

fn left_out(test: &str) -> Result<(), Failure> {
    let (mut stage, tool) = start(test, "unclaimed")?;
    let wishes = ["-R", "--on-unclaimed", "all=null", "--on-unclaimed", "fscontext=close"];
    let said = stage.dump(&tool, "closed", &wishes)?.said;
    expect(said.contains("left out: task") && said.contains("descriptor 77"), said)?;
    let null = stage.dump(&tool, "null", &["--on-unclaimed", "fscontext=null"])?.said;
    expect(null.contains("descriptor 78"), null)?;
    stage.restore(&tool, "closed", &[])?;
    expect(link(&stage, 77).is_none() && link(&stage, 1).is_some(), "77 is open, or 1 is not")?;
    stage.kill_tree()?;
    stage.restore(&tool, "null", &[])?;
    for number in [77, 78] {
        let link = link(&stage, number);
        expect(link == Some("/dev/null".into()), format!("{number} is {link:?}"))?;
    }
    // What an object names cannot be left out.
    stage.kill_tree()?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}

/// What an object of a plugin names cannot be left out.
fn needed_by_another(test: &str) -> Result<(), Failure> {
    let (stage, tool) = start(test, "epoll_basic")?;
    let before = stage.look_when_still()?;
    for policy in ["pipe=close", "all=null"] {
        let images = stage.dir.join("img");
        fs::create_dir_all(&images).doing("making the image directory")?;
        let flags = ["--without", "pipe", "--on-unclaimed", policy];
        let done = stage.tool(&mut tool.dump(stage.root, &images, &flags))?;
        let words = ["needs pipe:[", "which is to be left out"];
        let named = words.iter().all(|words| done.said.contains(words));
        expect(!done.status.success() && named, format!("{policy}: {}", done.said))?;
        stage.compare(&before, "the refusal")?;
        fs::remove_dir_all(&images).doing("removing the half image")?;
    }
    stage.check("the refusals")?;
    stage.kill_tree()?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}

fn external(test: &str) -> Result<(), Failure> {
    let (mut stage, tool) = start(test, "unclaimed")?;
    let info = fs::read_to_string(format!("/proc/{}/fdinfo/1", stage.root)).doing("reading fdinfo")?;
    let field = |name: &str| {
        let value = info.lines().find_map(|line| line.strip_prefix(name));
        value.and_then(|value| value.trim().parse::<u64>().ok()).unwrap_or_default()
    };
    let file = format!("file[{:x}:{:x}]", field("mnt_id:"), field("ino:"));
    let key = "anon_inode:[fscontext]";
    stage.dump(&tool, "img", &["--external", key, "--external", &file])?;
    let images = stage.dir.join("img");
    let refused = stage.tool(&mut tool.restore(&images, &[]))?;
    expect(
        !refused.status.success() && refused.said.contains("--inherit-fd 'fd[N]:"),
        format!("without a descriptor: {}", refused.said),
    )?;
    let elsewhere = stage.dir.join("elsewhere");
    let script = format!(
        "exec {} --inherit-fd 'fd[8]:{key}' --inherit-fd 'fd[9]:{file}' --pidfile {} 8</dev/full 9>{}",
        line(&tool.restore(&images, &[])),
        stage.dir.join("pidfile").display(),
        elsewhere.display()
    );
    stage.tool(Command::new("/bin/sh").args(["-c", &script]))?.ok()?;
    let said = fs::read_to_string(stage.dir.join("pidfile")).doing("reading the pid file")?;
    stage.root = said.trim().parse().unwrap_or_default();
    for (number, wanted) in [(77, PathBuf::from("/dev/full")), (78, "/dev/full".into()), (1, elsewhere)] {
        let link = link(&stage, number);
        expect(link.as_ref() == Some(&wanted), format!("{number} is {link:?}, not {wanted:?}"))?;
    }
    stage.kill_tree()?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}
