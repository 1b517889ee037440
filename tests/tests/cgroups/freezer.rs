//! `--freeze-cgroup`, in version 1 and 2.

use super::{Groups, POINTS, cleared, expect, killed, same, traced, tree};
use stasis_tests::{launch::Flavour, scenario::Failure, suite::Test, tool::Tool};
use std::{path::PathBuf, time::Instant};

pub fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for (version, controllers) in [("v1", "freezer"), ("v2", "")] {
        tests.push(Test::new(format!("freezer::{version}"), move |test| freezer(test, controllers)));
        tests.push(Test::new(format!("freezer::killed_{version}"), move |test| {
            killed_dump(test, controllers)
        }));
    }
    tests
}

fn group(groups: &Groups, controllers: &str) -> Result<PathBuf, Failure> {
    let group = groups.directory(controllers, "");
    group.ok_or_else(|| Failure::Skipped("no such hierarchy is mounted".into()))
}

/// Whether the group is thawed, in the words of its version.
fn state(groups: &Groups, controllers: &str) -> Option<String> {
    groups.get(controllers, "", if controllers.is_empty() { "cgroup.freeze" } else { "freezer.state" })
}

/// Freezes or thaws it, and gives what `state` says from then on.
fn freeze(groups: &Groups, controllers: &str, frozen: bool) -> Result<Option<String>, Failure> {
    let (file, text) = match (controllers, frozen) {
        ("", true) => ("cgroup.freeze", "1"),
        ("", false) => ("cgroup.freeze", "0"),
        (_, true) => ("freezer.state", "FROZEN"),
        (_, false) => ("freezer.state", "THAWED"),
    };
    groups.set(controllers, "", file, text)?;
    let wanted = Some(text.to_owned());
    // For a while it is FREEZING.
    becomes(groups, controllers, &wanted)?;
    Ok(wanted)
}

/// Waits until the state is this one.
fn becomes(groups: &Groups, controllers: &str, wanted: &Option<String>) -> Result<(), Failure> {
    cleared(|| Some(state(groups, controllers)).filter(|now| now != wanted).into_iter().collect())
}

/// A dump that leaves the tree running, of a tree that runs and of one that is frozen already; and one that kills it.
fn freezer(test: &str, controllers: &str) -> Result<(), Failure> {
    let (mut stage, tool, groups) = tree(test, "tree_groups", Flavour::Host)?;
    let flag = format!("--freeze-cgroup={}", group(&groups, controllers)?.display());
    let before = stage.look_when_still()?;
    let thawed = state(&groups, controllers);
    stage.dump(&tool, "running", &["-R", &flag])?;
    same("the state", &state(&groups, controllers), &thawed)?;
    stage.compare(&before, "the dump")?;
    let frozen = freeze(&groups, controllers, true)?;
    expect(frozen != thawed, || format!("{frozen:?}"))?;
    stage.dump(&tool, "frozen", &["-R", &flag])?;
    becomes(&groups, controllers, &frozen)?;
    freeze(&groups, controllers, false)?;
    stage.compare(&before, "the dump of a frozen tree")?;
    let pids = stage.pids();
    stage.dump(&tool, "img", &[&flag, "--manage-cgroups"])?;
    stage.assert_gone(&pids)?;
    stage.restore(&tool, "img", &[])?;
    stage.compare(&before, "the restore")?;
    stage.check("the restore")?;
    same("the state", &state(&groups, controllers), &thawed)
}

/// The command dies at points spread over a dump; the group is always thawed.
fn killed_dump(test: &str, controllers: &str) -> Result<(), Failure> {
    let (stage, tool, groups) = tree(test, "tree_groups", Flavour::Host)?;
    let flag = format!("--freeze-cgroup={}", group(&groups, controllers)?.display());
    let before = stage.look_when_still()?;
    let thawed = state(&groups, controllers);
    let dump = |tool: &Tool, name: &str| tool.dump(stage.root, &stage.dir.join(name), &["-R", &flag]);
    let began = Instant::now();
    stage.tool(&mut dump(&tool, "whole"))?.ok()?;
    let whole = began.elapsed();
    for point in 0..POINTS {
        let mut command = dump(&tool, &format!("img{point}"));
        killed(&stage, &mut command, whole * point / POINTS, point % 2 == 1)?;
        becomes(&groups, controllers, &thawed)?;
        cleared(|| stage.pids().into_iter().filter(|pid| traced(*pid)).collect())?;
    }
    stage.compare(&before, "killed dumps")?;
    stage.check("killed dumps")
}
