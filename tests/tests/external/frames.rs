//! The plugin frames of `tests/external-plugin`: a character device, and mappings of a ring that the kernel fills.

use std::fs;
use std::path::Path;
use std::time::Duration;

use stasis_tests::external::{cargo, plugin_dir, workspace};
use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{Doing, Failure, Stage};
use stasis_tests::suite::Test;
use stasis_tests::tool::Tool;

/// All tests of this file.
pub fn tests() -> Vec<Test> {
    vec![Test::new("frames::tunnel_and_ring", tunnel_and_ring), Test::new("frames::without", without)]
}

fn start(test: &str) -> Result<(Stage, Tool), Failure> {
    if !Path::new("/dev/net/tun").exists() {
        return Err(Failure::Skipped("there is no /dev/net/tun".into()));
    }
    let tool = Tool::discover().doing("finding the tool")?;
    Ok((Stage::start(test, "external_frames", Flavour::Host, Duration::from_secs(40))?, tool))
}

fn tunnel_and_ring(test: &str) -> Result<(), Failure> {
    let (mut stage, tool) = start(test)?;
    let library = "libstasis_plugin_frames.so";
    let built =
        cargo("plugins", &workspace().join("tests/external-plugin"), &["build", "--quiet"])?.join(library);
    let plugins = plugin_dir(&stage.dir, &[(&built, library)])?;
    let flags = ["--plugin-dir", &*plugins.to_string_lossy(), "--prefer", "frames"];
    let before = stage.look_when_still()?;
    stage.dump(&tool, "running", &[&["-R"], &flags[..]].concat())?;
    stage.compare(&before, "the dump")?;
    for round in ["one", "two", "three"] {
        stage.dump(&tool, round, &flags)?;
        stage.restore(&tool, round, &flags[..2])?;
        stage.compare(&before, "dump and restore")?;
    }
    stage.check("dump and restore")?;
    stage.kill_tree()?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}

/// Without the plugin: refused, or left out with a hole in the memory.
fn without(test: &str) -> Result<(), Failure> {
    let (mut stage, tool) = start(test)?;
    let images = stage.dir.join("refused");
    fs::create_dir_all(&images).doing("making the image directory")?;
    let done = stage.tool(&mut tool.dump(stage.root, &images, &["--without", "ns-net"]))?;
    let words = ["/dev/net/tun is claimed by no enabled plugin", "mapping ", "--on-unclaimed mapping=skip"];
    if done.status.success() || words.iter().any(|words| !done.said.contains(words)) {
        return Err(Failure::Changed("a refusal", done.said));
    }
    let maps = |stage: &Stage| fs::read_to_string(format!("/proc/{}/maps", stage.root)).unwrap_or_default();
    let had = maps(&stage);
    // The plugin packet would refuse the socket because of its ring; ns-net knows tun devices.
    let wishes =
        ["--without", "packet,ns-net", "--on-unclaimed", "all=close", "--on-unclaimed", "mapping=skip"];
    stage.dump(&tool, "img", &wishes)?;
    stage.restore(&tool, "img", &[])?;
    let has = maps(&stage);
    let rings = |maps: &str| maps.lines().filter(|line| line.contains("socket:[")).count();
    if rings(&had) != 1 || rings(&has) != 0 || has.lines().count() + 1 != had.lines().count() {
        return Err(Failure::Changed("a mapping that was left out", format!("{had}\nand then\n{has}")));
    }
    stage.kill_tree()?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}
