//! Unix sockets whose peers are outside the tree: refused by name, or kept as far as the user says.

use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::time::Duration;

use libc::{SOCK_DGRAM, SOCK_STREAM};

use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{Doing, Failure, Stage, workload_binary};
use stasis_tests::suite::{self, Test};
use stasis_tests::tool::Tool;
use stasis_tests::unix;

fn main() -> ExitCode {
    suite::main(vec![
        Test::new("outside::refused_by_name", refused_by_name),
        Test::new("outside::connected_again_and_cut", connected_again_and_cut),
    ])
}

/// The two services, outside, and the tree that uses them.
struct Outside {
    stage: Stage,
    service: OwnedFd,
    accepted: OwnedFd,
}

fn start(test: &str) -> Result<Outside, Failure> {
    let dir = Stage::fresh_dir(test)?;
    let at = |name: &str| unix::path(&dir.join("work").join(name));
    let service = unix::named(SOCK_DGRAM, &at("service")).doing("making a service")?;
    let listener = unix::listener(SOCK_STREAM, &at("stream"), 3).doing("making a service")?;
    let binary = workload_binary().doing("copying the workload binary")?;
    let (binary, place) = (binary.to_string_lossy(), dir.to_string_lossy());
    let argv = [&*binary, "unix_outside", &*place];
    let stage = Stage::start_command(&dir, Flavour::Host, &argv, Duration::from_secs(30))?;
    let accepted = unix::accept(&listener).doing("accepting the workload")?;
    unix::send(&accepted, &[], b"from outside", &[]).doing("sending to the workload")?;
    Ok(Outside { stage, service, accepted })
}

/// The stream socket of the workload, as `/proc` shows it.
fn stream(outside: &Outside) -> Result<u64, Failure> {
    let link =
        std::fs::read_link(format!("/proc/{}/fd/4", outside.stage.root)).doing("looking at descriptor 4")?;
    let number = link.to_string_lossy().trim_start_matches("socket:[").trim_end_matches(']').parse();
    number.map_err(|_| Failure::Changed("the start", format!("descriptor 4 is {}", link.display())))
}

fn refused(outside: &Outside, name: &str, more: &[&str], expected: &[&str]) -> Result<(), Failure> {
    let tool = Tool::discover().doing("finding the tool")?;
    let images = outside.stage.dir.join(name);
    std::fs::create_dir_all(&images).doing("making the image directory")?;
    let done = outside.stage.tool(&mut tool.dump(outside.stage.root, &images, more))?;
    let missing = expected.iter().find(|text| !done.said.contains(**text));
    match missing {
        None if !done.status.success() => Ok(()),
        _ => Err(Failure::Changed("a dump that is to be refused", done.said)),
    }
}

fn refused_by_name(test: &str) -> Result<(), Failure> {
    let outside = start(test)?;
    refused(&outside, "img1", &[], &["work/service is outside the tree", "--ext-unix-sk"])?;
    let ino = stream(&outside)?;
    let remedy = format!("--external unix[{ino}]");
    refused(&outside, "img2", &["--ext-unix-sk"], &["work/stream is outside the tree", &remedy])?;
    // Nothing has happened to the tree.
    drop(outside.accepted);
    outside.stage.check("refused dumps")?;
    outside.stage.kill_tree()
}

fn connected_again_and_cut(test: &str) -> Result<(), Failure> {
    let mut outside = start(test)?;
    let tool = Tool::discover().doing("finding the tool")?;
    let key = format!("unix[{}]", stream(&outside)?);
    outside.stage.dump(&tool, "img", &["--ext-unix-sk", "--external", &key])?;
    outside.stage.restore(&tool, "img", &[])?;
    outside.stage.check("the restore")?;
    for text in ["before", "after"] {
        let said = unix::data(&outside.service).doing("receiving at the service")?;
        if said != text.as_bytes() {
            return Err(Failure::Changed("the restore", format!("the service got {said:?}, not {text}")));
        }
    }
    outside.stage.kill_tree()
}
