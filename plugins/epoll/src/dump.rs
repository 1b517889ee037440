//! Reading an epoll: entries from fdinfo, their targets by kcmp.

use crate::{
    kernel,
    records::stasis::epoll::v1::{BusyPoll, Entry, Epoll},
};
use stasis_plugin_api::{Actor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, TaskInfo};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

/// An entry as fdinfo has it (fs/eventpoll.c, ep_show_fdinfo).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed {
    pub number: i32,
    pub events: u32,
    pub data: u64,
    pub ino: u64,
    /// Place among the entries of the same number.
    pub nth: u32,
}

/// The entries of an epoll.
pub fn entries(handle: &HandleInfo) -> Result<Vec<Listed>> {
    let mut seen: BTreeMap<i32, u32> = BTreeMap::new();
    let lines = handle.fdinfo.lines().filter(|line| line.starts_with("tfd:"));
    lines
        .map(|line| {
            let mut entry = entry(line)
                .ok_or_else(|| HookError::invalid(format!("fdinfo line of an epoll: {:?}", line.trim())))?;
            let nth = seen.entry(entry.number).or_default();
            entry.nth = *nth;
            *nth += 1;
            Ok(entry)
        })
        .collect()
}

/// `tfd: 5 events: 19 data: 5  pos:0 ino:61af sdev:7`, with blanks for padding.
fn entry(line: &str) -> Option<Listed> {
    let text = |name: &str| {
        let rest = line.split_once(name)?.1;
        rest.split_whitespace().next()
    };
    let hexadecimal = |name| u64::from_str_radix(text(name)?, 16).ok();
    Some(Listed {
        number: text("tfd:")?.parse().ok()?,
        events: hexadecimal("events:")? as u32,
        data: hexadecimal("data:")?,
        ino: hexadecimal("ino:")?,
        nth: 0,
    })
}

/// Makes the record of an epoll.
pub fn epoll(host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Epoll>> {
    let handle = &object.handles[0];
    let mut search = Search::new(host, handle)?;
    let mut record = Epoll::default();
    for listed in entries(handle)? {
        let target = search.target(&listed)?.ok_or_else(|| {
            HookError::unsupported(
                format!(
                    "epoll: it watches a file (inode {}) added as descriptor {}",
                    listed.ino, listed.number
                ),
                "no task of the tree has that file open any more",
                "let the program remove the entry, or dump who has the file open as well",
            )
        })?;
        let Listed { number, events, data, .. } = listed;
        record.entries.push(Entry { handle: target, number, events, data });
    }
    record.busy_poll = kernel::params(search.epoll.as_fd()).map(|params| BusyPoll {
        usecs: params.usecs,
        budget: params.budget.into(),
        prefer: params.prefer != 0,
    });
    let uses: BTreeSet<u32> = record.entries.iter().map(|entry| entry.handle).collect();
    let settle_as = adder(host, handle, &record).map_or(Actor::ANY, Actor::task);
    Ok(Dumped { uses: uses.into_iter().collect(), settle_as, ..Dumped::new(record) })
}

/// The task in whose table most entries' numbers are what they were when added; the first of equals.
fn adder(host: &Host<'_>, handle: &HandleInfo, record: &Epoll) -> Option<i32> {
    let holds = |pid: i32| handle.holders.iter().any(|holder| holder.pid == pid);
    let matches = |pid: i32| {
        let same = |entry: &&Entry| host.handle_at(pid, entry.number) == Some(entry.handle);
        record.entries.iter().filter(same).count()
    };
    let tasks = host.tasks();
    // `max_by_key` takes the last of equals.
    tasks.iter().rev().map(|task| task.pid).filter(|pid| holds(*pid)).max_by_key(|pid| matches(*pid))
}

/// A handle that a task holds, with a number by which kcmp finds it.
#[derive(Clone, Copy)]
struct Candidate {
    id: u32,
    ino: u64,
    host_pid: i32,
    fd: i32,
}

struct Search<'h, 'a> {
    host: &'h Host<'a>,
    epoll: OwnedFd,
    /// Holders of the epoll: their tables are looked at first.
    holders: Vec<TaskInfo>,
    /// All handles of the tree, listed when first needed.
    all: Option<Vec<Candidate>>,
}

impl<'h, 'a> Search<'h, 'a> {
    fn new(host: &'h Host<'a>, handle: &HandleInfo) -> Result<Self> {
        let mut holders = host.tasks();
        holders.retain(|task| handle.holders.iter().any(|holder| holder.pid == task.pid));
        Ok(Self { host, epoll: host.open_handle(handle.id)?, holders, all: None })
    }

    fn target(&mut self, listed: &Listed) -> Result<Option<u32>> {
        for task in &self.holders {
            if let Some(id) = self.host.handle_at(task.pid, listed.number)
                && self.is_target(listed, task.host_pid, listed.number)?
            {
                return Ok(Some(id));
            }
        }
        let all = match self.all.take() {
            Some(all) => all,
            None => self.list()?,
        };
        let mut found = None;
        for candidate in all.iter().filter(|candidate| candidate.ino == listed.ino) {
            if self.is_target(listed, candidate.host_pid, candidate.fd)? {
                found = Some(candidate.id);
                break;
            }
        }
        self.all = Some(all);
        Ok(found)
    }

    fn is_target(&self, listed: &Listed, host_pid: i32, fd: i32) -> Result<bool> {
        kernel::is_target(self.epoll.as_fd(), listed.number, listed.nth, host_pid, fd)
            .map_err(|error| HookError::failed("kcmp KCMP_EPOLL_TFD", error))
    }

    /// Every handle that is in a descriptor table, once.
    fn list(&self) -> Result<Vec<Candidate>> {
        let mut found = BTreeMap::new();
        for task in self.host.tasks() {
            let directory = self.host.open_proc(task.pid)?;
            // A dead leader or a zombie has no table.
            let Ok(numbers) = fs::read_dir(format!("/proc/self/fd/{}/fd", directory.as_raw_fd())) else {
                continue;
            };
            for fd in numbers.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
                let Some(id) = self.host.handle_at(task.pid, fd) else { continue };
                if let std::collections::btree_map::Entry::Vacant(entry) = found.entry(id)
                    && let Some(handle) = self.host.handle(id)
                {
                    entry.insert(Candidate { id, ino: handle.ino, host_pid: task.host_pid, fd });
                }
            }
        }
        Ok(found.into_values().collect())
    }
}
