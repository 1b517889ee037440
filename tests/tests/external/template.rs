//! `stasis plugins new`: what it writes builds, passes its own tests, loads, and keeps what it says.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use stasis_tests::external::{cargo, plugin_dir, workspace};
use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{Doing, Failure, Stage};
use stasis_tests::suite::Test;
use stasis_tests::tool::{self, Tool};
use stasis_tests::workloads::external_file::DIR;

/// All tests of this file.
pub fn tests() -> Vec<Test> {
    vec![Test::new("template::new_plugin", new_plugin)]
}

/// Runs the tool apart from any tree.
fn run(tool: &Tool, dir: &Path, args: &[&str]) -> Result<tool::Done, Failure> {
    let mut command = Command::new(&tool.bin);
    command.args(args).current_dir(dir);
    Ok(tool::run(&mut command, &dir.join("tool.out"), Duration::from_secs(20))?.ok()?)
}

fn new_plugin(test: &str) -> Result<(), Failure> {
    let tool = Tool::discover().doing("finding the tool")?;
    let dir = Stage::fresh_dir(test)?;
    let api = workspace().join("plugin-api");
    run(&tool, &dir, &["plugins", "new", "mine", "--api-path", &api.to_string_lossy()])?;
    let again = run(&tool, &dir, &["plugins", "new", "mine"]).err().map(|failure| failure.to_string());
    if !again.is_some_and(|said| said.contains("cannot write mine: File exists")) {
        return Err(Failure::Changed("the second call", "it must not touch what is there".into()));
    }
    let source = dir.join("mine");
    cargo("template", &source, &["test", "--quiet"])?;
    let library = cargo("template", &source, &["build", "--quiet"])?.join("libstasis_plugin_mine.so");
    let plugins = plugin_dir(&dir, &[(&library, "libstasis_plugin_mine.so")])?;
    let plugins = plugins.to_string_lossy().into_owned();
    let known = run(&tool, &dir, &["plugins", "--plugin-dir", &plugins])?.said;
    if !known.contains("mine 0.1.0") || !known.contains(&format!("path {DIR}/*")) {
        return Err(Failure::Changed("loading it", known));
    }
    // The machine's own /run stays as it is.
    mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), None::<&str>).doing("mounting a /run")?;
    let binary = stasis_tests::scenario::workload_binary().doing("copying the workload binary")?;
    let argv = [&binary.to_string_lossy(), "external_file", &*dir.to_string_lossy()];
    let mut stage = Stage::start_command(&dir, Flavour::Host, &argv, Duration::from_secs(40))?;
    let before = stage.look_when_still()?;
    stage.dump(&tool, "img", &["--plugin-dir", &plugins])?;
    fs::remove_file(format!("{DIR}/file")).doing("removing the file")?;
    let without = stage.restore(&tool, "img", &[]).err().map(|failure| failure.to_string());
    if !without.is_some_and(|said| said.contains("plugin mine 0.1.0, which is not installed")) {
        return Err(Failure::Changed("a restore without the plugin", "it must name the plugin".into()));
    }
    stage.restore(&tool, "img", &["--plugin-dir", &plugins])?;
    stage.compare(&before, "dump and restore")?;
    stage.check("dump and restore")?;
    stage.kill_tree()?;
    fs::remove_dir_all(&dir).doing("removing the directory")
}
