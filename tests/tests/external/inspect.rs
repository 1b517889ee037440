//! `stasis inspect` shows the records of every plugin in words, without the plugin.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use stasis_tests::external::{cargo, plugin_dir, workspace};
use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{Doing, Failure, Stage};
use stasis_tests::suite::Test;
use stasis_tests::tool::Tool;
use stasis_tests::workloads;

/// All tests of this file.
pub fn tests() -> Vec<Test> {
    vec![Test::new("inspect::every_record", every_record)]
}

/// Trees that together have records of (almost) every plugin.
const TREES: &[(&str, Flavour)] = &[
    ("mixture", Flavour::Host),
    ("devices", Flavour::Host),
    ("epoll_basic", Flavour::Host),
    ("eventfd", Flavour::Host),
    ("timerfd", Flavour::Host),
    ("signalfd", Flavour::Host),
    ("inotify", Flavour::Host),
    ("fanotify", Flavour::Host),
    ("mqueue", Flavour::Host),
    ("memfd", Flavour::Host),
    ("pidfd", Flavour::Host),
    ("pipe_data", Flavour::Host),
    ("pty_settings", Flavour::Host),
    ("tcp_connected", Flavour::Host),
    ("udp_sockets", Flavour::Host),
    ("unix_datagrams", Flavour::Host),
    ("files_namespaces", Flavour::Host),
    ("aio", Flavour::Host),
    ("netlink", Flavour::Host),
    ("raw_sockets", Flavour::Host),
    ("packet_sockets", Flavour::Host),
    ("pipe_data", Flavour::User),
    ("external_counter", Flavour::Host),
];

/// Plugins that have no records: they refuse, or only run at fixed points.
const WITHOUT_RECORDS: &[&str] = &["refused"];

fn wrong<T>(why: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Changed("inspect", why.into()))
}

/// A record must be an object with named fields; one that is all bytes says nothing to anybody.
fn in_words(owner: &str, record: &Value) -> Result<(), Failure> {
    let Some(fields) = record.as_object() else { return wrong(format!("the record of {owner} is {record}")) };
    if fields.contains_key("undecoded") {
        return wrong(format!("the record of {owner} is opaque: {record}"));
    }
    Ok(())
}

fn every_record(test: &str) -> Result<(), Failure> {
    let tool = Tool::discover().doing("finding the tool")?;
    let mut shown: BTreeSet<String> = BTreeSet::new();
    let mut all: BTreeSet<String> = BTreeSet::new();
    for (name, flavour) in TREES {
        let mut stage = Stage::start(test, name, *flavour, Duration::from_secs(40))?;
        stage.flags = workloads::find(name).map_or(&[], |workload| workload.flags);
        let mut more = vec!["-R".to_owned()];
        if *name == "external_counter" {
            let library = "libstasis_plugin_rival.so";
            let args = ["build", "--quiet"];
            let built = cargo("plugins", &workspace().join("tests/external-plugin"), &args)?.join(library);
            let plugins = plugin_dir(&stage.dir, &[(&built, library)])?;
            more.extend([
                "--plugin-dir".into(),
                plugins.display().to_string(),
                "--prefer".into(),
                "rival".into(),
            ]);
        }
        let more: Vec<&str> = more.iter().map(String::as_str).collect();
        stage.dump(&tool, "img", &more)?;
        let mut command = Command::new(&tool.bin);
        // No plugin is at hand.
        let done = stage.tool(command.args(["inspect", "--json"]).arg(stage.dir.join("img")))?.ok()?;
        let image: Value =
            serde_json::from_str(&done.said).or_else(|error| wrong(format!("{error}: {}", done.said)))?;
        let objects =
            ["objects", "namespaces", "task_records"].iter().flat_map(|list| image[*list].as_array());
        let vmas =
            image["memory_maps"].as_array().into_iter().flatten().flat_map(|map| map["vmas"].as_array());
        let vmas = vmas.flatten().filter(|vma| vma["kind"] == "PLUGIN");
        for record in objects.flatten().chain(vmas) {
            let plugin = record["plugin"].as_str().unwrap_or_default();
            in_words(&format!("{name}: {plugin}"), &record["record"])?;
            shown.insert(plugin.to_owned());
        }
        let mut command = Command::new(&tool.bin);
        let text = stage.tool(command.args(["inspect", "--mappings"]).arg(stage.dir.join("img")))?.ok()?.said;
        if text.contains("undecoded") {
            return wrong(format!("{name} is shown with opaque records: {text}"));
        }
        stage.kill_tree()?;
        fs::remove_dir_all(&stage.dir).doing("removing the directory")?;
    }
    let mut command = Command::new(&tool.bin);
    let dir = Stage::fresh_dir(test)?;
    let done = stasis_tests::tool::run(
        command.args(["plugins", "--json"]),
        &dir.join("tool.out"),
        Duration::from_secs(20),
    )?;
    let known: Value =
        serde_json::from_str(&done.said).or_else(|error| wrong(format!("{error}: {}", done.said)))?;
    for plugin in known["plugins"].as_array().into_iter().flatten() {
        all.insert(plugin["name"].as_str().unwrap_or_default().to_owned());
    }
    let missing: Vec<&String> = all
        .iter()
        .filter(|name| !shown.contains(*name) && !WITHOUT_RECORDS.contains(&name.as_str()))
        .collect();
    if !shown.contains("rival") || !missing.is_empty() {
        return wrong(format!("no record of {missing:?} was looked at: add a tree that has one"));
    }
    fs::remove_dir_all(&dir).doing("removing the directory")
}
