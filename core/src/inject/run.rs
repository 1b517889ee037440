//! Running injected code in many stopped threads at once: set all, continue all, wait for all.

use super::{InjectError, parasite};
use crate::{
    arch::Registers,
    ptrace::{Error, Stop, Stopped, TaskId, Tracee, who},
};
use std::time::Instant;

/// Signals that a fault raises: they stay unblocked, since the kernel resets the disposition of a blocked one (force_sig_info_to_task,
/// kernel/signal.c).
const FAULTS: [i32; 6] =
    [libc::SIGTRAP, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGSYS];

/// siginfo_t: si_code of a signal that the kernel itself raised for a trap (SI_KERNEL).
const SI_KERNEL: i32 = 0x80;

/// The signal mask under which injected code runs.
pub fn injection_mask() -> u64 {
    FAULTS.iter().fold(u64::MAX, |mask, signal| mask & !(1 << (signal - 1)))
}

/// Those of a list of pending signals that are in no injection mask.
pub fn faults_in(pending: &[Vec<u8>]) -> u64 {
    let bit = |info: &Vec<u8>| info.first().map_or(0, |&number| 1u64 << (u32::from(number).clamp(1, 64) - 1));
    pending.iter().map(bit).fold(0, |set, bit| set | bit) & !injection_mask()
}

/// What a thread had before code was injected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saved {
    /// Registers, with an interrupted wait rewound.
    pub registers: Registers,
    /// NT_X86_XSTATE.
    pub xstate: Vec<u8>,
    /// Blocked signals.
    pub signal_mask: u64,
    /// Fault signals that somebody sent and that are pending: injected code must not take them.
    pub sent_faults: u64,
}

impl Saved {
    /// Reads it.
    pub fn capture(stopped: &Stopped, scratch: &mut Vec<u8>) -> Result<Self, Error> {
        let (registers, signal_mask) = (stopped.registers()?, stopped.signal_mask()?);
        Ok(Self { registers, xstate: stopped.xstate(scratch)?, signal_mask, sent_faults: 0 })
    }

    /// Puts it back. Registers come last: with orig_rax they make the kernel restart an interrupted call.
    pub fn restore(&self, stopped: &Stopped) -> Result<(), Error> {
        stopped.set_xstate(&self.xstate)?;
        stopped.set_registers(&self.registers)?;
        stopped.set_signal_mask(self.signal_mask)
    }
}

/// How the end of a run is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// One system call: seen at its entry and its exit. No signal takes part, so no disposition can change.
    Syscall,
    /// Code that ends with int3.
    Call,
    /// The same, of a process that ignores SIGTRAP: ends with the system call [`parasite::DONE`].
    WatchedCall,
}

/// Something that can wait until a tracee may have changed.
pub trait Patience {
    /// Returns when a tracee may have changed; false if `deadline` has passed.
    fn wait(&mut self, deadline: Instant) -> bool;
}

/// A run of one thread, apart from the thread itself.
#[derive(Debug)]
pub struct Progress {
    way: Way,
    syscall_stops: u32,
    /// A task that the injected code forked; it is ours too.
    pub forked: Option<i32>,
    /// A group stop that began meanwhile.
    pub group_stop: Option<i32>,
    /// Signals from others, siginfo_t, which were taken out and must be sent again.
    pub deferred: Vec<Vec<u8>>,
    /// The registers at the end.
    pub outcome: Option<Result<Registers, InjectError>>,
}

impl Progress {
    /// Starts the run, with the faults in `held` blocked too. The original state is the caller's to put back.
    pub fn start(tracee: &mut Tracee, registers: &Registers, way: Way, held: u64) -> Self {
        let mut progress = Self::under_way(way);
        let prepared = tracee.stopped().and_then(|stopped| {
            // A system call raises no fault, and a signal that somebody sent stays where it is.
            stopped.set_signal_mask(if way == Way::Syscall { u64::MAX } else { injection_mask() | held })?;
            stopped.set_registers(registers)
        });
        match prepared {
            Ok(()) => progress.go_on(tracee),
            Err(error) => progress.outcome = Some(Err(error.into())),
        }
        progress
    }

    /// Of a thread that runs injected code already: a child which that code forked.
    pub fn under_way(way: Way) -> Self {
        Self { way, syscall_stops: 0, forked: None, group_stop: None, deferred: Vec::new(), outcome: None }
    }

    fn go_on(&self, tracee: &mut Tracee) {
        tracee.resume(|stopped| match self.way {
            Way::Call => stopped.cont(0),
            Way::Syscall | Way::WatchedCall => stopped.cont_to_syscall(),
        });
    }

    /// Looks once; true when the run has ended.
    pub fn poll(&mut self, tracee: &mut Tracee) -> bool {
        while self.outcome.is_none() && !tracee.poll() {
            match tracee.stopped().map_err(InjectError::from).and_then(|stopped| self.step(stopped)) {
                Ok(None) => self.go_on(tracee),
                Ok(Some(registers)) => self.outcome = Some(Ok(registers)),
                Err(error) => self.outcome = Some(Err(error)),
            }
        }
        self.outcome.is_some()
    }

    /// A stop on the way; the registers if it is the last.
    fn step(&mut self, stopped: &Stopped) -> Result<Option<Registers>, InjectError> {
        match stopped.stop() {
            Stop::Syscall => {
                // Never left at an entry: the kernel would make a call of whatever registers are put back.
                self.syscall_stops += 1;
                let registers = stopped.registers()?;
                let last = match self.way {
                    Way::Syscall => self.syscall_stops == 2,
                    Way::WatchedCall => registers.orig_rax == parasite::DONE && self.is_exit(),
                    Way::Call => false,
                };
                Ok(last.then_some(registers))
            }
            Stop::Event(_) => {
                self.forked = Some(stopped.event_message()? as i32);
                Ok(None)
            }
            Stop::Interrupted => Ok(None),
            Stop::Group(signal) => {
                self.group_stop = Some(signal);
                Ok(None)
            }
            Stop::Signal(signal) => self.signal(stopped, signal),
        }
    }

    /// Entries and exits alternate.
    fn is_exit(&self) -> bool {
        self.syscall_stops.is_multiple_of(2)
    }

    /// The int3 at the end, a fault, or a signal from somebody else.
    fn signal(&mut self, stopped: &Stopped, signal: i32) -> Result<Option<Registers>, InjectError> {
        let info = stopped.signal_info()?;
        if si_code(&info) <= 0 {
            self.deferred.push(info);
            return Ok(None);
        }
        let registers = stopped.registers()?;
        let regular =
            signal == libc::SIGTRAP && si_code(&info) == SI_KERNEL && registers.rax != parasite::PANICKED;
        if regular && self.way == Way::Call {
            return Ok(Some(registers));
        }
        let TaskId { pid, tid } = stopped.id();
        Err(InjectError::Crashed { pid, name: who::name(tid), signal, at: registers.rip })
    }

    /// Stops a thread that did not come back.
    pub fn give_up(&mut self, tracee: &mut Tracee, patience: &mut dyn Patience) {
        let TaskId { pid, tid } = tracee.id();
        if let Tracee::Running(running) = &*tracee {
            running.interrupt();
        }
        let deadline = Instant::now() + std::time::Duration::from_secs(1);
        while tracee.poll() && patience.wait(deadline) {}
        self.outcome = Some(Err(InjectError::Late { pid, tid, name: who::name(tid) }));
    }
}

/// A run with its thread.
#[derive(Debug)]
pub struct Run<'a> {
    tracee: &'a mut Tracee,
    /// How far it is.
    pub progress: Progress,
}

impl<'a> Run<'a> {
    /// See [`Progress::start`].
    pub fn start(tracee: &'a mut Tracee, registers: &Registers, way: Way, held: u64) -> Self {
        let progress = Progress::start(tracee, registers, way, held);
        Self { tracee, progress }
    }

    /// Which thread.
    pub fn id(&self) -> TaskId {
        self.tracee.id()
    }
}

/// Field si_code of a siginfo_t.
fn si_code(info: &[u8]) -> i32 {
    info.get(8..12).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_ne_bytes)
}

/// Waits for all runs. Those that are not back by the deadline are interrupted.
pub fn finish(runs: &mut [Run<'_>], patience: &mut dyn Patience, deadline: Instant) {
    /// How often to look before sleeping: a call takes microseconds, and there may be a second processor.
    const LOOKS: u32 = 20;
    let mut looks = 0;
    loop {
        let mut pending = 0;
        for run in runs.iter_mut() {
            pending += usize::from(!run.progress.poll(run.tracee));
        }
        if pending == 0 {
            return;
        }
        looks += 1;
        if looks > LOOKS && !patience.wait(deadline) {
            break;
        }
    }
    for run in runs.iter_mut().filter(|run| run.progress.outcome.is_none()) {
        run.progress.give_up(run.tracee, patience);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_stay_unblocked_and_all_else_is_blocked() {
        let mask = injection_mask();
        assert_eq!(mask & (1 << (libc::SIGTRAP - 1)), 0);
        assert_ne!(mask & (1 << (libc::SIGTERM - 1)), 0);
        assert_eq!(mask.count_zeros() as usize, FAULTS.len());
    }

    #[test]
    fn code_of_a_siginfo() {
        let mut info = vec![0u8; 128];
        info[8..12].copy_from_slice(&(-6i32).to_ne_bytes());
        assert_eq!(si_code(&info), -6);
        assert_eq!(si_code(&[]), 0);
    }
}
