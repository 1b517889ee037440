//! Bad input and faults: each gets one clear error, leaves the tree as it was (dump) or nothing behind (restore).

mod actions;
mod common;
mod dumping;
mod files;
mod images;
mod plugins;
mod sweep;

use std::process::ExitCode;

use stasis_tests::suite;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if let [_, flag, dir, millis] = &args[..]
        && flag == "--vfork"
    {
        dumping::vfork_workload(dir, millis.parse().unwrap_or(0));
    }
    let mut tests = Vec::new();
    tests.extend(actions::tests());
    tests.extend(dumping::tests());
    tests.extend(files::tests());
    tests.extend(images::tests());
    tests.extend(plugins::tests());
    tests.extend(sweep::tests());
    suite::main(tests)
}
