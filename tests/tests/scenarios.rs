//! Every workload through dump and restore, in each flavour and variant: `FLAVOUR::WORKLOAD::VARIANT`.

use std::process::ExitCode;

use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{self, Failure, Variant};
use stasis_tests::suite::{self, Test};
use stasis_tests::workloads;

/// Which variants are played in which flavour.
const PLAN: [(Flavour, &[Variant]); 3] = [
    (Flavour::Host, &[Variant::Kill, Variant::Running, Variant::NoCow, Variant::Stopped, Variant::Rounds]),
    (Flavour::Ns, &[Variant::Kill, Variant::Running]),
    (Flavour::User, &[Variant::Kill, Variant::Running]),
];

/// What cannot hold yet, or cannot hold by its nature: (workload, flavour, variant, why).
const SKIPPED: &[(&str, Option<Flavour>, Option<Variant>, &str)] = &[
    ("ns_tree", Some(Flavour::Host), None, "namespaces inside the tree are refused by name until issue 6"),
    ("sleep_absolute", None, Some(Variant::Running), "points in time pass while the original runs on"),
    ("sleep_absolute", None, Some(Variant::NoCow), "points in time pass while the original runs on"),
    ("sleep_absolute", None, Some(Variant::Stopped), "points in time pass while the original is stopped"),
    (
        "unix_waiting_data",
        None,
        Some(Variant::Running),
        "refused by name: the data can be had by accepting only",
    ),
    (
        "unix_waiting_data",
        None,
        Some(Variant::NoCow),
        "refused by name: the data can be had by accepting only",
    ),
    (
        "unix_waiting_data",
        None,
        Some(Variant::Stopped),
        "refused by name: the data can be had by accepting only",
    ),
    ("sleep_relative", None, Some(Variant::Rounds), "the sleeps are over before the last round"),
    ("wait_limits", None, Some(Variant::Stopped), "to be stopped ends these waits, for anybody (signal(7))"),
    (
        "wait_limits_sockets",
        None,
        Some(Variant::Stopped),
        "to be stopped ends these waits, for anybody (signal(7))",
    ),
    (
        "wait_limits_sockets",
        None,
        Some(Variant::Rounds),
        "what is left of a socket's timeout cannot be seen in a wait that was dumped before",
    ),
    ("pty_data", None, Some(Variant::Running), "unread data are kept only if the tree is killed"),
    ("pty_data", None, Some(Variant::NoCow), "unread data are kept only if the tree is killed"),
    ("pty_data", None, Some(Variant::Stopped), "unread data are kept only if the tree is killed"),
    (
        "tcp_states",
        None,
        Some(Variant::Running),
        "what the original ends lingers (TIME_WAIT) at the same ports",
    ),
    (
        "tcp_states",
        None,
        Some(Variant::NoCow),
        "what the original ends lingers (TIME_WAIT) at the same ports",
    ),
    (
        "tcp_states",
        None,
        Some(Variant::Stopped),
        "what the original ends lingers (TIME_WAIT) at the same ports",
    ),
    ("tree_fork_storm", None, Some(Variant::Stopped), "its processes end while the harness continues them"),
];

/// Why a scenario is not played.
fn skipped(workload: &str, flavour: Flavour, variant: Variant) -> Option<&'static str> {
    let hit = SKIPPED.iter().find(|(name, in_flavour, in_variant, _)| {
        *name == workload
            && in_flavour.is_none_or(|one| one == flavour)
            && in_variant.is_none_or(|one| one == variant)
    });
    hit.map(|(.., why)| *why)
}

fn main() -> ExitCode {
    let mut tests = Vec::new();
    for (flavour, variants) in PLAN {
        for &variant in variants {
            for workload in workloads::ALL.iter().filter(|workload| !workload.apart) {
                if flavour != Flavour::Host && (!workload.anywhere || workload.heavy) {
                    continue;
                }
                if workload.heavy && !matches!(variant, Variant::Kill | Variant::Running) {
                    continue;
                }
                // A tree with a task that was stopped before cannot just be continued.
                if workload.name == "sig_stopped" && variant == Variant::Stopped {
                    continue;
                }
                let name = format!("{}::{}::{}", flavour.name(), workload.name, variant.name());
                let mut test = Test::new(name, move |name| match skipped(workload.name, flavour, variant) {
                    Some(why) => Err(Failure::Skipped(why.into())),
                    None => scenario::run(name, workload, flavour, variant),
                });
                test.heavy = workload.heavy;
                tests.push(test);
            }
        }
    }
    suite::main(tests)
}
