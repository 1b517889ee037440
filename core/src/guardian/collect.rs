//! What ptrace tells of the stopped threads.

use super::{
    GuardianError,
    protocol::{Bytes, CollectedTask, ThreadState},
    restart,
    tree::{Process, Thread, Tree},
    wait::Waiter,
    waits::LimitedWait,
};
use crate::{
    arch::{Registers, socket_wait, timeout_of_uninterruptible_wait},
    inject::run::{Saved, faults_in},
    ptrace::{Rseq, Stopped, Tracee, who},
};

/// Saves the state of all threads of a process that have none saved yet.
pub fn capture(pid: i32, process: &mut Process, scratch: &mut Vec<u8>) -> Result<(), GuardianError> {
    let mut shared = None;
    for thread in process.threads.values_mut() {
        let (None, Tracee::Stopped(stopped)) = (&thread.saved, &thread.tracee) else { continue };
        let of_process = match shared {
            Some(found) => found,
            None => *shared.insert(faults_in(&stopped.pending(true)?)),
        };
        let of_thread = faults_in(&stopped.pending(false)?);
        capture_thread(pid, thread, scratch)?;
        if let Some(saved) = &mut thread.saved {
            saved.sent_faults = of_process | of_thread;
        }
    }
    Ok(())
}

/// Saves the state of one stopped thread.
pub fn capture_thread(pid: i32, thread: &mut Thread, scratch: &mut Vec<u8>) -> Result<(), GuardianError> {
    let stopped = thread.tracee.stopped()?;
    let mut saved = Saved::capture(stopped, scratch)?;
    let original = saved.registers;
    if saved.registers.result() == -i64::from(libc::EINTR)
        && is_wait(stopped.id().tid, &saved.registers)
        && !will_be_interrupted(pid, stopped, saved.signal_mask)?
    {
        let begun = thread.begun.filter(|begun| begun.lasted_until_stop(stopped.id().tid));
        thread.wait =
            begun.map(|begun| LimitedWait { syscall: original.orig_rax, deadline_ns: begun.deadline_ns });
        saved.registers.rewind();
    }
    if let Some(rseq) = stopped.rseq()? {
        leave_critical_section(stopped.id().tid, rseq, &mut saved);
    }
    thread.touched = saved.registers != original;
    thread.saved = Some(saved);
    Ok(())
}

/// Whether a call that returned EINTR is one that a stop alone makes do so.
fn is_wait(tid: i32, registers: &Registers) -> bool {
    let is_socket = |fd: u32| {
        let link = std::fs::read_link(format!("/proc/{tid}/fd/{fd}")).unwrap_or_default();
        link.to_string_lossy().starts_with("socket:")
    };
    timeout_of_uninterruptible_wait(registers).is_some()
        || socket_wait(registers).is_some_and(|wait| !wait.of_any_file || is_socket(wait.fd))
}

/// True if a handler is about to run for a pending signal: then EINTR is right.
fn will_be_interrupted(pid: i32, stopped: &Stopped, blocked: u64) -> Result<bool, GuardianError> {
    let number = |info: &Vec<u8>| info.first().map_or(0, |&byte| u32::from(byte));
    let pending = stopped
        .pending(false)?
        .iter()
        .chain(&stopped.pending(true)?)
        .map(number)
        .fold(0, |set, signal| if (1..=64).contains(&signal) { set | 1u64 << (signal - 1) } else { set });
    Ok(pending & !blocked != 0 && pending & !blocked & who::signal_set(pid, "SigCgt") != 0)
}

/// A stop inside a restartable sequence aborts it, as preemption would (rseq(2)); injected code would make the kernel forget that.
fn leave_critical_section(tid: i32, rseq: Rseq, saved: &mut Saved) {
    /// struct rseq: offset of rseq_cs.
    const DESCRIPTOR: u64 = 8;
    let mut word = [0u8; 8];
    if !transfer(tid, &mut word, rseq.address + DESCRIPTOR, false) {
        return;
    }
    let descriptor = u64::from_ne_bytes(word);
    if descriptor == 0 {
        return;
    }
    // struct rseq_cs: version and flags, start, length, abort handler.
    let mut section = [0u8; 32];
    if !transfer(tid, &mut section, descriptor, false) {
        return;
    }
    let field = |at: usize| section[at..at + 8].iter().rev().fold(0u64, |n, &byte| n << 8 | u64::from(byte));
    let (start, len, abort) = (field(8), field(16), field(24));
    if saved.registers.rip.wrapping_sub(start) < len {
        saved.registers.rip = abort;
        transfer(tid, &mut [0u8; 8], rseq.address + DESCRIPTOR, true);
    }
}

/// Reads or writes a few bytes without opening the task's memory.
pub(super) fn transfer(tid: i32, bytes: &mut [u8], address: u64, write: bool) -> bool {
    let local = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: address as *mut _, iov_len: bytes.len() };
    // SAFETY: one local and one remote vector; the remote one is checked by the kernel.
    let done = unsafe {
        if write {
            libc::process_vm_writev(tid, &local, 1, &remote, 1, 0)
        } else {
            libc::process_vm_readv(tid, &local, 1, &remote, 1, 0)
        }
    };
    done == bytes.len() as isize
}

/// The state of all threads of the tree.
pub fn collect(tree: &mut Tree, waiter: &mut Waiter) -> Result<Vec<CollectedTask>, GuardianError> {
    let mut scratch = Vec::new();
    for (&pid, process) in &mut tree.processes {
        capture(pid, process, &mut scratch)?;
    }
    restart::find(tree, waiter)?;
    let mut tasks = Vec::with_capacity(tree.processes.len());
    for (&pid, process) in &tree.processes {
        if process.zombie {
            continue;
        }
        let main = process.main(pid)?;
        let shared = tree.stopped(pid, main)?.pending(true)?;
        let mut order: Vec<(&i32, &Thread)> = process.threads.iter().collect();
        order.sort_by_key(|&(&tid, _)| (tid != pid, tid));
        let threads = order.into_iter().filter_map(|(&tid, thread)| describe(pid, tid, thread).transpose());
        tasks.push(CollectedTask {
            pid,
            shared_pending: shared.into_iter().map(Bytes).collect(),
            threads: threads.collect::<Result<_, GuardianError>>()?,
        });
    }
    Ok(tasks)
}

fn describe(pid: i32, tid: i32, thread: &Thread) -> Result<Option<ThreadState>, GuardianError> {
    let Some(saved) = &thread.saved else { return Ok(None) };
    let stopped = thread.tracee.stopped()?;
    Ok(Some(ThreadState {
        pid,
        tid,
        registers: saved.registers,
        xstate: Bytes(saved.xstate.clone()),
        signal_mask: saved.signal_mask,
        rseq: stopped.rseq()?,
        robust_list: stopped.robust_list()?,
        pending: stopped.pending(false)?.into_iter().map(Bytes).collect(),
        seccomp_filters: stopped.seccomp_filters()?,
        restart: thread.restart.or(thread.wait.map(LimitedWait::remaining)),
    }))
}
