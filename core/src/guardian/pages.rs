//! Writing pages from inside the tasks, several tasks at once, while the command does something else.

use super::{
    GuardianError,
    inspect::plan_in,
    journal::Journal,
    protocol::{WriteOrder, Written},
    tree::{CALL_TIME, Thread, Tree, answer},
    wait::Waiter,
};
use crate::{
    inject::run::Run,
    inject::{
        parasite::{self, Range, Simple, WritePages, ZeroRun, command},
        run::{Patience, Progress, finish},
        space::Space,
    },
    ptrace::who,
};
use nix::{
    errno::Errno,
    sys::socket::{ControlMessage, MsgFlags, sendmsg},
};
use std::{
    io::IoSlice,
    mem::offset_of,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::Instant,
};

/// A write in progress.
#[derive(Debug)]
pub struct Job {
    order: WriteOrder,
    /// Process of the tree to which the task belongs (itself, or the original of a snapshot).
    owner: i32,
    shard: Option<OwnedFd>,
    /// The shard in the task's table.
    number: Option<i32>,
    /// First range that is not finished, and bytes of it that are.
    at: (usize, u64),
    bytes: u64,
    zeros: Vec<(u64, u64)>,
    progress: Option<Progress>,
    started: Instant,
    error: Option<GuardianError>,
    done: bool,
}

impl Job {
    /// Not begun.
    pub fn new(order: WriteOrder, shard: OwnedFd, tree: &Tree) -> Result<Self, GuardianError> {
        let pid = order.pid;
        let is_copy = |process: &super::tree::Process| {
            process.copy.as_ref().is_some_and(|copy| copy.thread.tracee.id().pid == pid)
        };
        let owner = if tree.processes.contains_key(&pid) {
            pid
        } else {
            let found = tree.processes.iter().find(|(_, process)| is_copy(process));
            found.map(|(&owner, _)| owner).ok_or(GuardianError::Unknown { pid })?
        };
        Ok(Self {
            order,
            owner,
            shard: Some(shard),
            number: None,
            at: (0, 0),
            bytes: 0,
            zeros: Vec::new(),
            progress: None,
            started: Instant::now(),
            error: None,
            done: false,
        })
    }

    /// What it did.
    pub fn into_written(self) -> Written {
        Written {
            pid: self.order.pid,
            bytes: self.bytes,
            zeros: self.zeros,
            error: self.error,
            stopped_at: self.at,
        }
    }

    /// Ends it.
    pub fn fail(&mut self, error: GuardianError) {
        self.error = Some(error);
        self.done = true;
    }
}

/// The thread that works for a job, and its memory.
fn worker<'a>(tree: &'a mut Tree, job: &Job) -> Result<(&'a mut Thread, &'a Space), GuardianError> {
    let (pid, owner) = (job.order.pid, job.owner);
    let unknown = GuardianError::Unknown { pid };
    let process = tree.process_mut(owner)?;
    if pid != owner {
        let copy = process.copy.as_mut().ok_or(unknown)?;
        return Ok((&mut copy.thread, &copy.space));
    }
    let main = process.threads.contains_key(&pid).then_some(pid).or(process.threads.keys().next().copied());
    let thread = main.and_then(|main| process.threads.get_mut(&main)).ok_or(unknown.clone())?;
    Ok((thread, process.space.as_ref().ok_or(unknown)?))
}

/// Runs a short command to its end.
fn simple(
    tree: &mut Tree,
    job: &Job,
    command: u64,
    values: [i64; 2],
    waiter: &mut Waiter,
) -> Result<Simple, GuardianError> {
    let pid = job.order.pid;
    let (thread, space) = worker(tree, job)?;
    let slot = space.main_slot();
    let words = [command as i64, 0, values[0], values[1], 0, 0];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    space.write(&bytes, slot.0)?;
    let saved = thread.saved.as_ref().ok_or(GuardianError::Unknown { pid })?;
    let plan = plan_in(space, &saved.registers, slot);
    thread.touched = true;
    let mut runs = [Run::start(&mut thread.tracee, &plan.registers, plan.way, saved.sent_faults)];
    finish(&mut runs, waiter, Instant::now() + CALL_TIME);
    let outcome = runs.into_iter().next().and_then(|run| run.progress.outcome);
    thread.put_back()?;
    if let Some(Err(error)) = outcome {
        return Err(error.into());
    }
    let mut answer = [0u8; size_of::<Simple>()];
    space.read(&mut answer, slot.0)?;
    // SAFETY: 64-bit integers only.
    Ok(unsafe { answer.as_ptr().cast::<Simple>().read_unaligned() })
}

/// Puts the shard into the task's table, by a socket pair that the task itself makes: that needs no path and no privilege.
pub fn install(
    tree: &mut Tree,
    job: &mut Job,
    journal: &mut Journal,
    waiter: &mut Waiter,
) -> Result<(), GuardianError> {
    let pid = job.order.pid;
    if pid == job.owner {
        tree.inject(&[pid], waiter)?;
    }
    let Some(shard) = job.shard.take() else { return Ok(()) };
    let pair = simple(tree, job, command::CHANNEL, [0; 2], waiter)?;
    answer("socketpair", pid, pair.result)?;
    let [ours, theirs, ..] = pair.values;
    let sent = take(pid, ours as i32).and_then(|socket| {
        let raw = [shard.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&raw)];
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&[0])], &control, MsgFlags::MSG_NOSIGNAL, None)
    });
    // Also closes the pair, so it runs whether or not the shard was sent.
    let received = simple(tree, job, command::RECEIVE, [ours, theirs], waiter)?;
    sent.map_err(|errno| GuardianError::channel("sending a file into a task", errno))?;
    let number = answer("recvmsg", pid, received.result)? as i32;
    job.number = Some(number);
    if pid == job.owner {
        journal.descriptors.push((pid, number));
    }
    Ok(())
}

/// A descriptor of a task (pidfd_getfd(2)).
fn take(pid: i32, number: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: both calls take numbers only, and return new descriptors.
    unsafe {
        let pidfd = Errno::result(libc::syscall(libc::SYS_pidfd_open, pid, 0))?;
        let pidfd = OwnedFd::from_raw_fd(pidfd as i32);
        let fd = Errno::result(libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Drives every job as far as it goes without waiting. True if all are done.
pub fn advance(jobs: &mut [Job], tree: &mut Tree) -> bool {
    let mut all = true;
    for i in 0..jobs.len() {
        // Two jobs of one task share its argument block: one after the other.
        let (before, rest) = jobs.split_at_mut(i);
        let Some(job) = rest.first_mut() else { continue };
        let blocked = before.iter().any(|other| !other.done && other.order.pid == job.order.pid);
        if !blocked
            && !job.done
            && let Err(error) = advance_one(job, tree)
        {
            job.fail(error);
        }
        all &= job.done;
    }
    all
}

fn advance_one(job: &mut Job, tree: &mut Tree) -> Result<(), GuardianError> {
    loop {
        if let Some(progress) = &mut job.progress {
            let late = job.started.elapsed() > CALL_TIME;
            // `worker` wants the job too.
            let mut progress =
                std::mem::replace(progress, Progress::under_way(crate::inject::run::Way::Call));
            let (thread, _) = worker(tree, job)?;
            if !progress.poll(&mut thread.tracee) {
                let pid = job.order.pid;
                job.progress = Some(progress);
                if late {
                    return Err(
                        crate::inject::InjectError::Late { pid, tid: pid, name: who::name(pid) }.into()
                    );
                }
                return Ok(());
            }
            job.progress = None;
            let (thread, _) = worker(tree, job)?;
            thread.put_back()?;
            read_answer(job, tree)?;
            if let Some(Err(error)) = progress.outcome {
                return Err(error.into());
            }
        }
        if job.at.0 >= job.order.ranges.len() {
            job.done = true;
            return Ok(());
        }
        start(job, tree)?;
    }
}

/// Starts one call.
fn start(job: &mut Job, tree: &mut Tree) -> Result<(), GuardianError> {
    let pid = job.order.pid;
    let Some(number) = job.number else { return Err(GuardianError::Unknown { pid }) };
    let ranges: Vec<_> = job.order.ranges.iter().skip(job.at.0).take(parasite::RANGES_AT_ONCE).collect();
    let header = [
        command::WRITE_PAGES,
        0,
        number as u64,
        job.order.offset + job.bytes,
        0,
        ranges.len() as u64,
        0,
        job.at.1,
        0,
    ];
    let body =
        ranges.iter().flat_map(|range| [range.address, range.len, if range.raw { parasite::RAW } else { 0 }]);
    let bytes: Vec<u8> = header.into_iter().chain(body).flat_map(u64::to_ne_bytes).collect();
    const { assert!(size_of::<Range>() == 24 && offset_of!(WritePages, range) == 72) };
    let (thread, space) = worker(tree, job)?;
    let slot = space.main_slot();
    space.write(&bytes, slot.0)?;
    let saved = thread.saved.as_ref().ok_or(GuardianError::Unknown { pid })?;
    let plan = plan_in(space, &saved.registers, slot);
    thread.touched = true;
    job.progress = Some(Progress::start(&mut thread.tracee, &plan.registers, plan.way, saved.sent_faults));
    job.started = Instant::now();
    Ok(())
}

/// Reads what one call did.
fn read_answer(job: &mut Job, tree: &mut Tree) -> Result<(), GuardianError> {
    let (_, space) = worker(tree, job)?;
    let block = space.main_slot().0;
    let mut header = [0u8; offset_of!(WritePages, range)];
    space.read(&mut header, block)?;
    let word =
        |offset: usize| header[offset..offset + 8].iter().rev().fold(0u64, |n, &b| n << 8 | u64::from(b));
    let zeros = (word(offset_of!(WritePages, zeros)) as usize).min(parasite::ZEROS_AT_ONCE);
    let mut runs = vec![0u8; zeros * size_of::<ZeroRun>()];
    space.read(&mut runs, block + offset_of!(WritePages, zero) as u64)?;
    for run in runs.as_chunks::<16>().0 {
        let number = |at: usize| run[at..at + 8].iter().rev().fold(0u64, |n, &byte| n << 8 | u64::from(byte));
        job.zeros.push((number(0), number(8)));
    }
    let before = (job.at, job.bytes);
    job.at = (
        job.at.0 + word(offset_of!(WritePages, next_range)) as usize,
        word(offset_of!(WritePages, next_offset)),
    );
    job.bytes += word(offset_of!(WritePages, written));
    answer("pwritev", job.order.pid, word(offset_of!(WritePages, result)) as i64)?;
    // A call that neither fails nor gets on would go on for ever.
    let stuck = before == (job.at, job.bytes);
    if stuck { Err(GuardianError::Malformed { what: "answer of the parasite".into() }) } else { Ok(()) }
}

/// Waits for all jobs, and takes the shards out of the tasks again.
pub fn complete(
    jobs: &mut [Job],
    tree: &mut Tree,
    journal: &mut Journal,
    waiter: &mut Waiter,
) -> Result<(), GuardianError> {
    while !advance(jobs, tree) {
        waiter.wait(Instant::now() + std::time::Duration::from_millis(100));
    }
    for (pid, number) in std::mem::take(&mut journal.descriptors) {
        let call = (pid, libc::SYS_close as u64, [number as u64, 0, 0, 0, 0, 0]);
        tree.syscalls(&[call], waiter)?;
    }
    Ok(())
}
