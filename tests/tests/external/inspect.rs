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
    ("bpf_map", Flavour::Host),
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
    ("ns_clocks", Flavour::Ns),
    ("sysv_shm", Flavour::Ns),
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

/// Dumps a tree, and looks at every record of the image; notes whose they are.
fn look(test: &str, name: &str, flavour: Flavour, shown: &mut BTreeSet<String>) -> Result<(), Failure> {
    let tool = Tool::discover().doing("finding the tool")?;
    let mut stage = Stage::start(test, name, flavour, Duration::from_secs(40))?;
    stage.flags = workloads::find(name).map_or(&[], |workload| workload.flags);
    let mut more = vec!["-R".to_owned()];
    if name == "external_counter" {
        let library = "libstasis_plugin_rival.so";
        let args = ["build", "--quiet"];
        let built = cargo("plugins", &workspace().join("tests/external-plugin"), &args)?.join(library);
        let plugins = plugin_dir(&stage.dir, &[(&built, library)])?;
        more.extend(["--plugin-dir".into(), plugins.display().to_string()]);
        more.extend(["--prefer".into(), "rival".into()]);
    }
    let more: Vec<&str> = more.iter().map(String::as_str).collect();
    stage.dump(&tool, "img", &more)?;
    let image = stage.dir.join("img");
    // No plugin is at hand.
    let mut command = Command::new(&tool.bin);
    let done = stage.tool(command.args(["inspect", "--json"]).arg(&image))?.ok()?;
    let image_shown: Value =
        serde_json::from_str(&done.said).or_else(|error| wrong(format!("{error}: {}", done.said)))?;
    let lists = ["objects", "namespaces", "task_records"];
    let records = lists.iter().flat_map(|list| image_shown[*list].as_array()).flatten();
    let maps = image_shown["memory_maps"].as_array().into_iter().flatten();
    let vmas = maps.flat_map(|map| map["vmas"].as_array()).flatten().filter(|vma| vma["kind"] == "PLUGIN");
    for record in records.chain(vmas) {
        let plugin = record["plugin"].as_str().unwrap_or_default();
        in_words(&format!("{name}: {plugin}"), &record["record"])?;
        shown.insert(plugin.to_owned());
    }
    let mut command = Command::new(&tool.bin);
    let text = stage.tool(command.args(["inspect", "--mappings"]).arg(&image))?.ok()?.said;
    if text.contains("undecoded") {
        return wrong(format!("{name} is shown with opaque records: {text}"));
    }
    stage.kill_tree()?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}

/// The names of all plugins of the build.
fn known(test: &str) -> Result<Vec<String>, Failure> {
    let tool = Tool::discover().doing("finding the tool")?;
    let dir = Stage::fresh_dir(test)?;
    let mut command = Command::new(&tool.bin);
    let output = dir.join("tool.out");
    let done =
        stasis_tests::tool::run(command.args(["plugins", "--json"]), &output, Duration::from_secs(20))?;
    fs::remove_dir_all(&dir).doing("removing the directory")?;
    let known: Value =
        serde_json::from_str(&done.said).or_else(|error| wrong(format!("{error}: {}", done.said)))?;
    let plugins = known["plugins"].as_array().into_iter().flatten();
    Ok(plugins.filter_map(|plugin| plugin["name"].as_str()).map(String::from).collect())
}

fn every_record(test: &str) -> Result<(), Failure> {
    let mut shown = BTreeSet::new();
    for (name, flavour) in TREES {
        look(test, name, *flavour, &mut shown)?;
    }
    for plugin in known(test)? {
        if WITHOUT_RECORDS.contains(&plugin.as_str()) {
            continue;
        }
        // A plugin that is newer than the list above has workloads that are named for it.
        let word = plugin.split('-').next_back().unwrap_or(&plugin);
        let named = workloads::ALL.iter().filter(|w| !w.apart && !w.heavy && w.name.contains(word));
        for workload in named {
            if !shown.contains(&plugin) {
                look(test, workload.name, Flavour::Host, &mut shown)?;
            }
        }
        if !shown.contains(&plugin) {
            return wrong(format!("no record of {plugin} was looked at: add a tree that has one"));
        }
    }
    Ok(())
}
