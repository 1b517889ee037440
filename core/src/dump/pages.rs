//! Step 7, memory: collects what has contents, plans places, and has everything copied: by threads of ours from outside,
//! and by the tasks (or their copy-on-write snapshots) themselves through the guardian.

use super::{DumpError, options::DumpOptions};
use crate::{
    guardian::{Guardian, WriteJob, protocol::PageRange},
    image::{
        ImageWriter, checksum_shards,
        records::{PageExtent, PageMap, Shard, SharedSegment, Vma, VmaAdvice},
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
use std::{cell::RefCell, fs::File, os::fd::AsFd, sync::Mutex};

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

/// Memory of the tree, found and planned, not yet copied.
#[derive(Debug)]
pub struct Pages {
    subjects: Vec<Subject>,
    plan: PagePlan,
    files: Vec<File>,
    /// Processes worth a snapshot.
    snapshots: Vec<i32>,
    zeros: Vec<ZeroRun>,
}

impl Pages {
    /// Finds all contents while the tree is frozen, and opens the page files. `memory` has, per process, the number of
    /// its memory map and its mappings.
    pub fn find(
        memory: &[(&Process, u32, &[Vma])],
        segments: &[(SharedSegment, File)],
        writer: &ImageWriter,
        options: &DumpOptions,
    ) -> Result<Self, DumpError> {
        let related = memory.len() > 1;
        let mut subjects = Vec::new();
        let mut contents = Vec::new();
        for &(process, mm, vmas) in memory {
            let lost = VmaAdvice::Dontfork as u32 | VmaAdvice::Wipeonfork as u32;
            let (lost, kept): (Vec<Vma>, Vec<Vma>) =
                vmas.iter().cloned().partition(|vma| vma.advice & lost != 0);
            // A task that touches its own inaccessible pages dies of it.
            let (hidden, kept) = kept.into_iter().partition(|vma| vma.prot & libc::PROT_READ as u32 == 0);
            for (part, lost_by_fork, readable) in
                [(kept, false, true), (hidden, false, false), (lost, true, false)]
            {
                let mut found = private_contents(&process.proc, &part, related)?;
                if found.regions.is_empty() {
                    continue;
                }
                found.inside = !options.outside_only && readable;
                let memory = process.proc.open_file("mem", OFlag::O_RDONLY)?;
                subjects.push(Subject::Process { mm, host_pid: process.host_pid, memory, lost_by_fork });
                contents.push(found);
            }
        }
        let host_pid = memory.first().map_or(0, |(process, ..)| process.host_pid);
        for (segment, file) in segments {
            contents.push(segment_contents(host_pid, segment, file)?);
            let file = file.try_clone().map_err(|error| MemoryError::Task {
                operation: "reopen a shared segment",
                pid: host_pid,
                address: 0,
                errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
            })?;
            subjects.push(Subject::Segment { id: segment.id, host_pid, file });
        }
        let snapshots = worth_a_snapshot(&subjects, &contents);
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        let plan = plan::plan(&contents, threads);
        let files =
            (0..plan.shards.len() as u32).map(|index| writer.shard(index)).collect::<Result<_, _>>()?;
        Ok(Self { subjects, plan, files, snapshots, zeros: Vec::new() })
    }

    /// Processes that are worth a copy-on-write snapshot.
    pub fn snapshots(&self) -> &[i32] {
        &self.snapshots
    }

    /// Bytes to copy.
    pub fn bytes(&self) -> u64 {
        self.plan.shards.iter().sum()
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
        snapshots: &[(i32, i32)],
    ) -> Result<(), DumpError> {
        for subject in &mut self.subjects {
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

    /// Runs the jobs of all subjects for which `pid_of` names the process to read from.
    fn copy(
        &mut self,
        guardian: &RefCell<Guardian>,
        pid_of: impl Fn(&Subject) -> Option<i32>,
    ) -> Result<(), DumpError> {
        let jobs: Vec<(&Job, i32)> = self
            .plan
            .jobs
            .iter()
            .filter(|job| !job.runs.is_empty())
            .filter_map(|job| Some((job, pid_of(&self.subjects[job.contents])?)))
            .collect();
        let (inside, outside): (Vec<_>, Vec<_>) =
            jobs.into_iter().partition(|(job, _)| job.way == Way::Inside);
        let zeros = Mutex::new(Vec::new());
        let subjects = &self.subjects;
        let files = &self.files;
        let threads = outside.iter().map(|(job, _)| job.way).collect::<std::collections::BTreeSet<_>>();
        let fallback = std::thread::scope(|scope| -> Result<Vec<(Job, i32)>, DumpError> {
            let workers: Vec<_> = threads
                .into_iter()
                .map(|way| {
                    let mine: Vec<_> = outside.iter().filter(|(job, _)| job.way == way).copied().collect();
                    let zeros = &zeros;
                    scope.spawn(move || copy_outside(subjects, files, &mine, zeros))
                })
                .collect();
            let fallback = copy_inside(guardian, files, &inside, &zeros);
            for worker in workers {
                worker.join().map_err(|_| DumpError::ThreadPanicked { what: "a copying thread" })??;
            }
            fallback
        })?;
        // What a task could not write itself: RLIMIT_FSIZE, a full descriptor table, PROT_NONE.
        let fallback: Vec<(&Job, i32)> = fallback.iter().map(|(job, pid)| (job, *pid)).collect();
        copy_outside(subjects, files, &fallback, &zeros)?;
        self.zeros.append(&mut zeros.into_inner().unwrap_or_default());
        Ok(())
    }

    /// Writes the page maps, and gives the checksums of the page files.
    pub fn finish(mut self, writer: &ImageWriter) -> Result<Vec<Shard>, DumpError> {
        self.zeros.sort_unstable();
        let mut maps: std::collections::BTreeMap<(u32, u32), Vec<PageExtent>> =
            std::collections::BTreeMap::new();
        for (subject, mut extents) in self.subjects.iter().zip(self.plan.extents) {
            plan::drop_zeros(&mut extents, &self.zeros);
            let key = match subject {
                Subject::Process { mm, .. } => (*mm, 0),
                Subject::Segment { id, .. } => (0, *id),
            };
            maps.entry(key).or_default().append(&mut extents);
        }
        for ((mm, segment), mut extents) in maps {
            extents.sort_unstable_by_key(|extent| extent.address);
            writer.write_page_map(&PageMap { mm, segment, extents })?;
        }
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        for (index, (file, &length)) in self.files.iter().zip(&self.plan.shards).enumerate() {
            // A page file may end in a hole.
            file.set_len(length).map_err(|error| MemoryError::Write {
                shard: index as u32,
                errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
            })?;
        }
        let shards: Vec<_> = self
            .files
            .iter()
            .zip(&self.plan.shards)
            .enumerate()
            .map(|(i, (f, &l))| (i as u32, f, l))
            .collect();
        Ok(checksum_shards(&shards, threads)?)
    }
}

fn worth_a_snapshot(subjects: &[Subject], contents: &[Contents]) -> Vec<i32> {
    let worth = |(subject, contents): (&Subject, &Contents)| match subject {
        Subject::Process { host_pid, lost_by_fork: false, .. } if contents.bytes() >= SNAPSHOT_MINIMUM => {
            Some(*host_pid)
        }
        _ => None,
    };
    subjects.iter().zip(contents).filter_map(worth).collect()
}

fn copy_outside(
    subjects: &[Subject],
    files: &[File],
    jobs: &[(&Job, i32)],
    zeros: &Mutex<Vec<ZeroRun>>,
) -> Result<(), DumpError> {
    let mut found = Vec::new();
    for (job, pid) in jobs {
        let source = match &subjects[job.contents] {
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
fn copy_inside(
    guardian: &RefCell<Guardian>,
    files: &[File],
    jobs: &[(&Job, i32)],
    zeros: &Mutex<Vec<ZeroRun>>,
) -> Result<Vec<(Job, i32)>, DumpError> {
    let mut stretches: Vec<(&Job, i32, &[Run])> = Vec::new();
    for (job, pid) in jobs {
        let follows = |a: &Run, b: &Run| a.offset + a.length == b.offset;
        stretches.extend(job.runs.chunk_by(follows).map(|runs| (*job, *pid, runs)));
    }
    if stretches.is_empty() {
        return Ok(Vec::new());
    }
    let orders: Vec<WriteJob<'_>> = stretches
        .iter()
        .map(|(job, pid, runs)| WriteJob {
            pid: *pid,
            shard: files[job.shard as usize].as_fd(),
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
    for ((job, pid, runs), written) in stretches.into_iter().zip(written) {
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
        fallback.push((Job { runs: rest.collect(), ..(*job).clone() }, pid));
    }
    if let Ok(mut zeros) = zeros.lock() {
        zeros.append(&mut found);
    }
    Ok(fallback)
}
