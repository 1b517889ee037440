//! The version promise, with real builds: a host of the next minor version, whose ABI has a field, trait methods and a kind of
//! hook more, works with the plugins of today; another major version and changed layouts are refused in one line.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use stasis_tests::external::{cargo, plugin_dir, workspace};
use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{Doing, Failure, Stage};
use stasis_tests::suite::Test;
use stasis_tests::tool::{self, Done, Tool, target_dir};

/// All tests of this file.
pub fn tests() -> Vec<Test> {
    let mut tests = vec![
        Test::new("versions::newer_host", newer_host),
        Test::new("versions::newer_plugin", newer_plugin),
        Test::new("versions::other_major", |test| {
            let words =
                ["is built for plugin API 2.0.0, this stasis has 1.", "rebuild it against stasis-plugin-api"];
            refused(test, "major", &[MAJOR], &words)
        }),
        Test::new("versions::changed_layout", |test| {
            refused(test, "changed", &[CHANGED], &["does not fit this stasis", "rebuild it against"])
        }),
    ];
    // It builds a host.
    tests[0].heavy = true;
    tests
}

/// A change of a file: (file, what is there, what is put in its place).
type Change = (&'static str, &'static str, &'static str);

/// The next minor version, built of appended things as plugin-api's documentation allows.
const NEWER: &[Change] = &[
    ("plugin-api/Cargo.toml", "\nversion.workspace = true", "\nversion = \"1.1.0\""),
    (
        "plugin-api/src/abi.rs",
        "    fn hold(&self, begin: bool);\n",
        "    fn hold(&self, begin: bool);\n    fn later(&self) -> u32 {\n        7\n    }\n",
    ),
    (
        "plugin-api/src/abi.rs",
        "    fn settle(&self, host: HostRef<'_>, object: &ObjectInfo, record: RSlice<'_, u8>) -> AbiResult<()>;\n",
        "    fn settle(&self, host: HostRef<'_>, object: &ObjectInfo, record: RSlice<'_, u8>) -> AbiResult<()>;\n    \
         fn later(&self) -> u32 {\n        7\n    }\n",
    ),
    (
        "plugin-api/src/abi.rs",
        "/// The root module of every plugin.\n",
        "#[sabi_trait]\npub trait LaterAbi: Send + Sync {\n    #[sabi(last_prefix_field)]\n    fn declaration(&self) -> \
         KindDeclaration;\n}\npub type LaterBox = LaterAbi_TO<'static, RBox<()>>;\n\n/// The root module of every \
         plugin.\n",
    ),
    (
        "plugin-api/src/abi.rs",
        "    pub lifecycles: extern \"C\" fn() -> RVec<LifecycleBox>,\n",
        "    pub lifecycles: extern \"C\" fn() -> RVec<LifecycleBox>,\n    #[sabi(missing_field(option))]\n    pub laters: \
         extern \"C\" fn() -> RVec<LaterBox>,\n",
    ),
    (
        "plugin-api/src/register.rs",
        "        lifecycles,\n    }",
        "        lifecycles,\n        laters,\n    }",
    ),
    (
        "plugin-api/src/register.rs",
        "/// The root module of the library",
        "extern \"C\" fn laters() -> RVec<crate::abi::LaterBox> {\n    RVec::new()\n}\n\n/// The root module of the library",
    ),
];

/// The host uses what is new, and does without where a plugin lacks it.
const NEWER_HOST: &[Change] = &[
    (
        "core/src/plugins/loader.rs",
        "    if plugin.kinds().is_empty() {",
        "    let later = plugin.descriptors.iter().map(|kind| kind.hook.later()).collect::<Vec<_>>();\n    \
         assert!(later.iter().all(|n| *n == 7));\n    \
         assert_eq!(module.laters().is_some(), plugin.api_version != \"1.0.0\");\n    if plugin.kinds().is_empty() {",
    ),
    ("Cargo.toml", MEMBERS, "members = [\"core\", \"plugin-api\"]"),
    // Its own code need not be fast, but built fast.
    ("Cargo.toml", "[profile.release]", "[profile.dev.package.stasis]\nopt-level = 0\n\n[profile.release]"),
];

const MEMBERS: &str =
    "members = [\"core\", \"plugin-api\", \"plugins/*\", \"tests\", \"tests/fault-plugin\"]";
const API_ALONE: Change = ("Cargo.toml", MEMBERS, "members = [\"plugin-api\"]");
const MAJOR: Change = ("plugin-api/Cargo.toml", "\nversion.workspace = true", "\nversion = \"2.0.0\"");
const CHANGED: Change = (
    "plugin-api/src/model.rs",
    "    /// Parent.\n    pub ppid: i32,",
    "    /// Something else.\n    pub more: u64,\n    /// Parent.\n    pub ppid: i32,",
);

/// Whether a file of the workspace belongs into a copy of it.
fn is_source(path: &Path) -> bool {
    !["target", ".git"].iter().any(|name| path.ends_with(name))
}

/// Copies what has changed, so that cargo builds only what it must.
fn copy(from: &Path, to: &Path, changes: &[&[Change]], name: &str) -> Result<(), Failure> {
    if from.is_dir() {
        fs::create_dir_all(to).doing("making a directory")?;
        for entry in fs::read_dir(from).doing("reading the workspace")?.flatten() {
            let file = entry.file_name();
            let inner = format!("{name}/{}", file.to_string_lossy());
            if is_source(&entry.path()) {
                copy(&entry.path(), &to.join(file), changes, inner.trim_start_matches('/'))?;
            }
        }
        return Ok(());
    }
    let mut text = fs::read(from).doing("reading the workspace")?;
    for (_, old, new) in changes.iter().copied().flatten().filter(|(file, ..)| *file == name) {
        let before = String::from_utf8_lossy(&text).into_owned();
        if before.matches(old).count() != 1 {
            return Err(Failure::Changed("a change of the API", format!("{name} has not one {old:?}")));
        }
        text = before.replacen(old, new, 1).into_bytes();
    }
    if fs::read(to).ok().as_deref() != Some(&text) {
        fs::write(to, text).doing("copying the workspace")?;
    }
    Ok(())
}

/// A copy of the workspace with changes, at a place that stays the same, and what is built there.
fn changed(name: &str, changes: &[&[Change]], rooms: &[&str]) -> Result<PathBuf, Failure> {
    let target = target_dir().doing("finding the target directory")?;
    let to = target.parent().unwrap_or(&target).join("external-sources").join(name);
    fs::create_dir_all(&to).doing("making a directory")?;
    for room in rooms {
        copy(&workspace().join(room), &to.join(room), changes, room)?;
    }
    Ok(to)
}

/// The plugin rival, built against a changed API.
fn rival(name: &str, changes: &[&[Change]]) -> Result<PathBuf, Failure> {
    // The API takes its version and its dependencies from the workspace.
    let alone: &[Change] = &[API_ALONE];
    let changes = [changes, &[alone]].concat();
    let copy = changed(name, &changes, &["Cargo.toml", "plugin-api", "tests/external-plugin"])?;
    let args = ["build", "--quiet", "-p", "stasis-plugin-rival"];
    Ok(cargo(name, &copy.join("tests/external-plugin"), &args)?.join("libstasis_plugin_rival.so"))
}

fn run(bin: &Path, dir: &Path, args: &[&str]) -> Result<Done, Failure> {
    let mut command = Command::new(bin);
    command.args(args);
    Ok(tool::run(&mut command, &dir.join("tool.out"), Duration::from_secs(20))?)
}

fn newer_host(test: &str) -> Result<(), Failure> {
    let rooms = ["Cargo.toml", "Cargo.lock", "rustfmt.toml", "plugin-api", "core", "parasite", "restorer"];
    let copy = changed("newer-host", &[NEWER, NEWER_HOST], &rooms)?;
    let built =
        cargo("newer-host", &copy, &["build", "--quiet", "-p", "stasis", "--bin", "stasis"])?.join("stasis");
    let dir = Stage::fresh_dir(test)?;
    let (newer, name) = (rival("newer", &[NEWER])?, "libstasis_plugin_rival.so");
    let plugins = plugin_dir(&dir, &[(&newer, name)])?.to_string_lossy().into_owned();
    // Plugins of both versions side by side.
    let said = run(&built, &dir, &["plugins", "--json", "--plugin-dir", &plugins, "--prefer", "eventfd"])?
        .ok()?
        .said;
    let known: Value = serde_json::from_str(&said).unwrap_or_default();
    let known = known["plugins"].as_array().cloned().unwrap_or_default();
    let version =
        |name: &str| known.iter().find(|plugin| plugin["name"] == name).map(|plugin| &plugin["api_version"]);
    if known.len() < 15
        || version("rival") != Some(&"1.1.0".into())
        || version("pipe") != Some(&"1.0.0".into())
    {
        return Err(Failure::Changed("a newer host", said));
    }
    let mut stage = Stage::start(test, "mixture", Flavour::Host, Duration::from_secs(40))?;
    let plugins = plugin_dir(&stage.dir, &[])?.to_string_lossy().into_owned();
    let tool = Tool { bin: built, ..Tool::discover().doing("finding the tool")? };
    let flags = ["--plugin-dir", &plugins];
    let before = stage.look_when_still()?;
    stage.dump(&tool, "running", &[&["-R"], &flags[..]].concat())?;
    stage.compare(&before, "the dump")?;
    stage.dump(&tool, "img", &flags)?;
    stage.restore(&tool, "img", &flags)?;
    stage.compare(&before, "dump and restore")?;
    stage.check("dump and restore")?;
    stage.kill_tree()?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}

/// A plugin that was built against the next minor version and uses nothing of what is new there.
fn newer_plugin(test: &str) -> Result<(), Failure> {
    let newer = rival("newer", &[NEWER])?;
    let mut stage = Stage::start(test, "external_counter", Flavour::Host, Duration::from_secs(40))?;
    let plugins =
        plugin_dir(&stage.dir, &[(&newer, "libstasis_plugin_rival.so")])?.to_string_lossy().into_owned();
    let tool = Tool::discover().doing("finding the tool")?;
    stage.dump(&tool, "img", &["--plugin-dir", &plugins, "--prefer", "rival"])?;
    stage.restore(&tool, "img", &["--plugin-dir", &plugins])?;
    stage.check("dump and restore")?;
    stage.kill_tree()?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}

/// A plugin that this host cannot work with is refused in one line, which names it.
fn refused(test: &str, name: &str, changes: &[Change], words: &[&str]) -> Result<(), Failure> {
    let dir = Stage::fresh_dir(test)?;
    let library = rival(name, &[changes])?;
    let plugins = plugin_dir(&dir, &[(&library, "libstasis_plugin_rival.so")])?;
    let tool = Tool::discover().doing("finding the tool")?;
    let done = run(&tool.bin, &dir, &["plugins", "--plugin-dir", &plugins.to_string_lossy()])?;
    let missing = words.iter().find(|words| !done.said.contains(**words));
    let one_line = done.said.trim_end().lines().count() == 1 && done.said.len() < 800;
    if done.status.success()
        || missing.is_some()
        || !one_line
        || !done.said.contains("libstasis_plugin_rival.so")
    {
        return Err(Failure::Changed("a refusal", format!("{missing:?} is not in: {}", done.said)));
    }
    fs::remove_dir_all(&dir).doing("removing the directory")
}
