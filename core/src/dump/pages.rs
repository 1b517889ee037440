//! Step 7, memory: collects what has contents, plans places, and has everything copied: by threads of ours from outside,
//! and by the tasks (or their copy-on-write snapshots) themselves through the guardian.

use super::DumpError;
use crate::{
    guardian::{Guardian, WriteJob, protocol::PageRange},
    image::{
        ImageWriter, checksum_shards,
        records::{GuardRegion, PageExtent, PageMap, Shard, SharedSegment, Vma, VmaAdvice},
    },
    memory::{
        MemoryError,
        copy::{self, Source},
        describe::{private_contents, segment_contents},
        plan::{self, Contents, Job, PagePlan, Run, Way, ZeroRun},
    },
    proc::ProcDir,
    tree::Process,
};
use nix::{errno::Errno, fcntl::OFlag};
use std::{cell::RefCell, collections::BTreeMap, fs::File, os::fd::AsFd, sync::Mutex};

/// Processes with less than this to copy are copied while frozen: a fork and two more stops would freeze them longer.
const SNAPSHOT_MINIMUM: u64 = 4 << 20;

/// Whose pages a [`Contents`] are.
#[derive(Debug)]
enum Subject {
    /// Private memory of a process. `lost_by_fork`: of those mappings that a snapshot would not have.
    Process { mm: u32, host_pid: i32, memory: File, lost_by_fork: bool },
    /// A shared segment.
    Segment { id: u32, host_pid: i32, file: File },
}

/// A process' private memory.
#[derive(Debug)]
struct Private {
    mm: u32,
    host_pid: i32,
    proc: ProcDir,
    /// Mappings whose pages the task can read itself.
    readable: Vec<Vma>,
    /// A task that touches its own inaccessible pages dies of it.
    hidden: Vec<Vma>,
    /// Mappings that a snapshot would not have.
    lost_by_fork: Vec<Vma>,
}

/// Contents that were looked for at the same time, with their places. Pages are shared within a batch only.
#[derive(Debug)]
struct Batch {
    subjects: Vec<Subject>,
    plan: PagePlan,
}

/// Memory of the tree, found and planned, not yet copied.
#[derive(Debug)]
pub struct Pages {
    batches: Vec<Batch>,
    files: Vec<File>,
    /// Processes worth a snapshot.
    snapshots: Vec<i32>,
    /// A process whose pages are looked for in its snapshot, when the tree runs on already.
    postponed: Option<Private>,
    outside_only: bool,
    zeros: Vec<ZeroRun>,
    /// Guard regions, by memory map.
    guards: BTreeMap<u32, Vec<GuardRegion>>,
}

impl Pages {
    /// Finds contents while the tree is frozen, and opens the page files. `memory` has, per process, the number of its memory
    /// map and its mappings.
    ///
    /// With `may_snapshot`, a process that shares its pages with nobody in the tree is looked at only in its snapshot: that
    /// costs as much as the fork itself. Where pages are shared, their frames say so only as long as everybody is frozen.
    pub fn find(
        memory: &[(&Process, u32, &[Vma])],
        segments: &[(SharedSegment, File)],
        writer: &ImageWriter,
        outside_only: bool,
        may_snapshot: bool,
    ) -> Result<Self, DumpError> {
        let mut pages = Self {
            batches: Vec::new(),
            files: Vec::new(),
            snapshots: Vec::new(),
            postponed: None,
            outside_only,
            zeros: Vec::new(),
            guards: BTreeMap::new(),
        };
        let related = memory.len() > 1;
        let mut found = Vec::new();
        for &(process, mm, vmas) in memory {
            let mut private = Private::of(process, mm, vmas)?;
            if may_snapshot && !related && anonymous_bytes(process)? >= SNAPSHOT_MINIMUM {
                pages.snapshots.push(process.host_pid);
                let lost_by_fork = std::mem::take(&mut private.lost_by_fork);
                let proc = ProcDir::open(process.worker())?;
                let lost = Private { proc, readable: vec![], hidden: vec![], lost_by_fork, ..private };
                found.extend(lost.find(related, outside_only)?);
                pages.postponed = Some(private);
            } else {
                found.extend(private.find(related, outside_only)?);
            }
        }
        let host_pid = memory.first().map_or(0, |(process, ..)| process.host_pid);
        for (segment, file) in segments {
            let contents = segment_contents(host_pid, segment, file)?;
            let file = file.try_clone().map_err(|error| MemoryError::Task {
                operation: "reopen a shared segment",
                pid: host_pid,
                address: 0,
                errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
            })?;
            found.push((Subject::Segment { id: segment.id, host_pid, file }, contents));
        }
        if may_snapshot {
            pages.snapshots.extend(worth_a_snapshot(&found));
        }
        pages.add(found, writer)?;
        Ok(pages)
    }

    /// Gives contents their places in the page files.
    fn add(&mut self, found: Vec<(Subject, Contents)>, writer: &ImageWriter) -> Result<(), DumpError> {
        for (subject, contents) in &found {
            if let Subject::Process { mm, .. } = subject
                && !contents.guards.is_empty()
            {
                let guards =
                    contents.guards.iter().map(|guard| GuardRegion { start: guard.start, end: guard.end });
                self.guards.entry(*mm).or_default().extend(guards);
            }
        }
        let (subjects, contents): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        let shards = self.batches.last().map_or_else(Vec::new, |batch| batch.plan.shards.clone());
        let plan = plan::plan(&contents, threads, shards);
        for index in self.files.len()..plan.shards.len() {
            self.files.push(writer.shard(index as u32)?);
        }
        self.batches.push(Batch { subjects, plan });
        Ok(())
    }

    /// Processes that are worth a copy-on-write snapshot.
    pub fn snapshots(&self) -> &[i32] {
        &self.snapshots
    }

    /// No snapshot can be had: everything is to be copied while frozen.
    pub fn without_snapshots(&mut self, writer: &ImageWriter) -> Result<(), DumpError> {
        self.snapshots.clear();
        match self.postponed.take() {
            Some(private) => self.add(private.find(false, self.outside_only)?, writer),
            None => Ok(()),
        }
    }

    /// Bytes that have a place.
    pub fn bytes(&self) -> u64 {
        self.batches.last().map_or(0, |batch| batch.plan.shards.iter().sum())
    }

    /// Copies what must be copied while the tree is frozen: everything but what `later` processes have.
    pub fn copy_frozen(&mut self, guardian: &RefCell<Guardian>, later: &[i32]) -> Result<(), DumpError> {
        self.copy(guardian, |subject| match subject {
            Subject::Process { host_pid, lost_by_fork, .. } => {
                (*lost_by_fork || !later.contains(host_pid)).then_some(*host_pid)
            }
            Subject::Segment { host_pid, .. } => Some(*host_pid),
        })
    }

    /// Copies the rest out of snapshots: (process, its snapshot).
    pub fn copy_snapshots(
        &mut self,
        guardian: &RefCell<Guardian>,
        writer: &ImageWriter,
        snapshots: &[(i32, i32)],
    ) -> Result<(), DumpError> {
        if let Some(mut private) = self.postponed.take()
            && let Some((_, child)) = snapshots.iter().find(|(original, _)| *original == private.host_pid)
        {
            private.proc = ProcDir::open(*child)?;
            self.add(private.find(false, self.outside_only)?, writer)?;
        }
        for subject in self.batches.iter_mut().flat_map(|batch| &mut batch.subjects) {
            if let Subject::Process { host_pid, memory, lost_by_fork: false, .. } = subject
                && let Some((_, child)) = snapshots.iter().find(|(original, _)| original == host_pid)
            {
                *memory = ProcDir::open(*child)?.open_file("mem", OFlag::O_RDONLY)?;
            }
        }
        self.copy(guardian, |subject| match subject {
            Subject::Process { host_pid, lost_by_fork: false, .. } => {
                snapshots.iter().find(|(original, _)| original == host_pid).map(|(_, child)| *child)
            }
            _ => None,
        })
    }

    /// Copies the rest out of the frozen processes themselves.
    pub fn copy_rest(&mut self, guardian: &RefCell<Guardian>, rest: &[i32]) -> Result<(), DumpError> {
        self.copy(guardian, |subject| match subject {
            Subject::Process { host_pid, lost_by_fork: false, .. } => {
                rest.contains(host_pid).then_some(*host_pid)
            }
            _ => None,
        })
    }

    /// Runs the jobs of all subjects for which `pid_of` names the process to read from.
    fn copy(
        &mut self,
        guardian: &RefCell<Guardian>,
        pid_of: impl Fn(&Subject) -> Option<i32>,
    ) -> Result<(), DumpError> {
        let mut jobs = Vec::new();
        for batch in &self.batches {
            for job in batch.plan.jobs.iter().filter(|job| !job.runs.is_empty()) {
                let subject = &batch.subjects[job.contents];
                jobs.extend(pid_of(subject).map(|pid| Order { job, subject, pid }));
            }
        }
        let (inside, outside): (Vec<_>, Vec<_>) =
            jobs.into_iter().partition(|order| order.job.way == Way::Inside);
        let zeros = Mutex::new(Vec::new());
        let files = &self.files;
        let threads = outside.iter().map(|order| order.job.way).collect::<std::collections::BTreeSet<_>>();
        let fallback = std::thread::scope(|scope| {
            let workers: Vec<_> = threads
                .into_iter()
                .map(|way| {
                    let mine: Vec<_> = outside.iter().filter(|order| order.job.way == way).copied().collect();
                    let zeros = &zeros;
                    scope.spawn(move || copy_outside(files, &mine, zeros))
                })
                .collect();
            let fallback = copy_inside(guardian, files, &inside, &zeros);
            for worker in workers {
                worker.join().map_err(|_| DumpError::ThreadPanicked { what: "a copying thread" })??;
            }
            fallback
        })?;
        // What a task could not write itself: RLIMIT_FSIZE, a full descriptor table, PROT_NONE.
        let fallback: Vec<Order<'_>> = fallback.iter().map(|(job, order)| Order { job, ..*order }).collect();
        copy_outside(files, &fallback, &zeros)?;
        self.zeros.append(&mut zeros.into_inner().unwrap_or_default());
        Ok(())
    }

    /// Writes the page maps, and gives the checksums of the page files.
    pub fn finish(mut self, writer: &ImageWriter) -> Result<Vec<Shard>, DumpError> {
        self.zeros.sort_unstable();
        let lengths = self.batches.last().map_or_else(Vec::new, |batch| batch.plan.shards.clone());
        let mut maps: BTreeMap<(u32, u32), Vec<PageExtent>> = BTreeMap::new();
        for batch in self.batches {
            for (subject, mut extents) in batch.subjects.iter().zip(batch.plan.extents) {
                plan::drop_zeros(&mut extents, &self.zeros);
                let key = match subject {
                    Subject::Process { mm, .. } => (*mm, 0),
                    Subject::Segment { id, .. } => (0, *id),
                };
                maps.entry(key).or_default().append(&mut extents);
            }
        }
        for ((mm, segment), mut extents) in maps {
            extents.sort_unstable_by_key(|extent| extent.address);
            let mut guards = self.guards.remove(&mm).unwrap_or_default();
            guards.sort_unstable_by_key(|guard| guard.start);
            writer.write_page_map(&PageMap { mm, segment, extents, guards })?;
        }
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let mut shards = Vec::with_capacity(self.files.len());
        for ((index, file), length) in (0..).zip(&self.files).zip(lengths) {
            // A page file may end in a hole.
            file.set_len(length).map_err(|error| MemoryError::Write {
                shard: index,
                errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
            })?;
            shards.push((index, file, length));
        }
        Ok(checksum_shards(&shards, threads)?)
    }
}

impl Private {
    fn of(process: &Process, mm: u32, vmas: &[Vma]) -> Result<Self, DumpError> {
        // A child has no hugetlb pages in reserve, and dies of SIGBUS when there is none to copy to.
        let lost = VmaAdvice::Dontfork as u32 | VmaAdvice::Wipeonfork as u32;
        let (lost_by_fork, kept): (Vec<Vma>, Vec<Vma>) =
            vmas.iter().cloned().partition(|vma| vma.advice & lost != 0 || vma.huge_shift != 0);
        let (hidden, readable) = kept.into_iter().partition(|vma| vma.prot & libc::PROT_READ as u32 == 0);
        let proc = ProcDir::open(process.worker())?;
        Ok(Self { mm, host_pid: process.host_pid, proc, readable, hidden, lost_by_fork })
    }

    /// Its pages with contents.
    fn find(&self, related: bool, outside_only: bool) -> Result<Vec<(Subject, Contents)>, DumpError> {
        let mut found = Vec::new();
        for (vmas, lost_by_fork, readable) in
            [(&self.readable, false, true), (&self.hidden, false, false), (&self.lost_by_fork, true, false)]
        {
            let mut contents = private_contents(&self.proc, vmas, related)?;
            if contents.regions.is_empty() && contents.guards.is_empty() {
                continue;
            }
            contents.inside = !outside_only && readable;
            let memory = self.proc.open_file("mem", OFlag::O_RDONLY)?;
            let (mm, host_pid) = (self.mm, self.host_pid);
            found.push((Subject::Process { mm, host_pid, memory, lost_by_fork }, contents));
        }
        Ok(found)
    }
}

/// Private memory with contents, as the kernel counts it (proc_pid_status(5)); roughly.
fn anonymous_bytes(process: &Process) -> Result<u64, DumpError> {
    let mut kibibytes = 0;
    for field in ["RssAnon", "VmSwap"] {
        let text = process.status.text(field)?;
        kibibytes += text.split_ascii_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(kibibytes << 10)
}

/// A job, with what it copies and the process to read from.
#[derive(Debug, Clone, Copy)]
struct Order<'a> {
    job: &'a Job,
    subject: &'a Subject,
    pid: i32,
}

fn worth_a_snapshot(found: &[(Subject, Contents)]) -> Vec<i32> {
    let worth = |(subject, contents): &(Subject, Contents)| match subject {
        Subject::Process { host_pid, lost_by_fork: false, .. } if contents.bytes() >= SNAPSHOT_MINIMUM => {
            Some(*host_pid)
        }
        _ => None,
    };
    let mut pids: Vec<i32> = found.iter().filter_map(worth).collect();
    // Readable and inaccessible memory of one process are neighbours.
    pids.dedup();
    pids
}

fn copy_outside(files: &[File], orders: &[Order<'_>], zeros: &Mutex<Vec<ZeroRun>>) -> Result<(), DumpError> {
    let mut found = Vec::new();
    for Order { job, subject, pid } in orders {
        let source = match subject {
            Subject::Process { memory, .. } => Source::Process { pid: *pid, memory },
            Subject::Segment { file, .. } => Source::Segment { pid: *pid, file },
        };
        copy::copy(&source, &job.runs, job.shard, &files[job.shard as usize], &mut found, &|_| ())?;
    }
    if let Ok(mut zeros) = zeros.lock() {
        zeros.append(&mut found);
    }
    Ok(())
}

/// Has the tasks copy their own pages; gives back what they could not copy.
fn copy_inside<'a>(
    guardian: &RefCell<Guardian>,
    files: &[File],
    jobs: &[Order<'a>],
    zeros: &Mutex<Vec<ZeroRun>>,
) -> Result<Vec<(Job, Order<'a>)>, DumpError> {
    let mut stretches: Vec<(Order<'a>, &[Run])> = Vec::new();
    for order in jobs {
        let follows = |a: &Run, b: &Run| a.offset + a.length == b.offset;
        stretches.extend(order.job.runs.chunk_by(follows).map(|runs| (*order, runs)));
    }
    if stretches.is_empty() {
        return Ok(Vec::new());
    }
    let orders: Vec<WriteJob<'_>> = stretches
        .iter()
        .map(|(order, runs)| WriteJob {
            pid: order.pid,
            shard: files[order.job.shard as usize].as_fd(),
            offset: runs[0].offset,
            ranges: runs
                .iter()
                .map(|run| PageRange { address: run.address, len: run.length, raw: run.huge })
                .collect(),
        })
        .collect();
    let mut guardian = guardian.borrow_mut();
    guardian.start_write(&orders)?;
    let written = guardian.finish_write()?;
    let mut found = Vec::new();
    let mut fallback = Vec::new();
    for ((order, runs), written) in stretches.into_iter().zip(written) {
        let Order { job, pid, .. } = order;
        for (address, length) in written.zeros {
            let Some(run) =
                runs.iter().find(|run| (run.address..run.address + run.length).contains(&address))
            else {
                continue;
            };
            found.push(ZeroRun { shard: job.shard, offset: run.offset + (address - run.address), length });
        }
        let Some(error) = written.error else { continue };
        tracing::info!(
            pid,
            "the task could not write all of its pages itself: {error}; reading them from outside"
        );
        let (range, done) = written.stopped_at;
        let rest = runs.iter().skip(range).enumerate().map(|(index, run)| {
            let skip = if index == 0 { done.min(run.length) } else { 0 };
            Run { address: run.address + skip, length: run.length - skip, offset: run.offset + skip, ..*run }
        });
        fallback.push((Job { runs: rest.collect(), ..job.clone() }, order));
    }
    if let Ok(mut zeros) = zeros.lock() {
        zeros.append(&mut found);
    }
    Ok(fallback)
}
