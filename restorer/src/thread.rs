//! Making threads, and what each thread sets for itself.

use crate::proto::{Arguments, Step, Thread};
use crate::sys::{Failure, Outcome, call, nr, step};
use crate::{arrive, credentials as ids, fail, own, process};
use core::arch::naked_asm;
use core::sync::atomic::Ordering;

const CLONE_VM: u64 = 0x100;
const CLONE_FS: u64 = 0x200;
const CLONE_FILES: u64 = 0x400;
const CLONE_SIGHAND: u64 = 0x800;
const CLONE_THREAD: u64 = 0x1_0000;
const CLONE_SYSVSEM: u64 = 0x4_0000;
const FLAGS: u64 = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM;

const PR_SET_PDEATHSIG: u64 = 1;
const PR_SET_NAME: u64 = 15;
const PR_SET_SECCOMP: u64 = 22;
const PR_SET_TSC: u64 = 26;
const SS_ONSTACK: u64 = 1;
const SECCOMP_MODE_STRICT: u32 = 1;
const FUTEX_WAKE: u64 = 1;

/// `struct clone_args` up to `cgroup`.
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// How often a number that is taken is tried, a millisecond apart.
const TRIES: u32 = 500;
const EEXIST: i64 = -17;

/// Makes the thread `index` of the table (clone3(2) with `set_tid`).
pub fn make(arguments: &'static Arguments, index: usize) -> Outcome {
    let threads = arguments.threads.entries();
    let Some(thread) = threads.get(index) else { return Ok(()) };
    let clone = CloneArguments {
        flags: FLAGS,
        stack: arguments.stacks + (index as u64 - 1) * arguments.stack_size,
        stack_size: arguments.stack_size,
        set_tid: &raw const thread.tid as u64,
        set_tid_size: 1,
        ..CloneArguments::default()
    };
    let mut result;
    let mut tries = 0;
    loop {
        // SAFETY: the new thread runs `run` on a stack of its own, and never returns from there.
        result = unsafe { clone3(&clone, size_of::<CloneArguments>(), arguments, thread) };
        // The kernel frees a number a moment after its last task is out of sight (release_task, kernel/exit.c).
        if result != EEXIST || tries == TRIES {
            break;
        }
        tries += 1;
        let millisecond = [0u64, 1_000_000];
        // SAFETY: nanosleep(2) reads two words, and writes nothing to a null pointer.
        unsafe { call(nr::NANOSLEEP, [&raw const millisecond as u64, 0]) };
    }
    if result < 0 {
        return Err(Failure {
            step: Step::Clone,
            errno: result.unsigned_abs() as u32,
            index: thread.tid as usize,
        });
    }
    Ok(())
}

/// clone3(2) whose child calls [`run`] with the last two arguments, which it keeps in registers.
#[unsafe(naked)]
unsafe extern "C" fn clone3(_: &CloneArguments, _: usize, _: &'static Arguments, _: &'static Thread) -> i64 {
    naked_asm!(
        "mov r8, rcx",
        "mov eax, 435",
        "syscall",
        "test rax, rax",
        "jz 2f",
        "ret",
        "2:",
        "xor ebp, ebp",
        "mov rdi, rdx",
        "mov rsi, r8",
        "call {run}",
        "ud2",
        run = sym run,
    )
}

extern "C" fn run(arguments: &'static Arguments, thread: &'static Thread) -> ! {
    if let Err(failure) = attributes(arguments, thread).and_then(|()| credentials(thread)) {
        fail(arguments, thread.tid, &failure);
    }
    arguments.ready.fetch_add(1, Ordering::Release);
    if arguments.ready.load(Ordering::Acquire) as usize + 1 == arguments.threads.len as usize {
        // SAFETY: wakes the leader; touches no memory.
        unsafe { call(nr::FUTEX, [&raw const arguments.ready as u64, FUTEX_WAKE, 1]) };
    }
    arrive()
}

/// All of a thread but its credentials and what follows from them.
pub fn attributes(arguments: &Arguments, thread: &Thread) -> Outcome {
    // SAFETY: the kernel reads 16 bytes of the name; the other calls get addresses of the task, which the kernel only
    // keeps, or writes to as it would have in the task's own name.
    unsafe {
        step(Step::ThreadName, 0, nr::PRCTL, [PR_SET_NAME, thread.name.as_ptr() as u64])?;
        call(nr::SET_TID_ADDRESS, [thread.clear_child_tid]);
        if thread.robust_list_len != 0 {
            step(Step::RobustList, 0, nr::SET_ROBUST_LIST, [thread.robust_list, thread.robust_list_len])?;
        }
        if thread.rseq != 0 {
            let place = [thread.rseq, thread.rseq_size.into(), 0, thread.rseq_signature.into()];
            step(Step::Rseq, 0, nr::RSEQ, place)?;
        }
        let stack = [thread.altstack_base, thread.altstack_flags & !SS_ONSTACK, thread.altstack_size];
        step(Step::AltStack, 0, nr::SIGALTSTACK, [stack.as_ptr() as u64, 0])?;
    }
    own::set(thread)?;
    for (index, info) in thread.pending.entries().iter().enumerate() {
        let place = [arguments.pid as u64, thread.tid as u64, info[0] & 0x7f, &raw const *info as u64];
        // SAFETY: the kernel reads one siginfo_t.
        unsafe { step(Step::Pending, index, nr::RT_TGSIGQUEUEINFO, place)? };
    }
    process::filters(thread.filters)
}

/// Credentials, and what a change of them resets.
pub fn credentials(thread: &Thread) -> Outcome {
    ids::set(&thread.credentials)?;
    // SAFETY: no memory is involved.
    unsafe {
        // commit_creds clears it (kernel/cred.c).
        step(Step::ParentDeath, 0, nr::PRCTL, [PR_SET_PDEATHSIG, thread.parent_death_signal.into()])?;
        // Last of what runs here: no code of the restorer reads the time stamp counter.
        if thread.tsc != 0 {
            step(Step::TimeStamps, 0, nr::PRCTL, [PR_SET_TSC, thread.tsc.into()])?;
        }
        if thread.credentials.seccomp_mode == SECCOMP_MODE_STRICT {
            step(Step::Seccomp, 0, nr::PRCTL, [PR_SET_SECCOMP, SECCOMP_MODE_STRICT.into()])?;
        }
    }
    Ok(())
}
