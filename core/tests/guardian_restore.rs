//! The guardian's restore side on a hand-made tree: adopted from birth, given its final state, let go or killed.
#![allow(clippy::undocumented_unsafe_blocks)]
#[path = "guardian_support/mod.rs"]
mod support;

use stasis::{
    arch::Registers,
    guardian::{
        Guardian, GuardianError,
        protocol::{Bytes, FinalTask, FinalThread, Outcome, Restart},
    },
};
use std::{
    arch::naked_asm,
    fs::File,
    io::{Read, pipe},
    os::fd::{AsRawFd, OwnedFd},
    process::Command,
    time::{Duration, Instant},
};
use support::*;

const TIME: Duration = Duration::from_secs(20);
/// Where the pretended restorer lies.
const BLOB: u64 = 0x1234_5000_0000;

/// What the restored tasks run: the tail of a system call, then one byte to descriptor r12, then exit code r13.
#[unsafe(naked)]
extern "C" fn program() {
    naked_asm!(
        "syscall", // two bytes: the final registers begin just behind
        "push 0x21",
        "mov eax, 1",
        "mov edi, r12d",
        "mov rsi, rsp",
        "mov edx, 1",
        "syscall",
        "mov eax, 231",
        "mov edi, r13d",
        "syscall",
        "ud2"
    )
}

/// Maps a page with an int3 in it, and goes there.
unsafe fn arrive() -> ! {
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let page = libc::mmap(BLOB as *mut _, 8192, protection, flags, -1, 0);
        *page.cast::<u8>() = 0xcc;
        let code: extern "C" fn() -> ! = std::mem::transmute(page);
        code()
    }
}

/// Forks a root task that waits for the gate, then forks a child; both end at an int3. Tells the root and the gate.
fn root() -> (i32, OwnedFd) {
    let (reader, writer) = pipe().unwrap();
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        unsafe {
            let mut byte = 0u8;
            libc::close(writer.as_raw_fd());
            if libc::read(reader.as_raw_fd(), (&raw mut byte).cast(), 1) != 1 {
                libc::_exit(9);
            }
            // A helper that comes and goes, for which its parent waits.
            let helper = libc::fork();
            if helper == 0 {
                libc::_exit(5);
            }
            let mut status = 0;
            libc::waitpid(helper, &mut status, 0);
            if libc::WEXITSTATUS(status) != 5 {
                libc::_exit(8);
            }
            libc::fork();
            arrive();
        }
    }
    (pid, writer.into())
}

/// Extended registers of some process of this machine.
fn xstate() -> Bytes {
    let sleeper = Killed(Command::new("sleep").arg("100").spawn().unwrap());
    let mut guardian = Guardian::spawn().unwrap();
    guardian.seize(sleeper.pid(), TIME, None).unwrap();
    let state = guardian.collect().unwrap();
    guardian.finish(Outcome::Run).unwrap();
    state[0].threads[0].xstate.clone()
}

fn task(pid: i32, stack: u64, fd: i32, code: u64) -> FinalTask {
    let registers = Registers {
        rip: program as *const () as u64 + 2,
        rsp: stack,
        r12: fd as u64,
        r13: code,
        cs: 0x33,
        ss: 0x2b,
        eflags: 0x202,
        orig_rax: u64::MAX,
        ..Registers::default()
    };
    let thread = FinalThread {
        tid: pid,
        registers: Bytes(registers.to_bytes()),
        xstate: xstate(),
        signal_mask: 0,
        restart: None,
        late: Vec::new(),
    };
    FinalTask {
        pid,
        unmap: vec![(BLOB, 8192)],
        arm: None,
        scratch: BLOB + 4096,
        group_stop: None,
        threads: vec![thread],
    }
}

fn child_of(pid: i32) -> i32 {
    children(pid).trim().parse().expect("one child")
}

/// The stack of this very process, which the forked ones have too.
fn a_stack() -> u64 {
    let stack: &'static mut [u64] = Vec::leak(vec![0u64; 4096]);
    stack.as_ptr_range().end as u64
}

fn exit_code(pid: i32) -> i32 {
    let mut status = 0;
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert!(libc::WIFEXITED(status), "status {status:#x}");
    libc::WEXITSTATUS(status)
}

#[test]
fn a_tree_is_finalized_and_runs() {
    let stack = a_stack();
    let (mut output, input) = pipe().unwrap();
    let mut guardian = Guardian::spawn().unwrap();
    let (root, gate) = root();
    guardian.adopt(root, Some(gate)).unwrap();
    guardian.wait_arrived(2, TIME).unwrap();
    let died = guardian.try_died().unwrap().expect("the helper");
    assert_eq!(died.exit, stasis::ptrace::Exit::Code(5));
    let child = child_of(root);
    assert!(maps(root).contains("12345000"));
    let mut first = task(root, stack, input.as_raw_fd(), 3);
    // The root was sleeping: half a second of ten is left.
    let nap = Box::leak(Box::new([10i64, 0]));
    let mut registers = Registers::from_bytes(&first.threads[0].registers).unwrap();
    registers.rax = -516i64 as u64;
    registers.orig_rax = libc::SYS_clock_nanosleep as u64;
    registers.rdi = libc::CLOCK_MONOTONIC as u64;
    registers.rdx = nap.as_ptr() as u64;
    first.threads[0].registers = Bytes(registers.to_bytes());
    let remaining_ns = Some(500_000_000);
    first.threads[0].restart = Some(Restart {
        syscall: libc::SYS_clock_nanosleep as u64,
        clock: libc::CLOCK_MONOTONIC,
        remaining_ns,
    });
    let mut second = task(child, stack, input.as_raw_fd(), 4);
    second.group_stop = Some(libc::SIGTSTP);
    guardian.finalize(vec![first, second]).unwrap();
    let released = Instant::now();
    guardian.release().unwrap();
    assert!(!maps(root).contains("12345000"), "the blob is unmapped");
    wait_for(|| state(child) == 'T');
    let mut byte = [0u8];
    output.read_exact(&mut byte).unwrap();
    assert_eq!(byte, [0x21]);
    let slept = released.elapsed();
    assert!(slept > Duration::from_millis(300) && slept < Duration::from_secs(5), "slept {slept:?}");
    assert_eq!(exit_code(root), 3);
    assert_eq!(field(child, "TracerPid"), "0");
    unsafe { libc::kill(child, libc::SIGCONT) };
    output.read_exact(&mut byte).unwrap();
}

#[test]
fn aborting_kills_all() {
    let mut guardian = Guardian::spawn().unwrap();
    let (root, gate) = root();
    guardian.adopt(root, Some(gate)).unwrap();
    guardian.wait_arrived(2, TIME).unwrap();
    let child = child_of(root);
    guardian.abort().unwrap();
    assert!(is_gone(root) && is_gone(child));
    unsafe { libc::waitpid(root, std::ptr::null_mut(), 0) };
}

/// The command is a child of this test; the root task holds a copy of its channel, which must not matter.
#[test]
fn killing_the_command_kills_all() {
    let (mut reader, writer) = pipe().unwrap();
    let command = unsafe { libc::fork() };
    if command == 0 {
        let mut guardian = Guardian::spawn().unwrap();
        let (root, gate) = root();
        guardian.adopt(root, Some(gate)).unwrap();
        guardian.wait_arrived(2, TIME).unwrap();
        let pids = [root.to_ne_bytes(), child_of(root).to_ne_bytes()].concat();
        unsafe { libc::write(writer.as_raw_fd(), pids.as_ptr().cast(), 8) };
        std::thread::sleep(TIME);
        unsafe { libc::_exit(1) };
    }
    let mut pids = [0u8; 8];
    reader.read_exact(&mut pids).unwrap();
    let [root, child] = [0, 4].map(|at| i32::from_ne_bytes(pids[at..at + 4].try_into().unwrap()));
    assert!(!is_gone(root) && !is_gone(child));
    unsafe {
        libc::kill(command, libc::SIGKILL);
        libc::waitpid(command, std::ptr::null_mut(), 0);
    }
    wait_for(|| is_gone(root) && is_gone(child));
}

#[test]
fn killing_the_guardian_kills_all() {
    let mut guardian = Guardian::spawn().unwrap();
    let (root, gate) = root();
    guardian.adopt(root, Some(gate)).unwrap();
    guardian.wait_arrived(2, TIME).unwrap();
    let child = child_of(root);
    unsafe { libc::kill(guardian.pid(), libc::SIGKILL) };
    wait_for(|| is_gone(root) && is_gone(child));
    unsafe { libc::waitpid(root, std::ptr::null_mut(), 0) };
    assert_eq!(guardian.abort().unwrap_err(), GuardianError::Ended);
}

#[test]
fn a_crash_on_the_way_is_reported() {
    let (reader, writer) = pipe().unwrap();
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        unsafe {
            let mut byte = 0u8;
            libc::read(reader.as_raw_fd(), (&raw mut byte).cast(), 1);
            libc::abort();
        }
    }
    let mut guardian = Guardian::spawn().unwrap();
    guardian.adopt(pid, Some(writer.into())).unwrap();
    let error = guardian.wait_arrived(1, TIME).unwrap_err();
    let exit = stasis::ptrace::Exit::Signal(libc::SIGABRT);
    assert_eq!(error, GuardianError::RestoredTaskDied { pid, exit });
    assert!(error.to_string().contains("SIGABRT"), "{error}");
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
    drop(File::from(OwnedFd::from(reader)));
}
