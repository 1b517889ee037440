//! Dumps that must be refused, of trees that must not notice.

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use nix::mount::{MsFlags, mount, umount};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};
use stasis_tests::ctl::pause;
use stasis_tests::launch::Flavour;
use stasis_tests::scenario::{Doing, Failure, Stage};
use stasis_tests::suite::Test;
use stasis_tests::tool::{self, Tool};

use crate::common::{Case, refused, succeeded};

/// All tests of this file.
pub fn tests() -> Vec<Test> {
    let mut tests = vec![
        Test::new("dump::no_such_pid", |test| tool_alone(test, &["-t", "999999"], &["999999"])),
        Test::new("dump::own_ancestor", |test| tool_alone(test, &["-t", "1"], &["1"])),
        Test::new("dump::kernel_thread", |test| tool_alone(test, &["-t", "2"], &["kernel thread"])),
        Test::new("dump::itself", itself),
        Test::new("dump::not_root", not_root),
        Test::new("dump::traced_by_another", traced),
        Test::new("dump::exits_meanwhile", exits_meanwhile),
        Test::new("dump::image_already_there", image_already_there),
        Test::new("dump::read_only_directory", read_only_directory),
        Test::new("dump::disk_full", disk_full),
        Test::new("dump::unclaimed_descriptors", unclaimed),
        Test::new("dump::what_nobody_can_keep", what_nobody_can_keep),
        Test::new("dump::shared_memory", |test| one_word(test, "refused_memory", "share their memory")),
        Test::new("dump::thread_files", |test| {
            one_word(test, "refused_thread", "descriptor table of its own")
        }),
        Test::new("dump::keyring", |test| one_word(test, "refused_keyring", "process keyring")),
        Test::new("dump::user_dispatch", |test| {
            one_word(test, "refused_dispatch", "PR_SET_SYSCALL_USER_DISPATCH")
        }),
        Test::new("dump::program_of_32_bits", program_of_32_bits),
        Test::new("dump::vfork_that_ends", |test| vfork(test, Duration::from_millis(300))),
        Test::new("dump::vfork_that_does_not", |test| vfork(test, Duration::from_secs(60))),
    ];
    // Kernel threads are seen in the machine's own pid namespace only.
    tests[2].outside = true;
    tests
}

/// A dump with these arguments must be refused with these words.
fn tool_alone(test: &str, arguments: &[&str], words: &[&str]) -> Result<(), Failure> {
    let dir = Stage::fresh_dir(test)?;
    let tool = Tool::discover().doing("finding the tool")?;
    let mut command = Command::new(&tool.bin);
    command.arg("dump").args(arguments).arg("-D").arg(&dir);
    let done = tool::run(&mut command, &dir.join("tool.out"), Duration::from_secs(20))?;
    refused(&done, words)?;
    fs::remove_dir_all(&dir).doing("removing the directory")
}

fn itself(test: &str) -> Result<(), Failure> {
    let dir = Stage::fresh_dir(test)?;
    let tool = Tool::discover().doing("finding the tool")?;
    let script = format!("exec {} dump -t $$ -D {}", tool.bin.display(), dir.display());
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &script]);
    refused(&tool::run(&mut command, &dir.join("tool.out"), Duration::from_secs(20))?, &[])?;
    fs::remove_dir_all(&dir).doing("removing the directory")
}

fn not_root(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "pipe_data")?;
    let images = case.images("img")?;
    std::os::unix::fs::chown(&images, Some(65534), Some(65534)).doing("giving the directory away")?;
    let mut command = Command::new(&case.tool.bin);
    command.args(["dump", "-t", &case.stage.root.to_string(), "-D"]).arg(&images).uid(65534).gid(65534);
    match case.stage.tool(&mut command) {
        Ok(done) => refused(&done, &[])?,
        // The build directory may be closed to others.
        Err(_) => {
            return Err(Failure::Skipped("another user cannot execute the tool where it was built".into()));
        }
    }
    case.unharmed()?;
    case.finish()
}

fn traced(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "mixture")?;
    let victim = Pid::from_raw(*case.before.pids.last().unwrap_or(&case.stage.root));
    // SAFETY: one thread.
    let tracer = match unsafe { fork() }.doing("forking the tracer")? {
        ForkResult::Child => {
            let _ = nix::sys::ptrace::seize(victim, nix::sys::ptrace::Options::empty());
            loop {
                pause(Duration::from_secs(10));
            }
        }
        ForkResult::Parent { child } => child,
    };
    let traced = || {
        let status = fs::read_to_string(format!("/proc/{victim}/status")).unwrap_or_default();
        status.contains(&format!("TracerPid:\t{tracer}\n"))
    };
    stasis_tests::ctl::poll_until("the tracer traces", traced)
        .map_err(|fail| Failure::Changed("the setup", fail.to_string()))?;
    let done = case.dump("img", &[])?;
    refused(&done, &[&victim.to_string(), "trace"])?;
    let still = traced();
    kill(tracer, Signal::SIGKILL).doing("ending the tracer")?;
    waitpid(tracer, None).doing("ending the tracer")?;
    if !still {
        return Err(Failure::Changed("the refusal", "the other tracer has lost its task".into()));
    }
    case.unharmed()?;
    case.finish()
}

/// Tasks that end at every moment of a dump: it must succeed without them or refuse, and never hang.
fn exits_meanwhile(test: &str) -> Result<(), Failure> {
    for round in 0..40u64 {
        let dir = Stage::fresh_dir(test)?;
        let tool = Tool::discover().doing("finding the tool")?;
        // SAFETY: one thread.
        let root = match unsafe { fork() }.doing("forking")? {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                let _ = nix::unistd::setsid();
                for n in 0..8 {
                    // SAFETY: one thread; the children only sleep.
                    if let Ok(ForkResult::Child) = unsafe { fork() } {
                        pause(Duration::from_micros(300 * n + 500 * round));
                        // SAFETY: ends the copy.
                        unsafe { libc::_exit(0) };
                    }
                }
                pause(Duration::from_micros(1500 + 500 * round));
                // SAFETY: as above.
                unsafe { libc::_exit(0) }
            }
        };
        let mut command = tool.dump(root.as_raw(), &dir, &["-j"]);
        let done = tool::run(&mut command, &dir.join("tool.out"), Duration::from_secs(20))?;
        if !done.status.success() {
            refused(&done, &[])?;
        }
        waitpid(root, None).doing("waiting for the tree")?;
        fs::remove_dir_all(&dir).doing("removing the directory")?;
    }
    Ok(())
}

fn image_already_there(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "pipe_data")?;
    succeeded(case.dump("img", &["-R"])?)?;
    refused(&case.dump("img", &[])?, &["img"])?;
    case.unharmed()?;
    case.stage.kill_tree()?;
    succeeded(case.restore("img", &[])?)?;
    case.unharmed()?;
    case.finish()
}

fn on_tmpfs(
    test: &str,
    workload: &str,
    options: &str,
    flags: MsFlags,
    words: &[&str],
) -> Result<(), Failure> {
    let mut case = Case::start(test, workload)?;
    let images = case.images("img")?;
    mount(Some("small"), &images, Some("tmpfs"), flags, Some(options)).doing("mounting a tmpfs")?;
    // The tree sees the mount as well; only what comes after counts.
    case = Case::of(case.stage)?;
    let done = case.dump("img", &[])?;
    refused(&done, words)?;
    case.unharmed()?;
    umount(&images).doing("unmounting the tmpfs")?;
    case.stage.check("the refusal")?;
    case.end()
}

fn read_only_directory(test: &str) -> Result<(), Failure> {
    on_tmpfs(test, "mixture", "size=1m", MsFlags::MS_RDONLY, &["read-only"])
}

fn disk_full(test: &str) -> Result<(), Failure> {
    // The heap of huge pages alone has 10 MiB.
    on_tmpfs(test, "mem_thp", "size=6m", MsFlags::empty(), &["no space"])
}

fn unclaimed(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "unclaimed")?;
    let done = case.dump("img", &[])?;
    refused(&done, &["77", "78", "fscontext", &case.stage.root.to_string()])?;
    case.unharmed()?;
    case.finish()
}

fn what_nobody_can_keep(test: &str) -> Result<(), Failure> {
    let case = Case::start(test, "refused")?;
    let names = fs::read_to_string(case.stage.dir.join("work/names")).doing("reading the names")?;
    let names: Vec<String> = names.lines().map(str::to_lowercase).collect();
    if names.is_empty() {
        return Err(Failure::Skipped("the machine lets nobody make any of these".into()));
    }
    let words: Vec<&str> = names.iter().map(String::as_str).collect();
    refused(&case.dump("img", &[])?, &words)?;
    case.unharmed()?;
    case.finish()
}

/// A workload whose state cannot be kept, and the word for it.
fn one_word(test: &str, workload: &str, word: &str) -> Result<(), Failure> {
    let case = Case::start(test, workload)?;
    refused(&case.dump("img", &[])?, &[word, "stasis-workload"])?;
    case.unharmed()?;
    case.finish()
}

/// An ELF file for i386 that waits in pause(2), again and again.
const WAITS_IN_32_BITS: [u8; 96] = {
    // mov eax, 29; int 0x80; jmp back
    let code = [0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7];
    let head = [
        0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, // ident
        2, 0, 3, 0, 1, 0, 0, 0, // ET_EXEC, EM_386
        0x54, 0x80, 0x04, 0x08, 52, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // entry, program headers
        52, 0, 32, 0, 1, 0, 40, 0, 0, 0, 0, 0, // sizes
        1, 0, 0, 0, 0, 0, 0, 0, 0x00, 0x80, 0x04, 0x08, 0x00, 0x80, 0x04, 0x08, // PT_LOAD
        96, 0, 0, 0, 96, 0, 0, 0, 5, 0, 0, 0, 0, 0x10, 0, 0,
    ];
    let mut file = [0; 96];
    let mut at = 0;
    while at < head.len() {
        file[at] = head[at];
        at += 1;
    }
    let mut at = 0;
    while at < code.len() {
        file[head.len() + at] = code[at];
        at += 1;
    }
    file
};

fn program_of_32_bits(test: &str) -> Result<(), Failure> {
    use std::os::unix::fs::PermissionsExt;
    let dir = Stage::fresh_dir(test)?;
    let program = dir.join("work/waits");
    fs::write(&program, WAITS_IN_32_BITS).doing("writing a program")?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).doing("writing a program")?;
    match Command::new(&program).spawn() {
        Err(error) => return Err(Failure::Skipped(format!("32-bit programs do not run here: {error}"))),
        Ok(mut child) => {
            child.kill().doing("ending the program")?;
            child.wait().doing("ending the program")?;
        }
    }
    let script = format!(": > {}/ready; exec {}", dir.display(), program.display());
    let stage =
        Stage::start_command(&dir, Flavour::Host, &["/bin/sh", "-c", &script], Duration::from_secs(20))?;
    let exe = format!("/proc/{}/exe", stage.root);
    stasis_tests::ctl::poll_until("the program runs", || fs::read_link(&exe).is_ok_and(|exe| exe == program))
        .map_err(|fail| Failure::Changed("the setup", fail.to_string()))?;
    let case = Case::of(stage)?;
    refused(&case.dump("img", &[])?, &["32-bit", "waits"])?;
    case.unharmed()?;
    case.end()
}

/// A parent in vfork(2) cannot stop until its child is done with its memory.
fn vfork(test: &str, length: Duration) -> Result<(), Failure> {
    let ends = length < Duration::from_secs(10);
    let dir = Stage::fresh_dir(test)?;
    let exe = std::env::current_exe().doing("finding this executable")?;
    let argv = [exe.to_string_lossy().into_owned(), "--vfork".into(), dir.to_string_lossy().into_owned()];
    let mut argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let millis = length.as_millis().to_string();
    argv.push(&millis);
    let mut stage = Stage::start_command(&dir, Flavour::Host, &argv, Duration::from_secs(30))?;
    stage.steady = false;
    let case = Case::of(stage)?;
    let done = case.dump("img", &["--timeout", if ends { "5" } else { "1" }, "-R"])?;
    if ends {
        succeeded(done)?;
    } else {
        refused(&done, &["vfork"])?;
    }
    case.end()
}

/// The workload of [`vfork`]: a child that sleeps in its parent's memory.
pub fn vfork_workload(dir: &str, millis: u64) -> ! {
    let _ = fs::write(format!("{dir}/ready"), "");
    let time = libc::timespec { tv_sec: (millis / 1000) as i64, tv_nsec: (millis % 1000 * 1_000_000) as i64 };
    loop {
        // SAFETY: the child makes two system calls and touches no memory of its parent but its own stack frame.
        unsafe {
            let pid = libc::syscall(
                libc::SYS_clone,
                libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD,
                0,
                0,
                0,
                0,
            );
            if pid == 0 {
                libc::syscall(libc::SYS_nanosleep, &time, 0);
                libc::syscall(libc::SYS_exit, 0);
            }
            libc::waitpid(pid as i32, std::ptr::null_mut(), 0);
        }
        pause(Duration::from_millis(5));
    }
}
