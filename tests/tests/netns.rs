//! Net namespaces that lead out: pairs with an end on the host, on a bridge or not, macvlan, what the user says of the outside, and
//! what is refused.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{Doing, Failure, Stage};
use stasis_tests::suite::{self, Test};
use stasis_tests::tool::{Done, Tool};
use stasis_tests::workloads::tcp_server::PORT;

const PATIENCE: Duration = Duration::from_secs(40);
const KEEP: &str = "--tcp-established";
const INSIDE: &str = "10.77.0.2";

fn wrong(what: impl Into<String>) -> Failure {
    Failure::Changed("the dump", what.into())
}

fn run(program: &str, arguments: &str) -> Result<String, Failure> {
    let output = Command::new(program).args(arguments.split_whitespace()).output();
    let output = output.map_err(|error| Failure::Skipped(format!("{program}: {error}")))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(wrong(format!("{program} {arguments}: {}", text(&output.stderr)))),
    }
}

/// ip(8) in the namespace of the harness, which is that of stasis; a call a line.
fn ip(lines: &str) -> Result<String, Failure> {
    let calls = lines.lines().filter(|line| !line.trim().is_empty());
    Ok(calls.map(|line| run("ip", line)).collect::<Result<Vec<_>, _>>()?.concat())
}

/// The numbers of a device's words.
fn links() -> Result<Vec<String>, Failure> {
    let name =
        |line: &str| line.split(": ").nth(1).map(|name| name.split('@').next().unwrap_or(name).to_owned());
    Ok(ip("-o link")?.lines().filter_map(name).collect())
}

struct Case {
    stage: Stage,
    tool: Tool,
    images: u32,
}

impl Case {
    fn start(test: &str, flavour: Flavour) -> Result<Self, Failure> {
        let stage = Stage::start(test, "net_server", flavour, PATIENCE)?;
        Ok(Self { stage, tool: Tool::discover().doing("finding the tool")?, images: 0 })
    }

    /// ip(8) in the tree's namespace.
    fn ip(&self, lines: &str) -> Result<String, Failure> {
        let calls = lines.lines().filter(|line| !line.trim().is_empty());
        let inside =
            |line: &str| run("nsenter", &format!("--net=/proc/{}/ns/net ip {line}", self.stage.root));
        Ok(calls.map(inside).collect::<Result<Vec<_>, _>>()?.concat())
    }

    /// A pair: `eth0` inside, `outer` here.
    fn pair(&self) -> Result<(), Failure> {
        ip(&format!("link add outer type veth peer name eth0 netns {}", self.stage.root))?;
        self.ip(&format!(
            "link set eth0 up
             addr add {INSIDE}/24 dev eth0
             route add default via 10.77.0.1"
        ))?;
        ip("link set outer up").map(drop)
    }

    fn bridge(&self) -> Result<(), Failure> {
        ip("link add br7 type bridge
            addr add 10.77.0.1/24 dev br7
            link set br7 up")?;
        self.pair()?;
        ip("link set outer master br7").map(drop)
    }

    fn dump(&mut self, more: &[&str]) -> Result<Done, Failure> {
        self.images += 1;
        let images = self.stage.dir.join(format!("img{}", self.images));
        fs::create_dir_all(&images).doing("making the image directory")?;
        self.stage.tool(&mut self.tool.dump(self.stage.root, &images, more))
    }

    fn try_restore(&mut self, more: &[&str]) -> Result<Done, Failure> {
        let images = self.stage.dir.join(format!("img{}", self.images));
        self.stage.tool(&mut self.tool.restore(&images, more))
    }

    fn restore(&mut self, more: &[&str]) -> Result<(), Failure> {
        let pidfile = self.stage.dir.join("root.pid").display().to_string();
        let more = [more, &["--pidfile", &pidfile]].concat();
        self.try_restore(&more)?.ok()?;
        let root = fs::read_to_string(&pidfile).doing("reading the pid file")?;
        self.stage.root = root.trim().parse().map_err(|_| wrong("the pid file has no number"))?;
        Ok(())
    }

    /// Dump and restore.
    fn pass(&mut self, dump: &[&str], restore: &[&str]) -> Result<(), Failure> {
        let pids = self.stage.pids();
        self.dump(&[&[KEEP], dump].concat())?.ok()?;
        self.stage.assert_gone(&pids)?;
        self.restore(restore)
    }

    fn finish(self) -> Result<(), Failure> {
        self.stage.check("all of it")?;
        fs::remove_dir_all(&self.stage.dir).doing("removing the directory")
    }
}

fn connect(host: &str) -> Result<TcpStream, Failure> {
    let began = Instant::now();
    loop {
        match TcpStream::connect((host, PORT)) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE)).doing("setting a timeout")?;
                return Ok(stream);
            }
            Err(error) if began.elapsed() > Duration::from_secs(10) => return Err(error).doing("connecting"),
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn echo(client: &mut TcpStream, word: &str) -> Result<(), Failure> {
    client.write_all(word.as_bytes()).doing("sending a word")?;
    let mut buffer = vec![0; word.len()];
    client.read_exact(&mut buffer).doing("reading the echo")?;
    if buffer == word.as_bytes() { Ok(()) } else { Err(wrong(format!("the echo of {word} is {buffer:?}"))) }
}

/// A connection from the host goes on, by the names of before and by others.
fn on_a_bridge(test: &str, flavour: Flavour) -> Result<(), Failure> {
    let mut case = Case::start(test, flavour)?;
    case.bridge()?;
    let mut client = connect(INSIDE)?;
    echo(&mut client, "before")?;
    let inside = |case: &Case| case.ip("addr show dev eth0");
    let strip = |text: String| text.replace(" tentative", "");
    let before = strip(inside(&case)?);
    case.pass(&[], &[])?;
    echo(&mut client, "with the old names")?;
    if !ip("link show outer")?.contains("master br7") {
        return Err(wrong("the outer end is not on its bridge"));
    }
    // The other end has another number.
    let cut = |text: &str| {
        text.split_once("eth0@").map(|(_, rest)| rest.split_once(':').map(|(_, rest)| rest.to_owned()))
    };
    let after = strip(inside(&case)?);
    if cut(&before) != cut(&after) {
        return Err(wrong(format!("eth0 was {before}, is {after}")));
    }
    ip("link add br8 type bridge
        link set br8 up")?;
    case.pass(&[], &["--external", "veth[eth0]:stale", "--external", "veth[eth0]:fresh@br7"])?;
    echo(&mut client, "with another name")?;
    if links()?.contains(&"outer".into()) || !ip("link show fresh")?.contains("master br7") {
        return Err(wrong("the outer end has not the name that was asked for"));
    }
    let mut late = connect(INSIDE)?;
    echo(&mut late, "late")?;
    case.finish()
}

/// Without a bridge the outer end keeps its own address.
fn point_to_point(test: &str) -> Result<(), Failure> {
    let mut case = Case::start(test, Flavour::Ns)?;
    case.pair()?;
    ip("addr add 10.77.0.1/24 dev outer
        -6 addr add fd00:77::1/64 dev outer nodad")?;
    case.ip("-6 addr add fd00:77::2/64 dev eth0 nodad")?;
    let (mut four, mut six) = (connect(INSIDE)?, connect("fd00:77::2")?);
    for _ in 0..3 {
        echo(&mut four, "before")?;
        echo(&mut six, "before")?;
        case.pass(&[], &[])?;
        echo(&mut four, "after")?;
        echo(&mut six, "after")?;
    }
    case.finish()
}

/// A peer that sends all the time gets no reset, neither while the old namespace goes nor while the new one comes.
fn under_load(test: &str, connected: fn(&Case) -> Result<(), Failure>) -> Result<(), Failure> {
    const ROUNDS: usize = 12;
    let mut case = Case::start(test, Flavour::Ns)?;
    connected(&case)?;
    let mut client = connect(INSIDE)?;
    let mut writer = client.try_clone().doing("duplicating a socket")?;
    let writing = thread::spawn(move || -> std::io::Result<usize> {
        let block = [7; 4096];
        let (mut sent, began) = (0, Instant::now());
        while began.elapsed() < Duration::from_secs(6) {
            sent += writer.write(&block)?;
        }
        writer.shutdown(std::net::Shutdown::Write)?;
        Ok(sent)
    });
    let reading = thread::spawn(move || -> std::io::Result<usize> {
        let (mut received, mut buffer) = (0, [0; 65536]);
        loop {
            match client.read(&mut buffer)? {
                0 => return Ok(received),
                length => received += length,
            }
        }
    });
    for _ in 0..ROUNDS {
        case.pass(&[], &[])?;
        if writing.is_finished() {
            break;
        }
    }
    let sent = writing.join().map_err(|_| wrong("a thread panicked"))?.doing("sending")?;
    let received = reading.join().map_err(|_| wrong("a thread panicked"))?.doing("receiving")?;
    println!("{sent} bytes there and back");
    if sent != received {
        return Err(wrong(format!("{sent} bytes were sent, {received} came back")));
    }
    case.finish()
}

/// Restores that fail leave no device, and say what to do.
fn failures(test: &str) -> Result<(), Failure> {
    let mut case = Case::start(test, Flavour::Ns)?;
    case.bridge()?;
    let pids = case.stage.pids();
    case.dump(&[KEEP])?.ok()?;
    case.stage.assert_gone(&pids)?;
    let gone = |names: &[String]| !names.contains(&"outer".into());
    let began = Instant::now();
    while !gone(&links()?) && began.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(5));
    }
    let before = links()?;
    let refused = |case: &mut Case, more: &[&str], words: &[&str]| {
        let done = case.try_restore(more)?;
        if done.status.success() || words.iter().any(|word| !done.said.contains(word)) {
            return Err(wrong(format!("the restore with {more:?} said {}", done.said)));
        }
        if links()? != before { Err(wrong(format!("devices are left: {:?}", links()?))) } else { Ok(()) }
    };
    refused(
        &mut case,
        &["--external", "veth[eth0]:outer@nowhere"],
        &["nowhere", "--external veth[eth0]:OUTSIDE@BRIDGE"],
    )?;
    refused(&mut case, &["--external", "veth[eth0]:br7"], &["br7", "give another name"])?;
    refused(&mut case, &["--join-ns=net:/nowhere"], &["/nowhere", "--join-ns"])?;
    // A task that cannot come back, when the devices are there already.
    let output = case.stage.dir.join("work/.out");
    let aside = case.stage.dir.join("aside");
    fs::rename(&output, &aside).doing("moving a file away")?;
    refused(&mut case, &[], &[".out"])?;
    fs::rename(&aside, &output).doing("moving the file back")?;
    case.restore(&[])?;
    echo(&mut connect(INSIDE)?, "after")?;
    case.finish()
}

/// `--empty-ns net`, at the dump and at the restore.
fn empty(test: &str) -> Result<(), Failure> {
    let mut case = Case::start(test, Flavour::Ns)?;
    case.pair()?;
    let is_empty = |case: &Case| {
        let shown = case.ip("-o link")?;
        if shown.lines().count() == 1 && shown.contains("lo: <LOOPBACK>") {
            return Ok(());
        }
        Err(wrong(format!("the namespace is not empty: {shown}")))
    };
    case.pass(&[], &["--empty-ns=net"])?;
    is_empty(&case)?;
    case.ip("link set lo up")?;
    case.pair()?;
    case.pass(&["--empty-ns=net"], &[])?;
    is_empty(&case)?;
    case.finish()
}

/// `--external net[INODE]:KEY` with `--inherit-fd` and with `--join-ns`.
fn external(test: &str) -> Result<(), Failure> {
    let mut case = Case::start(test, Flavour::Ns)?;
    case.bridge()?;
    let path = format!("/proc/{}/ns/net", case.stage.root);
    // As an engine holds it.
    let held = fs::File::open(&path).doing("opening the namespace")?;
    let ino = fs::read_link(&path).doing("reading a link")?.display().to_string();
    let number = ino.trim_start_matches("net:[").trim_end_matches(']');
    let key = format!("net[{number}]:outerNet");
    let mut client = connect(INSIDE)?;
    echo(&mut client, "before")?;
    let is_same = |case: &Case| {
        let now = fs::read_link(format!("/proc/{}/ns/net", case.stage.root)).doing("reading a link")?;
        if now.display().to_string() == ino {
            Ok(())
        } else {
            Err(wrong(format!("{} is not {ino}", now.display())))
        }
    };
    let pids = case.stage.pids();
    case.dump(&[KEEP, "--external", &key])?.ok()?;
    case.stage.assert_gone(&pids)?;
    let done = case.try_restore(&[])?;
    if done.status.success() || !done.said.contains("--inherit-fd fd[N]:outerNet") {
        return Err(wrong(format!("the restore said {}", done.said)));
    }
    let fd = nix::unistd::dup(&held).doing("duplicating a descriptor")?;
    case.restore(&["--inherit-fd", &format!("fd[{}]:outerNet", fd.as_raw_fd())])?;
    is_same(&case)?;
    echo(&mut client, "inherited")?;
    let pids = case.stage.pids();
    case.dump(&[KEEP, "--external", &key])?.ok()?;
    case.stage.assert_gone(&pids)?;
    let path = format!("/proc/{}/fd/{}", std::process::id(), held.as_raw_fd());
    case.restore(&[&format!("--join-ns=net:{path}")])?;
    is_same(&case)?;
    echo(&mut client, "joined")?;
    case.finish()
}

/// A macvlan device on one of ours.
fn macvlan(case: &Case) -> Result<(), Failure> {
    ip("link add here type veth peer name there
        link set here up
        link set there up
        addr add 10.77.0.1/24 dev there")?;
    ip(&format!("link add link here name eth0 netns {} type macvlan mode bridge", case.stage.root))?;
    case.ip(&format!(
        "link set eth0 up
         addr add {INSIDE}/24 dev eth0
         neigh add 10.77.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent"
    ))
    .map(drop)
}

fn on_another_device(test: &str) -> Result<(), Failure> {
    let mut case = Case::start(test, Flavour::Ns)?;
    macvlan(&case)?;
    let look = |case: &Case| {
        Ok::<_, Failure>(case.ip("addr show dev eth0\nneigh show nud permanent")?.replace(" tentative", ""))
    };
    let before = look(&case)?;
    let mut client = connect(INSIDE)?;
    echo(&mut client, "before")?;
    case.pass(&[], &[])?;
    echo(&mut client, "after")?;
    case.pass(&[], &["--external", "macvlan[eth0]:here"])?;
    echo(&mut client, "named")?;
    let after = look(&case)?;
    if after != before {
        return Err(wrong(format!("eth0 was {before}, is {after}")));
    }
    case.finish()
}

/// What cannot be kept is said by name, and stays as it is.
fn refusals(test: &str) -> Result<(), Failure> {
    let mut case = Case::start(test, Flavour::Ns)?;
    let refuses = |case: &mut Case, words: &[&str]| {
        let done = case.dump(&["-R"])?;
        if !done.status.success() && words.iter().all(|word| done.said.contains(word)) {
            return Ok(());
        }
        Err(wrong(format!("was not refused with {words:?}: {}", done.said)))
    };
    case.ip("link add vx0 type vxlan id 7 dstport 4789")?;
    refuses(&mut case, &["vx0", "vxlan"])?;
    case.ip("link del vx0\nxfrm policy add dir out src 192.0.2.0/24 dst 198.51.100.0/24 action block")?;
    refuses(&mut case, &["IPsec policies"])?;
    case.ip("xfrm policy flush")?;
    let tc = |line: &str| run("nsenter", &format!("--net=/proc/{}/ns/net tc {line}", case.stage.root));
    tc("qdisc add dev lo root tbf rate 1mbit burst 10kb latency 70ms")?;
    refuses(&mut case, &["device lo", "tbf"])?;
    let tc = |line: &str| run("nsenter", &format!("--net=/proc/{}/ns/net tc {line}", case.stage.root));
    tc("qdisc del dev lo root")?;
    tc("qdisc add dev lo ingress")?;
    refuses(&mut case, &["come in", "device"])?;
    let tc = |line: &str| run("nsenter", &format!("--net=/proc/{}/ns/net tc {line}", case.stage.root));
    tc("qdisc del dev lo ingress")?;
    case.ip("link add br0 type bridge\nlink add port type ifb\nlink set port master br0")?;
    let bridge =
        |line: &str| run("nsenter", &format!("--net=/proc/{}/ns/net bridge {line}", case.stage.root));
    bridge("fdb add 02:00:00:00:00:07 dev port master static")?;
    refuses(&mut case, &["by hand", "02:00:00:00:00:07"])?;
    case.ip("link del br0\nlink del port")?;
    case.pass(&[], &[])?;
    case.finish()
}

fn main() -> ExitCode {
    suite::main(vec![
        Test::new("netns::on_a_bridge", |name| on_a_bridge(name, Flavour::Ns)),
        Test::new("netns::on_a_bridge_of_users", |name| on_a_bridge(name, Flavour::User)),
        Test::new("netns::point_to_point", point_to_point),
        Test::new("netns::under_load", |name| under_load(name, Case::bridge)),
        Test::new("netns::under_load_on_another_device", |name| under_load(name, macvlan)),
        Test::new("netns::failures", failures),
        Test::new("netns::empty", empty),
        Test::new("netns::external", external),
        Test::new("netns::on_another_device", on_another_device),
        Test::new("netns::refusals", refusals),
    ])
}
