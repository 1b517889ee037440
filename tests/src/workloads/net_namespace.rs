//! A net namespace with devices, addresses, routes, rules, neighbours and settings of its own, as ip(8) and /proc/sys show them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};

use crate::ctl::{Ctl, Fail, Outcome, changed, same};

/// What is made, one call of ip(8) a line.
const SETUP: &str = "
link set lo up
addr add 127.5.5.5/16 dev lo label lo:five
addr add 2001:db8:5::1/128 dev lo
link add br0 type bridge forward_delay 300 ageing_time 12345 mcast_snooping 0
link add out index 40 address 02:00:00:00:00:40 mtu 1400 type veth peer name port index 41 address 02:00:00:00:00:41
link property add dev out altname a-much-longer-name-than-fifteen
link set out txqueuelen 77 alias words
link set port master br0
link set port type bridge_slave cost 42 isolated on
link add link out name upper address 02:00:00:00:00:50 type macvlan mode bridge
link add ifb7 type ifb
link set out up
link set port up
link set br0 up multicast off
link set upper up
addr add 192.0.2.1/24 broadcast 192.0.2.255 dev out
addr add 192.0.2.2/24 dev out
addr add 198.51.100.1 peer 198.51.100.2 dev out metric 7
addr add 2001:db8:1::1/64 dev out nodad
addr add 2001:db8:1::2/64 dev out valid_lft 5000 preferred_lft 4000
addr add 2001:db8:2::1/64 dev br0 noprefixroute
addr add 203.0.113.1/24 dev upper
addr add 10.1.1.1/24 dev ifb7
route add default via 192.0.2.254
route add 10.0.0.0/8 via 192.0.2.253 dev out metric 5 mtu 1300
route add 10.0.0.0/8 via 192.0.2.252 dev out metric 6
route add blackhole 10.9.0.0/16
route add 10.8.0.0/16 nexthop via 192.0.2.10 weight 2 nexthop via 203.0.113.9 weight 3
route add 10.7.0.0/16 via 10.6.0.1 dev out onlink table 100
route add unreachable 10.5.0.0/16 table 2000
route add 172.16.0.0/12 via 192.0.2.254 src 192.0.2.2
nexthop add id 9 via 192.0.2.77 dev out
nexthop add id 10 via 192.0.2.78 dev out
nexthop add id 11 group 9,3/10,2
route add 10.4.0.0/16 nhid 11
-6 route add default via 2001:db8:1::fe
-6 route add 2001:db8:9::/48 via 2001:db8:1::fd dev out metric 33
-6 route add 2001:db8:a::/48 nexthop via 2001:db8:1::fc weight 1 nexthop via 2001:db8:1::fb weight 4
-6 route add prohibit 2001:db8:b::/48 table 100
rule add from 192.0.2.2 lookup 100 priority 1000
rule add fwmark 7/15 iif out lookup 2000
rule add not to 10.0.0.0/8 ipproto udp dport 53 blackhole
-6 rule add from 2001:db8:1::/64 lookup 100
-6 rule del priority 32766
neigh add 192.0.2.254 lladdr 02:aa:aa:aa:aa:aa dev out nud permanent
-6 neigh add 2001:db8:1::fe lladdr 02:bb:bb:bb:bb:bb dev out router nud permanent
neigh add proxy 192.0.2.99 dev out
-6 addrlabel add prefix 2001:db8:7::/48 label 77
-6 addr del ::1/128 dev lo
";

/// Settings that are changed.
const SETTINGS: [(&str, &str); 9] = [
    ("ipv4/ip_forward", "1"),
    ("ipv4/ip_local_port_range", "20000\t30000"),
    ("ipv4/tcp_rmem", "4096\t100000\t5000000"),
    ("ipv4/conf/out/rp_filter", "2"),
    ("ipv4/neigh/out/base_reachable_time_ms", "12345"),
    ("ipv6/conf/out/accept_ra", "0"),
    ("ipv6/conf/upper/disable_ipv6", "1"),
    ("ipv6/conf/ifb7/accept_dad", "1"),
    ("core/somaxconn", "99"),
];

/// What shows all of it.
const LISTS: [&str; 12] = [
    "-d link",
    "addr",
    "-4 route show table all",
    "-6 route show table all",
    "rule",
    "-6 rule",
    "-4 neigh show nud permanent",
    "-6 neigh show nud permanent",
    "neigh show proxy",
    "nexthop",
    "-6 addrlabel",
    "-d nexthop",
];

/// Words of these lists that time changes, with the word after each.
const VOLATILE: [&str; 10] =
    ["hold_timer", "message_age_timer", "forward_delay_timer", "hello_timer", "tcn_timer", "topology_change_timer", "gc_timer", "valid_lft", "preferred_lft", "expires"];

/// ip(8), without the shell.
pub fn ip(arguments: &str) -> Outcome<String> {
    let output = Command::new("ip").args(arguments.split_whitespace()).output();
    let output = output.map_err(|error| Fail::Absent(format!("ip: {error}")))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => Err(changed(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr)))),
    }
}

fn list(arguments: &str) -> Outcome<Vec<String>> {
    let text = ip(arguments)?;
    let line = |line: &str| {
        let mut words: Vec<&str> = line.split_whitespace().collect();
        while let Some(at) = words.iter().position(|word| VOLATILE.contains(word)) {
            words.drain(at..(at + 2).min(words.len()));
        }
        words.join(" ")
    };
    let mut lines: Vec<String> = text.lines().map(line).collect();
    if arguments.starts_with("-6 route") {
        // The kernel makes some of equal rank by itself, when it comes to it.
        lines.sort();
    }
    Ok(lines)
}

fn settings(directory: &Path, found: &mut BTreeMap<String, Vec<u8>>) -> Outcome {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            settings(&path, found)?;
        } else if let Ok(value) = fs::read(&path) {
            found.insert(path.to_string_lossy().into_owned(), value);
        }
    }
    Ok(())
}

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    unshare(CloneFlags::CLONE_NEWNET)?;
    for which in ["all", "default"] {
        fs::write(format!("/proc/sys/net/ipv6/conf/{which}/accept_dad"), "0")?;
    }
    for line in SETUP.lines().filter(|line| !line.is_empty()) {
        ip(line)?;
    }
    for (name, value) in SETTINGS {
        fs::write(format!("/proc/sys/net/{name}"), value)?;
    }
    let look = || LISTS.iter().map(|one| list(one)).collect::<Outcome<Vec<_>>>();
    let look_at_settings = || {
        let mut found = BTreeMap::new();
        settings(Path::new("/proc/sys/net"), &mut found)?;
        Ok::<_, Fail>(found)
    };
    let (before, settings_before) = (look()?, look_at_settings()?);

    let spoil = ctl.wait()?;
    if spoil {
        ip("route del blackhole 10.9.0.0/16")?;
    }

    for (name, (now, before)) in LISTS.iter().zip(look()?.into_iter().zip(before)) {
        if let Some(line) = before.iter().find(|line| !now.contains(line)) {
            let new: Vec<&String> = now.iter().filter(|line| !before.contains(line)).collect();
            return Err(changed(format!("ip {name}: gone: {line}; new: {new:?}")));
        }
        same(&format!("ip {name}"), now, before)?;
    }
    let now = look_at_settings()?;
    for (name, value) in &settings_before {
        same(name, now.get(name).map(|value| String::from_utf8_lossy(value).into_owned()), Some(String::from_utf8_lossy(value).into_owned()))?;
    }
    same("the number of settings", now.len(), settings_before.len())
}
