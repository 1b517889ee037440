//! The workloads themselves, without any dump: each must pass its own check in every flavour, and must notice
//! when its state was spoilt.

use std::process::ExitCode;

use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{self, Variant};
use stasis_tests::suite::{self, Test};
use stasis_tests::workloads;

fn main() -> ExitCode {
    let mut tests = Vec::new();
    for flavour in Flavour::ALL {
        for variant in [Variant::Straight, Variant::Sabotage] {
            for workload in workloads::ALL.iter().filter(|workload| !workload.guest) {
                let elsewhere = flavour != Flavour::Host;
                if elsewhere && (!workload.anywhere || workload.heavy || variant == Variant::Sabotage) {
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
