//! Plugins by others: built outside the workspace against the plugin API alone, and loaded from `--plugin-dir`.

mod template;

use std::process::ExitCode;

use stasis_tests::suite;

fn main() -> ExitCode {
    suite::main(template::tests())
}
