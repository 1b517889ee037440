//! Bad input and faults: each gets one clear error, leaves the tree as it was (dump) or nothing behind (restore).

mod common;
mod dumping;
mod files;
mod images;
mod plugins;
mod sweep;

use std::process::ExitCode;

use stasis_tests::{
    scenario::Failure,
    suite::{self, Test},
};

/// Open defects and tests that are not trusted yet: by the start of the name, with the reason. An empty list is the aim.
const OPEN: &[(&str, &str)] = &[
    (
        "sweep::",
        "the sweeps over a dump still fail at some points, and those over a restore need more time than CI has",
    ),
    ("dump::traced_by_another", "does not end on a busy machine"),
    ("dump::exits_meanwhile", "fails now and then on a busy machine"),
];

/// Leaves out what is open, unless everything is asked for.
fn without_open(tests: Vec<Test>) -> Vec<Test> {
    if std::env::var_os("STASIS_TEST_OPEN").is_some() {
        return tests;
    }
    let replace = |test: Test| match OPEN.iter().find(|(start, _)| test.name.starts_with(start)) {
        Some((_, why)) => Test::new(test.name, move |_| Err(Failure::Skipped((*why).into()))),
        None => test,
    };
    tests.into_iter().map(replace).collect()
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if let [_, flag, dir, millis] = &args[..]
        && flag == "--vfork"
    {
        dumping::vfork_workload(dir, millis.parse().unwrap_or(0));
    }
    let mut tests = Vec::new();
    tests.extend(dumping::tests());
    tests.extend(files::tests());
    tests.extend(images::tests());
    tests.extend(plugins::tests());
    tests.extend(sweep::tests());
    suite::main(without_open(tests))
}
