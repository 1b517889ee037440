//! Flags of dump and restore, each told by its effect.

use std::fs;
use std::process::{Command, ExitCode};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use stasis_tests::ctl::pause;
use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{Doing, Failure, Stage};
use stasis_tests::suite::{self, Test};
use stasis_tests::tool::{self, Tool, target_dir};

const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    suite::main(vec![
        Test::new("restore::sibling", sibling),
        Test::new("restore::attached", attached),
        Test::new("restore::pidfile", pidfile),
        Test::new("dump::shell_job", shell_job),
        Test::new("dump::json_error", json_error),
        Test::new("mounts::elsewhere", elsewhere),
        Test::new("mounts::masters", |test| host_groups(test, "slave", "--enable-external-masters")),
        Test::new("mounts::sharing", |test| host_groups(test, "unchanged", "--enable-external-sharing")),
        Test::new("plugins::without", without),
        Test::new("plugins::subset", subset),
    ])
}

fn wrong(why: String) -> Result<(), Failure> {
    Err(Failure::Changed("the option", why))
}

fn expect(holds: bool, why: &str) -> Result<(), Failure> {
    if holds { Ok(()) } else { wrong(why.into()) }
}

/// A field of `/proc/PID/status`.
fn status(pid: i32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

/// A root of its own with nothing but busybox, in which a mount shows a directory of the machine.
const ROOTED: &str = r#"set -e
mkdir -p root/bin root/proc root/data root/control root/old outside
cp "$1" root/bin/busybox
echo one >outside/file
mount --bind root root
mount -t proc proc root/proc
mount --bind . root/control
mount --bind outside root/data
cd root
pivot_root . old
exec /bin/busybox chroot . /bin/busybox sh -c '
    cd /
    busybox umount -l /old
    exec </control/work/.in >>/control/work/.out 2>&1
    echo >/control/ready
    n=0
    while :; do
        n=$((n+1))
        echo $n >/count
        read line </data/file
        echo "$line" >/seen
        busybox usleep 10000
    done'
"#;

/// `--root`, and `--external mnt[...]` on both sides: restored as on another machine, with the root and an external directory
/// at other places.
fn elsewhere(test: &str) -> Result<(), Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let busybox = std::env::split_paths(&path).map(|dir| dir.join("busybox")).find(|file| file.exists());
    let busybox = busybox.ok_or_else(|| Failure::Skipped("busybox is not installed".into()))?;
    let (dir, tool) = (Stage::fresh_dir(test)?, Tool::discover().doing("finding the tool")?);
    fs::write(dir.join("script"), ROOTED).doing("writing the script")?;
    let script = format!("cd {0} && exec sh {0}/script {1}", dir.display(), busybox.display());
    let argv = ["/bin/sh", "-c", &script];
    let mut stage = Stage::start_command(&dir, Flavour::Ns, &argv, PATIENCE)?;
    let pids = stage.pids();
    stage.dump(&tool, "img", &["--external", "mnt[/data]:shared"])?;
    stage.assert_gone(&pids)?;
    fs::rename(dir.join("root"), dir.join("moved")).doing("moving the root")?;
    fs::rename(dir.join("outside"), dir.join("other")).doing("moving the directory")?;
    fs::write(dir.join("other/file"), "two\n").doing("writing the file")?;
    let number =
        || fs::read_to_string(dir.join("moved/count")).unwrap_or_default().trim().parse().unwrap_or(0);
    let before: u64 = number();
    let root = format!("--root={}", dir.join("moved").display());
    let source = format!("mnt[shared]:{}", dir.join("other").display());
    for (given, missing) in [(vec![root.as_str()], "mnt[shared]"), (vec!["--external", &source], "root")] {
        let done = stage.tool(&mut tool.restore(&dir.join("img"), &given))?;
        expect(!done.status.success() && done.said.contains(missing), &format!("{missing}: {}", done.said))?;
    }
    stage.restore(&tool, "img", &[&root, "--external", &source])?;
    let seen = || fs::read_to_string(dir.join("moved/seen")).unwrap_or_default();
    let began = std::time::Instant::now();
    while number() < before + 3 || seen().trim() != "two" {
        if began.elapsed() > PATIENCE {
            return wrong(format!("it counts {}, was {before}, and sees {:?}", number(), seen()));
        }
        pause(Duration::from_millis(5));
    }
    stage.kill_tree()?;
    fs::remove_dir_all(&dir).doing("removing the directory")
}

/// A tree with mounts of its own that hears of new mounts of the machine, as before.
fn host_groups(test: &str, propagation: &str, flag: &str) -> Result<(), Failure> {
    let none: Option<&str> = None;
    let (dir, tool) = (Stage::fresh_dir(test)?, Tool::discover().doing("finding the tool")?);
    let (common, late, seen) = (dir.join("common"), dir.join("common/late"), dir.join("work/seen"));
    fs::create_dir(&common).doing("making a directory")?;
    mount(Some("common"), &common, Some("tmpfs"), MsFlags::empty(), none).doing("mounting a tmpfs")?;
    mount(none, &common, none, MsFlags::MS_SHARED, none).doing("sharing it")?;
    fs::create_dir(&late).doing("making a directory")?;
    let script = format!(
        "echo >{0}/ready; while :; do [ -e {0}/common/late/mark ] && echo yes >{0}/work/seen; sleep 0.02; done",
        dir.display()
    );
    let unshare = format!("exec unshare -m --propagation {propagation} sh -c '{script}'");
    let argv = ["/bin/sh", "-c", &unshare];
    let mut stage = Stage::start_command(&dir, Flavour::Host, &argv, PATIENCE)?;
    let pids = stage.pids();
    fs::create_dir_all(dir.join("img")).doing("making the image directory")?;
    let refused = stage.tool(&mut tool.dump(stage.root, &dir.join("img"), &[]))?;
    expect(refused.said.contains(flag), &format!("without {flag}: {}", refused.said))?;
    stage.dump(&tool, "img", &[flag])?;
    stage.assert_gone(&pids)?;
    stage.restore(&tool, "img", &[])?;
    expect(!seen.exists(), "it has seen the mount before it was there")?;
    mount(Some("late"), &late, Some("tmpfs"), MsFlags::empty(), none).doing("mounting another tmpfs")?;
    fs::write(late.join("mark"), "").doing("writing a file")?;
    let began = std::time::Instant::now();
    while !seen.exists() {
        if began.elapsed() > PATIENCE {
            return wrong("it does not hear of a new mount".into());
        }
        pause(Duration::from_millis(5));
    }
    stage.kill_tree()?;
    for place in [&late, &common] {
        umount2(place, MntFlags::MNT_DETACH).doing("unmounting")?;
    }
    fs::remove_dir_all(&dir).doing("removing the directory")
}

/// A workload that was dumped and is gone.
fn dumped(test: &str, workload: &str, more: &[&str]) -> Result<(Stage, Tool), Failure> {
    let tool = Tool::discover().doing("finding the tool")?;
    let stage = Stage::start(test, workload, Flavour::Host, PATIENCE)?;
    let pids = stage.pids();
    stage.dump(&tool, "img", more)?;
    stage.assert_gone(&pids)?;
    Ok((stage, tool))
}

/// `--restore-sibling`: the root task is a child of whoever called stasis, who can wait for it.
fn sibling(test: &str) -> Result<(), Failure> {
    let (stage, tool) = dumped(test, "tree_blocked", &[])?;
    stage.tool(&mut tool.restore(&stage.dir.join("img"), &["--restore-sibling"]))?.ok()?;
    let parent = status(stage.root, "PPid");
    expect(parent == std::process::id().to_string(), &format!("the parent is {parent}"))?;
    stage.check("the restore")?;
    let ended = waitpid(Pid::from_raw(stage.root), None).doing("waiting for the sibling")?;
    expect(matches!(ended, WaitStatus::Exited(_, 0)), &format!("the sibling ended with {ended:?}"))
}

/// Without `--restore-detached` the command stays until the root task ends, and ends likewise.
fn attached(test: &str) -> Result<(), Failure> {
    let (stage, tool) = dumped(test, "eventfd", &[])?;
    let mut command = Command::new(&tool.bin);
    command.arg("restore").arg("-D").arg(stage.dir.join("img"));
    let mut child = tool::start(&mut command, &stage.dir.join("tool.out"))?;
    let began = std::time::Instant::now();
    while status(stage.root, "Name").is_empty() {
        expect(began.elapsed() < PATIENCE, "the root task does not come back")?;
        pause(Duration::from_millis(5));
    }
    expect(child.try_wait().doing("looking at the command")?.is_none(), "the command has ended already")?;
    stage.check("the restore")?;
    let ended = child.wait().doing("waiting for the command")?;
    expect(ended.success(), &format!("the command ended with {ended}"))
}

/// `--pidfile` holds the number of the root task as the caller sees it.
fn pidfile(test: &str) -> Result<(), Failure> {
    let (stage, tool) = dumped(test, "eventfd", &[])?;
    let file = stage.dir.join("root.pid");
    let mut command = tool.restore(&stage.dir.join("img"), &[]);
    stage.tool(command.arg("--pidfile").arg(&file))?.ok()?;
    let said = fs::read_to_string(&file).doing("reading the pid file")?;
    expect(said.trim() == stage.root.to_string(), &format!("it says {said:?}"))?;
    stage.check("the restore")?;
    stage.assert_gone(&[stage.root])
}

/// A task of a session that stays outside: refused without `--shell-job`, and back in the caller's session with it.
fn shell_job(test: &str) -> Result<(), Failure> {
    let tool = Tool::discover().doing("finding the tool")?;
    let dir = Stage::fresh_dir(test)?;
    // SAFETY: one thread; the child only sleeps, and ends.
    let job = match unsafe { fork() }.doing("forking")? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            // SAFETY: no descriptor of the harness is used any more.
            unsafe { libc::close_range(0, u32::MAX, 0) };
            let _ = nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0));
            loop {
                pause(Duration::from_secs(1000));
            }
        }
    };
    let began = std::time::Instant::now();
    while fs::read_dir(format!("/proc/{job}/fd")).map_or(1, Iterator::count) > 0 {
        expect(began.elapsed() < PATIENCE, "the job does not get ready")?;
        pause(Duration::from_millis(1));
    }
    let images = dir.join("img");
    fs::create_dir_all(&images).doing("making the image directory")?;
    let run = |command: &mut Command| tool::run(command, &dir.join("tool.out"), PATIENCE);
    let refused = run(&mut tool.dump(job.as_raw(), &images, &[]))?;
    expect(
        !refused.status.success() && refused.said.contains("--shell-job"),
        &format!("without the flag: {}", refused.said),
    )?;
    run(&mut tool.dump(job.as_raw(), &images, &["--shell-job"]))?.ok()?;
    waitpid(job, None).doing("reaping the job")?;
    run(&mut tool.restore(&images, &["--shell-job"]))?.ok()?;
    let sid = nix::unistd::getsid(Some(job)).doing("asking for the session")?;
    expect(Ok(sid) == nix::unistd::getsid(None), &format!("its session is {sid}"))?;
    kill(job, Signal::SIGKILL).doing("ending the job")
}

/// `--json` tells an error as data, too.
fn json_error(test: &str) -> Result<(), Failure> {
    let tool = Tool::discover().doing("finding the tool")?;
    let stage = Stage::start(test, "unclaimed", Flavour::Host, PATIENCE)?;
    fs::create_dir_all(stage.dir.join("img")).doing("making the image directory")?;
    let mut command = Command::new(&tool.bin);
    command.args(["dump", "--json", "-t", &stage.root.to_string(), "-D"]).arg(stage.dir.join("img"));
    let done = stage.tool(&mut command)?;
    let line = done.said.lines().find(|line| line.starts_with('{'));
    let Some(value) =
        line.and_then(|line| serde_json::from_str::<serde_json::Value>(line).ok()).or_else(|| {
            // Printed over several lines.
            serde_json::from_str(done.said.get(done.said.find('{')?..)?).ok()
        })
    else {
        return wrong(format!("no JSON in: {}", done.said));
    };
    let text = value.to_string();
    expect(
        text.contains("77") && text.contains(&stage.root.to_string()),
        &format!("the descriptor and the task are not named: {text}"),
    )?;
    stage.kill_tree()
}

/// `--without`: what the plugin would have taken is refused by name, and the plugin is named.
fn without(test: &str) -> Result<(), Failure> {
    let tool = Tool::discover().doing("finding the tool")?;
    let stage = Stage::start(test, "pipe_data", Flavour::Host, PATIENCE)?;
    fs::create_dir_all(stage.dir.join("img")).doing("making the image directory")?;
    let command = &mut tool.dump(stage.root, &stage.dir.join("img"), &["--without", "pipe"]);
    let done = stage.tool(command)?;
    expect(
        !done.status.success() && done.said.contains("plugin pipe would take it"),
        &format!("it said: {}", done.said),
    )?;
    stage.check("the refusal")
}

/// An image that was made with some of the plugins is restored where only they are.
fn subset(test: &str) -> Result<(), Failure> {
    let (stage, tool) = dumped(test, "pipe_data", &["--plugins", "pipe"])?;
    let plugins = stage.dir.join("plugins");
    fs::create_dir_all(&plugins).doing("making the plugin directory")?;
    let name = "libstasis_plugin_pipe.so";
    let library = target_dir().doing("finding the plugins")?.join(name);
    fs::copy(library, plugins.join(name)).doing("copying the plugin")?;
    let dir = plugins.to_string_lossy().into_owned();
    stage.tool(&mut tool.restore(&stage.dir.join("img"), &["--plugin-dir", &dir]))?.ok()?;
    stage.check("the restore")
}
