//! Requests by socket.

use super::{
    client::{
        CHECK, DUMP, FEATURE_CHECK, Features, Opts, PRE_DUMP, RESTORE, Req, Server, VERSION, names, succeeded,
    },
    expect, tool,
};
use nix::{
    sys::wait::{WaitStatus, waitpid},
    unistd::Pid,
};
use stasis_tests::{
    launch::Flavour,
    scenario::{Doing, Failure, Stage},
    suite::Test,
    tool::Tool,
};
use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    time::Duration,
};

const PATIENCE: Duration = Duration::from_secs(30);

pub fn tests() -> Vec<Test> {
    let mut tests = vec![
        Test::new("rpc::questions", questions),
        Test::new("rpc::crun", crun),
        Test::new("rpc::failures", failures),
        Test::new("rpc::refused_points", refused_points),
    ];
    for flavour in [Flavour::Host, Flavour::Ns] {
        for running in [false, true] {
            let name = format!("rpc::runc::{}::{}", flavour.name(), if running { "running" } else { "kill" });
            tests.push(Test::new(name, move |test| like_runc(test, flavour, running)));
        }
    }
    tests
}

/// Directories that are open in us, the client.
struct Directories {
    images: File,
    work: File,
}

impl Directories {
    fn new(stage: &Stage) -> Result<Self, Failure> {
        let open = |name: &str| {
            fs::create_dir_all(stage.dir.join(name)).doing("making a directory")?;
            File::open(stage.dir.join(name)).doing("opening a directory")
        };
        Ok(Self { images: open("img")?, work: open("logs")? })
    }

    fn opts(&self, log: &str) -> Opts {
        Opts {
            images_dir_fd: self.images.as_raw_fd(),
            work_dir_fd: Some(self.work.as_raw_fd()),
            log_level: Some(4),
            log_file: Some(log.into()),
            notify_scripts: Some(true),
            tcp_established: Some(false),
            file_locks: Some(false),
            manage_cgroups: Some(true),
            manage_cgroups_mode: Some(0),
            config_file: Some("/etc/criu/runc.conf".into()),
            ..Opts::default()
        }
    }
}

fn dump_request(stage: &Stage, directories: &Directories) -> Req {
    let opts = Opts { pid: Some(stage.root), ..directories.opts("dump.log") };
    Req { kind: DUMP, opts: Some(opts), ..Req::default() }
}

fn restore_request(directories: &Directories) -> Req {
    let opts = Opts { rst_sibling: Some(true), ..directories.opts("restore.log") };
    Req { kind: RESTORE, opts: Some(opts), ..Req::default() }
}

fn start(stage: &Stage, tool: &Tool) -> Result<Server, Failure> {
    Server::start(tool, &stage.dir.join("tool.out"), None)
}

fn said(stage: &Stage) -> String {
    let read = |name: &str| fs::read_to_string(stage.dir.join(name)).unwrap_or_default();
    read("tool.out") + &read("logs/dump.log") + &read("logs/restore.log")
}

/// A dump and a restore with all their notifications.
fn like_runc(test: &str, flavour: Flavour, running: bool) -> Result<(), Failure> {
    let mut stage = Stage::start(test, "tree_blocked", flavour, PATIENCE)?;
    let tool = tool(&stage)?;
    let directories = Directories::new(&stage)?;
    let before = stage.look_when_still()?;
    let pids = stage.pids();
    let files = stage.save_files()?;
    let server = start(&stage, &tool)?;
    let mut request = dump_request(&stage, &directories);
    request.opts.get_or_insert_default().leave_running = Some(running);
    let (answer, notified) = server.ask(&request, None)?;
    succeeded(&answer, DUMP)?;
    expect(answer.dump.and_then(|dump| dump.restored) == Some(false), || "restored".into())?;
    let mut points = names(&notified);
    if running {
        // The tree runs on while its copy is written.
        expect(points.contains(&"network-unlock"), || format!("{points:?}"))?;
        points.retain(|point| *point != "network-unlock");
    }
    expect(points == ["pre-dump", "network-lock", "query-ext-files", "post-dump"], || format!("{points:?}"))?;
    let status = server.end()?;
    expect(status.success(), || format!("the dump ended with {status}: {}", said(&stage)))?;
    for name in ["img/inventory.img", "logs/stats-dump", "logs/dump.log"] {
        expect(stage.dir.join(name).exists(), || format!("no {name}"))?;
    }
    if running {
        stage.check("the dump, in the original")?;
        stage.kill_tree()?;
        stage.reset();
        stasis_tests::scenario::put_back(&files)?;
    } else {
        stage.assert_gone(&pids)?;
    }

    let server = start(&stage, &tool)?;
    let (answer, notified) = server.ask(&restore_request(&directories), None)?;
    succeeded(&answer, RESTORE)?;
    let pid = answer.restore.map_or(0, |restore| restore.pid);
    let expected = [
        "pre-restore",
        "setup-namespaces",
        "post-setup-namespaces",
        "post-restore",
        "network-unlock",
        "pre-resume",
        "post-resume",
    ];
    expect(names(&notified) == expected, || format!("{:?}", names(&notified)))?;
    for notify in
        notified.iter().filter(|n| matches!(n.script.as_deref(), Some("setup-namespaces" | "post-restore")))
    {
        expect(notify.pid == Some(pid), || format!("{notify:?}, but the root is {pid}"))?;
    }
    let tool_pid = server.pid();
    let status = server.end()?;
    expect(status.success(), || format!("the restore ended with {status}: {}", said(&stage)))?;
    expect(stage.dir.join("logs/stats-restore").exists(), || "no stats-restore".into())?;
    expect(pid != tool_pid && (flavour != Flavour::Host || pid == stage.root), || {
        format!("the root is {pid}")
    })?;
    stage.root = pid;
    stage.compare(&before, "the restore")?;
    stage.check("the restore")?;
    // Ours to wait for: a child of the client.
    let ended = waitpid(Pid::from_raw(pid), None).doing("waiting for the restored root")?;
    expect(matches!(ended, WaitStatus::Exited(_, 0)), || format!("{ended:?}"))
}

/// crun's way: libcriu's child tells its pid and becomes the tool; nobody wants to be notified.
fn crun(test: &str) -> Result<(), Failure> {
    const CHILD: &str = "import os, socket, struct, sys\n\
        number = int(sys.argv[1])\n\
        os.write(number, struct.pack('i', os.getpid()))\n\
        os.set_inheritable(number, True)\n\
        os.execv(sys.argv[2], ['criu', 'swrk', str(number)])\n";
    if !std::path::Path::new("/usr/bin/python3").exists() {
        return Err(Failure::Skipped("no python3".into()));
    }
    let mut stage = Stage::start(test, "pipe_data", Flavour::Host, PATIENCE)?;
    let tool = tool(&stage)?;
    let directories = Directories::new(&stage)?;
    let quiet = |mut request: Req| {
        request.opts.get_or_insert_default().notify_scripts = None;
        request
    };
    let run = |request: Req| -> Result<_, Failure> {
        let server = Server::start(&tool, &stage.dir.join("tool.out"), Some(CHILD))?;
        let pid = server.receive_bytes()?;
        expect(pid == server.pid().to_ne_bytes(), || format!("the child says {pid:?}"))?;
        let (answer, notified) = server.ask(&request, None)?;
        expect(notified.is_empty(), || format!("notified: {notified:?}"))?;
        succeeded(&answer, request.kind)?;
        let status = server.end()?;
        expect(status.success(), || format!("{status}: {}", said(&stage)))?;
        Ok(answer)
    };
    let pids = stage.pids();
    run(quiet(dump_request(&stage, &directories)))?;
    stage.assert_gone(&pids)?;
    let answer = run(quiet(restore_request(&directories)))?;
    stage.root = answer.restore.map_or(0, |restore| restore.pid);
    stage.check("the restore")
}

/// Questions, several on one connection.
fn questions(test: &str) -> Result<(), Failure> {
    let stage = Stage { dir: Stage::fresh_dir(test)?, ..nobody() };
    let server = start(&stage, &tool(&stage)?)?;
    let ask = |request: Req| server.ask(&request, None).map(|(answer, _)| answer);
    let more = |kind| Req { kind, keep_open: Some(true), ..Req::default() };
    let answer = ask(more(VERSION))?;
    succeeded(&answer, VERSION)?;
    // podman wants at least 3.16 for pods, runc 3.0.
    expect(answer.version.as_ref().is_some_and(|version| version.major >= 4), || format!("{answer:?}"))?;
    let wanted = Features { mem_track: Some(true), lazy_pages: Some(true) };
    let answer = ask(Req { features: Some(wanted), ..more(FEATURE_CHECK) })?;
    succeeded(&answer, FEATURE_CHECK)?;
    let none = Features { mem_track: Some(false), lazy_pages: Some(false) };
    expect(answer.features == Some(none), || format!("{answer:?}"))?;
    let answer = ask(more(PRE_DUMP))?;
    expect(answer.kind == PRE_DUMP && !answer.success && answer.cr_errmsg.is_some(), || {
        format!("{answer:?}")
    })?;
    succeeded(&ask(Req { kind: CHECK, ..Req::default() })?, CHECK)?;
    let status = server.end()?;
    expect(status.success(), || format!("{status}"))
}

fn nobody() -> Stage {
    Stage::idle(std::path::PathBuf::new(), PATIENCE)
}

/// What cannot be done is said in words.
fn failures(test: &str) -> Result<(), Failure> {
    let stage = Stage { dir: Stage::fresh_dir(test)?, root: i32::MAX, ..nobody() };
    let tool = tool(&stage)?;
    let directories = Directories::new(&stage)?;
    let closed = || {
        let mut request = restore_request(&directories);
        request.opts.get_or_insert_default().images_dir_fd = 9999;
        request
    };
    let table = [
        (dump_request(&stage, &directories), "2147483647"),
        (restore_request(&directories), "image"),
        (closed(), "/fd/9999"),
        (Req { kind: DUMP, ..Req::default() }, "opts"),
    ];
    for (request, message) in table {
        let server = start(&stage, &tool)?;
        let (answer, _) = server.ask(&request, None)?;
        let text = answer.cr_errmsg.clone().unwrap_or_default();
        expect(!answer.success && answer.kind == request.kind && text.contains(message), || {
            format!("{answer:?}")
        })?;
        let status = server.end()?;
        expect(status.code() == Some(1), || format!("{message}: {status}"))?;
    }
    Ok(())
}

/// A client that says no at some point: the dump leaves the tree running, the restore leaves nothing.
fn refused_points(test: &str) -> Result<(), Failure> {
    let mut stage = Stage::start(test, "tree_blocked", Flavour::Host, PATIENCE)?;
    let tool = tool(&stage)?;
    let directories = Directories::new(&stage)?;
    let before = stage.look_when_still()?;
    for point in ["pre-dump", "network-lock", "query-ext-files"] {
        let server = start(&stage, &tool)?;
        let (answer, _) = server.ask(&dump_request(&stage, &directories), Some(point))?;
        let text = answer.cr_errmsg.clone().unwrap_or_default();
        expect(!answer.success && text.contains(point), || format!("{answer:?}"))?;
        server.end()?;
        stage.compare(&before, "a dump that was refused")?;
        expect(!stage.dir.join("img/inventory.img").exists(), || format!("{point}: an inventory"))?;
    }
    let server = start(&stage, &tool)?;
    let pids = stage.pids();
    succeeded(&server.ask(&dump_request(&stage, &directories), None)?.0, DUMP)?;
    server.end()?;
    stage.assert_gone(&pids)?;
    for point in ["pre-restore", "setup-namespaces", "post-setup-namespaces", "post-restore", "pre-resume"] {
        let server = start(&stage, &tool)?;
        let (answer, _) = server.ask(&restore_request(&directories), Some(point))?;
        let text = answer.cr_errmsg.clone().unwrap_or_default();
        expect(!answer.success && text.contains(point), || format!("{answer:?}"))?;
        server.end()?;
        // The root would be ours.
        let _ = waitpid(Pid::from_raw(stage.root), None);
        stage.assert_gone(&pids)?;
    }
    let server = start(&stage, &tool)?;
    let (answer, _) = server.ask(&restore_request(&directories), None)?;
    succeeded(&answer, RESTORE)?;
    server.end()?;
    stage.root = answer.restore.map_or(0, |restore| restore.pid);
    stage.compare(&before, "the restore")?;
    stage.check("the restore")
}
