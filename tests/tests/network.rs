//! TCP connections and what goes wrong with them: options that end them, locks that are lifted, ports and addresses that are gone.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use stasis_tests::launch::Flavour;
use stasis_tests::net;
use stasis_tests::scenario::{self, Doing, Failure, Stage};
use stasis_tests::suite::{self, Test};
use stasis_tests::tool::{self, Done, Tool};
use stasis_tests::workloads::{tcp_ended, tcp_many, tcp_server};

const PATIENCE: Duration = Duration::from_secs(40);
const KEEP: &str = "--tcp-established";

fn wrong(what: impl Into<String>) -> Failure {
    Failure::Changed("the dump", what.into())
}

/// A tree, the tool, and where its images go.
struct Case {
    stage: Stage,
    tool: Tool,
}

impl Case {
    fn start(test: &str, workload: &str, flavour: Flavour) -> Result<Self, Failure> {
        let stage = Stage::start(test, workload, flavour, PATIENCE)?;
        Ok(Self { stage, tool: Tool::discover().doing("finding the tool")? })
    }

    fn dump(&self, name: &str, more: &[&str]) -> Result<Done, Failure> {
        let images = self.stage.dir.join(name);
        fs::create_dir_all(&images).doing("making the image directory")?;
        self.stage.tool(&mut self.tool.dump(self.stage.root, &images, more))
    }

    /// A dump that ends the tree.
    fn freeze(&self) -> Result<(), Failure> {
        let pids = self.stage.pids();
        self.dump("img", &[KEEP])?.ok()?;
        self.stage.assert_gone(&pids)
    }

    fn restore(&self, more: &[&str]) -> Result<Done, Failure> {
        self.stage.tool(&mut self.tool.restore(&self.stage.dir.join("img"), more))
    }

    /// A dump that must be refused with these words, and harm nothing.
    fn refuses(&self, name: &str, more: &[&str], words: &[&str]) -> Result<(), Failure> {
        let before = self.stage.look_when_still()?;
        let done = self.dump(name, more)?;
        if done.status.success() || words.iter().any(|word| !done.said.contains(word)) {
            return Err(wrong(format!("was not refused with {words:?}: {}", done.said)));
        }
        self.stage.compare(&before, "a refusal")
    }

    fn finish(self) -> Result<(), Failure> {
        self.stage.kill_tree()?;
        fs::remove_dir_all(&self.stage.dir).doing("removing the directory")
    }
}

fn client() -> Result<TcpStream, Failure> {
    let stream = TcpStream::connect(("127.0.0.1", tcp_server::PORT)).doing("connecting")?;
    stream.set_read_timeout(Some(PATIENCE)).doing("setting a timeout")?;
    Ok(stream)
}

fn echo(client: &mut TcpStream, word: &str) -> Result<(), Failure> {
    client.write_all(word.as_bytes()).doing("sending a word")?;
    let mut buffer = vec![0; word.len()];
    client.read_exact(&mut buffer).doing("reading the echo")?;
    if buffer == word.as_bytes() { Ok(()) } else { Err(wrong(format!("the echo of {word} is {buffer:?}"))) }
}

/// The tables that nf_tables shows.
fn tables() -> Result<String, Failure> {
    match Command::new("nft").args(["list", "tables"]).output() {
        Ok(output) => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Err(error) => Err(Failure::Skipped(format!("nft: {error}"))),
    }
}

fn no_rules() -> Result<(), Failure> {
    let began = Instant::now();
    loop {
        let said = tables()?;
        match said.contains("stasis") {
            false => return Ok(()),
            true if began.elapsed() > Duration::from_secs(10) => {
                return Err(wrong(format!("rules are left: {said}")));
            }
            true => thread::sleep(Duration::from_millis(5)),
        }
    }
}

/// The lock that a dump leaves is there, and the client hears nothing: neither an answer nor a reset.
fn locked(client: &mut TcpStream) -> Result<(), Failure> {
    let said = tables()?;
    if !said.contains("stasis") {
        return Err(wrong(format!("no lock is there: {said}")));
    }
    client.write_all(b"into the silence").doing("sending")?;
    client.set_read_timeout(Some(Duration::from_millis(300))).doing("setting a timeout")?;
    let heard = client.read(&mut [0; 99]).map_err(|error| error.kind());
    client.set_read_timeout(Some(PATIENCE)).doing("setting a timeout")?;
    if heard == Err(ErrorKind::WouldBlock) { Ok(()) } else { Err(wrong(format!("the client got {heard:?}"))) }
}

/// Nobody is there any more, and the peer is told so.
fn reset(mut client: TcpStream) -> Result<(), Failure> {
    match client.read(&mut [0; 99]).map_err(|error| error.kind()) {
        Err(ErrorKind::ConnectionReset) => Ok(()),
        heard => Err(wrong(format!("the client got {heard:?}, not a reset"))),
    }
}

fn close(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "tcp_ended", Flavour::Host)?;
    case.refuses("refused", &[], &["--tcp-established", "--tcp-close"])?;
    let pids = case.stage.pids();
    case.dump("img", &["--tcp-close"])?.ok()?;
    case.stage.assert_gone(&pids)?;
    no_rules()?;
    case.restore(&[])?.ok()?;
    case.stage.check("a dump with --tcp-close")?;
    fs::remove_dir_all(&case.stage.dir).doing("removing the directory")
}

/// The image has the connections, the restore ends them.
fn close_at_restore(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "tcp_ended", Flavour::Host)?;
    case.freeze()?;
    case.restore(&["--tcp-close"])?.ok()?;
    no_rules()?;
    case.stage.check("a restore with --tcp-close")?;
    fs::remove_dir_all(&case.stage.dir).doing("removing the directory")
}

fn skip_in_flight(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "tcp_ended", Flavour::Host)?;
    let waiting = TcpStream::connect(("127.0.0.1", tcp_ended::PORT)).doing("connecting")?;
    case.refuses("refused", &["--tcp-close"], &["1 connections wait to be accepted", "--skip-in-flight"])?;
    let pids = case.stage.pids();
    case.dump("img", &["--tcp-close", "--skip-in-flight"])?.ok()?;
    case.stage.assert_gone(&pids)?;
    waiting.set_read_timeout(Some(PATIENCE)).doing("setting a timeout")?;
    reset(waiting)?;
    case.restore(&[])?.ok()?;
    case.stage.check("a dump with --skip-in-flight")?;
    fs::remove_dir_all(&case.stage.dir).doing("removing the directory")
}

fn unlock(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "tcp_server", Flavour::Host)?;
    let mut client = client()?;
    echo(&mut client, "before")?;
    case.freeze()?;
    locked(&mut client)?;
    let mut command = Command::new(&case.tool.bin);
    command.arg("unlock").arg(case.stage.dir.join("img"));
    tool::run(&mut command, &case.stage.dir.join("unlock.out"), PATIENCE)?.ok()?;
    no_rules()?;
    reset(client)?;
    // A second time there is nothing to do.
    tool::run(&mut command, &case.stage.dir.join("unlock.out"), PATIENCE)?.ok()?;
    fs::remove_dir_all(&case.stage.dir).doing("removing the directory")
}

/// The port is taken: the restore says so, leaves nothing, and gives the connections up.
fn port_taken(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "tcp_server", Flavour::Host)?;
    let mut client = client()?;
    echo(&mut client, "before")?;
    case.freeze()?;
    locked(&mut client)?;
    let thief = net::listener(&format!("127.0.0.1:{}", tcp_server::PORT), &[]).doing("taking the port")?;
    let done = case.restore(&[])?;
    if done.status.success() || !done.said.contains("another program has the port") {
        return Err(wrong(format!("the restore said {}", done.said)));
    }
    no_rules()?;
    reset(client)?;
    drop(thief);
    fs::remove_dir_all(&case.stage.dir).doing("removing the directory")
}

/// The command of the dump is killed between lock and unlock: the connection goes on; and so is that of the restore, after which
/// the connection is given up, or still locked for a second restore.
fn killed(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "tcp_server", Flavour::Host)?;
    let mut client = client()?;
    echo(&mut client, "before")?;
    let kill = |mut command: Command, delay: u64| -> Result<bool, Failure> {
        let mut child = tool::start(&mut command, &case.stage.dir.join("killed.out"))?;
        thread::sleep(Duration::from_millis(delay));
        let ended = matches!(child.try_wait(), Ok(Some(_)));
        let _ = child.kill();
        let _ = child.wait();
        Ok(ended)
    };
    for delay in [10, 25, 40, 55, 70, 90, 120] {
        let images = case.stage.dir.join(format!("killed{delay}"));
        fs::create_dir_all(&images).doing("making the image directory")?;
        kill(case.tool.dump(case.stage.root, &images, &["-R", KEEP]), delay)?;
        echo(&mut client, &format!("killed after {delay}"))?;
        no_rules()?;
    }
    case.freeze()?;
    locked(&mut client)?;
    for delay in [5, 10, 20, 30] {
        if kill(case.tool.restore(&case.stage.dir.join("img"), &[]), delay)? {
            // It was faster: the tree is back.
            return came_back(case, client);
        }
        let began = Instant::now();
        while fs::exists(format!("/proc/{}", case.stage.root)).unwrap_or(false) {
            if began.elapsed() > Duration::from_secs(10) {
                // Killed when all was done already.
                return came_back(case, client);
            }
            thread::sleep(Duration::from_millis(5));
        }
        // One whose command lived on for a moment has given the connection up, as any restore that fails.
        if !tables()?.contains("stasis") {
            reset(client)?;
            return fs::remove_dir_all(&case.stage.dir).doing("removing the directory");
        }
        locked(&mut client)?;
    }
    case.restore(&[])?.ok()?;
    came_back(case, client)
}

fn came_back(case: Case, mut client: TcpStream) -> Result<(), Failure> {
    let mut silence = Vec::new();
    let words = b"into the silence";
    let mut buffer = [0; 99];
    // Everything that was said meanwhile is answered.
    while silence.len() < words.len() {
        let length = client.read(&mut buffer).doing("reading what was said meanwhile")?;
        silence.extend_from_slice(&buffer[..length]);
    }
    if !silence.starts_with(words) {
        return Err(wrong(format!("the answer is {silence:?}")));
    }
    no_rules()?;
    case.finish()
}

/// The peer is gone when the connection comes back: that is the peer's end, not the restore's.
fn peer_gone(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "tcp_server", Flavour::Host)?;
    let (mut gone, mut stays) = (client()?, client()?);
    echo(&mut gone, "before")?;
    echo(&mut stays, "before")?;
    case.freeze()?;
    drop(gone);
    case.restore(&[])?.ok()?;
    no_rules()?;
    echo(&mut stays, "after")?;
    let mut late = client()?;
    echo(&mut late, "late")?;
    case.stage.check("a peer that is gone")?;
    fs::remove_dir_all(&case.stage.dir).doing("removing the directory")
}

/// In a user namespace that does not own its net namespace nobody can repair a connection: the dump says so.
fn user_namespace(test: &str) -> Result<(), Failure> {
    let dir = Stage::fresh_dir(test)?;
    let workload = scenario::workload_binary().doing("copying the workload binary")?;
    let (binary, place) = (workload.display().to_string(), dir.display().to_string());
    let command = ["/usr/bin/unshare", "--user", "--map-root-user", &binary, "tcp_server", &place];
    let stage = Stage::start_command(&dir, Flavour::Host, &command, PATIENCE)?;
    let case = Case { stage, tool: Tool::discover().doing("finding the tool")? };
    let mut client = client()?;
    echo(&mut client, "before")?;
    case.refuses("refused", &[KEEP], &["user namespace", "--tcp-close"])?;
    no_rules()?;
    echo(&mut client, "after")?;
    case.finish()
}

/// The address is gone: a clear error.
fn address_gone(test: &str) -> Result<(), Failure> {
    let ip = |arguments: &[&str]| match Command::new("ip").args(arguments).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(Failure::Skipped(format!("ip {arguments:?}: {status}"))),
        Err(error) => Err(Failure::Skipped(format!("ip: {error}"))),
    };
    const ADDRESS: &str = "192.0.2.77";
    ip(&["address", "add", &format!("{ADDRESS}/32"), "dev", "lo"])?;
    let case = Case::start(test, "tcp_server", Flavour::Host)?;
    let there = net::socket(libc::AF_INET, libc::SOCK_STREAM, 0).doing("making a socket")?;
    let from = (ADDRESS.parse::<std::net::IpAddr>().map_err(|_| wrong("no address"))?, 0).into();
    net::bind(&there, from).doing("binding to the address")?;
    net::connect(&there, ([127, 0, 0, 1], tcp_server::PORT).into()).doing("connecting")?;
    let mut there = TcpStream::from(there);
    echo(&mut there, "before")?;
    case.freeze()?;
    ip(&["address", "del", &format!("{ADDRESS}/32"), "dev", "lo"])?;
    // The peer's address need not be on this machine, only a route to it: so the connection is there, and silent.
    let done = case.restore(&[])?;
    if !done.status.success() && !done.said.contains("give this machine a route to the peer first") {
        return Err(wrong(format!("the restore said {}", done.said)));
    }
    no_rules()?;
    if done.status.success() {
        return case.finish();
    }
    fs::remove_dir_all(&case.stage.dir).doing("removing the directory")
}

/// Signed segments are refused by name.
fn signed(test: &str) -> Result<(), Failure> {
    let key = {
        // struct tcp_md5sig (linux/tcp.h): address, flags, prefix length, key length, interface, key.
        let mut bytes = vec![0u8; 216];
        bytes[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
        bytes[4..8].copy_from_slice(&[127, 0, 0, 1]);
        bytes[130..132].copy_from_slice(&3u16.to_ne_bytes());
        bytes[136..139].copy_from_slice(b"key");
        bytes
    };
    let probe = TcpListener::bind("127.0.0.1:0").doing("listening")?;
    const TCP_MD5SIG: i32 = 14;
    if let Err(error) = net::set_bytes(&probe, libc::IPPROTO_TCP, TCP_MD5SIG, &key) {
        return Err(Failure::Skipped(format!("TCP_MD5SIG: {error}")));
    }
    drop(probe);
    let python = format!(
        "import socket, time, os, sys\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen(1)\n\
         s.setsockopt(6, {TCP_MD5SIG}, bytes({key:?}))\nopen(sys.argv[1], 'w').close()\ntime.sleep(60)"
    );
    let output = Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output();
    let Ok(output) = output else { return Err(Failure::Skipped("python3 is not installed".into())) };
    let interpreter = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let dir = Stage::fresh_dir(test)?;
    let ready = dir.join("ready").display().to_string();
    let stage = Stage::start_command(&dir, Flavour::Host, &[&interpreter, "-c", &python, &ready], PATIENCE)?;
    let case = Case { stage, tool: Tool::discover().doing("finding the tool")? };
    case.refuses("refused", &[], &["TCP-MD5"])?;
    case.finish()
}

/// 10,000 connections of one process.
fn many(test: &str) -> Result<(), Failure> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).doing("looking at the limit of descriptors")?;
    if hard < tcp_many::COUNT as u64 + 500 {
        return Err(Failure::Skipped(format!("no more than {hard} descriptors are allowed")));
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).doing("raising the limit of descriptors")?;
    let listening = Stage::fresh_dir(test)?.join("listening");
    let connecting = thread::spawn(move || -> Result<Vec<TcpStream>, Failure> {
        while !listening.exists() {
            thread::sleep(Duration::from_millis(5));
        }
        let connect = |_| TcpStream::connect(("127.0.0.1", tcp_many::PORT)).doing("connecting");
        (0..tcp_many::COUNT).map(connect).collect()
    });
    let case = Case::start(test, "tcp_many", Flavour::Host)?;
    let mut clients = connecting.join().map_err(|_| wrong("a thread panicked"))??;
    let pids = case.stage.pids();
    let dumped = case.dump("img", &[KEEP])?.ok()?;
    case.stage.assert_gone(&pids)?;
    let restored = case.restore(&[])?.ok()?;
    no_rules()?;
    println!("{} connections: dump {:?}, restore {:?}", tcp_many::COUNT, dumped.took, restored.took);
    for client in &mut clients {
        client.write_all(b"ping").doing("sending")?;
    }
    case.stage.check("10,000 connections")?;
    for client in &mut clients {
        let mut buffer = [0; 4];
        client.set_read_timeout(Some(PATIENCE)).doing("setting a timeout")?;
        client.read_exact(&mut buffer).doing("reading the echo")?;
    }
    fs::remove_dir_all(&case.stage.dir).doing("removing the directory")
}

fn main() -> ExitCode {
    suite::main(vec![
        Test::new("tcp::close", close),
        Test::new("tcp::close_at_restore", close_at_restore),
        Test::new("tcp::skip_in_flight", skip_in_flight),
        Test::new("tcp::unlock", unlock),
        Test::new("tcp::port_taken", port_taken),
        Test::new("tcp::killed", killed),
        Test::new("tcp::peer_gone", peer_gone),
        Test::new("tcp::user_namespace", user_namespace),
        Test::new("tcp::address_gone", address_gone),
        Test::new("tcp::signed_segments", signed),
        Test { heavy: true, ..Test::new("tcp::many", many) },
    ])
}
