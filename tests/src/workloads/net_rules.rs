//! Rules of nf_tables, with sets, maps, counters and other objects, and a connection that only tracking lets through.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use crate::ctl::{Ctl, Fail, Outcome, changed, same};
use crate::net::tcp_pair;
use crate::sandbox::bring_loopback_up;

const RULES: &str = "
table inet first {
    comment \"ours\"
    counter seen { packets 5 bytes 500 }
    quota much { over 1000 mbytes used 3 mbytes }
    limit slow { rate 10/second burst 3 packets }
    ct helper ftp { type \"ftp\" protocol tcp; }
    set hosts { type ipv4_addr; flags interval; elements = { 192.0.2.0/24, 198.51.100.7 } }
    set ports { type inet_service; size 99; elements = { 80, 443 comment \"web\" } }
    set pairs { type ipv4_addr . inet_service; elements = { 192.0.2.1 . 22 } }
    set learned { type ipv6_addr; flags dynamic,timeout; timeout 1h; elements = { 2001:db8::1 timeout 2h } }
    map names { type mark : ipv4_addr; elements = { 1 : 192.0.2.9 } }
    map verdicts { type inet_service : verdict; elements = { 23 : drop, 24 : jump deeper } }
    chain deeper { counter packets 7 bytes 70 return; tcp flags & (fin | syn) == syn drop; }
    chain input {
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        tcp flags syn / syn,ack accept
        meta l4proto icmp counter name seen limit name slow accept
        ip saddr @hosts tcp dport @ports quota name much accept comment \"remember\"
        tcp dport vmap @verdicts
        tcp dport { 1000-2000, 3000 } reject with tcp reset
        ip6 saddr @learned update @learned { ip6 saddr timeout 30m } accept
        ip saddr . tcp dport @pairs log prefix \"seen: \" level warn accept
        iifname vmap { \"eth0\" : goto deeper, \"eth1\" : accept }
    }
    chain marking { type route hook output priority mangle; meta mark set 7 ct mark set 9; }
}
table ip second {
    chain out { type nat hook postrouting priority srcnat; oifname \"eth0\" masquerade; }
    chain in { type nat hook prerouting priority dstnat; tcp dport 8080 dnat to 192.0.2.3:80; }
}
table netdev third {
    chain early { type filter hook ingress device \"lo\" priority 0; policy accept; ip saddr 203.0.113.0/24 drop; }
}
table arp fourth {
    chain whole { type filter hook input priority 0; arp operation request accept; }
}
";

fn nft(arguments: &[&str], input: &str) -> Outcome<String> {
    let child = Command::new("nft").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.map_err(|error| Fail::Absent(format!("nft: {error}")))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(changed(format!("nft {arguments:?}: {}", String::from_utf8_lossy(&output.stderr)))),
    }
}

/// Without the word after `expires`, and counters of rules that packets of the test pass.
fn rules() -> Outcome<Vec<String>> {
    let line = |line: &str| {
        let mut words: Vec<&str> = line.split_whitespace().collect();
        while let Some(at) = words.iter().position(|word| *word == "expires") {
            words.drain(at..(at + 2).min(words.len()));
        }
        words.join(" ")
    };
    Ok(nft(&["list", "ruleset"], "")?.lines().map(line).filter(|line| !line.contains("stasis-")).collect())
}

/// What is tracked of TCP, without the time that is left; nothing if only the machine's root may see it.
fn tracked() -> Outcome<Vec<String>> {
    let text = match fs::read_to_string("/proc/self/net/nf_conntrack") {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return Ok(Vec::new()),
        Err(error) => return Err(Fail::Absent(format!("nf_conntrack: {error}"))),
        Ok(text) => text,
    };
    let fields = |line: &str| line.split_whitespace().filter(|word| word.parse::<u32>().is_err()).collect::<Vec<_>>().join(" ");
    let mut lines: Vec<String> = text.lines().filter(|line| line.contains("tcp")).map(fields).collect();
    lines.sort();
    Ok(lines)
}

fn send(from: &mut TcpStream, to: &mut TcpStream) -> Outcome {
    to.set_read_timeout(Some(Duration::from_secs(15)))?;
    from.write_all(b"tracked")?;
    let mut buffer = [0; 7];
    to.read_exact(&mut buffer)?;
    same("what comes through", &buffer, b"tracked")
}

fn echo(here: &mut TcpStream, there: &mut TcpStream) -> Outcome {
    send(here, there)?;
    send(there, here)
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    unshare(CloneFlags::CLONE_NEWNET)?;
    bring_loopback_up();
    nft(&["-f", "-"], RULES)?;
    let (mut here, mut there) = tcp_pair("127.0.0.1:0")?;
    echo(&mut here, &mut there)?;
    let (before, tracked_before) = (rules()?, tracked()?);

    if ctl.wait()? {
        nft(&["delete", "element", "inet", "first", "ports", "{ 80 }"], "")?;
    }

    let now = rules()?;
    if let Some(line) = before.iter().find(|line| !now.contains(line)) {
        let new: Vec<&String> = now.iter().filter(|line| !before.contains(line)).collect();
        return Err(changed(format!("gone: {line}; new: {new:?}")));
    }
    same("the rules", now, before)?;
    let tracked = tracked()?;
    if !tracked.is_empty() {
        same("the tracked connections", tracked, tracked_before)?;
    }
    echo(&mut here, &mut there)
}
