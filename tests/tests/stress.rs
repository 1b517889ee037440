//! Random trees of fifty tasks, dumped and restored ten times in a row and compared each time. The seed is printed by a
//! failure; `STASIS_STRESS_SEED=N` makes the same tree again, `STASIS_STRESS_RUNS=N` makes N different ones.

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{self, Doing, Failure, Stage};
use stasis_tests::suite::{self, Test};
use stasis_tests::tool::Tool;

/// Dumps in a row.
const ROUNDS: usize = 10;
/// What the branches need.
const FLAGS: &[&str] = &["--file-locks", "--link-remap"];

fn main() -> ExitCode {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let runs = number("STASIS_STRESS_RUNS").unwrap_or(1);
    let mut tests = Vec::new();
    for flavour in [Flavour::Host, Flavour::Ns, Flavour::User] {
        for run in 0..runs {
            let mut test = Test::new(format!("{}::random::{run}", flavour.name()), move |name| {
                let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
                let seed = number("STASIS_STRESS_SEED").unwrap_or(now.as_micros() as u64 % 1_000_000_007);
                random(name, flavour, seed).map_err(|failure| {
                    Failure::Changed("a random tree", format!("STASIS_STRESS_SEED={seed}: {failure}"))
                })
            });
            test.heavy = true;
            tests.push(test);
        }
    }
    suite::main(tests)
}

fn random(test: &str, flavour: Flavour, seed: u64) -> Result<(), Failure> {
    let dir = Stage::fresh_dir(test)?;
    fs::write(dir.join("seed"), seed.to_string()).doing("writing the seed")?;
    let binary = scenario::workload_binary().doing("copying the workload binary")?;
    let argv = [binary.to_string_lossy(), "stress".into(), dir.to_string_lossy()];
    let argv: Vec<&str> = argv.iter().map(AsRef::as_ref).collect();
    let mut stage = Stage::start_command(&dir, flavour, &argv, Duration::from_secs(60))?;
    stage.flags = FLAGS;
    let tool = Tool::discover().doing("finding the tool")?;
    let before = stage.look_when_still()?;
    for round in 0..ROUNDS {
        let name = format!("img{round}");
        let pids = stage.pids();
        stage.dump(&tool, &name, &[])?;
        stage.assert_gone(&pids)?;
        stage.restore(&tool, &name, &[])?;
        stage.compare(&before, "dump and restore")?;
        fs::remove_dir_all(stage.dir.join(&name)).doing("removing an image")?;
    }
    stage.check("ten dumps and restores")?;
    stage.kill_tree()?;
    fs::remove_dir_all(&stage.dir).doing("removing the directory")
}
