//! A tree in a cgroup namespace.

use super::{Groups, PATIENCE, expect, furnish, places, same};
use stasis_tests::{
    launch::Flavour,
    scenario::{Doing, Failure, Stage, workload_binary},
    suite::Test,
    tool::Tool,
};
use std::process::Command;

pub fn tests() -> Vec<Test> {
    vec![
        Test::new("namespace::made_again", |test| namespace(test, Flavour::Host, false)),
        Test::new("namespace::made_again_ns", |test| namespace(test, Flavour::Ns, false)),
        Test::new("namespace::other_root", |test| namespace(test, Flavour::Host, true)),
    ]
}

/// What a task sees of its own cgroups, as one of its namespace.
fn inside(pid: i32) -> Result<String, Failure> {
    let mut command = Command::new("nsenter");
    command.args(["-t", &pid.to_string(), "-C", "cat"]).arg(format!("/proc/{pid}/cgroup"));
    let output = command.output().doing("running nsenter")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn namespace(test: &str, flavour: Flavour, elsewhere: bool) -> Result<(), Failure> {
    let tool = Tool::discover().doing("finding the tool")?;
    let groups = Groups::of(test)?;
    furnish(&groups)?;
    let dir = Stage::fresh_dir(test)?;
    let binary = workload_binary().doing("copying the workload binary")?;
    let join: Vec<String> = groups
        .roots
        .iter()
        .map(|(_, root)| format!("echo $$ >{}{}/cgroup.procs", root.display(), groups.top))
        .collect();
    let script = format!(
        "{}; exec unshare -C -- {} tree_blocked {}",
        join.join(" && "),
        binary.display(),
        dir.display()
    );
    let mut stage = Stage::start_command(&dir, flavour, &["/bin/sh", "-c", &script], PATIENCE)?;
    // A task below the root of the namespace.
    let child = stage.pids()[1];
    groups.put(child, "/a")?;
    let (before, seen) = (places(&stage.pids())?, [inside(stage.root)?, inside(child)?]);
    expect(seen[0].lines().all(|line| line.ends_with(":/")) && seen[1].contains(":/a\n"), || {
        format!("{seen:?}")
    })?;
    let pids = stage.pids();
    stage.dump(&tool, "img", &["--manage-cgroups=full"])?;
    stage.assert_gone(&pids)?;
    groups.remove(&groups.top)?;
    let new = format!("{}-new", groups.top);
    let root = format!("--cgroup-root={new}");
    let more: &[&str] = if elsewhere { &[&root] } else { &[] };
    stage.restore(&tool, "img", more)?;
    let now = places(&stage.pids())?;
    let expected: Vec<String> = before
        .values()
        .map(|text| if elsewhere { text.replace(&groups.top, &new) } else { text.clone() })
        .collect();
    let check = || {
        same("memberships", &now.values().cloned().collect(), &expected)?;
        same("what tasks see", &[inside(stage.root)?, inside(stage.pids()[1])?], &seen)?;
        stage.check("the restore")
    };
    let outcome = check();
    stage.kill_tree()?;
    groups.remove(&new)?;
    outcome
}
