//! The binary: a thin face on the library, or that of CRIU if it is called so.

use std::{env, process::ExitCode};

fn main() -> ExitCode {
    let name = env::args_os().next().unwrap_or_default();
    if stasis::criu::is_meant(&name) {
        stasis::criu::main(env::args_os().skip(1))
    } else {
        stasis::cli::main()
    }
}
