//! The guardian on processes that make it hard: filters, storms, stops, and a command that is killed.
#![allow(clippy::undocumented_unsafe_blocks)]
#[path = "guardian_support/mod.rs"]
mod support;

use stasis::guardian::{
    Guardian, GuardianError, WriteJob,
    protocol::{Outcome, PageRange},
};
use std::{os::fd::AsFd, process::Command, time::Duration};
use support::*;

const TIME: Duration = Duration::from_secs(20);

/// Seizes, asks everything, and lets go.
fn visit(pid: i32) -> Result<(), GuardianError> {
    let mut guardian = Guardian::spawn()?;
    let tasks = guardian.seize(pid, TIME, None)?;
    guardian.collect()?;
    let pids: Vec<i32> = tasks.iter().filter(|task| !task.zombie).map(|task| task.pid).collect();
    guardian.inspect(&pids)?;
    guardian.finish(Outcome::Run)
}

#[test]
fn a_filter_that_allows_hardly_anything() {
    // SECCOMP_MODE_STRICT allows read, write and exit; anything else kills. Python needs more: a filter on top of prctl.
    let mut program = Killed(python(
        "import ctypes,struct,sys,os\nlibc=ctypes.CDLL(None)\nbuf=ctypes.create_string_buffer(1)\nos.write(1,b'ready\\n')\nlibc.prctl(22,1,0,0,0)\nlibc.read(0,buf,1)\nlibc.write(1,b'ok\\n',3)\nlibc.syscall(60,7)",
    ));
    ready(&mut program.0);
    let pid = program.pid();
    wait_for(|| field(pid, "Seccomp") == "1" && state(pid) == 'S');
    let before = maps(pid);
    visit(pid).unwrap();
    assert_eq!(maps(pid), before);
    write_line(&mut program.0);
    assert_eq!(read_line(&mut program.0), "ok\n");
    assert_eq!(program.0.wait().unwrap().code(), Some(7));
}

#[test]
fn memory_deny_write_execute() {
    let mut program = Killed(python(
        "import ctypes,sys\nlibc=ctypes.CDLL(None)\nassert libc.prctl(65,1,0,0,0)==0\nprint('ready',flush=True)\nsys.stdin.readline()\nprint('ok',flush=True)",
    ));
    ready(&mut program.0);
    let pid = program.pid();
    let mut guardian = Guardian::spawn().unwrap();
    guardian.seize(pid, TIME, None).unwrap();
    assert_eq!(guardian.inspect(&[pid]).unwrap()[0].mdwe, 1);
    guardian.finish(Outcome::Run).unwrap();
    write_line(&mut program.0);
    assert_eq!(read_line(&mut program.0), "ok\n");
}

#[test]
fn ignored_and_handled_sigtrap_stay_so() {
    for disposition in ["signal.SIG_IGN", "lambda *a: print('trapped',flush=True)"] {
        let mut program = Killed(python(&format!(
            "import signal,sys,os\nsignal.signal(signal.SIGTRAP,{disposition})\nprint('ready',flush=True)\nsys.stdin.readline()\nos.kill(os.getpid(),signal.SIGTRAP)\nprint('end',flush=True)"
        )));
        ready(&mut program.0);
        let pid = program.pid();
        let signals =
            |pid| (field(pid, "SigIgn"), field(pid, "SigCgt"), field(pid, "SigBlk"), field(pid, "SigPnd"));
        let before = signals(pid);
        visit(pid).unwrap();
        let mut guardian = Guardian::spawn().unwrap();
        guardian.seize(pid, TIME, None).unwrap();
        guardian.snapshot(&[pid]).unwrap();
        guardian.finish(Outcome::Run).unwrap();
        assert_eq!(signals(pid), before);
        assert_eq!(children(pid), "");
        write_line(&mut program.0);
        if disposition != "signal.SIG_IGN" {
            assert_eq!(read_line(&mut program.0), "trapped\n");
        }
        assert_eq!(read_line(&mut program.0), "end\n");
    }
}

#[test]
fn storms_of_forks_and_threads() {
    for body in [
        "while True:\n p=os.fork()\n if p==0:\n  os._exit(0)\n os.waitpid(p,0)",
        "while True:\n t=threading.Thread(target=lambda:None)\n t.start()\n t.join()",
        "import subprocess\nwhile True: subprocess.run(['/bin/true'])",
    ] {
        let mut program = Killed(python(&format!("import os,threading\nprint('ready',flush=True)\n{body}")));
        ready(&mut program.0);
        let pid = program.pid();
        for _ in 0..15 {
            visit(pid).unwrap();
            assert_eq!(field(pid, "TracerPid"), "0");
        }
        wait_for(|| {
            children(pid)
                .split(' ')
                .filter(|text| !text.is_empty())
                .all(|child| field(child.parse().unwrap(), "TracerPid") != "x")
        });
        assert!(!is_gone(pid), "the program ended: {body}");
    }
}

#[test]
fn a_group_stop_is_seen_and_kept() {
    let mut program = Killed(python("import time\nprint('ready',flush=True)\ntime.sleep(1000)"));
    ready(&mut program.0);
    let pid = program.pid();
    unsafe { libc::kill(pid, libc::SIGSTOP) };
    wait_for(|| state(pid) == 'T');
    let mut guardian = Guardian::spawn().unwrap();
    let tasks = guardian.seize(pid, TIME, None).unwrap();
    assert_eq!(tasks[0].group_stop, Some(libc::SIGSTOP));
    guardian.collect().unwrap();
    guardian.inspect(&[pid]).unwrap();
    guardian.finish(Outcome::Run).unwrap();
    wait_for(|| state(pid) == 'T');
    unsafe { libc::kill(pid, libc::SIGCONT) };
    wait_for(|| state(pid) == 'S');
}

#[test]
fn left_stopped_and_continued() {
    let mut program = Killed(python(
        "import threading,sys\nfor _ in range(8): threading.Thread(target=threading.Event().wait,daemon=True).start()\nprint('ready',flush=True)\nsys.stdin.readline()\nprint('on',flush=True)",
    ));
    ready(&mut program.0);
    let pid = program.pid();
    let mut guardian = Guardian::spawn().unwrap();
    guardian.seize(pid, TIME, None).unwrap();
    guardian.inspect(&[pid]).unwrap();
    guardian.finish(Outcome::Stopped).unwrap();
    wait_for(|| state(pid) == 'T' && field(pid, "TracerPid") == "0");
    unsafe { libc::kill(pid, libc::SIGCONT) };
    write_line(&mut program.0);
    assert_eq!(read_line(&mut program.0), "on\n");
}

#[test]
fn refusals_name_the_reason() {
    let mut guardian = Guardian::spawn().unwrap();
    let error = |guardian: &mut Guardian, pid| guardian.seize(pid, TIME, None).unwrap_err().to_string();
    let own = std::process::id() as i32;
    assert!(error(&mut guardian, own).contains("stasis itself"), "{}", error(&mut guardian, own));
    assert!(error(&mut guardian, 1).contains("stasis itself"));
    assert!(error(&mut guardian, 2).contains("kernel thread"), "{}", error(&mut guardian, 2));
    assert!(error(&mut guardian, 4_000_000).contains("there is no task 4000000"));
    let sleeper = Killed(Command::new("sleep").arg("100").spawn().unwrap());
    let mut other = Guardian::spawn().unwrap();
    other.seize(sleeper.pid(), TIME, None).unwrap();
    let text = error(&mut guardian, sleeper.pid());
    assert!(text.contains(&format!("already traced by process {} (stasis-guardian)", other.pid())), "{text}");
    other.finish(Outcome::Run).unwrap();
    visit(sleeper.pid()).unwrap();
}

#[test]
fn a_vforked_parent_cannot_be_stopped_but_is_left_alone() {
    let mut program = Killed(own_program("vfork_and_wait"));
    while !read_line(&mut program.0).contains("forking") {}
    // The test harness runs it in a thread of its own.
    let pid = program.pid();
    let all_children = |pid: i32| -> String {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let text = |tid: &str| std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/children"));
        threads
            .map(|thread| text(thread.unwrap().file_name().to_str().unwrap()).unwrap_or_default())
            .collect()
    };
    wait_for(|| !all_children(pid).is_empty());
    let mut guardian = Guardian::spawn().unwrap();
    let error = guardian.seize(pid, Duration::from_millis(700), None).unwrap_err();
    assert!(error.to_string().contains("vfork"), "{error}");
    // It stays traced until it stops, and then is let go.
    write_line(&mut program.0);
    while !read_line(&mut program.0).contains("parent") {}
    wait_for(|| field(pid, "TracerPid") == "0");
    visit(pid).unwrap();
}

/// The command is killed in the middle: a child process of this test plays it.
#[test]
fn a_killed_command_leaves_the_tree_unharmed() {
    let mut program = Killed(python(
        "import threading,sys,time\nfor _ in range(20): threading.Thread(target=threading.Event().wait,daemon=True).start()\nbig=bytearray(b'x'*(64<<20))\nprint('ready',flush=True)\nwhile True:\n line=sys.stdin.readline()\n print('alive',sum(big[::4096])==120*len(big[::4096]),flush=True)",
    ));
    ready(&mut program.0);
    let pid = program.pid();
    let (before, fds) = (maps(pid), descriptors(pid));
    let range = before.lines().filter_map(|line| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    });
    let (start, end) =
        range.max_by_key(|(start, end)| if end - start < (70 << 20) { end - start } else { 0 }).unwrap();
    for delay in [0u64, 1, 2, 3, 5, 8, 13, 21, 34, 55] {
        let command = unsafe { libc::fork() };
        if command == 0 {
            let run = || -> Result<(), GuardianError> {
                let mut guardian = Guardian::spawn()?;
                guardian.seize(pid, TIME, None)?;
                guardian.collect()?;
                guardian.inspect(&[pid])?;
                let shard = tempfile::tempfile().unwrap();
                let ranges = vec![PageRange { address: start, len: end - start, raw: false }];
                guardian.start_write(&[WriteJob { pid, shard: shard.as_fd(), offset: 0, ranges }])?;
                guardian.finish_write()?;
                guardian.snapshot(&[pid])?;
                loop {
                    std::thread::sleep(TIME);
                }
            };
            let _ = run();
            unsafe { libc::_exit(1) };
        }
        std::thread::sleep(Duration::from_millis(delay * 3));
        unsafe {
            libc::kill(command, libc::SIGKILL);
            libc::waitpid(command, std::ptr::null_mut(), 0);
        }
        wait_for(|| field(pid, "TracerPid") == "0" && children(pid).is_empty());
        write_line(&mut program.0);
        assert_eq!(read_line(&mut program.0), "alive True\n", "after {delay}");
        wait_for(|| field(pid, "TracerPid") == "0");
        assert_eq!(maps(pid), before, "after {delay}");
        assert_eq!(descriptors(pid), fds, "after {delay}");
    }
}

#[test]
fn a_task_killed_in_the_middle_harms_no_other() {
    let mut program = Killed(python(
        "import os,sys,time\np=os.fork()\nif p==0: time.sleep(1000)\nprint(p,flush=True)\nprint(os.waitpid(p,0)[1],flush=True)",
    ));
    let child: i32 = read_line(&mut program.0).trim().parse().unwrap();
    let pid = program.pid();
    let mut guardian = Guardian::spawn().unwrap();
    guardian.seize(pid, TIME, None).unwrap();
    guardian.collect().unwrap();
    unsafe { libc::kill(child, libc::SIGKILL) };
    let error = guardian.inspect(&[pid, child]).unwrap_err();
    assert!(error.to_string().contains(&child.to_string()), "{error}");
    guardian.finish(Outcome::Run).unwrap();
    assert_eq!(read_line(&mut program.0), "9\n", "its parent sees the signal");
}

#[test]
fn extended_registers_are_kept() {
    // A loop that keeps values in vector registers and ends when they change or a line comes.
    let mut program = Killed(own_program("vector_register_loop"));
    while !read_line(&mut program.0).contains("looping") {}
    let pid = program.pid();
    for _ in 0..50 {
        visit(pid).unwrap();
    }
    assert!(!is_gone(pid), "a vector register changed");
}

/// One of the ignored tests of this file, as a process.
fn own_program(name: &str) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args([name, "--ignored", "--exact", "--nocapture"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap()
}

/// Not a test of itself: what `a_vforked_parent_cannot_be_stopped_but_is_left_alone` starts.
#[test]
#[ignore = "the program of another test"]
fn vfork_and_wait() {
    println!("forking");
    unsafe {
        std::arch::asm!(
            "mov eax, 58", // vfork
            "syscall",
            "test eax, eax",
            "jnz 2f",
            "xor edi, edi", // the child: read(0, r13, 1), exit(0)
            "mov rsi, r13",
            "mov edx, 1",
            "syscall",
            "mov eax, 60",
            "xor edi, edi",
            "syscall",
            "2:",
            in("r13") [0u8; 8].as_mut_ptr(), out("rax") _, out("rdi") _, out("rsi") _, out("rdx") _, out("rcx") _, out("r11") _,
        );
    }
    println!("parent");
    std::thread::sleep(TIME);
}

/// Not a test of itself: what `extended_registers_are_kept` starts.
#[test]
#[ignore = "the program of another test"]
fn vector_register_loop() {
    println!("looping");
    let pattern = [0x1122_3344_5566_7788u64, 0x99aa_bbcc_ddee_ff00];
    unsafe {
        std::arch::asm!(
            "movdqu xmm3, [{p}]",
            "movdqu xmm14, [{p}]",
            "2:",
            "movdqa xmm0, xmm3",
            "pcmpeqb xmm0, xmm14",
            "pmovmskb {m:e}, xmm0",
            "cmp {m:e}, 0xffff",
            "jne 3f",
            "movq {m}, xmm3",
            "cmp {m}, [{p}]",
            "je 2b",
            "3:",
            p = in(reg) pattern.as_ptr(), m = out(reg) _, out("xmm0") _, out("xmm3") _, out("xmm14") _,
        );
    }
    panic!("a vector register changed");
}

#[test]
fn an_interrupted_wait_for_descriptors_is_made_again() {
    // Restarted by nobody: select.epoll would raise InterruptedError no more, so the raw call is made and its result shown.
    let mut program = Killed(python(
        "import ctypes,select,sys,os\nlibc=ctypes.CDLL(None,use_errno=True)\ne=select.epoll()\ne.register(0,select.EPOLLIN)\nbuf=ctypes.create_string_buffer(64)\nprint('ready',flush=True)\nr=libc.epoll_wait(e.fileno(),buf,4,-1)\nprint(r,flush=True)",
    ));
    ready(&mut program.0);
    let pid = program.pid();
    wait_for(|| state(pid) == 'S');
    for _ in 0..5 {
        visit(pid).unwrap();
        // And with nothing injected.
        let mut guardian = Guardian::spawn().unwrap();
        guardian.seize(pid, TIME, None).unwrap();
        guardian.collect().unwrap();
        guardian.finish(Outcome::Run).unwrap();
    }
    write_line(&mut program.0);
    assert_eq!(read_line(&mut program.0), "1\n");
}

#[test]
fn a_cgroup_is_frozen_meanwhile_and_as_before_afterwards() {
    let mut tried = 0;
    for root in ["/sys/fs/cgroup/freezer", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"] {
        let directory = std::path::Path::new(root).join(format!("stasis-test-{}", std::process::id()));
        if std::fs::create_dir(&directory).is_err() {
            continue;
        }
        let freezable = directory.join("freezer.state").exists() || directory.join("cgroup.freeze").exists();
        if freezable {
            tried += 1;
            let mut program = Killed(python(
                "import subprocess\nprint('ready',flush=True)\nwhile True: subprocess.run(['/bin/true'])",
            ));
            ready(&mut program.0);
            let pid = program.pid();
            std::fs::write(directory.join("cgroup.procs"), pid.to_string()).unwrap();
            for _ in 0..5 {
                let mut guardian = Guardian::spawn().unwrap();
                let tasks = guardian.seize(pid, TIME, Some(directory.clone())).unwrap();
                guardian.collect().unwrap();
                let pids: Vec<i32> = tasks.iter().filter(|task| !task.zombie).map(|task| task.pid).collect();
                guardian.inspect(&pids).unwrap();
                guardian.finish(Outcome::Run).unwrap();
            }
            let text = |file: &str| std::fs::read_to_string(directory.join(file)).unwrap_or_default();
            assert!(text("freezer.state") != "FROZEN\n" && !text("cgroup.events").contains("frozen 1"));
            drop(program);
        }
        wait_for(|| std::fs::remove_dir(&directory).is_ok());
    }
    if tried == 0 {
        println!("skipped: no cgroup can be made here");
    }
}
