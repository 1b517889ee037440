//! Nothing is lost in silence: state beyond what is promised today is either refused by a clear error that leaves the tree
//! as it was, or it is kept.

use stasis_tests::scenario::Failure;
use stasis_tests::suite::Test;
use stasis_tests::workloads;

use crate::common::{Case, refused, succeeded};

/// One test for each workload whose name says that it need not be supported.
pub fn tests() -> Vec<Test> {
    let shy = workloads::ALL.iter().filter(|workload| workload.name.starts_with("shy_"));
    shy.map(|workload| {
        Test::new(format!("silence::{}", &workload.name[4..]), move |test| {
            kept_or_refused(test, workload.name)
        })
    })
    .collect()
}

fn kept_or_refused(test: &str, workload: &str) -> Result<(), Failure> {
    let case = Case::start(test, workload)?;
    let done = case.dump("img", &[])?;
    if !done.status.success() {
        refused(&done, &[])?;
        case.unharmed()?;
        return case.finish();
    }
    case.stage.assert_gone(&case.before.pids)?;
    succeeded(case.restore("img", &[])?)?;
    case.unharmed()?;
    case.finish()
}
