//! The tree that is being dumped, as the guardian holds it.

use super::{GuardianError, protocol::Restart, survey::Begun, wait::Waiter, waits::LimitedWait};
use crate::{
    arch::Registers,
    inject::{
        InjectError,
        blob::PARASITE,
        run::{Run, Saved, Way, finish},
        space::{AREA_LEN, Space},
    },
    ptrace::{Exit, Stopped, Tracee, who},
};
use nix::errno::Errno;
use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

/// How long injected code may take: it makes a few system calls, or writes 64 MiB.
pub const CALL_TIME: Duration = Duration::from_secs(60);

/// A thread.
#[derive(Debug)]
pub struct Thread {
    /// Its ptrace state.
    pub tracee: Tracee,
    /// What it had when it stopped.
    pub saved: Option<Saved>,
    /// An interrupted sleep.
    pub restart: Option<Restart>,
    /// The wait in which it was seen before it was stopped.
    pub begun: Option<Begun>,
    /// A wait that it makes once more, and when the time of that is over (CLOCK_MONOTONIC).
    pub wait: Option<LimitedWait>,
    /// Registers differ from `saved` (or `saved` from what the kernel had) and must be put back.
    pub touched: bool,
}

/// A copy-on-write child.
#[derive(Debug)]
pub struct Copy {
    /// The child.
    pub thread: Thread,
    /// Its memory.
    pub space: Space,
}

/// A process.
#[derive(Debug, Default)]
pub struct Process {
    /// Its live threads.
    pub threads: BTreeMap<i32, Thread>,
    /// Dead, not reaped.
    pub zombie: bool,
    /// The signal of its group stop.
    pub group_stop: Option<i32>,
    /// Its memory, once opened.
    pub space: Option<Space>,
    /// Its snapshot.
    pub copy: Option<Copy>,
    /// Signals of others that were taken out: thread, siginfo_t.
    pub deferred: Vec<(i32, Vec<u8>)>,
    /// It runs on (after a snapshot).
    pub resumed: bool,
}

impl Thread {
    /// Of a tracee.
    pub fn new(tracee: Tracee) -> Self {
        Self { tracee, saved: None, restart: None, begun: None, wait: None, touched: false }
    }

    /// Its own state, if it is stopped and still has one.
    pub fn put_back(&mut self) -> Result<(), GuardianError> {
        if let (true, Some(saved), Tracee::Stopped(stopped)) = (self.touched, &self.saved, &self.tracee) {
            saved.restore(stopped)?;
            self.touched = false;
        }
        Ok(())
    }
}

impl Process {
    /// The thread in which calls for the whole process are made: the leader, or another if it is dead.
    pub fn main(&self, pid: i32) -> Result<i32, GuardianError> {
        let stopped = |thread: &Thread| matches!(thread.tracee, Tracee::Stopped(_));
        if self.threads.get(&pid).is_some_and(stopped) {
            return Ok(pid);
        }
        let other = self.threads.iter().find(|(_, thread)| stopped(thread)).map(|(&tid, _)| tid);
        other.ok_or(GuardianError::Ptrace(crate::ptrace::Error::Died { pid, tid: pid, exit: Exit::Unknown }))
    }
}

/// What a run in one thread gave.
#[derive(Debug)]
pub struct Ran {
    /// Registers at the end.
    pub outcome: Result<Registers, InjectError>,
    /// A task it forked.
    pub forked: Option<i32>,
}

/// All processes by pid.
#[derive(Debug, Default)]
pub struct Tree {
    /// Processes.
    pub processes: BTreeMap<i32, Process>,
    /// Threads that could not be stopped, or may not be because they are in a wait again: they are let go as soon as they stop.
    pub stragglers: Vec<Thread>,
}

/// A planned run.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Registers to begin with.
    pub registers: Registers,
    /// How its end is seen.
    pub way: Way,
}

impl Tree {
    /// A process of the tree.
    pub fn process(&self, pid: i32) -> Result<&Process, GuardianError> {
        self.processes.get(&pid).ok_or(GuardianError::Unknown { pid })
    }

    /// A process of the tree.
    pub fn process_mut(&mut self, pid: i32) -> Result<&mut Process, GuardianError> {
        self.processes.get_mut(&pid).ok_or(GuardianError::Unknown { pid })
    }

    /// Every thread, with its process's number; snapshots' children too.
    pub fn threads_mut(&mut self) -> impl Iterator<Item = (i32, &mut Thread)> {
        self.processes.iter_mut().flat_map(|(&pid, process)| {
            let copy = process.copy.as_mut().map(|copy| &mut copy.thread);
            process.threads.values_mut().chain(copy).map(move |thread| (pid, thread))
        })
    }

    /// What a thread had when it stopped.
    pub fn saved(&self, pid: i32, tid: i32) -> Result<&Saved, GuardianError> {
        let process = self.process(pid)?;
        let saved = process.threads.get(&tid).and_then(|thread| thread.saved.as_ref());
        saved.ok_or(GuardianError::Unknown { pid: tid })
    }

    /// Runs the plans, by thread, all at once, and puts every thread's own state back.
    pub fn run(&mut self, plans: &HashMap<i32, Plan>, waiter: &mut Waiter) -> HashMap<i32, Ran> {
        let mut runs: Vec<(i32, Run<'_>)> = Vec::with_capacity(plans.len());
        for (pid, thread) in self.threads_mut() {
            if let Some(plan) = plans.get(&thread.tracee.id().tid) {
                thread.touched = true;
                let held = thread.saved.as_ref().map_or(0, |saved| saved.sent_faults);
                runs.push((pid, Run::start(&mut thread.tracee, &plan.registers, plan.way, held)));
            }
        }
        let (pids, mut runs): (Vec<i32>, Vec<Run<'_>>) = runs.into_iter().unzip();
        finish(&mut runs, waiter, Instant::now() + CALL_TIME);
        let mut ran = HashMap::with_capacity(runs.len());
        let mut notes = Vec::new();
        for (pid, run) in pids.into_iter().zip(runs) {
            let (tid, run) = (run.id().tid, run.progress);
            if run.group_stop.is_some() || !run.deferred.is_empty() {
                notes.push((pid, tid, run.group_stop, run.deferred));
            }
            if let Some(outcome) = run.outcome {
                ran.insert(tid, Ran { outcome, forked: run.forked });
            }
        }
        for (pid, tid, group_stop, deferred) in notes {
            if let Some(process) = self.processes.get_mut(&pid) {
                process.group_stop = group_stop.or(process.group_stop);
                process.deferred.extend(deferred.into_iter().map(|info| (tid, info)));
            }
        }
        for (_, thread) in self.threads_mut() {
            if plans.contains_key(&thread.tracee.id().tid) {
                // A task that was killed in the middle is found so by whoever needs it.
                let _ = thread.put_back();
            }
        }
        ran
    }

    /// One system call in each of these processes.
    pub fn syscalls(
        &mut self,
        calls: &[(i32, u64, [u64; 6])],
        waiter: &mut Waiter,
    ) -> Result<HashMap<i32, Result<i64, InjectError>>, GuardianError> {
        let mut plans = HashMap::with_capacity(calls.len());
        let mut threads = HashMap::with_capacity(calls.len());
        for &(pid, number, arguments) in calls {
            let process = self.process(pid)?;
            let tid = process.main(pid)?;
            let Some(space) = &process.space else { return Err(GuardianError::Unknown { pid }) };
            let registers = self.saved(pid, tid)?.registers.for_syscall(space.syscall_at, number, arguments);
            plans.insert(tid, Plan { registers, way: Way::Syscall });
            threads.insert(tid, pid);
        }
        let ran = self.run(&plans, waiter);
        let result = |ran: Ran| ran.outcome.map(|registers| registers.result());
        Ok(ran.into_iter().filter_map(|(tid, ran)| Some((*threads.get(&tid)?, result(ran)))).collect())
    }

    /// Opens the memory of these processes and maps the parasite in those that lack it.
    pub fn inject(&mut self, pids: &[i32], waiter: &mut Waiter) -> Result<(), GuardianError> {
        self.open(pids)?;
        let lacking: Vec<i32> = pids
            .iter()
            .copied()
            .filter(|pid| self.space(*pid).is_some_and(|space| space.code.is_none()))
            .collect();
        let (read_write, read_execute) =
            ((libc::PROT_READ | libc::PROT_WRITE) as u64, (libc::PROT_READ | libc::PROT_EXEC) as u64);
        let code_len = PARASITE.image.len() as u64;
        for (len, protection, is_code) in [(code_len, read_execute, true), (AREA_LEN, read_write, false)] {
            let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
            let arguments = [0, len, protection, flags, u64::MAX, 0];
            let calls: Vec<_> = lacking.iter().map(|&pid| (pid, libc::SYS_mmap as u64, arguments)).collect();
            let mut first_error = None;
            for (pid, result) in self.syscalls(&calls, waiter)? {
                // All answers are noted even if one is an error: the undo needs to know every mapping.
                match result.and_then(|value| answer("mmap", pid, value)) {
                    Ok(address) => {
                        if let Some(space) = self.processes.get_mut(&pid).and_then(|p| p.space.as_mut()) {
                            *(if is_code { &mut space.code } else { &mut space.area }) = Some(address as u64);
                        }
                    }
                    Err(error) => first_error = Some(error),
                }
            }
            if let Some(error) = first_error {
                return Err(error.into());
            }
        }
        for pid in lacking {
            if let Some(space) = self.space(pid) {
                space.write_code()?;
            }
        }
        Ok(())
    }

    /// Takes the parasite out of these processes again.
    pub fn eject(&mut self, pids: &[i32], waiter: &mut Waiter) -> Result<(), GuardianError> {
        let mut first_error = None;
        for is_code in [false, true] {
            let mut calls = Vec::new();
            for &pid in pids {
                let Some(process) = self.processes.get_mut(&pid) else { continue };
                if process.main(pid).is_err() {
                    continue;
                }
                let Some(space) = &mut process.space else { continue };
                let (mapping, len) = if is_code {
                    (space.code.take(), PARASITE.image.len() as u64)
                } else {
                    (space.area.take(), AREA_LEN)
                };
                if let Some(address) = mapping {
                    calls.push((pid, libc::SYS_munmap as u64, [address, len, 0, 0, 0, 0]));
                }
            }
            for (pid, result) in self.syscalls(&calls, waiter)? {
                if let Err(error) = result.and_then(|value| answer("munmap", pid, value)) {
                    first_error = Some(error);
                }
            }
        }
        first_error.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Opens the memory of these processes.
    pub fn open(&mut self, pids: &[i32]) -> Result<(), GuardianError> {
        let mut scratch = Vec::new();
        for &pid in pids {
            let process = self.process_mut(pid)?;
            let tid = process.main(pid)?;
            super::collect::capture(pid, process, &mut scratch)?;
            for (&tid, thread) in &process.threads {
                let (Some(saved), Tracee::Stopped(stopped)) = (&thread.saved, &thread.tracee) else {
                    continue;
                };
                if !saved.registers.is_64_bit() {
                    return Err(InjectError::Not64Bit { pid, name: who::name(tid) }.into());
                }
                if process.space.is_none() && stopped.has_user_dispatch() {
                    return Err(InjectError::UserDispatch { pid, name: who::name(tid) }.into());
                }
            }
            if process.space.is_none() {
                let mut space = Space::open(pid, tid)?;
                let sent = |thread: &Thread| thread.saved.as_ref().map_or(0, |saved| saved.sent_faults);
                let trap = 1 << (libc::SIGTRAP - 1);
                space.ignores_trap |= process.threads.values().any(|thread| sent(thread) & trap != 0);
                process.space = Some(space);
            }
        }
        Ok(())
    }

    /// The memory of a process or, by its own number, of a snapshot's child.
    pub fn space(&self, pid: i32) -> Option<&Space> {
        if let Some(process) = self.processes.get(&pid) {
            return process.space.as_ref();
        }
        self.copies().find(|copy| copy.thread.tracee.id().pid == pid).map(|copy| &copy.space)
    }

    /// All snapshots' children.
    pub fn copies(&self) -> impl Iterator<Item = &Copy> {
        self.processes.values().filter_map(|process| process.copy.as_ref())
    }

    /// Prepares to stop everything: what a stopped thread of the tree is.
    pub fn stopped(&self, pid: i32, tid: i32) -> Result<&Stopped, GuardianError> {
        let thread = self.process(pid)?.threads.get(&tid).ok_or(GuardianError::Unknown { pid: tid })?;
        Ok(thread.tracee.stopped()?)
    }
}

/// A system call's answer: a value, or a negative errno.
pub fn answer(call: &'static str, pid: i32, value: i64) -> Result<i64, InjectError> {
    named_answer(Cow::Borrowed(call), pid, value)
}

/// The same of a call whose name is not known in advance.
pub fn named_answer(call: Cow<'static, str>, pid: i32, value: i64) -> Result<i64, InjectError> {
    if !(-4095..0).contains(&value) {
        return Ok(value);
    }
    let errno = Errno::from_raw(-value as i32) as i32;
    Err(InjectError::Syscall { call, pid, name: who::name(pid), errno })
}
