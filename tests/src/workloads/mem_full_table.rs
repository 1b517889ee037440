//! A process whose descriptor table is full: the image's files cannot be opened inside it.

use std::fs::{self, File};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::ctl::{Ctl, Outcome, ensure, pause, poll_until};
use crate::sys::{Map, PAGE};

const LIMIT: u64 = 64;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let request = ctl.dir().join("check-request");
    let child = ctl.child("full", |_| {
        let map = Map::anon(4000 * PAGE)?;
        map.fill(92);
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, LIMIT, hard)?;
        let files: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
        while !request.exists() {
            pause(Duration::from_millis(5));
        }
        ensure(File::open("/dev/null").is_err(), "the table is no longer full")?;
        drop(files);
        if fs::read(&request)? == b"sabotage" {
            map.put(800, 3);
        }
        map.check("memory", 92)
    })?;
    let table = format!("/proc/{}/fd", child.pid);
    poll_until("the child fills its table", || {
        fs::read_dir(&table).map_or(0, Iterator::count) as u64 >= LIMIT
    })?;

    ctl.wait()?;

    child.join()
}
