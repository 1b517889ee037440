//! Many behaviours in one tree, each in a child of its own: what the fault sweeps disturb.

use std::fs;

use crate::ctl::{Ctl, Outcome, changed, poll_until};

const PARTS: [&str; 9] = [
    "mem_cow_children",
    "threads_registers",
    "threads_rseq_robust",
    "sig_pending",
    "sig_altstack",
    "tree_blocked",
    "files_offsets",
    "pipe_ends",
    "timerfd",
];

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let mut parts = Vec::new();
    for name in PARTS {
        let dir = ctl.dir().join(format!("part.{name}"));
        fs::create_dir_all(dir.join("work"))?;
        let part = super::find(name).ok_or_else(|| changed(format!("no workload is called {name}")))?;
        let child = ctl.child(name, |ctl| (part.run)(&ctl.moved(&dir)))?;
        let ready = dir.join("ready");
        let result = ctl.dir().join(format!("failure.{name}"));
        poll_until(&format!("{name} gets ready"), || ready.exists() || result.exists())?;
        parts.push((dir, child));
    }

    let request: &[u8] = if ctl.wait()? { b"sabotage" } else { b"check" };

    for (dir, _) in &parts {
        ctl.moved(dir).announce("check-request", request)?;
    }
    let verdicts: Vec<Outcome> = parts
        .into_iter()
        .map(|(dir, child)| {
            let verdict = child.join();
            let _ = fs::remove_file(dir.join("check-request"));
            verdict
        })
        .collect();
    verdicts.into_iter().collect()
}
