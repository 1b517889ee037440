//! Scripts of the user: called at their points with what they need, and heeded when they fail.

use std::fs;

use stasis_tests::scenario::{Doing, Failure};
use stasis_tests::suite::Test;

use crate::common::{Case, refused, succeeded};

pub fn tests() -> Vec<Test> {
    vec![
        Test::new("actions::in_order", in_order),
        Test::new("actions::failing_lock", failing_lock),
        Test::new("actions::failing_restore", failing_restore),
    ]
}

/// What the script of a case has written, and nothing of it any more afterwards.
fn said(case: &Case) -> Result<Vec<String>, Failure> {
    let log = case.stage.dir.join("actions");
    let text = fs::read_to_string(&log).doing("reading what the script wrote")?;
    fs::remove_file(log).doing("removing what the script wrote")?;
    Ok(text.lines().map(Into::into).collect())
}

fn expect(what: &'static str, said: Vec<String>, wanted: &[String]) -> Result<(), Failure> {
    if said == wanted { Ok(()) } else { Err(Failure::Changed(what, format!("is {said:?}, not {wanted:?}"))) }
}

/// A script that writes each action, and fails at one.
fn script(case: &Case, fails_at: &str) -> String {
    let log = case.stage.dir.join("actions");
    format!(
        "echo $CRTOOLS_SCRIPT_ACTION ${{CRTOOLS_INIT_PID:-none}} ${{CRTOOLS_IMAGE_DIR##*/}} >> {}; \
         test $CRTOOLS_SCRIPT_ACTION != {fails_at}",
        log.display()
    )
}

fn lines(actions: &[(&str, Option<i32>)]) -> Vec<String> {
    let pid = |pid: Option<i32>| pid.map_or_else(|| "none".to_owned(), |pid| pid.to_string());
    actions.iter().map(|(action, init)| format!("{action} {} img", pid(*init))).collect()
}

fn in_order(test: &str) -> Result<(), Failure> {
    let mut case = Case::start(test, "pipe_data")?;
    let root = Some(case.stage.root);
    let script = script(&case, "nothing");
    succeeded(case.dump("img", &["--action-script", &script])?)?;
    let wanted = [("pre-dump", root), ("network-lock", root), ("post-dump", root)];
    expect("dump", said(&case)?, &lines(&wanted))?;
    let tool = stasis_tests::tool::Tool::discover().doing("finding the tool")?;
    case.stage.restore(&tool, "img", &["--action-script", &script])?;
    let wanted = [
        ("pre-restore", None),
        ("setup-namespaces", root),
        ("post-setup-namespaces", root),
        ("post-restore", root),
        ("network-unlock", root),
        ("pre-resume", root),
        ("post-resume", root),
    ];
    expect("restore", said(&case)?, &lines(&wanted))?;
    case.finish()
}

fn failing_lock(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "pipe_data")?;
    let root = Some(case.stage.root);
    let script = script(&case, "network-lock");
    refused(&case.dump("img", &["--action-script", &script])?, &["network-lock", "action script"])?;
    let wanted = [("pre-dump", root), ("network-lock", root), ("network-unlock", root)];
    expect("dump", said(&case)?, &lines(&wanted))?;
    case.unharmed()?;
    case.finish()
}

fn failing_restore(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "pipe_data")?;
    succeeded(case.dump("img", &[])?)?;
    let script = script(&case, "pre-resume");
    refused(&case.restore("img", &["--action-script", &script])?, &["pre-resume", "action script"])?;
    case.nothing_left()?;
    case.end()
}
