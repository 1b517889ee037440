//! Tasks that are being restored: all traced from birth, killed together unless they are released together.

use super::{
    GuardianError,
    protocol::{ArmTimers, FinalTask, FinalThread, LateCall, Restart, TaskDied},
    wait::Waiter,
    waits::{Again, begin_again, is_limited},
};
use crate::{
    arch::{Registers, restartable},
    inject::{
        InjectError,
        run::{Patience, Progress, Saved, Way},
        space::Space,
    },
    ptrace::{Error, Exit, Options, Running, Stop, Stopped, TaskId, Tracee, who},
};
use std::{
    collections::{BTreeMap, HashMap},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

/// How long a step of the final preparation may take.
const STEP_TIME: Duration = Duration::from_secs(10);
/// Bytes of scratch per thread.
pub const SCRATCH_LEN: u64 = 128;

/// A thread that is ours.
#[derive(Debug)]
struct Adopted {
    tracee: Tracee,
    arrived: bool,
    /// What remains of the wait that it makes once more.
    remaining_ns: Option<i64>,
    /// Thread and process in the innermost pid namespace.
    inner: (i32, i32),
}

/// All of them, by thread.
#[derive(Debug, Default)]
pub struct Nursery {
    tasks: BTreeMap<i32, Adopted>,
    /// Ended, not yet reported.
    died: Vec<TaskDied>,
    /// The first that ended by a signal: reported or not, the restore has failed.
    crashed: Option<TaskDied>,
    group_stops: Vec<(i32, i32)>,
    /// Not 0 while no task may be killed.
    hold: Option<&'static AtomicU32>,
}

impl Nursery {
    /// An empty one; tasks are not killed as long as `hold` is not 0.
    pub fn new(hold: Option<&'static AtomicU32>) -> Self {
        Self { hold, ..Self::default() }
    }

    /// Anything to look after.
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// Seizes the root; whatever it forks becomes ours with it.
    pub fn adopt(&mut self, root: i32) -> Result<(), GuardianError> {
        let id = TaskId { pid: root, tid: root };
        let running = Running::seize(id, Options::RESTORE)?;
        self.tasks.insert(
            root,
            Adopted {
                tracee: Tracee::Running(running),
                arrived: false,
                remaining_ns: None,
                inner: inner(root),
            },
        );
        Ok(())
    }

    /// Lets everything go on that has stopped on its way; notes arrivals and deaths.
    pub fn pump(&mut self) {
        loop {
            let mut status = 0;
            // SAFETY: the kernel writes one int.
            let tid = unsafe { libc::waitpid(-1, &mut status, libc::__WALL | libc::WNOHANG) };
            if tid <= 0 {
                return;
            }
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                let exit = if libc::WIFEXITED(status) {
                    Exit::Code(libc::WEXITSTATUS(status))
                } else {
                    Exit::Signal(libc::WTERMSIG(status))
                };
                if let Some(task) = self.tasks.remove(&tid) {
                    let died = TaskDied { tid, inner_tid: task.inner.0, exit };
                    if matches!(exit, Exit::Signal(_)) {
                        self.crashed.get_or_insert_with(|| died.clone());
                    }
                    self.died.push(died);
                }
                continue;
            }
            let pid = self.tasks.get(&tid).map(|task| task.tracee.id().pid);
            let pid = pid.or_else(|| who::process_of(tid)).unwrap_or(tid);
            let stopped = Stopped::from_status(TaskId { pid, tid }, status);
            let task = self.tasks.entry(tid).or_insert_with(|| Adopted {
                tracee: Tracee::Gone(TaskId { pid, tid }, Exit::Unknown),
                arrived: false,
                remaining_ns: None,
                inner: inner(tid),
            });
            task.tracee = Tracee::Stopped(stopped);
            task.go_on();
        }
    }

    /// Deaths since the last time.
    pub fn take_died(&mut self) -> Vec<TaskDied> {
        std::mem::take(&mut self.died)
    }

    fn arrived(&self) -> usize {
        self.tasks.values().filter(|task| task.arrived).count()
    }

    /// Waits until so many threads stand at the restorer's end.
    pub fn wait_arrived(
        &mut self,
        expected: usize,
        timeout: Duration,
        waiter: &mut Waiter,
    ) -> Result<(), GuardianError> {
        let deadline = Instant::now() + timeout;
        loop {
            self.pump();
            if self.arrived() >= expected {
                return Ok(());
            }
            if let Some(died) = &self.crashed {
                return Err(GuardianError::RestoredTaskDied { pid: died.inner_tid, exit: died.exit });
            }
            if waiter.command_gone {
                return Err(GuardianError::CommandEnded);
            }
            if !waiter.wait(deadline) {
                return Err(GuardianError::NotArrived { arrived: self.arrived(), expected });
            }
        }
    }

    /// Gives every thread its final state. All stay stopped.
    pub fn finalize(&mut self, tasks: &[FinalTask], waiter: &mut Waiter) -> Result<(), GuardianError> {
        let mut by_number: HashMap<(i32, i32), Option<i32>> = HashMap::new();
        for (&tid, task) in self.tasks.iter_mut().filter(|(_, task)| task.arrived) {
            // The restorer has only just made the threads, and a leader by its own number.
            task.inner = inner(tid);
            by_number.entry(task.inner).and_modify(|found| *found = None).or_insert(Some(tid));
        }
        // Those with timers last, so that these lose as little time as can be.
        let (plain, timed): (Vec<_>, Vec<_>) = tasks.iter().partition(|task| task.arm.is_none());
        for task in plain.into_iter().chain(timed) {
            let mut threads = Vec::with_capacity(task.threads.len());
            for thread in &task.threads {
                let found = by_number.get(&(thread.tid, task.pid)).copied().flatten();
                let missing = GuardianError::NoSuchThread { pid: task.pid, tid: thread.tid };
                threads.push((found.ok_or(missing)?, thread));
            }
            self.finalize_task(task, &threads, waiter)?;
        }
        Ok(())
    }

    fn task(&mut self, tid: i32) -> Result<&mut Adopted, GuardianError> {
        self.tasks.get_mut(&tid).ok_or(GuardianError::Unknown { pid: tid })
    }

    fn finalize_task(
        &mut self,
        task: &FinalTask,
        threads: &[(i32, &FinalThread)],
        waiter: &mut Waiter,
    ) -> Result<(), GuardianError> {
        let Some(&(first, _)) = threads.first() else { return Ok(()) };
        let pid = self.task(first)?.tracee.id().pid;
        if !threads.iter().any(|&(tid, _)| tid == pid) {
            leader_exits(pid, waiter)?;
        }
        let space = Space::open(pid, first)?;
        let mut armed = HashMap::new();
        for (index, &(tid, thread)) in threads.iter().enumerate() {
            let registers = registers_of(task, thread)?;
            if let Some(restart) = thread.restart.filter(|restart| !is_limited(&registers, restart.syscall)) {
                let scratch = task.scratch + index as u64 * SCRATCH_LEN;
                let tracee = &mut self.task(tid)?.tracee;
                let result = arm(tracee, &registers, restart, &space, scratch, waiter)?;
                armed.insert(tid, result);
            }
        }
        let base = registers_of(task, threads[0].1)?;
        for (index, &(tid, thread)) in threads.iter().enumerate() {
            let scratch = task.scratch + index as u64 * SCRATCH_LEN;
            for call in &thread.late {
                let registers = registers_of(task, thread)?;
                let result = self.late(tid, &registers, call, &space, scratch, waiter)?;
                let name = call.name.clone().into();
                super::tree::named_answer(name, task.pid, result)?;
            }
        }
        if let Some(arm) = task.arm {
            self.arm_timers(first, &base, arm, waiter)?;
        }
        for &(address, len) in &task.unmap {
            let call =
                base.for_syscall(space.syscall_at, libc::SYS_munmap as u64, [address, len, 0, 0, 0, 0]);
            let result = run_syscall(&mut self.task(first)?.tracee, &call, waiter)?.result();
            super::tree::answer("munmap", task.pid, result)?;
        }
        for &(tid, thread) in threads {
            let mut registers = registers_of(task, thread)?;
            if let (Some(restart), Some(result)) = (thread.restart, armed.get(&tid)) {
                // Interrupted again: the kernel has a restart block of its own now. Else it is over already.
                registers.rax = *result as u64;
                registers.orig_rax = restart.syscall;
            }
            let signal_mask = thread.signal_mask;
            let saved = Saved { registers, xstate: thread.xstate.0.clone(), signal_mask, sent_faults: 0 };
            let adopted = self.task(tid)?;
            saved.restore(adopted.tracee.stopped()?)?;
            // All others have been armed.
            adopted.remaining_ns = match thread.restart {
                Some(restart) if !armed.contains_key(&tid) && task.group_stop.is_none() => {
                    restart.remaining_ns
                }
                _ => None,
            };
        }
        if let Some(signal) = task.group_stop {
            self.group_stops.push((first, signal));
        }
        Ok(())
    }

    /// A system call of a thread, by an instruction of its own memory.
    fn late(
        &mut self,
        tid: i32,
        registers: &Registers,
        call: &LateCall,
        space: &Space,
        scratch: u64,
        waiter: &mut Waiter,
    ) -> Result<i64, GuardianError> {
        let mut arguments = call.arguments;
        if !call.data.is_empty() {
            space.write(&call.data[..call.data.len().min(SCRATCH_LEN as usize)], scratch)?;
            if let Some(pointer) = arguments.get_mut(call.pointer) {
                *pointer = scratch;
            }
        }
        let registers = registers.for_syscall(space.syscall_at, call.number, arguments);
        Ok(run_syscall(&mut self.task(tid)?.tracee, &registers, waiter)?.result())
    }

    /// Runs the restorer's last code, which ends at its trap again.
    fn arm_timers(
        &mut self,
        tid: i32,
        own: &Registers,
        arm: ArmTimers,
        waiter: &mut Waiter,
    ) -> Result<(), GuardianError> {
        const ARM: u64 = 1;
        let registers = Registers { rsi: ARM, ..own.for_call(arm.entry, arm.arguments, arm.stack) };
        let tracee = &mut self.task(tid)?.tracee;
        let stopped = tracee.stopped()?;
        // As at its first trap: all but SIGTRAP is blocked, so nothing is delivered.
        stopped.set_signal_mask(!(1 << (libc::SIGTRAP - 1)))?;
        stopped.set_registers(&registers)?;
        tracee.resume(|stopped| stopped.cont(0));
        loop {
            wait_stopped(tracee, waiter)?;
            let stopped = tracee.stopped()?;
            match stopped.stop() {
                Stop::Signal(libc::SIGTRAP) if is_trap(stopped) => return Ok(()),
                _ => tracee.resume(|stopped| stopped.cont(0)),
            }
        }
    }

    /// Lets all go, at once. Tells which sleep in a call and are to be let go when they return, if we last that long.
    pub fn release(&mut self, waiter: &mut Waiter) -> Result<Vec<Tracee>, GuardianError> {
        let mut stopped = Vec::new();
        for (tid, signal) in std::mem::take(&mut self.group_stops) {
            if let Some(task) = self.tasks.get_mut(&tid) {
                group_stop(&mut task.tracee, signal, waiter)?;
                stopped.push(task.tracee.id().pid);
            }
        }
        let mut tasks = std::mem::take(&mut self.tasks);
        let waits = tasks.values_mut().filter_map(|task| {
            let remaining_ns = task.remaining_ns?;
            Some(Again { tracee: &mut task.tracee, remaining_ns })
        });
        begin_again(waits.collect(), waiter)?;
        let (mut left, mut asleep) = (Vec::new(), Vec::new());
        for (_, task) in tasks {
            match task.tracee {
                tracee @ Tracee::Running(_) if task.remaining_ns.is_some() => asleep.push(tracee),
                Tracee::Stopped(stopped) => left.extend(stopped.detach(0).err()),
                // A dead leader of live threads; the kernel lets it go when we end.
                Tracee::Running(running)
                    if who::Stat::read(running.id().tid).is_some_and(|s| s.is_zombie()) => {}
                // A helper on its way: it must stop before it can be let go.
                Tracee::Running(running) => {
                    running.interrupt();
                    let mut tracee = Tracee::Running(running);
                    let deadline = Instant::now() + STEP_TIME;
                    while tracee.poll() && waiter.wait(deadline) {}
                    if let Tracee::Stopped(stopped) = tracee {
                        let signal = if let Stop::Signal(signal) = stopped.stop() { signal } else { 0 };
                        left.extend(stopped.detach(signal).err());
                    }
                }
                Tracee::Gone(..) => {}
            }
        }
        super::undo::see_off(left.into_iter().map(Tracee::Running).collect(), waiter);
        super::undo::see_stopped(&stopped, waiter);
        Ok(asleep)
    }

    /// Kills all, and waits until they are gone.
    pub fn abort(&mut self, waiter: &mut Waiter) -> Result<(), GuardianError> {
        // A task with names of files to take away does so before it dies.
        let deadline = Instant::now() + STEP_TIME;
        while self.hold.is_some_and(|hold| hold.load(Ordering::Acquire) != 0)
            && !self.tasks.is_empty()
            && Instant::now() < deadline
        {
            self.pump();
            waiter.wait(Instant::now() + Duration::from_millis(1));
        }
        let mut pids: Vec<i32> = Vec::new();
        loop {
            for task in self.tasks.values_mut() {
                let pid = task.tracee.id().pid;
                // SAFETY: takes numbers only; we are the tracer and have not seen its end, so the number is its own.
                unsafe { libc::kill(pid, libc::SIGKILL) };
                pids.push(pid);
            }
            self.pump();
            self.died.clear();
            let Some((&tid, _)) = self.tasks.iter().next() else { break };
            if !waiter.wait((Instant::now() + Duration::from_millis(20)).min(deadline))
                && Instant::now() >= deadline
            {
                return Err(GuardianError::NotGone { pid: tid, name: who::name(tid) });
            }
        }
        self.group_stops.clear();
        self.crashed = None;
        Ok(())
    }
}

impl Adopted {
    /// Goes on from whatever stop, unless it is the end of the restorer.
    fn go_on(&mut self) {
        let Tracee::Stopped(stopped) = &self.tracee else { return };
        let signal = match stopped.stop() {
            Stop::Signal(libc::SIGTRAP) => {
                if is_trap(stopped) {
                    self.arrived = true;
                    return;
                }
                libc::SIGTRAP
            }
            Stop::Signal(signal) => signal,
            Stop::Group(_) => return self.tracee.resume(Stopped::listen),
            Stop::Interrupted | Stop::Event(_) | Stop::Syscall => 0,
        };
        self.tracee.resume(|stopped| stopped.cont(signal));
    }
}

/// Waits until the first thread has exited, which runs the restorer's code until then. Nothing tells its tracer as long as others
/// live.
fn leader_exits(pid: i32, waiter: &mut Waiter) -> Result<(), GuardianError> {
    let deadline = Instant::now() + STEP_TIME;
    while who::Stat::read(pid).is_some_and(|stat| !stat.is_zombie()) {
        if Instant::now() > deadline {
            return Err(InjectError::Late { pid, tid: pid, name: who::name(pid) }.into());
        }
        waiter.wait(Instant::now() + Duration::from_millis(1));
    }
    Ok(())
}

/// Whether a SIGTRAP is that of an int3.
fn is_trap(stopped: &Stopped) -> bool {
    /// siginfo_t: si_code.
    const SI_KERNEL: [u8; 4] = 0x80i32.to_ne_bytes();
    stopped.signal_info().is_ok_and(|info| info.get(8..12) == Some(&SI_KERNEL))
}

/// Thread and process in the innermost pid namespace.
pub(super) fn inner(tid: i32) -> (i32, i32) {
    let last = |field| {
        let text = who::status_field(tid, field).unwrap_or_default();
        text.split_ascii_whitespace().last().and_then(|number| number.parse().ok()).unwrap_or(0)
    };
    (last("NSpid"), last("NStgid"))
}

fn registers_of(task: &FinalTask, thread: &FinalThread) -> Result<Registers, GuardianError> {
    let bad = GuardianError::BadState { pid: task.pid, tid: thread.tid, what: "general registers".into() };
    Registers::from_bytes(&thread.registers).ok_or(bad)
}

fn run_syscall(
    tracee: &mut Tracee,
    registers: &Registers,
    waiter: &mut Waiter,
) -> Result<Registers, GuardianError> {
    let mut progress = Progress::start(tracee, registers, Way::Syscall, 0);
    let deadline = Instant::now() + STEP_TIME;
    while !progress.poll(tracee) {
        if !waiter.wait(deadline) {
            progress.give_up(tracee, waiter);
        }
    }
    let TaskId { pid, tid } = tracee.id();
    let lost = InjectError::Ptrace(Error::Died { pid, tid, exit: Exit::Unknown });
    Ok(progress.outcome.unwrap_or(Err(lost))?)
}

/// Makes the kernel build a restart block: the thread makes its own call once more, by its own instruction and with its own
/// registers but for the timeout, and is interrupted before it sleeps. Tells what the call returned.
fn arm(
    tracee: &mut Tracee,
    registers: &Registers,
    restart: Restart,
    space: &Space,
    scratch: u64,
    waiter: &mut Waiter,
) -> Result<i64, GuardianError> {
    let mut call = *registers;
    call.orig_rax = restart.syscall;
    call.rewind();
    call.rax = restart.syscall;
    if let Some(remaining) = restart.remaining_ns {
        let (seconds, nanoseconds) = (remaining / 1_000_000_000, remaining % 1_000_000_000);
        let timespec: Vec<u8> = [seconds, nanoseconds].iter().flat_map(|word| word.to_ne_bytes()).collect();
        let pointer = match restart.syscall {
            restartable::NANOSLEEP => Some(&mut call.rdi),
            restartable::CLOCK_NANOSLEEP => Some(&mut call.rdx),
            restartable::FUTEX => Some(&mut call.r10),
            restartable::POLL => {
                call.rdx = (remaining.saturating_add(999_999) / 1_000_000) as u64;
                None
            }
            _ => None,
        };
        if let Some(pointer) = pointer {
            space.write(&timespec, scratch)?;
            *pointer = scratch;
        }
    }
    let stopped = tracee.stopped()?;
    stopped.set_signal_mask(u64::MAX)?;
    stopped.set_registers(&call)?;
    tracee.resume(Stopped::cont_to_syscall);
    wait_stopped(tracee, waiter)?;
    // Pending from before the call sleeps: it returns at once.
    tracee.stopped()?.interrupt();
    tracee.resume(Stopped::cont_to_syscall);
    wait_stopped(tracee, waiter)?;
    Ok(tracee.stopped()?.registers()?.result())
}

fn wait_stopped(tracee: &mut Tracee, waiter: &mut Waiter) -> Result<(), GuardianError> {
    let deadline = Instant::now() + STEP_TIME;
    while tracee.poll() {
        if !waiter.wait(deadline) {
            let TaskId { pid, tid } = tracee.id();
            return Err(InjectError::Late { pid, tid, name: who::name(tid) }.into());
        }
    }
    tracee.stopped().map(drop).map_err(GuardianError::from)
}

/// A group stop by this signal, begun while its threads are traced, so that none runs an instruction before it.
pub fn group_stop(tracee: &mut Tracee, signal: i32, waiter: &mut Waiter) -> Result<(), GuardianError> {
    let stopped = tracee.stopped()?;
    let mask = stopped.signal_mask()?;
    // SIGSTOP cannot be blocked; everything else waits until the group stop has begun. Which signal stops it is ours to say
    // at its delivery.
    let but_for_it = !(1 << (signal - 1));
    stopped.set_signal_mask(but_for_it)?;
    let pid = stopped.id().pid;
    // SAFETY: takes numbers only. The process is our tracee, so the number is its own.
    let send_stop = || unsafe { libc::kill(pid, libc::SIGSTOP) };
    send_stop();
    tracee.resume(|stopped| stopped.cont(0));
    let (mut signal, mut delivered) = (signal, false);
    loop {
        wait_stopped(tracee, waiter)?;
        let stopped = tracee.stopped()?;
        match stopped.stop() {
            Stop::Group(_) => break,
            Stop::Signal(libc::SIGSTOP) => {
                // If the kernel throws the signal away, this stops the thread before it runs an instruction.
                stopped.interrupt();
                delivered = true;
                tracee.resume(|stopped| stopped.cont(signal));
            }
            // In an orphaned process group only SIGSTOP stops (kernel/signal.c, get_signal).
            Stop::Interrupted if delivered && signal != libc::SIGSTOP => {
                signal = libc::SIGSTOP;
                send_stop();
                tracee.resume(|stopped| stopped.cont(0));
            }
            _ => tracee.resume(|stopped| stopped.cont(0)),
        }
    }
    Ok(tracee.stopped()?.set_signal_mask(mask)?)
}
