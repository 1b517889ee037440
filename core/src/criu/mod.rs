//! The face of CRIU: called by the name `criu` (a link), the binary takes that tool's flags, gives its output, and writes the files
//! beside an image that its callers look for. Container engines drive it unchanged.
//!
//! Everything ends in the same [`DumpOptions`](crate::dump::DumpOptions) and [`RestoreOptions`](crate::restore::RestoreOptions) as the
//! own command line. Flags that belong to a resource kind are handed to whichever plugin declares them. The image is that of
//! stasis: images of CRIU are not read.

mod arguments;
mod files;
mod flags;
mod options;
mod rpc;
mod run;

use arguments::{Arguments, UsageError};
use std::{
    ffi::{OsStr, OsString},
    path::Path,
    process::ExitCode,
};

/// The version of the interface, and so what `criu --version` answers.
pub const VERSION: (i32, i32) = (4, 2);
/// Read before every command line, if it is there.
const DEFAULT_CONFIG: &str = "/etc/criu/default.conf";

mod records {
    #![allow(missing_docs)]
    include!(concat!(env!("OUT_DIR"), "/criu.rs"));
}

/// Whether somebody who starts a program by this name means CRIU.
pub fn is_meant(name: &OsStr) -> bool {
    Path::new(name).file_name() == Some(OsStr::new("criu"))
}

/// Actions of CRIU that are not there, and why.
const REFUSED: &[(&str, &str)] = &[
    ("pre-dump", "every dump is a whole one"),
    ("page-server", "pages cannot be sent to another machine"),
    ("lazy-pages", "memory is restored before the tasks run"),
    ("service", "there is no daemon; `criu swrk FD` serves one caller"),
    ("cpuinfo", "images have what is needed of the processor, and a restore checks it"),
    ("dedup", "every image is whole"),
    ("exec", "nothing is executed in other tasks"),
    ("show", "use `stasis inspect`"),
];

/// What `criu check --feature NAME` says, by name.
const FEATURES: &[(&str, bool)] = &[
    ("mem_dirty_track", false),
    ("lazy_pages", false),
    ("uffd", false),
    ("uffd-noncoop", false),
    ("pidfd_store", false),
];

/// Runs a command line (without the program's name) and gives the exit status: 0, or 1 if it failed; that of the root task, if
/// it was waited for.
pub fn main(line: impl IntoIterator<Item = OsString>) -> ExitCode {
    Arguments::parse(line).and_then(act).unwrap_or_else(|error| {
        eprintln!("criu: {error}");
        ExitCode::FAILURE
    })
}

fn act(mut arguments: Arguments) -> Result<ExitCode, UsageError> {
    if arguments.has("version") {
        println!("Version: {}.{}\nGitID: stasis-{}", VERSION.0, VERSION.1, env!("CARGO_PKG_VERSION"));
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(path) = arguments.last("config").map(ToOwned::to_owned) {
        arguments.prepend(Arguments::read_config(Path::new(&path))?);
    }
    if !arguments.has("no-default-config") && Path::new(DEFAULT_CONFIG).exists() {
        arguments.prepend(Arguments::read_config(Path::new(DEFAULT_CONFIG))?);
    }
    let words: Vec<&str> = arguments.words.iter().map(String::as_str).collect();
    match words[..] {
        ["dump"] => {
            let place = run::Place::named(&arguments)?;
            Ok(run::dump(&arguments, &place, None, |_| {})?)
        }
        ["restore"] => {
            let place = run::Place::named(&arguments)?;
            run::restore_and_wait(&arguments, &place)
        }
        ["check"] => Ok(check(&arguments)),
        ["swrk", number] => Ok(rpc::serve(number)?),
        ["swrk"] => Err(UsageError::Missing("the number of a socket after swrk")),
        [] => Err(UsageError::Missing("an action (dump, restore, check, swrk)")),
        [action, ..] => Err(match REFUSED.iter().find(|(name, _)| *name == action) {
            Some((name, why)) => UsageError::NoSuchAction { action: (*name).into(), why },
            None => UsageError::NoSuchAction { action: words.join(" "), why: "there is no such action" },
        }),
    }
}

fn check(arguments: &Arguments) -> ExitCode {
    let mut failures = Vec::new();
    for wanted in arguments.all("feature") {
        match FEATURES.iter().find(|(name, _)| *name == wanted) {
            Some((_, true)) => {}
            Some((_, false)) => failures.push(format!("feature {wanted} is not there")),
            None => failures.push(format!("unknown feature {wanted}")),
        }
    }
    if !arguments.has("feature") {
        failures = crate::cli::Checks::run(&Default::default()).failures();
    }
    for failure in &failures {
        eprintln!("criu check: {failure}");
    }
    if !failures.is_empty() {
        return ExitCode::FAILURE;
    }
    println!("Looks good.");
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_decides() {
        for (name, meant) in [
            ("criu", true),
            ("/usr/sbin/criu", true),
            ("stasis", false),
            ("/criu/stasis", false),
            ("", false),
        ] {
            assert_eq!(is_meant(OsStr::new(name)), meant, "{name}");
        }
    }

    #[test]
    fn actions_that_are_not_there_are_refused_with_the_reason() {
        for (line, message) in [
            ("pre-dump -t 1", "pre-dump: every dump is a whole one"),
            ("dump 5", "dump 5: there is no such action"),
            ("", "an action (dump, restore, check, swrk) is missing"),
            ("swrk", "number of a socket after swrk is missing"),
            ("swrk x", "swrk x: invalid digit"),
        ] {
            let arguments = Arguments::parse(line.split_whitespace().map(OsString::from)).unwrap();
            let error = act(arguments).unwrap_err().to_string();
            assert!(error.contains(message), "{line}: {error}");
        }
    }
}
