//! Plugins that claim the same, and one that exports nothing.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use stasis_tests::external::{cargo, plugin_dir, workspace};
use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{Doing, Failure, Stage};
use stasis_tests::suite::Test;
use stasis_tests::tool::Tool;

/// All tests of this file.
pub fn tests() -> Vec<Test> {
    vec![
        Test::new("rival::prefer", prefer),
        Test::new("rival::exports_nothing", exports_nothing),
        Test::new("rival::own_tests", own_tests),
    ]
}

fn expect(holds: bool, why: impl Into<String>) -> Result<(), Failure> {
    if holds { Ok(()) } else { Err(Failure::Changed("the command", why.into())) }
}

/// A library of the external workspace.
fn built(name: &str) -> Result<(PathBuf, String), Failure> {
    let library = format!("libstasis_plugin_{name}.so");
    let products = cargo("plugins", &workspace().join("tests/external-plugin"), &["build", "--quiet"])?;
    Ok((products.join(&library), library))
}

/// Two plugins claim event counters: an error by name, unless one is preferred or left out; the image says whose it is.
fn prefer(test: &str) -> Result<(), Failure> {
    let tool = Tool::discover().doing("finding the tool")?;
    let mut stage = Stage::start(test, "external_counter", Flavour::Host, Duration::from_secs(40))?;
    let (library, name) = built("rival")?;
    let plugins = plugin_dir(&stage.dir, &[(&library, &name)])?.to_string_lossy().into_owned();
    let flags =
        |more: [&'static str; 2]| ["--plugin-dir".into(), plugins.clone(), more[0].into(), more[1].into()];
    let images = stage.dir.join("refused");
    fs::create_dir_all(&images).doing("making the image directory")?;
    let done = stage.tool(&mut tool.dump(stage.root, &images, &["--plugin-dir", &plugins]))?;
    expect(
        !done.status.success()
            && done.said.contains("plugins eventfd and rival both claim anon_inode:[eventfd]")
            && done.said.contains("--prefer eventfd or --prefer rival"),
        done.said,
    )?;
    let before = stage.look_when_still()?;
    let cases = [
        (["--prefer", "rival"], "rival"),
        (["--prefer", "eventfd"], "eventfd"),
        (["--without", "eventfd"], "rival"),
    ];
    for (number, (more, owner)) in cases.into_iter().enumerate() {
        let image = format!("img{number}");
        let flags: [String; 4] = flags(more);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        stage.dump(&tool, &image, &flags)?;
        let mut inspect = Command::new(&tool.bin);
        let shown = stage.tool(inspect.arg("inspect").arg(stage.dir.join(&image)))?.ok()?.said;
        let other = if owner == "rival" { "plugin eventfd" } else { "plugin rival" };
        expect(shown.contains(&format!("plugin {owner}")) && !shown.contains(other), shown)?;
        // A restore loads what the image needs: the two do not meet.
        stage.restore(&tool, &image, &flags[..2])?;
        stage.compare(&before, "dump and restore")?;
    }
    stage.check("dump and restore")?;
    stage.kill_tree()?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}

/// The unit tests of all plugins there.
fn own_tests(_: &str) -> Result<(), Failure> {
    cargo("plugins", &workspace().join("tests/external-plugin"), &["test", "--quiet"]).map(drop)
}

fn exports_nothing(test: &str) -> Result<(), Failure> {
    let tool = Tool::discover().doing("finding the tool")?;
    let dir = Stage::fresh_dir(test)?;
    let (library, name) = built("empty")?;
    let plugins = plugin_dir(&dir, &[(&library, &name)])?;
    let mut command = Command::new(&tool.bin);
    command.arg("plugins").arg("--plugin-dir").arg(&plugins);
    let done = stasis_tests::tool::run(&mut command, &dir.join("tool.out"), Duration::from_secs(20))?;
    expect(
        !done.status.success()
            && done.said.contains(&name)
            && done.said.contains("it exports nothing that it could do"),
        done.said,
    )?;
    fs::remove_dir_all(&dir).doing("removing the directory")
}
