//! All workloads in one binary: `stasis-workload NAME DIR`, or `stasis-workload launch FLAVOUR DIR COMMAND...` to start
//! any command as the root of a tree of its own, in fresh namespaces if the flavour says so.

use std::path::Path;
use std::process::ExitCode;

use stasis_tests::emulator;
use stasis_tests::launch::{self, Flavour};
use stasis_tests::workloads;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["launch", flavour, dir, ref command @ ..] if !command.is_empty() => match Flavour::parse(flavour) {
            Some(flavour) => launch::launch(flavour, command, Path::new(dir)),
            None => usage(),
        },
        [emulator::NAME, dir, ref command @ ..] if !command.is_empty() => {
            emulator::run(Path::new(dir), command)
        }
        ["list"] => {
            for workload in workloads::ALL {
                println!("{:28} {}", workload.name, workload.about);
            }
            ExitCode::SUCCESS
        }
        [name, dir] => workloads::run(name, Path::new(dir)),
        _ => usage(),
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: stasis-workload list | NAME DIR | launch host|ns|user DIR COMMAND...");
    ExitCode::from(2)
}
