//! Plugins that are not plugins, are of another version, or misbehave in a hook.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use stasis_tests::scenario::{Doing, Failure};
use stasis_tests::suite::Test;

use crate::common::{Case, plugins_with_fault, refused, succeeded, with_fault};

/// How a hook can misbehave, and what the error must say besides the plugin's name.
const ACTIONS: [(&str, &str); 6] =
    [("error", "on request"), ("panic", "panic"), ("abort", ""), ("segv", ""), ("exit", ""), ("hang", "")];

/// Hooks of a dump that kills the tree, in which a fault must save it.
const DUMP_HOOKS: [&str; 6] = ["BeforeFreeze", "claims", "describe", "Frozen", "dump", "commit"];
/// Hooks of a restore, in which a fault must leave nothing.
const RESTORE_HOOKS: [&str; 6] = ["BeforeRestore", "create", "link", "settle", "Forked", "Restored"];

/// All tests of this file.
pub fn tests() -> Vec<Test> {
    let mut tests = vec![
        Test::new("plugin::works_at_all", works),
        Test::new("plugin::truncated", |test| bad_file(test, |good| good[..good.len() * 2 / 3].to_vec())),
        Test::new("plugin::cut_to_its_header", |test| bad_file(test, |good| good[..64].to_vec())),
        Test::new("plugin::text_file", |test| bad_file(test, |_| b"not a library\n".to_vec())),
        Test::new("plugin::empty", |test| bad_file(test, |_| Vec::new())),
        Test::new("plugin::other_machine", |test| bad_file(test, other_machine)),
        Test::new("plugin::no_plugin", no_plugin),
        Test::new("plugin::other_major_version", |test| bad_file(test, other_major)),
        Test::new("plugin::claims_twice", claims_twice),
        Test::new("plugin::says", says),
        Test::new("plugin::writable_by_others", writable_by_others),
        Test::new("plugin::unreadable_record", unreadable_record),
        Test::new("plugin::closed_descriptor", |test| bad_create(test, "closed", "which is not open")),
        Test::new("plugin::no_descriptor", |test| bad_create(test, "none", "0 descriptors were made for 1")),
    ];
    for (action, words) in ACTIONS {
        tests.push(Test::new(format!("plugin::{action}_in_dump"), move |test| in_dump(test, action, words)));
        tests.push(Test::new(format!("plugin::{action}_in_restore"), move |test| {
            in_restore(test, action, words)
        }));
    }
    tests
}

/// The arguments that make the misbehaving plugin known.
fn arguments(plugins: &Path) -> Vec<String> {
    let dir = plugins.to_string_lossy().into_owned();
    ["--plugin-dir", &dir, "--plugin-timeout", "1"].map(String::from).to_vec()
}

/// Runs dump or restore with the plugin and a wish.
fn with_plugin(
    case: &Case,
    what: &str,
    plugins: &Path,
    wish: &str,
) -> Result<stasis_tests::tool::Done, Failure> {
    let images = case.images("img")?;
    let more = arguments(plugins);
    let more: Vec<&str> = more.iter().map(String::as_str).collect();
    let mut command = match what {
        "dump" => case.tool.dump(case.stage.root, &images, &more),
        _ => case.tool.restore(&images, &more),
    };
    with_fault(&mut command, wish);
    case.stage.tool(&mut command)
}

fn works(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "unclaimed")?;
    let plugins = plugins_with_fault(&case.stage.dir)?;
    succeeded(with_plugin(&case, "dump", &plugins, "")?)?;
    case.stage.assert_gone(&case.before.pids)?;
    succeeded(with_plugin(&case, "restore", &plugins, "")?)?;
    case.unharmed()?;
    case.finish()
}

/// A dump with such a file among the plugins must be refused, naming the file.
fn bad_file(test: &str, spoil: fn(&[u8]) -> Vec<u8>) -> Result<(), Failure> {
    let case = Case::start(test, "unclaimed")?;
    let plugins = plugins_with_fault(&case.stage.dir)?;
    let file = plugins.join("libstasis_plugin_fault.so");
    let good = fs::read(&file).doing("reading the plugin")?;
    fs::write(&file, spoil(&good)).doing("spoiling the plugin")?;
    refused(&with_plugin(&case, "dump", &plugins, "")?, &["libstasis_plugin_fault.so"])?;
    case.unharmed()?;
    case.finish()
}

/// A library for another machine: e_machine of the ELF header (elf(5)).
fn other_machine(good: &[u8]) -> Vec<u8> {
    let mut bad = good.to_vec();
    bad[18] = 183;
    bad
}

/// Compiled against plugin-api 2.0.0: the version is a string in the library.
fn other_major(good: &[u8]) -> Vec<u8> {
    let mut bad = good.to_vec();
    let api = b"1.0.0";
    for at in 0..bad.len() - api.len() {
        if bad[at..].starts_with(api) {
            bad[at] = b'2';
        }
    }
    bad
}

/// A good library that is no plugin.
fn no_plugin(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "unclaimed")?;
    let plugins = plugins_with_fault(&case.stage.dir)?;
    let maps = fs::read_to_string("/proc/self/maps").doing("looking for the C library")?;
    let Some(libc) =
        maps.split_whitespace().find(|word| word.contains("/libc.so") || word.contains("/libc-"))
    else {
        return Err(Failure::Skipped("no C library is mapped".into()));
    };
    fs::copy(libc, plugins.join("libstasis_plugin_fault.so")).doing("copying the C library")?;
    refused(&with_plugin(&case, "dump", &plugins, "")?, &["libstasis_plugin_fault.so"])?;
    case.unharmed()?;
    case.finish()
}

/// Two plugins that claim the same.
fn claims_twice(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "unclaimed")?;
    let plugins = plugins_with_fault(&case.stage.dir)?;
    let file = plugins.join("libstasis_plugin_fault.so");
    let good = fs::read(&file).doing("reading the plugin")?;
    // The same plugin a second time.
    fs::write(plugins.join("libstasis_plugin_twin.so"), &good).doing("writing the twin")?;
    refused(&with_plugin(&case, "dump", &plugins, "")?, &["fault"])?;
    case.unharmed()?;
    case.finish()
}

/// What a hook says reaches the log, wherever it runs: in the command or in a task that is being restored.
fn says(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "unclaimed")?;
    let plugins = plugins_with_fault(&case.stage.dir)?;
    let hear = |what: &str, hook: &str| {
        succeeded(with_plugin(&case, what, &plugins, &format!("{hook}:say"))?)?;
        let log =
            fs::read_to_string(case.stage.dir.join(format!("img.{what}.log"))).doing("reading the log")?;
        for words in [format!("a warning on request in {hook}"), format!("an event on request in {hook}")] {
            if !log.contains(&words) {
                let why = format!("{what} does not say {words:?}:\n{log}");
                return Err(Failure::Changed("the log", why));
            }
        }
        Ok(())
    };
    for (i, hook) in RESTORE_HOOKS.into_iter().enumerate() {
        hear("dump", DUMP_HOOKS[i % DUMP_HOOKS.len()])?;
        hear("restore", hook)?;
        fs::remove_dir_all(case.stage.dir.join("img")).doing("removing the image")?;
    }
    case.finish()
}

/// What others can change is not loaded as root, unless the user says so.
fn writable_by_others(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "unclaimed")?;
    let plugins = plugins_with_fault(&case.stage.dir)?;
    let file = plugins.join("libstasis_plugin_fault.so");
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).doing("changing a mode")
    };
    let owner = |path: &Path, uid| chown(path, Some(uid), None).doing("changing an owner");
    let refuse = |what: &Path, why: &str| {
        let words = [&*what.to_string_lossy(), why, "--allow-unsafe-plugins"];
        refused(&with_plugin(&case, "dump", &plugins, "")?, &words)?;
        case.unharmed()
    };
    mode(&file, 0o646)?;
    refuse(&file, "writable by others")?;
    mode(&file, 0o644)?;
    owner(&file, 65534)?;
    refuse(&file, "belongs to uid 65534")?;
    owner(&file, 0)?;
    mode(&plugins, 0o1777)?;
    refuse(&plugins, "writable by others")?;
    mode(&plugins, 0o755)?;
    owner(&plugins, 65534)?;
    refuse(&plugins, "belongs to uid 65534")?;
    owner(&plugins, 0)?;
    // A library elsewhere, to which a link leads.
    let elsewhere = case.stage.dir.join("elsewhere.so");
    fs::rename(&file, &elsewhere).doing("moving the library")?;
    symlink(&elsewhere, &file).doing("linking the library")?;
    mode(&elsewhere, 0o666)?;
    refuse(&elsewhere, "writable by others")?;
    let images = case.images("allowed")?;
    let more = ["-R", "--allow-unsafe-plugins", "--plugin-dir", &*plugins.to_string_lossy()];
    succeeded(case.stage.tool(&mut case.tool.dump(case.stage.root, &images, &more))?)?;
    case.unharmed()?;
    case.finish()
}

/// A record that cannot be read back fails the dump that writes it.
fn unreadable_record(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "unclaimed")?;
    let plugins = plugins_with_fault(&case.stage.dir)?;
    let done = with_plugin(&case, "dump", &plugins, "dump:unreadable")?;
    refused(&done, &["plugin fault", "no valid stasis.fault.v1.Quiet", "cannot be dumped"])?;
    case.unharmed()?;
    case.finish()
}

/// What `create` gives is not what was asked for.
fn bad_create(test: &str, wish: &str, words: &str) -> Result<(), Failure> {
    let case = Case::start(test, "unclaimed")?;
    let plugins = plugins_with_fault(&case.stage.dir)?;
    succeeded(with_plugin(&case, "dump", &plugins, "")?)?;
    case.stage.assert_gone(&case.before.pids)?;
    let done = with_plugin(&case, "restore", &plugins, &format!("create:{wish}"))?;
    refused(&done, &["plugin fault, create", words])?;
    case.nothing_left()?;
    succeeded(with_plugin(&case, "restore", &plugins, "")?)?;
    case.finish()
}

fn in_dump(test: &str, action: &str, words: &str) -> Result<(), Failure> {
    let case = Case::start(test, "unclaimed")?;
    let plugins = plugins_with_fault(&case.stage.dir)?;
    for hook in DUMP_HOOKS {
        let done = with_plugin(&case, "dump", &plugins, &format!("{hook}:{action}"))?;
        refused(&done, &["fault", words]).map_err(|failure| Failure::Changed(hook, failure.to_string()))?;
        case.unharmed().map_err(|failure| Failure::Changed(hook, failure.to_string()))?;
        fs::remove_dir_all(case.stage.dir.join("img")).doing("removing the half image")?;
    }
    // And without a fault it still can be dumped.
    succeeded(with_plugin(&case, "dump", &plugins, "")?)?;
    case.stage.assert_gone(&case.before.pids)?;
    succeeded(with_plugin(&case, "restore", &plugins, "")?)?;
    case.finish()
}

fn in_restore(test: &str, action: &str, words: &str) -> Result<(), Failure> {
    let case = Case::start(test, "unclaimed")?;
    let plugins = plugins_with_fault(&case.stage.dir)?;
    succeeded(with_plugin(&case, "dump", &plugins, "")?)?;
    case.stage.assert_gone(&case.before.pids)?;
    for hook in RESTORE_HOOKS {
        let done = with_plugin(&case, "restore", &plugins, &format!("{hook}:{action}"))?;
        refused(&done, &["fault", words]).map_err(|failure| Failure::Changed(hook, failure.to_string()))?;
        case.nothing_left().map_err(|failure| Failure::Changed(hook, failure.to_string()))?;
    }
    succeeded(with_plugin(&case, "restore", &plugins, "")?)?;
    case.unharmed()?;
    case.finish()
}
