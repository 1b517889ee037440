//! The main function of a test executable whose tests run in sandboxes: lists them for `cargo test`, runs at most two at
//! once, and closes with cargo's summary line. `EXE --in-sandbox TEST` plays one of them, inside its sandbox.

use std::process::ExitCode;
use std::sync::RwLock;

use libtest_mimic::{Arguments, Completion, Trial};

use crate::hugepages::HugePages;
use crate::sandbox::{self, Verdict};
use crate::scenario::Failure;

/// What a test does, given its own name.
pub type Play = Box<dyn Fn(&str) -> Result<(), Failure> + Send + Sync>;

/// A named test.
pub struct Test {
    /// Its name, with `::` between the parts.
    pub name: String,
    /// Takes minutes or gigabytes.
    pub heavy: bool,
    /// Needs the machine's own pid namespace, and is harmless enough for it.
    pub outside: bool,
    /// What happens inside the sandbox.
    pub play: Play,
}

impl Test {
    /// A test.
    pub fn new(
        name: impl Into<String>,
        play: impl Fn(&str) -> Result<(), Failure> + Send + Sync + 'static,
    ) -> Test {
        Test { name: name.into(), heavy: false, outside: false, play: Box::new(play) }
    }
}

/// Plays one test inside the sandbox and returns its exit status.
pub fn play(tests: &[Test], name: &str) -> i32 {
    let Some(test) = tests.iter().find(|test| test.name == name) else {
        eprintln!("no test is called {name}");
        return 2;
    };
    match (test.play)(name) {
        Ok(()) => 0,
        Err(Failure::Skipped(why)) => {
            println!("{why}");
            sandbox::SKIPPED
        }
        Err(failure) => {
            println!("{failure}");
            let dir = crate::scenario::base_dir().join(name.replace("::", "."));
            println!("the scenario's directory: {}", dir.display());
            if let Ok(commands) = std::fs::read_to_string(dir.join("commands")) {
                println!("the tool was called as:\n{commands}");
            }
            if let Ok(exe) = std::env::current_exe() {
                println!("to replay: {} {} {name}", exe.display(), sandbox::ENTER);
            }
            1
        }
    }
}

/// The main function of a test executable: plays one test if asked to, else all that the arguments select.
pub fn main(tests: Vec<Test>) -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if let [_, flag, name] = &args[..]
        && flag == sandbox::ENTER
    {
        if tests.iter().any(|test| test.name == *name && test.outside) {
            std::process::exit(play(&tests, name));
        }
        sandbox::enter(|| play(&tests, name));
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(arguments.test_threads.unwrap_or(AT_ONCE).min(AT_ONCE));
    let trials = tests.into_iter().map(|test| {
        Trial::ignorable_test(test.name.clone(), move || {
            let _alone = test.heavy.then(|| ALONE.write());
            let _together = (!test.heavy).then(|| ALONE.read());
            match sandbox::run(&test.name) {
                Ok(Verdict::Passed) => Ok(Completion::Completed),
                Ok(Verdict::Skipped(why)) => Ok(Completion::ignored_with(why.trim())),
                Ok(Verdict::Failed(said)) => Err(said.into()),
                Err(error) => Err(error.into()),
            }
        })
    });
    let pool = HugePages::allow();
    let code = libtest_mimic::run(&arguments, trials.collect()).exit_code();
    drop(pool);
    code
}

/// How many tests run at once.
const AT_ONCE: usize = 2;
/// Heavy tests run alone.
static ALONE: RwLock<()> = RwLock::new(());
