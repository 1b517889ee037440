//! runc of Debian, unchanged.

use stasis_tests::suite::Test;

pub fn tests() -> Vec<Test> {
    Vec::new()
}
