//! The plugin redis-link of `tests/external-plugin`: clients of a redis server that is outside of the tree go on after a restore.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use stasis_tests::external::{cargo, plugin_dir, workspace};
use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{Doing, Failure, Stage};
use stasis_tests::suite::Test;
use stasis_tests::tool::Tool;

/// All tests of this file.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new("redis::client_goes_on", client_goes_on),
        Test::new("redis::unread_replies", unread_replies),
        Test::new("redis::refused", refused),
    ]
}

const PATIENCE: Duration = Duration::from_secs(40);

fn wrong<T>(why: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Changed("dump and restore", why.into()))
}

/// A server, outside of every tree.
struct Server {
    child: Child,
    socket: PathBuf,
}

impl Server {
    fn start(dir: &Path) -> Result<Server, Failure> {
        let socket = dir.join("work/redis.sock");
        let mut command = Command::new("redis-server");
        command.args(["--port", "0", "--save", "", "--daemonize", "no", "--unixsocket"]).arg(&socket);
        command.arg("--dir").arg(dir.join("work")).stdout(Stdio::null()).stderr(Stdio::null());
        let child = match command.spawn() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Failure::Skipped("redis-server is not installed".into()));
            }
            child => child.doing("starting redis-server")?,
        };
        let server = Server { child, socket };
        let began = Instant::now();
        while UnixStream::connect(&server.socket).is_err() {
            if began.elapsed() > PATIENCE {
                return wrong("redis-server does not get ready");
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    fn ask(&self, request: &str) -> Result<String, Failure> {
        let mut stream = UnixStream::connect(&self.socket).doing("connecting to the server")?;
        stream.write_all(request.as_bytes()).doing("asking the server")?;
        let mut answer = [0; 100];
        let n = stream.read(&mut answer).doing("reading the server's answer")?;
        Ok(String::from_utf8_lossy(&answer[..n]).into_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The directory with all plugins and this one, and the flags of a dump with it.
fn flags(dir: &Path, server: &Server) -> Result<Vec<String>, Failure> {
    let library = "libstasis_plugin_redis_link.so";
    let built =
        cargo("plugins", &workspace().join("tests/external-plugin"), &["build", "--quiet"])?.join(library);
    let plugins = plugin_dir(dir, &[(&built, library)])?;
    let socket = format!("--redis-socket={}", server.socket.display());
    Ok(vec![
        "--plugin-dir".into(),
        plugins.display().to_string(),
        socket,
        "--prefer".into(),
        "redis-link".into(),
    ])
}

fn words(flags: &[String]) -> Vec<&str> {
    flags.iter().map(String::as_str).collect()
}

/// The numbers that redis-cli has printed.
fn printed(stage: &Stage) -> Result<Vec<u64>, Failure> {
    let text = fs::read_to_string(stage.dir.join("work/.out")).doing("reading what redis-cli said")?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|line| line.parse().or_else(|_| wrong(format!("redis-cli says {line:?}")))).collect()
}

/// redis-cli counts; the count has neither gaps nor repetitions.
fn client_goes_on(test: &str) -> Result<(), Failure> {
    let dir = Stage::fresh_dir(test)?;
    let server = Server::start(&dir)?;
    let flags = flags(&dir, &server)?;
    let flags = words(&flags);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let client = std::env::split_paths(&path).map(|dir| dir.join("redis-cli")).find(|file| file.is_file());
    let Some(client) = client else { return Err(Failure::Skipped("redis-cli is not installed".into())) };
    let ready = dir.join("ready");
    let out = dir.join("work/.out");
    let waiter = thread::spawn(move || {
        let began = Instant::now();
        while fs::metadata(&out).map_or(0, |out| out.len()) == 0 && began.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(5));
        }
        fs::write(ready, "")
    });
    let argv = [
        &*client.to_string_lossy(),
        "-s",
        &*server.socket.to_string_lossy(),
        "-r",
        "1000000",
        "-i",
        "0.002",
        "INCR",
        "count",
    ];
    let mut stage = Stage::start_command(&dir, Flavour::Host, &argv, PATIENCE)?;
    waiter.join().map_err(|_| Failure::Blind)?.doing("announcing the client")?;
    let tool = Tool::discover().doing("finding the tool")?;
    let more = |stage: &Stage, than: usize| -> Result<usize, Failure> {
        let began = Instant::now();
        loop {
            let count = printed(stage)?.len();
            if count > than + 20 {
                return Ok(count);
            }
            if began.elapsed() > PATIENCE {
                return wrong(format!("the client stands still at {count}"));
            }
            thread::sleep(Duration::from_millis(5));
        }
    };
    let count = more(&stage, 0)?;
    stage.dump(&tool, "running", &[&["-R"], &flags[..]].concat())?;
    let count = more(&stage, count)?;
    for round in ["one", "two", "three"] {
        stage.dump(&tool, round, &flags)?;
        let count = count.max(printed(&stage)?.len());
        thread::sleep(Duration::from_millis(50));
        stage.restore(&tool, round, &flags[..2])?;
        more(&stage, count)?;
    }
    stage.kill_tree()?;
    let numbers = printed(&stage)?;
    let wanted: Vec<u64> = (1..=numbers.len() as u64).collect();
    if numbers != wanted {
        let at = numbers.iter().zip(&wanted).position(|(is, was)| is != was);
        return wrong(format!(
            "the count goes wrong at {at:?}: {:?}",
            &numbers[at.unwrap_or(0).saturating_sub(2)..]
        ));
    }
    let kept = server.ask("GET count\r\n")?;
    let kept: u64 = kept.lines().nth(1).and_then(|line| line.parse().ok()).unwrap_or_default();
    // One may have been on its way when the client was killed.
    if !(numbers.len() as u64..=numbers.len() as u64 + 1).contains(&kept) {
        return wrong(format!("the server has counted to {kept}, the client to {}", numbers.len()));
    }
    fs::remove_dir_all(&dir).doing("removing the directory")
}

fn unread_replies(test: &str) -> Result<(), Failure> {
    let dir = Stage::fresh_dir(test)?;
    let server = Server::start(&dir)?;
    let flags = flags(&dir, &server)?;
    let flags = words(&flags);
    let binary = stasis_tests::scenario::workload_binary().doing("copying the workload binary")?;
    let argv = [&*binary.to_string_lossy(), "external_redis", &*dir.to_string_lossy()];
    let mut stage = Stage::start_command(&dir, Flavour::Host, &argv, PATIENCE)?;
    let tool = Tool::discover().doing("finding the tool")?;
    stage.dump(&tool, "running", &[&["-R"], &flags[..]].concat())?;
    for round in ["one", "two"] {
        stage.dump(&tool, round, &flags)?;
        stage.restore(&tool, round, &flags[..2])?;
    }
    stage.check("dump and restore")?;
    stage.kill_tree()?;
    // The server is gone: refused, and nothing is left.
    drop(server);
    let gone = stage.tool(&mut tool.restore(&dir.join("two"), &flags[..2]))?;
    if gone.status.success() || !gone.said.contains("start the server first") {
        return wrong(format!("without the server: {}", gone.said));
    }
    fs::remove_dir_all(&dir).doing("removing the directory")
}

fn refused(test: &str) -> Result<(), Failure> {
    let dir = Stage::fresh_dir(test)?;
    let server = Server::start(&dir)?;
    let flags = flags(&dir, &server)?;
    let flags = words(&flags);
    let binary = stasis_tests::scenario::workload_binary().doing("copying the workload binary")?;
    let argv = [&*binary.to_string_lossy(), "external_redis", &*dir.to_string_lossy()];
    let stage = Stage::start_command(&dir, Flavour::Host, &argv, PATIENCE)?;
    let tool = Tool::discover().doing("finding the tool")?;
    let refuse = |name: &str, flags: &[&str], words: &str| {
        let images = dir.join(name);
        fs::create_dir_all(&images).doing("making the image directory")?;
        let done = stage.tool(&mut tool.dump(stage.root, &images, flags))?;
        match done.status.success() || !done.said.contains(words) {
            true => wrong(format!("{name}: it does not say {words:?}: {}", done.said)),
            false => Ok(()),
        }
    };
    refuse("without", &[], "is outside the tree")?;
    refuse("not-preferred", &flags[..3], "plugin redis-link would take it: --prefer redis-link")?;
    let mut other = UnixStream::connect(&server.socket).doing("connecting to the server")?;
    other.write_all(b"SELECT 3\r\n").doing("selecting a database")?;
    other.read_exact(&mut [0; 5]).doing("selecting a database")?;
    refuse("state", &flags, "a client of the server has a state there that would be lost: db=3")?;
    drop(other);
    stage.check("the refusals")?;
    stage.kill_tree()?;
    fs::remove_dir_all(&dir).doing("removing the directory")
}
