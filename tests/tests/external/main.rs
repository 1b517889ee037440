//! Plugins by others: built outside the workspace against the plugin API alone, and loaded from `--plugin-dir`. And dumps with
//! some of the plugins only.

mod frames;
mod inspect;
mod redis;
mod rival;
mod selective;
mod template;
mod versions;

use std::process::ExitCode;

use stasis_tests::suite;

fn main() -> ExitCode {
    let mut tests = template::tests();
    tests.extend(frames::tests());
    tests.extend(inspect::tests());
    tests.extend(redis::tests());
    tests.extend(rival::tests());
    tests.extend(selective::tests());
    tests.extend(versions::tests());
    suite::main(tests)
}
