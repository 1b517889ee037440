//! Network services whose clients are outside the tree, and notice nothing: `SERVICE::WHAT`.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{Doing, Failure, Stage};
use stasis_tests::suite::{self, Test};
use stasis_tests::tool::Tool;

const PORT: u16 = 7777;
const PATIENCE: Duration = Duration::from_secs(40);
const KEEP: &str = "--tcp-established";

fn address() -> SocketAddr {
    ([127, 0, 0, 1], PORT).into()
}

/// A program of the system.
fn find(name: &str) -> Result<PathBuf, Failure> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    places.push("/usr/sbin".into());
    let found = places.into_iter().map(|dir| dir.join(name)).find(|file| file.is_file());
    found.ok_or_else(|| Failure::Skipped(format!("{name} is not installed")))
}

fn broken(what: impl Into<String>) -> Failure {
    Failure::Changed("dump and restore", what.into())
}

/// Starts a service, which is ready when it takes a connection.
fn start(dir: &Path, argv: &[&str]) -> Result<Stage, Failure> {
    let ready = dir.join("ready");
    let waiter = thread::spawn(move || {
        let began = Instant::now();
        while TcpStream::connect(address()).is_err() && began.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(10));
        }
        // Long enough to see that the look was over.
        thread::sleep(Duration::from_millis(100));
        fs::write(ready, "")
    });
    let stage = Stage::start_command(dir, Flavour::Host, argv, PATIENCE)?;
    let waited = waiter.join().map_err(|_| broken("the look at the port panicked"))?;
    waited.doing("announcing the service")?;
    Ok(stage)
}

/// A number that a longer run sets in the environment.
fn asked_for(name: &str, usual: u32) -> u32 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(usual)
}

/// For how many seconds there is a snapshot every second (`STASIS_SNAPSHOT_SECONDS`): what a service does under them takes as long.
fn snapshot_seconds() -> u32 {
    asked_for("STASIS_SNAPSHOT_SECONDS", 1)
}

/// Snapshots of the running service, and then a dump that ends it, and a restore.
fn through(stage: &mut Stage) -> Result<(), Failure> {
    let tool = Tool::discover().doing("finding the tool")?;
    let (seconds, mut longest) = (snapshot_seconds(), Duration::ZERO);
    for second in 0..seconds {
        let began = Instant::now();
        let name = format!("running{second}");
        stage.dump(&tool, &name, &["-R", KEEP])?;
        longest = longest.max(began.elapsed());
        let _ = fs::remove_dir_all(stage.dir.join(name));
        if second + 1 < seconds {
            thread::sleep(Duration::from_secs(1).saturating_sub(began.elapsed()));
        }
    }
    if seconds > 1 {
        println!("{seconds} snapshots, a second apart: the longest took {longest:?}");
    }
    thread::sleep(Duration::from_millis(200));
    let pids = stage.pids();
    stage.dump(&tool, "img", &[KEEP])?;
    stage.assert_gone(&pids)?;
    thread::sleep(Duration::from_millis(100));
    stage.restore(&tool, "img", &[])?;
    no_rules()
}

/// No lock is left.
fn no_rules() -> Result<(), Failure> {
    let nft = find("nft")?;
    let output = Command::new(nft).args(["list", "tables"]).output().doing("listing tables")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if said.contains("stasis") { Err(broken(format!("rules are left: {said}"))) } else { Ok(()) }
}

fn joined<T>(thread: JoinHandle<Result<T, Failure>>) -> Result<T, Failure> {
    thread.join().map_err(|_| broken("a client panicked"))?
}

fn finish(stage: &Stage) -> Result<(), Failure> {
    stage.kill_tree()?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}

/// Clients that count in redis as fast as they can; every answer is the next number. Gives the longest stall.
fn count(key: usize, stop: &AtomicBool) -> Result<(u64, Duration), Failure> {
    const AT_ONCE: u64 = 16;
    let mut stream = TcpStream::connect(address()).doing("connecting")?;
    stream.set_read_timeout(Some(PATIENCE)).doing("setting a timeout")?;
    let request = format!("INCR key{key}\r\n").repeat(AT_ONCE as usize);
    let (mut done, mut longest, mut buffer) = (0, Duration::ZERO, Vec::new());
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        stream.write_all(request.as_bytes()).doing("sending requests")?;
        let expected: String = (done + 1..=done + AT_ONCE).map(|n| format!(":{n}\r\n")).collect();
        buffer.resize(expected.len(), 0);
        stream.read_exact(&mut buffer).doing("reading answers")?;
        if buffer != expected.as_bytes() {
            return Err(broken(format!("redis answered {:?}", String::from_utf8_lossy(&buffer))));
        }
        done += AT_ONCE;
        longest = longest.max(began.elapsed());
    }
    Ok((done, longest))
}

fn redis(test: &str) -> Result<(), Failure> {
    let dir = Stage::fresh_dir(test)?;
    let mut stage = start_redis(&dir)?;
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..50)
        .map(|key| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || count(key, &stop))
        })
        .collect();
    thread::sleep(Duration::from_millis(200));
    let result = through(&mut stage);
    thread::sleep(Duration::from_millis(300));
    stop.store(true, Ordering::Relaxed);
    let mut longest = Duration::ZERO;
    let mut total = 0;
    for client in clients {
        let (done, stall) = joined(client)?;
        (total, longest) = (total + done, longest.max(stall));
    }
    result?;
    println!("{total} requests, longest stall {longest:?}");
    finish(&stage)
}

/// Clients that count for some time, each on a key of its own from `first` on: requests done in all, and the longest stall.
fn counting(
    first: usize,
    time: Duration,
    meanwhile: impl FnOnce() -> Result<(), Failure>,
) -> Result<(u64, Duration), Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (first..first + 10)
        .map(|key| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || count(key, &stop))
        })
        .collect();
    let began = Instant::now();
    let result = meanwhile();
    thread::sleep(time.saturating_sub(began.elapsed()));
    stop.store(true, Ordering::Relaxed);
    let (mut total, mut longest) = (0, Duration::ZERO);
    for client in clients {
        let (done, stall) = joined(client)?;
        (total, longest) = (total + done, longest.max(stall));
    }
    result.map(|()| (total, longest))
}

/// Snapshots of a busy server, one every second: no client notices but by the clock.
fn snapshots(test: &str) -> Result<(), Failure> {
    const ROUNDS: u32 = 5;
    let dir = Stage::fresh_dir(test)?;
    let stage = start_redis(&dir)?;
    let tool = Tool::discover().doing("finding the tool")?;
    let (calm, calm_stall) = counting(0, Duration::from_secs(2), || Ok(()))?;
    let (busy, stall) = counting(100, Duration::from_secs(ROUNDS.into()), || {
        // Until all are accepted.
        thread::sleep(Duration::from_millis(700));
        for round in 0..ROUNDS {
            let began = Instant::now();
            let name = format!("snapshot{round}");
            stage.dump(&tool, &name, &["-R", KEEP])?;
            fs::remove_dir_all(dir.join(&name)).doing("removing a snapshot")?;
            thread::sleep(Duration::from_secs(1).saturating_sub(began.elapsed()));
        }
        no_rules()
    })?;
    let kept = busy as f64 / f64::from(ROUNDS) / (calm as f64 / 2.0) * 100.0;
    println!(
        "throughput with a snapshot each second: {kept:.0} %; worst stall {stall:?}, without {calm_stall:?}"
    );
    finish(&stage)
}

fn start_redis(dir: &Path) -> Result<Stage, Failure> {
    let server = find("redis-server")?;
    let (server, work) = (server.to_string_lossy().into_owned(), dir.join("work").display().to_string());
    let port = PORT.to_string();
    // The background thread of its allocator sleeps until a point in time, which is another test's concern.
    let options = ["--appendonly", "yes", "--save", "", "--jemalloc-bg-thread", "no"];
    start(dir, &[&[server.as_str(), "--port", &port, "--dir", &work], &options[..]].concat())
}

/// PostgreSQL under pgbench: no transaction fails, and what accounts, tellers and branches have is what the history says.
fn postgres(test: &str) -> Result<(), Failure> {
    let place = "/usr/lib/postgresql";
    let versions = fs::read_dir(place).into_iter().flatten().flatten().map(|entry| entry.path().join("bin"));
    let bin = versions.max().ok_or_else(|| Failure::Skipped("postgresql is not installed".into()))?;
    let setpriv = find("setpriv")?;
    let dir = Stage::fresh_dir(test)?;
    let (data, port) = (dir.join("work/data").display().to_string(), PORT.to_string());
    let program = |name: &str| bin.join(name).display().to_string();
    let as_user = [
        setpriv.display().to_string(),
        "--reuid=postgres".into(),
        "--regid=postgres".into(),
        "--clear-groups".into(),
    ];
    let run = |arguments: &[&str]| -> Result<String, Failure> {
        let output = Command::new(&as_user[0])
            .args(&as_user[1..])
            .args(arguments)
            .output()
            .doing("running a program")?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        match output.status.success() {
            true => Ok(said),
            false => {
                Err(broken(format!("{arguments:?}: {said} {}", String::from_utf8_lossy(&output.stderr))))
            }
        }
    };
    let owner = nix::unistd::User::from_name("postgres").doing("looking for a user")?;
    let owner = owner.ok_or_else(|| Failure::Skipped("there is no user postgres".into()))?;
    std::os::unix::fs::chown(dir.join("work"), Some(owner.uid.as_raw()), Some(owner.gid.as_raw()))
        .doing("chown")?;
    run(&[&program("initdb"), "-D", &data, "-A", "trust", "-N"])?;
    let server = program("postgres");
    let options = ["-D", &data, "-p", &port, "-h", "127.0.0.1", "-c", "unix_socket_directories="];
    // The machine's hugetlb pages come and go with other tests.
    let options = [&options[..], &["-c", "fsync=off", "-c", "huge_pages=off"]].concat();
    let argv: Vec<&str> =
        as_user.iter().map(String::as_str).chain([server.as_str()]).chain(options).collect();
    let mut stage = start(&dir, &argv)?;
    let there = ["-h", "127.0.0.1", "-p", &port, "-U", "postgres"];
    let pgbench = program("pgbench");
    let with = |more: &[&'static str]| -> Vec<String> {
        [pgbench.as_str()].into_iter().chain(there).chain(more.iter().copied()).map(str::to_owned).collect()
    };
    let words = |line: &[String]| -> Result<String, Failure> {
        run(&line.iter().map(String::as_str).collect::<Vec<_>>())
    };
    // It takes connections before it takes requests.
    let began = Instant::now();
    let isready = program("pg_isready");
    while run(&[&[isready.as_str()][..], &there[..4]].concat()).is_err() && began.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(20));
    }
    words(&with(&["-i", "-q", "postgres"]))?;
    let said = thread::scope(|scope| {
        // Connections that a failed restore has given up would keep it waiting.
        let time = snapshot_seconds() + 3;
        let limit = ["timeout".to_owned(), (time + 36).to_string()];
        let load = [with(&["-c", "4", "-n", "-T"]), vec![time.to_string(), "postgres".to_owned()]].concat();
        let line = [&limit[..], &load].concat();
        let client = scope.spawn(move || words(&line));
        thread::sleep(Duration::from_millis(800));
        through(&mut stage)?;
        client.join().map_err(|_| broken("a client panicked"))?
    })?;
    if !said.contains("number of failed transactions: 0 ") {
        return Err(broken(format!("pgbench said {said}")));
    }
    let sums = "select (select sum(delta) from pgbench_history) = all (array[(select sum(abalance) from pgbench_accounts), \
                (select sum(tbalance) from pgbench_tellers), (select sum(bbalance) from pgbench_branches)])";
    let psql = program("psql");
    let line: Vec<&str> =
        [psql.as_str()].into_iter().chain(there).chain(["-Atc", sums, "postgres"]).collect();
    let agreed = run(&line)?;
    if agreed.trim() != "t" {
        return Err(broken(format!("the sums do not agree: {agreed}")));
    }
    // An orderly end, which takes its System V segment away.
    let pids = stage.pids();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(stage.root), nix::sys::signal::Signal::SIGINT)
        .doing("stopping")?;
    stage.assert_gone(&pids)?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}

fn nginx(test: &str) -> Result<(), Failure> {
    let server = find("nginx")?;
    let dir = Stage::fresh_dir(test)?;
    let work = dir.join("work");
    let size = asked_for("STASIS_DOWNLOAD_MIB", 24);
    // Two seconds of it, or at most a hundred MiB in each.
    let rate = size.div_ceil(2).min(100);
    let content: Vec<u8> =
        (0..size << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(work.join("big"), &content).doing("making a file")?;
    let place = work.display().to_string();
    let conf = format!(
        "daemon off; worker_processes 2; user root; pid {place}/pid; error_log {place}/error.log;
        events {{ worker_connections 512; }}
        http {{ access_log off; client_body_temp_path {place}/t1; proxy_temp_path {place}/t2;
          fastcgi_temp_path {place}/t3; uwsgi_temp_path {place}/t4; scgi_temp_path {place}/t5;
          server {{ listen 127.0.0.1:{PORT}; root {place}; limit_rate {rate}m; }} }}"
    );
    fs::write(work.join("conf"), conf).doing("writing a configuration")?;
    let (server, conf) = (server.to_string_lossy().into_owned(), format!("{place}/conf"));
    let mut stage = start(&dir, &[&server, "-c", &conf])?;
    let client = thread::spawn(move || -> Result<bool, Failure> {
        let mut stream = TcpStream::connect(address()).doing("connecting")?;
        stream.set_read_timeout(Some(PATIENCE)).doing("setting a timeout")?;
        stream.write_all(b"GET /big HTTP/1.0\r\nHost: here\r\n\r\n").doing("sending a request")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).doing("downloading")?;
        Ok(answer.ends_with(&content) && answer.len() < content.len() + 1000)
    });
    thread::sleep(Duration::from_millis(300));
    let result = through(&mut stage);
    let whole = joined(client);
    result?;
    if !whole? {
        return Err(broken("the download is not the file"));
    }
    finish(&stage)
}

const IDLE: usize = 1000;

/// A server with many clients, each of which says something now and then.
fn asyncio(test: &str) -> Result<(), Failure> {
    let python = find("python3")?;
    let output = Command::new(python).args(["-c", "import sys; print(sys.executable)"]).output();
    let python =
        String::from_utf8_lossy(&output.doing("asking python where it is")?.stdout).trim().to_owned();
    let dir = Stage::fresh_dir(test)?;
    let script = format!("{}/real/echo_server.py", env!("CARGO_MANIFEST_DIR"));
    let port = PORT.to_string();
    let mut stage = start(&dir, &[&python, &script, &port])?;
    let mut clients = Vec::with_capacity(IDLE);
    for _ in 0..IDLE {
        clients.push(TcpStream::connect(address()).doing("connecting")?);
    }
    echo(&mut clients)?;
    through(&mut stage)?;
    echo(&mut clients)?;
    drop(clients);
    finish(&stage)
}

fn echo(clients: &mut [TcpStream]) -> Result<(), Failure> {
    for (number, client) in clients.iter_mut().enumerate() {
        client.set_read_timeout(Some(PATIENCE)).doing("setting a timeout")?;
        let line = format!("hello {number}\n");
        client.write_all(line.as_bytes()).doing("saying hello")?;
    }
    for (number, client) in clients.iter_mut().enumerate() {
        let line = format!("hello {number}\n");
        let mut buffer = vec![0; line.len()];
        client.read_exact(&mut buffer).doing("reading the echo")?;
        if buffer != line.as_bytes() {
            return Err(broken(format!("client {number} got {:?}", String::from_utf8_lossy(&buffer))));
        }
    }
    Ok(())
}

/// Without the flag a connection is refused by name; a failed dump and one whose command is killed leave no rule and no
/// socket in repair mode.
fn refused(test: &str) -> Result<(), Failure> {
    let python = find("python3")?;
    let output = Command::new(python).args(["-c", "import sys; print(sys.executable)"]).output();
    let python =
        String::from_utf8_lossy(&output.doing("asking python where it is")?.stdout).trim().to_owned();
    let dir = Stage::fresh_dir(test)?;
    let script = format!("{}/real/echo_server.py", env!("CARGO_MANIFEST_DIR"));
    let stage = start(&dir, &[&python, &script, &PORT.to_string()])?;
    let mut clients = vec![TcpStream::connect(address()).doing("connecting")?];
    echo(&mut clients)?;
    let tool = Tool::discover().doing("finding the tool")?;
    let images = dir.join("refused");
    fs::create_dir_all(&images).doing("making the image directory")?;
    let done = stage.tool(&mut tool.dump(stage.root, &images, &[]))?;
    if done.status.success() || !done.said.contains(KEEP) {
        return Err(broken(format!("a connection was not refused by name: {}", done.said)));
    }
    echo(&mut clients)?;
    for delay in [5, 20, 40, 60, 80, 100, 130, 160] {
        let images = dir.join(format!("killed{delay}"));
        fs::create_dir_all(&images).doing("making the image directory")?;
        let mut command = tool.dump(stage.root, &images, &["-R", KEEP]);
        let mut child = stasis_tests::tool::start(&mut command, &dir.join("killed.out"))?;
        thread::sleep(Duration::from_millis(delay));
        let _ = child.kill();
        let _ = child.wait();
        echo(&mut clients)?;
        let began = Instant::now();
        while no_rules().is_err() && began.elapsed() < Duration::from_secs(10) {
            thread::sleep(Duration::from_millis(5));
        }
        no_rules()?;
    }
    finish(&stage)
}

/// A measurement in the middle: the client gets to its end without an error.
fn iperf(test: &str) -> Result<(), Failure> {
    let program = find("iperf3")?;
    let dir = Stage::fresh_dir(test)?;
    let (name, port) = (program.to_string_lossy().into_owned(), PORT.to_string());
    let time = (snapshot_seconds() + 3).to_string();
    let mut stage = start(&dir, &[&name, "-s", "-p", &port])?;
    for direction in [&[][..], &["-R"][..]] {
        let mut client = Command::new(&program);
        client
            .args(["-c", "127.0.0.1", "-p", &port, "-t", &time, "-b", "500M", "-P", "2", "-J"])
            .args(direction);
        let client = thread::spawn(move || client.output());
        thread::sleep(Duration::from_millis(700));
        through(&mut stage)?;
        fs::remove_dir_all(dir.join("img")).doing("removing an image")?;
        let output = client.join().map_err(|_| broken("a client panicked"))?.doing("running iperf3")?;
        let said = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() || said.contains("\"error\"") || !said.contains("\"sum_received\"") {
            return Err(broken(format!("iperf3 {direction:?}: {}, {said}", output.status)));
        }
    }
    finish(&stage)
}

/// Sessions of ssh, with a terminal and without: what is typed before and after is answered by the same shell.
fn ssh(test: &str) -> Result<(), Failure> {
    let (server, client, keygen) = (find("sshd")?, find("ssh")?, find("ssh-keygen")?);
    let dir = Stage::fresh_dir(test)?;
    let work = dir.join("work");
    for key in ["host", "user"] {
        let made = Command::new(&keygen)
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(work.join(key))
            .status()
            .doing("making a key")?;
        if !made.success() {
            return Err(Failure::Skipped(format!("ssh-keygen: {made}")));
        }
    }
    fs::create_dir_all("/run/sshd").doing("making the directory of sshd")?;
    let place = work.display().to_string();
    let conf = format!(
        "Port {PORT}\nListenAddress 127.0.0.1\nHostKey {place}/host\nAuthorizedKeysFile {place}/user.pub\n\
         StrictModes no\nUsePAM no\nPermitRootLogin yes\nPrintMotd no\nPrintLastLog no\nPidFile none\n"
    );
    fs::write(work.join("conf"), conf).doing("writing a configuration")?;
    let (server, conf) = (server.to_string_lossy().into_owned(), format!("{place}/conf"));
    let mut stage = start(&dir, &[&server, "-D", "-f", &conf])?;
    let mut sessions = Vec::new();
    for terminal in ["-T", "-tt"] {
        let session = Command::new(&client)
            .args([terminal, "-p", &PORT.to_string(), "-i"])
            .arg(work.join("user"))
            .args([
                "-o",
                "StrictHostKeyChecking=no",
                "-o",
                "UserKnownHostsFile=/dev/null",
                "-o",
                "LogLevel=ERROR",
            ])
            .args([
                "root@127.0.0.1",
                "n=0; stty -echo 2>/dev/null; echo ready; while read word; do n=$((n+1)); echo $word $n; done",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .doing("starting ssh")?;
        sessions.push(session);
    }
    let mut readers = Vec::new();
    for session in &mut sessions {
        let stdout = session.stdout.take().ok_or_else(|| broken("a session without output"))?;
        readers.push(BufReader::new(stdout));
    }
    for reader in &mut readers {
        let mut line = String::new();
        reader.read_line(&mut line).doing("reading from a session")?;
        if line.trim() != "ready" {
            return Err(broken(format!("a session began with {line:?}")));
        }
    }
    let mut say = |word: &str, number: u32| -> Result<(), Failure> {
        for (session, reader) in sessions.iter_mut().zip(&mut readers) {
            let stdin = session.stdin.as_mut().ok_or_else(|| broken("a session without input"))?;
            stdin.write_all(format!("{word}\n").as_bytes()).doing("typing")?;
            let mut line = String::new();
            reader.read_line(&mut line).doing("reading from a session")?;
            if line.trim() != format!("{word} {number}") {
                return Err(broken(format!("a session answered {line:?} to {word}")));
            }
        }
        Ok(())
    };
    say("before", 1)?;
    through(&mut stage)?;
    say("after", 2)?;
    say("later", 3)?;
    for mut session in sessions {
        // ^D: a terminal does not end with the input of its client.
        let stdin = session.stdin.take();
        stdin
            .ok_or_else(|| broken("a session without input"))?
            .write_all(b"\x04")
            .doing("ending a session")?;
        let status = session.wait().doing("waiting for ssh")?;
        if !status.success() {
            return Err(broken(format!("a session ended with {status}")));
        }
    }
    finish(&stage)
}

fn main() -> ExitCode {
    suite::main(vec![
        Test::new("redis::pipelining", redis),
        Test::new("redis::snapshots", snapshots),
        Test::new("postgres::pgbench", postgres),
        Test::new("nginx::download", nginx),
        Test::new("asyncio::idle", asyncio),
        Test::new("asyncio::refused_and_killed", refused),
        Test::new("iperf3::both_directions", iperf),
        Test::new("sshd::sessions", ssh),
    ])
}
