//! `stasis inspect`, `plugins` and `check`, as a user runs them.

use stasis::{
    image::{ImageWriter, checksum_shards, records::*},
    plugins::{PluginChoice, Registry},
};
use std::{
    io::Write,
    path::Path,
    process::{Command, Output},
};

fn stasis(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_stasis")).args(arguments).output().expect("the binary runs")
}

fn json(output: &Output) -> serde_json::Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text).unwrap_or_else(|error| {
        panic!("{error} in {text}\nstderr: {}", String::from_utf8_lossy(&output.stderr))
    })
}

/// The protobuf types of the one plugin that is looked at, without naming it here twice.
const PLUGIN: &str = "eventfd";

/// An image with an object of a plugin, whose record is `count: 7, semaphore: true`.
fn write_image(directory: &Path, plugins: Vec<PluginUse>) {
    let path = |path: &str| Some(PathRef { path: path.into(), ..Default::default() });
    let thread = Thread { tid: 5, registers: vec![0; 216], name: b"worker".to_vec(), ..Default::default() };
    let writer = ImageWriter::create(directory).unwrap();
    let write = |result: Result<(), stasis::image::ImageError>| result.unwrap();
    write(writer.write(&Header {
        format: stasis::image::FORMAT_VERSION,
        root_pid: 5,
        page_size: 4096,
        plugins,
        ..Default::default()
    }));
    let threads = vec![thread];
    write(writer.write(&Task {
        pid: 5,
        mm: 1,
        files: 1,
        exe: path("/bin/w"),
        threads,
        ..Default::default()
    }));
    let vma = Vma { start: 0x1000, end: 0x3000, prot: 3, name: b"pool".to_vec(), ..Default::default() };
    write(writer.write(&MemoryMap { id: 1, vmas: vec![vma], ..Default::default() }));
    let extents = vec![PageExtent { address: 0x1000, pages: 1, ..Default::default() }];
    write(writer.write(&PageMap { mm: 1, extents, ..Default::default() }));
    let descriptors = vec![
        Descriptor { number: 0, handle: 1, cloexec: false },
        Descriptor { number: 3, handle: 2, cloexec: true },
    ];
    write(writer.write(&DescriptorTable { id: 1, descriptors }));
    write(writer.write(&Handle { id: 1, path: path("/dev/null"), ..Default::default() }));
    write(writer.write(&Handle { id: 2, object: 1, ..Default::default() }));
    write(writer.write(&Object {
        id: 1,
        plugin: PLUGIN.into(),
        kind: PLUGIN.into(),
        record: vec![0x08, 7, 0x10, 1],
        handles: vec![2],
        description: "counter".into(),
        ..Default::default()
    }));
    let mut shard = writer.shard(0).unwrap();
    shard.write_all(&[9; 4096]).unwrap();
    writer.finish(checksum_shards(&[(0, &shard, 4096)], 1).unwrap(), false).unwrap();
}

#[test]
fn inspect_decodes_records_without_the_plugin() {
    let executable = std::env::current_exe().unwrap();
    let profile = executable.parent().unwrap().parent().unwrap();
    if !profile.join(format!("libstasis_plugin_{PLUGIN}.so")).exists() {
        eprintln!("SKIPPED: no plugin is built (cargo build --workspace)");
        return;
    }
    let choice = PluginChoice {
        directories: vec![profile.into()],
        only: vec![PLUGIN.into()],
        ..PluginChoice::default()
    };
    let registry = Registry::load(&choice).unwrap();
    let outer = tempfile::tempdir().unwrap();
    let directory = outer.path().join("image");
    write_image(&directory, registry.uses([(PLUGIN, PLUGIN)]));
    let directory = directory.to_str().unwrap();
    // No plugin directory: nothing can be loaded.
    let empty = outer.path().to_str().unwrap();

    let output = stasis(&["inspect", directory, "--json", "--verify", "--plugin-dir", empty]);
    assert!(output.status.success(), "{output:?}");
    let value = json(&output);
    assert_eq!(value["ok"], true);
    assert_eq!(value["objects"][0]["record"]["count"], 7);
    assert_eq!(value["objects"][0]["record"]["semaphore"], true);
    assert_eq!(value["tasks"][0]["threads"][0]["name"], "worker");
    assert_eq!(value["handles"][0]["path"]["path"], "/dev/null");
    assert_eq!(value["memory_maps"][0]["vmas"][0]["kind"], "PRIVATE_ANONYMOUS");
    assert_eq!(value["sizes"]["pages-0.img"], 4096);
    assert_eq!(value["fault"], serde_json::Value::Null);

    let output = stasis(&["inspect", "-D", directory, "--mappings"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for expected in [
        "  5 worker: 1 thread, group 0, session 0, /bin/w",
        "memory map 1 (task 5): 1 mappings, 8.0 KiB mapped, 4.0 KiB stored",
        "000000001000-000000003000 rw- private-anonymous 0 pool",
        "     0 /dev/null flags 0o0 position 0",
        r#"     3 close-on-exec eventfd/eventfd counter flags 0o0 role 0 {"count":7,"semaphore":true}"#,
    ] {
        assert!(text.contains(expected), "{expected:?} is not in\n{text}");
    }
}

#[test]
fn inspect_shows_what_restore_would_refuse() {
    let outer = tempfile::tempdir().unwrap();
    let directory = outer.path().join("image");
    write_image(&directory, Vec::new());
    let output = stasis(&["inspect", directory.to_str().unwrap(), "--json"]);
    assert!(!output.status.success());
    let value = json(&output);
    assert_eq!(value["fault"], format!("object 1 needs plugin {PLUGIN:?}, which the header does not list"));
    assert_eq!(value["objects"][0]["record"]["undecoded"], "08071001");
    std::fs::write(directory.join("manifest"), "gone").unwrap();
    let output = stasis(&["inspect", directory.to_str().unwrap()]);
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("manifest is damaged at offset 0"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn check_tries_everything() {
    let directory = tempfile::tempdir().unwrap();
    let output = stasis(&["check", "--json", "--plugin-dir", directory.path().to_str().unwrap()]);
    let value = json(&output);
    let checks = value["checks"].as_array().unwrap();
    assert!(checks.len() > 20);
    let plugins = checks.iter().find(|check| check["name"] == "plugins").unwrap();
    assert_eq!((&plugins["works"], &plugins["needed"]), (&false.into(), &true.into()));
    assert!(!output.status.success(), "nothing can be done without plugins");
    for check in checks {
        assert!(!check["why"].as_str().unwrap().is_empty(), "{check}");
    }
}

#[test]
fn plugins_names_the_directory_that_is_missing() {
    let output = stasis(&["plugins", "--plugin-dir", "/nonexistent"]);
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("cannot read plugin directory /nonexistent"), "{text}");
}
