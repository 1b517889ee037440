//! Every workload through dump and restore, in each flavour and variant: `FLAVOUR::WORKLOAD::VARIANT`.

use std::process::ExitCode;

use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{self, Variant};
use stasis_tests::suite::{self, Test};
use stasis_tests::workloads;

/// Which variants are played in which flavour.
const PLAN: [(Flavour, &[Variant]); 3] = [
    (Flavour::Host, &[Variant::Kill, Variant::Running, Variant::NoCow, Variant::Stopped, Variant::Rounds]),
    (Flavour::Ns, &[Variant::Kill, Variant::Running]),
    (Flavour::User, &[Variant::Kill, Variant::Running]),
];

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
                let mut test = Test::new(name, move |name| scenario::run(name, workload, flavour, variant));
                test.heavy = workload.heavy;
                tests.push(test);
            }
        }
    }
    suite::main(tests)
}
