//! Programs on terminals through dump and restore: `PROGRAM::VARIANT`; and terminals whose other end is outside.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use stasis_tests::ctl::Fail;
use stasis_tests::emulator::{self, Console};
use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{Doing, Failure, Stage, Variant, play, workload_binary};
use stasis_tests::suite::{self, Test};
use stasis_tests::terminal::Terminal;
use stasis_tests::tool::Tool;

/// A program, how it is started, brought into a state, and asked for it.
struct Program {
    name: &'static str,
    binary: &'static str,
    argv: fn(dir: &str) -> Vec<String>,
    prepare: fn(&Stage) -> Result<(), Failure>,
    verify: fn(&Stage) -> Result<(), Failure>,
}

const PATIENCE: Duration = Duration::from_secs(30);

const PROGRAMS: [Program; 5] = [
    Program {
        name: "bash",
        binary: "bash",
        argv: |dir| on_terminal(dir, &["bash", "--norc", "-i"]),
        prepare: prepare_shell,
        verify: verify_shell,
    },
    Program {
        name: "vim",
        // Its larger builds have POSIX timers, which are another matter.
        binary: "vim.tiny",
        argv: |dir| on_terminal(dir, &["vim.tiny", "-u", "NONE", "-i", "NONE", &format!("{dir}/work/text")]),
        prepare: |stage| {
            let mut console = Console::new(&stage.dir);
            console.send("iwritten before")?;
            console.until("before").map(drop)
        },
        verify: |stage| {
            let out = stage.dir.join("written");
            let _ = fs::remove_file(&out);
            let mut console = Console::new(&stage.dir);
            console.send(&format!(" and after\x1b:w! {}\r", out.display()))?;
            await_text(&out, "written before and after\n")
        },
    },
    Program {
        name: "script",
        binary: "script",
        argv: |dir| {
            on_terminal(
                dir,
                &["script", "-q", "-f", "-c", "bash --norc -i", &format!("{dir}/work/typescript")],
            )
        },
        prepare: prepare_shell,
        verify: |stage| {
            verify_shell(stage)?;
            await_text(&stage.dir.join("work/typescript"), "jobs=1")
        },
    },
    Program {
        name: "tmux",
        binary: "tmux",
        argv: |dir| {
            ["/bin/sh", "-c", &format!("echo >{dir}/ready; exec tmux -D -S {dir}/work/socket -f /dev/null")]
                .map(String::from)
                .to_vec()
        },
        prepare: |stage| {
            let socket = stage.dir.join("work/socket");
            await_that("the socket of tmux", || socket.exists())?;
            tmux(stage, &["new-session", "-d", "-s", "s", "-x", "80", "-y", "24", SHELL])?;
            tmux(stage, &["new-window", "-t", "s", SHELL])?;
            for window in ["s:0", "s:1"] {
                tmux(stage, &["send-keys", "-t", window, &format!("W={window}; {SETUP}"), "Enter"])?;
                await_that("a shell in tmux", || tmux_says(stage, window, "begun"))?;
            }
            Ok(())
        },
        verify: |stage| {
            for window in ["s:0", "s:1"] {
                // What was on the screen is still there.
                if !tmux_says(stage, window, "begun") {
                    return Err(Failure::Changed("the restore", format!("window {window} is empty")));
                }
                tmux(stage, &["send-keys", "-t", window, &format!("echo W=$W; {QUESTION}"), "Enter"])?;
                await_that("a shell in tmux", || {
                    tmux_says(stage, window, &format!("W={window}")) && tmux_says(stage, window, ANSWER)
                })?;
                tmux(stage, &["send-keys", "-t", window, "clear; echo be\"\"gun", "Enter"])?;
                await_that("a shell in tmux", || !tmux_says(stage, window, ANSWER))?;
            }
            Ok(())
        },
    },
    Program {
        name: "screen",
        binary: "screen",
        argv: |dir| {
            let command = format!(
                "export SCREENDIR={dir}/sockets; mkdir -m 700 -p $SCREENDIR; echo >{dir}/ready; \
                 exec screen -D -m -c /dev/null -S s {SHELL}"
            );
            ["/bin/sh", "-c", &command].map(String::from).to_vec()
        },
        prepare: |stage| {
            let sockets = stage.dir.join("sockets");
            await_that("the socket of screen", || {
                fs::read_dir(&sockets).is_ok_and(|mut entries| entries.next().is_some())
            })?;
            // Before there is a window, what is typed is lost.
            await_that("a window of screen", || screen_says(stage, ""))?;
            screen(stage, &["stuff", &format!("{SETUP}\n")])?;
            await_that("a shell in screen", || screen_says(stage, "begun"))
        },
        verify: |stage| {
            // What was on the screen is still there.
            await_that("the contents of a screen", || screen_says(stage, "begun"))?;
            // Its own variables are what screen would put in for dollars.
            screen(stage, &["stuff", "declare -p X; jobs -r\n"])?;
            await_that("a shell in screen", || {
                screen_says(stage, "X=\"kept\"") && screen_says(stage, "Running")
            })
        },
    },
];

const SHELL: &str = "bash --norc -i";
const SETUP: &str = "PS1=; X=kept; sleep 1000 & echo be\"\"gun";
const QUESTION: &str = "echo X=$X jobs=$(jobs -r | wc -l)";
const ANSWER: &str = "X=kept jobs=1";

const VARIANTS: [Variant; 4] = [Variant::Straight, Variant::Kill, Variant::Running, Variant::Rounds];

fn on_terminal(dir: &str, command: &[&str]) -> Vec<String> {
    // The binary is copied before the first stage is started.
    let binary = workload_binary().map(|path| path.display().to_string()).unwrap_or_default();
    let start = [binary.as_str(), emulator::NAME, dir];
    start.iter().chain(command).map(ToString::to_string).collect()
}

fn prepare_shell(stage: &Stage) -> Result<(), Failure> {
    let mut console = Console::new(&stage.dir);
    console.send(&format!("stty -echo; {SETUP}\n"))?;
    console.until("begun")?;
    // What the shell has started for this is gone, too.
    std::thread::sleep(Duration::from_millis(100));
    Ok(())
}

fn verify_shell(stage: &Stage) -> Result<(), Failure> {
    let mut console = Console::new(&stage.dir);
    console.send(&format!("{QUESTION} size=$(stty size)\n"))?;
    console.until(&format!("{ANSWER} size=24 80"))?;
    // ^C reaches a job in the foreground, and the shell takes its terminal back.
    console.send("sleep 500; echo st\"\"atus=$?\n")?;
    std::thread::sleep(Duration::from_millis(200));
    console.send("\x03")?;
    console.send("echo ba\"\"ck\n")?;
    console.until("back").map(drop)
}

fn await_that(what: &'static str, mut done: impl FnMut() -> bool) -> Result<(), Failure> {
    let began = Instant::now();
    while !done() {
        if began.elapsed() > Duration::from_secs(15) {
            return Err(Failure::Late(began.elapsed(), what, String::new()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn await_text(path: &Path, text: &str) -> Result<(), Failure> {
    await_that("a text in a file", || fs::read_to_string(path).is_ok_and(|all| all.contains(text)))
}

fn said(command: &mut Command) -> Result<String, Failure> {
    let output = command.stdin(Stdio::null()).output().doing("starting a client")?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            Err(Failure::Changed("a client's call", format!("{command:?}: {said}")))
        }
    }
}

fn tmux(stage: &Stage, args: &[&str]) -> Result<String, Failure> {
    said(Command::new("tmux").arg("-S").arg(stage.dir.join("work/socket")).args(args))
}

fn tmux_says(stage: &Stage, window: &str, text: &str) -> bool {
    tmux(stage, &["capture-pane", "-p", "-t", window]).is_ok_and(|screen| screen.contains(text))
}

fn screen(stage: &Stage, args: &[&str]) -> Result<String, Failure> {
    let mut command = Command::new("screen");
    said(command.env("SCREENDIR", stage.dir.join("sockets")).args(["-S", "s", "-p", "0", "-X"]).args(args))
}

fn screen_says(stage: &Stage, text: &str) -> bool {
    let copy = stage.dir.join("hardcopy");
    let _ = fs::remove_file(&copy);
    let asked = screen(stage, &["hardcopy", &copy.to_string_lossy()]).is_ok();
    // The client does not wait until it is written.
    let began = Instant::now();
    while asked && !copy.exists() && began.elapsed() < Duration::from_millis(500) {
        std::thread::sleep(Duration::from_millis(10));
    }
    asked && fs::read_to_string(&copy).is_ok_and(|screen| screen.contains(text))
}

fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}

fn main() -> ExitCode {
    let mut tests = Vec::new();
    for program in &PROGRAMS {
        for variant in VARIANTS {
            let name = format!("{}::{}", program.name, variant.name());
            tests.push(Test::new(name, move |test| run(program, variant, test)));
        }
    }
    tests.push(Test::new("outside::shell_job", shell_job));
    tests.push(Test::new("outside::inherited", inherited));
    tests.push(Test::new("outside::refused", refused));
    tests.push(Test::new("data::refused", data_refused));
    suite::main(tests)
}

fn run(program: &Program, variant: Variant, test: &str) -> Result<(), Failure> {
    if find(program.binary).is_none() {
        return Err(Failure::Skipped(format!("{} is not installed", program.binary)));
    }
    let dir = Stage::fresh_dir(test)?;
    let argv = (program.argv)(&dir.to_string_lossy());
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let mut stage = Stage::start_command(&dir, Flavour::Host, &argv, PATIENCE)?;
    (program.prepare)(&stage)?;
    stage.verify = Some(program.verify);
    play(&mut stage, variant)?;
    stage.kill_tree()?;
    fs::remove_dir_all(&dir).doing("removing the directory")
}

/// A command that leads a session on a terminal whose master is ours.
fn lead(terminal: &Terminal, mut command: Command) -> Result<Child, Failure> {
    let slave = terminal.open_plain().doing("opening a slave")?;
    let copy = |file: &fs::File| file.try_clone().doing("duplicating a slave");
    command.stdin(copy(&slave)?).stdout(copy(&slave)?).stderr(slave).env("TERM", "xterm").env("PS1", "");
    // SAFETY: three system calls.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::setsid()?;
            // Whatever the tests' own caller had open leads out of the tree.
            libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32);
            match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        })
    };
    command.spawn().doing("starting a command on a terminal")
}

fn shell() -> Command {
    let mut command = Command::new("bash");
    command.args(["--norc", "-i"]);
    command
}

fn on(fail: Fail) -> Failure {
    Failure::Changed("the restore", fail.to_string())
}

/// A stage for a tree that the test has started itself.
fn stage_of(test: &str, root: i32) -> Result<Stage, Failure> {
    let dir = Stage::fresh_dir(test)?;
    Ok(Stage { root, ..Stage::idle(dir, PATIENCE) })
}

/// A shell's job moves to another terminal.
fn shell_job(test: &str) -> Result<(), Failure> {
    let mut old = Terminal::open().doing("opening a terminal")?;
    let mut shell = lead(&old, shell())?;
    let job =
        "bash --norc -c 'n=0; echo p\"\"id=$$.; while read line; do n=$((n+1)); echo got $n $line.; done'\n";
    old.send(job.as_bytes()).doing("typing")?;
    let mut said = old.until("pid=").map_err(on)?;
    let pid = loop {
        match said.rsplit("pid=").next().and_then(|rest| rest.split_once('.')) {
            Some((number, _)) => break number.parse().unwrap_or(0),
            None => said += &old.until(".").map_err(on)?,
        }
    };
    old.send(b"one\n").doing("typing")?;
    old.until("got 1 one.").map_err(on)?;

    let stage = stage_of(test, pid)?;
    let tool = Tool::discover().doing("finding the tool")?;
    stage.dump(&tool, "img", &["--shell-job"])?;
    stage.assert_gone(&[pid])?;
    let mut new = Terminal::open().doing("opening a terminal")?;
    let mut command = Command::new(&tool.bin);
    command.args(["restore", "--shell-job", "-D"]).arg(stage.dir.join("img"));
    let mut restored = lead(&new, command)?;
    new.send(b"two\n").doing("typing")?;
    new.until("got 2 two.").map_err(on)?;
    new.send(b"\x04\x03").doing("typing")?;
    restored.kill().doing("killing")?;
    restored.wait().doing("waiting")?;
    shell.kill().doing("killing")?;
    shell.wait().doing("waiting")?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}

/// What `--external` calls a terminal.
fn key(terminal: &Terminal) -> Result<String, Failure> {
    let slave = fs::metadata(&terminal.slave).doing("stat of a slave")?;
    Ok(format!("tty[{:x}:{:x}]", slave.rdev(), slave.dev()))
}

/// A shell with a job on a terminal of ours.
fn with_shell(test: &str) -> Result<(Terminal, Child, Stage), Failure> {
    let mut terminal = Terminal::open().doing("opening a terminal")?;
    let shell = lead(&terminal, shell())?;
    terminal.send(format!("stty -echo; {SETUP}\n").as_bytes()).doing("typing")?;
    terminal.until("begun").map_err(on)?;
    let stage = stage_of(test, shell.id() as i32)?;
    Ok((terminal, shell, stage))
}

/// A session with its leader goes on with a terminal that restore is given.
fn inherited(test: &str) -> Result<(), Failure> {
    let (old, mut shell, mut stage) = with_shell(test)?;
    let tool = Tool::discover().doing("finding the tool")?;
    let key = key(&old)?;
    stage.dump(&tool, "img", &["--external", &key])?;
    shell.wait().doing("waiting for the killed shell")?;
    let mut new = Terminal::open().doing("opening a terminal")?;

    let without = stage.tool(&mut tool.restore(&stage.dir.join("img"), &[]))?;
    let remedy = format!("--inherit-fd fd[N]:{key}");
    if without.status.success() || !without.said.contains(&remedy) {
        return Err(Failure::Changed("a restore without terminal", without.said));
    }

    let mut command = tool.restore(&stage.dir.join("img"), &[]);
    let pidfile = stage.dir.join("pidfile");
    command.arg("--pidfile").arg(&pidfile).args(["--inherit-fd", &format!("fd[0]:{key}")]);
    let slave = new.open_slave().doing("opening a slave")?;
    let status = command.stdin(slave).status().doing("starting the restore")?;
    if !status.success() {
        return Err(Failure::Changed("the restore", status.to_string()));
    }
    stage.root = fs::read_to_string(&pidfile).doing("reading the pid file")?.trim().parse().unwrap_or(0);
    new.send(format!("{QUESTION}\n").as_bytes()).doing("typing")?;
    new.until(ANSWER).map_err(on)?;
    new.send(b"sleep 500\n").doing("typing")?;
    std::thread::sleep(Duration::from_millis(200));
    new.send(b"\x03echo ba\"\"ck\n").doing("typing")?;
    new.until("back").map_err(on)?;
    stage.kill_tree()?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}

/// Without a word of the user, an end outside is refused by name, and the shell goes on.
fn refused(test: &str) -> Result<(), Failure> {
    let (mut terminal, mut shell, stage) = with_shell(test)?;
    let tool = Tool::discover().doing("finding the tool")?;
    let done = stage.tool(&mut tool.dump(stage.root, &stage.dir.join("img"), &[]))?;
    let wanted = format!("--external {}", key(&terminal)?);
    if done.status.success() || !done.said.contains("outside the tree") || !done.said.contains(&wanted) {
        return Err(Failure::Changed("a dump without --external", done.said));
    }
    terminal.send(format!("{QUESTION}\n").as_bytes()).doing("typing")?;
    terminal.until(ANSWER).map_err(on)?;
    shell.kill().doing("killing")?;
    shell.wait().doing("waiting")?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}

/// Data that can only be copied by taking them out are refused by name when the tree is to live on, and are still there.
fn data_refused(test: &str) -> Result<(), Failure> {
    let stage = Stage::start(test, "pty_data", Flavour::Host, PATIENCE)?;
    let tool = Tool::discover().doing("finding the tool")?;
    for flag in ["-R", "-s"] {
        let done = stage.tool(&mut tool.dump(stage.root, &stage.dir.join("img"), &[flag]))?;
        if done.status.success() || !done.said.contains("can only be copied by taking them out") {
            return Err(Failure::Changed("a dump of unread data", done.said));
        }
    }
    stage.check("refused dumps")?;
    stage.kill_tree()?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}
