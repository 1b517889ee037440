//! Files that are not what they were, or cannot be kept: refused by name, and nothing left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use stasis_tests::ctl::pause;
use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{self, Doing, Failure, Stage, Variant, workload_binary};
use stasis_tests::suite::Test;
use stasis_tests::tool;

use crate::common::{Case, refused, succeeded};

/// All tests of this file.
pub fn tests() -> Vec<Test> {
    let mut tests = vec![
        Test::new("files::unlinked_and_large", |test| {
            refused_dump(
                test,
                "ghost_files",
                &["--ghost-limit", "500K"],
                &["large (deleted)", "--ghost-limit"],
            )
        }),
        Test::new("files::unlinked_with_other_names", |test| {
            refused_dump(test, "ghost_linked", &[], &["opened (deleted)", "--link-remap"])
        }),
        Test::new("files::link_that_cannot_be_made", link_refused),
        Test::new("files::locked", |test| {
            refused_dump(test, "locks_all", &[], &["is locked", "--file-locks"])
        }),
        Test::new("files::lock_taken_meanwhile", lock_taken),
        Test::new("files::truncated_or_replaced", changed),
        Test::new("files::replaced_by_a_larger_one", replaced),
        Test::new("files::another_build", another_build),
        Test::new("files::unlinked_restore_fails", restore_fails),
        Test::new("files::unlinked_restore_killed", restore_killed),
    ];
    for kind in ["overlay", "tmpfs"] {
        for workload in ELSEWHERE {
            let run = move |test: &str| on_filesystem(test, kind, workload);
            tests.push(Test::new(format!("files::{kind}_{workload}"), run));
        }
    }
    tests
}

/// Workloads that are played on other file systems, too.
const ELSEWHERE: [&str; 8] = [
    "files_flags",
    "ghost_files",
    "ghost_nameless",
    "ghost_mapped",
    "ghost_dirs",
    "ghost_linked",
    "mem_file_shared",
    "locks_all",
];

/// A workload whose files are on a file system of this kind, through dump and restore.
fn on_filesystem(test: &str, kind: &str, workload: &str) -> Result<(), Failure> {
    let dir = Stage::fresh_dir(test)?;
    let layers = ["lower", "upper", "scratch"].map(|name| dir.join(name));
    layers.iter().try_for_each(fs::create_dir).doing("making the layers")?;
    let [lower, upper, scratch] = layers.map(|path| path.to_string_lossy().into_owned());
    let data = match kind {
        "overlay" => format!("lowerdir={lower},upperdir={upper},workdir={scratch}"),
        _ => String::new(),
    };
    let work = dir.join("work");
    mount(Some(kind), &work, Some(kind), MsFlags::empty(), Some(data.as_str()))
        .map_err(|errno| Failure::Skipped(format!("{kind} cannot be mounted: {errno}")))?;
    let binary = workload_binary().doing("finding the workload")?.to_string_lossy().into_owned();
    let argv = [binary.as_str(), workload, &dir.to_string_lossy()].map(str::to_owned);
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let mut stage = Stage::start_command(&dir, Flavour::Host, &argv, Duration::from_secs(40))?;
    stage.flags = stasis_tests::workloads::find(workload).map_or(&[], |workload| workload.flags);
    let outcome = scenario::play(&mut stage, Variant::Kill);
    if outcome.is_ok() {
        stage.kill_tree()?;
    }
    umount2(&work, MntFlags::MNT_DETACH).doing("unmounting")?;
    if outcome.is_ok() {
        fs::remove_dir_all(&dir).doing("removing the directory")?;
    }
    outcome
}

/// Everything below a directory.
fn listing(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                todo.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

fn same_names(before: &[PathBuf], dir: &Path) -> Result<(), Failure> {
    let now = listing(dir);
    if now == before {
        Ok(())
    } else {
        Err(Failure::Changed("the refusal", format!("names were {before:?}, are {now:?}")))
    }
}

/// A dump that is refused with these words and harms nothing.
fn refused_dump(test: &str, workload: &str, flags: &[&str], words: &[&str]) -> Result<(), Failure> {
    let case = Case::start(test, workload)?;
    let before = listing(&case.stage.dir.join("work"));
    refused(&case.dump("img", flags)?, words)?;
    same_names(&before, &case.stage.dir.join("work"))?;
    case.unharmed()?;
    case.finish()
}

/// The link is made, but the dump fails later: the link goes.
fn link_refused(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "ghost_linked")?;
    let work = case.stage.dir.join("work");
    let before = listing(&work);
    let plugins = crate::common::plugins_with_fault(&case.stage.dir)?;
    let images = case.images("img")?;
    let mut command = case.tool.dump(case.stage.root, &images, &["-R", "--link-remap", "--plugin-dir"]);
    command.arg(plugins);
    crate::common::with_fault(&mut command, "BeforeResume:error");
    refused(&case.stage.tool(&mut command)?, &["fault on request"])?;
    same_names(&before, &work)?;
    case.unharmed()?;
    case.finish()
}

/// Between dump and restore somebody else takes a lock.
fn lock_taken(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "locks_all")?;
    succeeded(case.dump("img", &["--file-locks"])?)?;
    let file = fs::File::open(case.stage.dir.join("work/exclusive")).doing("opening the locked file")?;
    file.lock().doing("locking")?;
    refused(&case.restore("img", &[])?, &["exclusive", "flock"])?;
    case.nothing_left()?;
    drop(file);
    succeeded(case.restore("img", &[])?)?;
    case.finish()
}

fn changed(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "files_flags")?;
    succeeded(case.dump("img", &[])?)?;
    let data = case.stage.dir.join("work/data");
    let put_back = || -> Result<(), Failure> {
        let _ = fs::remove_dir(&data);
        fs::write(&data, "content").doing("putting the file back")?;
        fs::set_permissions(&data, fs::Permissions::from_mode(0o644)).doing("putting the file back")
    };
    fs::write(&data, "con").doing("cutting the file")?;
    refused(&case.restore("img", &[])?, &["work/data", "3 bytes", "--no-file-check"])?;
    case.nothing_left()?;
    put_back()?;
    fs::set_permissions(&data, fs::Permissions::from_mode(0o600)).doing("changing the mode")?;
    refused(&case.restore("img", &[])?, &["work/data", "mode 600"])?;
    fs::remove_file(&data).doing("removing the file")?;
    refused(&case.restore("img", &[])?, &["work/data"])?;
    fs::create_dir(&data).doing("making a directory")?;
    refused(&case.restore("img", &[])?, &["work/data", "type"])?;
    case.nothing_left()?;
    put_back()?;
    fs::write(&data, "content and more").doing("appending")?;
    succeeded(case.restore("img", &[])?)?;
    case.stage.kill_tree()?;
    fs::write(&data, "con").doing("cutting the file")?;
    succeeded(case.restore("img", &["--no-file-check"])?)?;
    case.stage.kill_tree()?;
    put_back()?;
    succeeded(case.restore("img", &[])?)?;
    case.finish()
}

/// A file that the tree only reads, which is now another that is larger.
fn replaced(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "files_dirs")?;
    succeeded(case.dump("img", &[])?)?;
    let read = case.stage.dir.join("work/.read");
    let original = fs::read(&read).doing("reading the file")?;
    fs::write(&read, [b"another", original.as_slice()].concat()).doing("replacing the file")?;
    refused(&case.restore("img", &[])?, &["work/.read", "first bytes", "--no-file-check"])?;
    case.nothing_left()?;
    fs::write(&read, [original.as_slice(), b"and more"].concat()).doing("appending")?;
    succeeded(case.restore("img", &[])?)?;
    case.finish()
}

/// The program is built anew: same size, same mode, another build id.
fn another_build(test: &str) -> Result<(), Failure> {
    let dir = Stage::fresh_dir(test)?;
    let program = dir.join("program");
    fs::copy(workload_binary().doing("finding the workload")?, &program).doing("copying the program")?;
    let (text, dir_text) = (program.to_string_lossy().into_owned(), dir.to_string_lossy().into_owned());
    let argv = [text.as_str(), "mem_private", dir_text.as_str()];
    let case = Case::of(Stage::start_command(&dir, Flavour::Host, &argv, Duration::from_secs(40))?)?;
    succeeded(case.dump("img", &[])?)?;
    let original = fs::read(&program).doing("reading the program")?;
    // The note: name "GNU", type 3 (NT_GNU_BUILD_ID), then the id itself.
    let note = b"\x03\0\0\0GNU\0";
    let Some(at) = original.windows(note.len()).position(|window| window == note) else {
        return Err(Failure::Skipped("the workload was linked without a build id".into()));
    };
    let mut other = original.clone();
    other[at + note.len()] ^= 1;
    fs::write(&program, other).doing("changing the program")?;
    refused(&case.restore("img", &[])?, &["program", "build"])?;
    case.nothing_left()?;
    fs::write(&program, original).doing("putting the program back")?;
    succeeded(case.restore("img", &[])?)?;
    case.finish()
}

/// Names that were made for the moment go when a later one cannot be made.
fn restore_fails(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "ghost_dirs")?;
    let work = case.stage.dir.join("work");
    succeeded(case.dump("img", &[])?)?;
    fs::write(work.join("gone"), "no directory").doing("blocking the name")?;
    let before = listing(&work);
    refused(&case.restore("img", &[])?, &["gone/file"])?;
    same_names(&before, &work)?;
    case.nothing_left()?;
    fs::remove_file(work.join("gone")).doing("freeing the name")?;
    succeeded(case.restore("img", &[])?)?;
    case.finish()
}

/// No process of the tool is left, nor a task that it has begun.
fn nobody_restores() -> bool {
    crate::common::all_pids().into_iter().all(|pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        !matches!(name.trim(), "stasis" | "stasis-guardian")
    })
}

/// Killed at many moments, a restore leaves no name either.
fn restore_killed(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "ghost_dirs")?;
    let work = case.stage.dir.join("work");
    succeeded(case.dump("img", &[])?)?;
    let before = listing(&work);
    for millis in (0..60).step_by(4) {
        let mut command = case.tool.restore(&case.stage.dir.join("img"), &[]);
        let mut child = tool::start(&mut command, &case.stage.dir.join("tool.out"))?;
        pause(Duration::from_millis(millis));
        kill(Pid::from_raw(child.id() as i32), Signal::SIGKILL).doing("killing the restore")?;
        child.wait().doing("waiting for the restore")?;
        stasis_tests::ctl::poll_until("the guardian is done", nobody_restores)
            .map_err(|fail| Failure::Changed("the kill", fail.to_string()))?;
        // It came too late.
        if Path::new(&format!("/proc/{}", case.stage.root)).exists() {
            case.stage.kill_tree()?;
        }
        case.nothing_left()?;
        same_names(&before, &work)?;
    }
    succeeded(case.restore("img", &[])?)?;
    case.finish()
}
