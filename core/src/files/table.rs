//! All descriptor tables of a tree, and which of their entries refer to the same open file description (kcmp(2)).

use crate::proc::{
    ProcDir, ProcError,
    descriptor::{self, DescriptorFacts},
    kcmp::{Resource, SharingSet},
};
use std::{
    collections::HashMap,
    os::fd::{AsRawFd, OwnedFd},
};

/// An entry of a descriptor table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Descriptor number.
    pub number: i32,
    /// Index of the open file description.
    pub handle: usize,
    /// Close-on-exec.
    pub cloexec: bool,
}

/// An open file description of the tree.
#[derive(Debug)]
pub struct Handle {
    /// What /proc says of it.
    pub facts: DescriptorFacts,
    /// Who holds it: (process as stasis sees it, number, close-on-exec).
    pub holders: Vec<(i32, i32, bool)>,
    /// Texts about locks: the process to which they are shown, and its fdinfo.
    pub locks: Vec<(i32, String)>,
    /// For those held by no table (in flight inside another object): our own duplicate.
    pub in_flight: Option<OwnedFd>,
    /// For those that only a mapping has: the process as stasis sees it, and the mapping, for messages.
    pub mapped: Option<(i32, String)>,
}

impl Handle {
    /// A process and number that refer to it; ourselves if it is in flight.
    pub fn subject(&self) -> (i32, i32) {
        match (&self.in_flight, self.holders.first()) {
            (_, Some(&(pid, number, _))) => (pid, number),
            (Some(fd), None) => (std::process::id() as i32, fd.as_raw_fd()),
            (None, None) => (0, -1),
        }
    }
}

/// What two entries must have in common to be the same description; kcmp decides among those.
/// Not the whole of fdinfo: some of it changes from one read to the next.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Resemblance {
    dev: u64,
    ino: u64,
    status_flags: u32,
    position: u64,
    link: Vec<u8>,
    number: Option<u64>,
}

/// The number by which fdinfo tells objects without an inode of their own apart, if they have one (a line whose name ends in "-id").
fn own_number(info: &str) -> Option<u64> {
    info.lines().find_map(|line| line.split_once("-id:")?.1.trim().parse().ok())
}

/// Those that resemble each other: one as a rule, and then nothing is compared.
#[derive(Debug)]
enum Alike {
    One((i32, u64), usize),
    Many(SharingSet<usize>),
}

/// All open file descriptions of the tree.
#[derive(Debug, Default)]
pub struct Handles {
    /// In the order they were found.
    pub all: Vec<Handle>,
    alike: HashMap<Resemblance, Alike>,
}

impl Handles {
    /// Enters the table of a process, read before by [`read_table`] from its thread `worker`.
    pub fn add_table(
        &mut self,
        pid: i32,
        worker: i32,
        facts: Vec<DescriptorFacts>,
    ) -> Result<Vec<Entry>, ProcError> {
        let mut entries = Vec::with_capacity(facts.len());
        for facts in facts {
            let (number, cloexec) = (facts.number, facts.cloexec);
            // fs/locks.c, show_fd_locks: each process is shown its own.
            let locks = facts.info.contains("lock:\t").then(|| facts.info.clone());
            let handle = self.find_or_add(worker, facts)?;
            self.all[handle].holders.push((pid, number, cloexec));
            self.all[handle].locks.extend(locks.map(|text| (pid, text)));
            entries.push(Entry { number, handle, cloexec });
        }
        Ok(entries)
    }

    /// Enters a process that shares a table that is known: its entries.
    pub fn add_sharer(&mut self, pid: i32, table: &[Entry]) -> Vec<Entry> {
        for entry in table {
            self.all[entry.handle].holders.push((pid, entry.number, entry.cloexec));
        }
        table.to_vec()
    }

    /// Enters a description that is in flight inside another object: the index of it, whether known before or not.
    pub fn add_in_flight(&mut self, fd: OwnedFd) -> Result<usize, ProcError> {
        let own = ProcDir::open_self()?;
        let facts = descriptor::facts(&own, fd.as_raw_fd())?;
        let known = self.all.len();
        let handle = self.find_or_add(std::process::id() as i32, facts)?;
        if handle == known {
            self.all[handle].in_flight = Some(fd);
        }
        Ok(handle)
    }

    /// Enters a description of a file that is mapped and that nobody has open.
    pub fn add_mapped(&mut self, fd: OwnedFd, pid: i32, place: String) -> Result<usize, ProcError> {
        let handle = self.add_in_flight(fd)?;
        self.all[handle].mapped = Some((pid, place));
        Ok(handle)
    }

    /// A description of this file, through which it can be opened again.
    pub fn of_file(&self, dev: u64, ino: u64) -> Option<usize> {
        let path_only = libc::O_PATH as u32;
        self.all.iter().position(|handle| {
            let facts = &handle.facts;
            (facts.stat.st_dev, facts.stat.st_ino) == (dev, ino) && facts.status_flags & path_only == 0
        })
    }

    fn find_or_add(&mut self, pid: i32, facts: DescriptorFacts) -> Result<usize, ProcError> {
        let resemblance = Resemblance {
            dev: facts.stat.st_dev,
            ino: facts.stat.st_ino,
            status_flags: facts.status_flags,
            position: facts.position,
            link: facts.link.clone(),
            number: own_number(&facts.info),
        };
        let subject = (pid, facts.number as u64);
        let next = self.all.len();
        let found = match self.alike.get_mut(&resemblance) {
            None => {
                self.alike.insert(resemblance, Alike::One(subject, next));
                None
            }
            Some(Alike::Many(set)) => set.find_or_insert(subject, next)?,
            Some(one @ Alike::One(..)) => {
                let mut set = SharingSet::new(Resource::File);
                if let Alike::One(first, handle) = *one {
                    set.find_or_insert(first, handle)?;
                }
                let found = set.find_or_insert(subject, next)?;
                *one = Alike::Many(set);
                found
            }
        };
        if found.is_none() {
            self.all.push(Handle {
                facts,
                holders: Vec::new(),
                locks: Vec::new(),
                in_flight: None,
                mapped: None,
            });
        }
        Ok(found.unwrap_or(next))
    }
}

/// Below this many descriptors a second thread costs more than it brings.
const PARALLEL_MINIMUM: usize = 512;

/// Reads everything /proc tells about the descriptors of a process.
pub fn read_table(proc: &ProcDir) -> Result<Vec<DescriptorFacts>, ProcError> {
    let numbers = descriptor::numbers(proc)?;
    let read = |part: &[i32]| part.iter().map(|&n| descriptor::facts(proc, n)).collect::<Result<Vec<_>, _>>();
    if numbers.len() < PARALLEL_MINIMUM {
        return read(&numbers);
    }
    let (first, second) = numbers.split_at(numbers.len() / 2);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| read(second));
        let mut facts = read(first)?;
        // A thread that panicked is reported as if it had read nothing; its panic is on stderr.
        let failed =
            |_| ProcError::Format { pid: proc.pid(), file: "fd", what: "a reading thread panicked".into() };
        facts.extend(other.join().map_err(failed)??);
        Ok(facts)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_objects() {
        assert_eq!(own_number("pos:\t0\ncounter: 3\ncounter-id: 17\nsemaphore: 0\n"), Some(17));
        assert_eq!(own_number("pos:\t0\nflags:\t02\nmnt_id:\t16\n"), None);
    }

    #[test]
    fn duplicates_share_a_handle_and_strangers_do_not() {
        let (reader, writer) = std::io::pipe().unwrap();
        let duplicate = reader.try_clone().unwrap();
        let same_file =
            [std::fs::File::open("/dev/null").unwrap(), std::fs::File::open("/dev/null").unwrap()];
        let proc = ProcDir::open_self().unwrap();
        let mut handles = Handles::default();
        // Not the whole table: other tests open and close descriptors meanwhile.
        let numbers = [reader.as_raw_fd(), duplicate.as_raw_fd(), writer.as_raw_fd()];
        let numbers = numbers.into_iter().chain(same_file.iter().map(AsRawFd::as_raw_fd));
        let facts = numbers.map(|number| descriptor::facts(&proc, number).unwrap()).collect();
        let entries = handles.add_table(proc.pid(), proc.pid(), facts).unwrap();
        let handle = |fd: i32| entries.iter().find(|entry| entry.number == fd).unwrap().handle;
        assert_eq!(handle(reader.as_raw_fd()), handle(duplicate.as_raw_fd()));
        assert_ne!(handle(reader.as_raw_fd()), handle(writer.as_raw_fd()));
        assert_ne!(handle(same_file[0].as_raw_fd()), handle(same_file[1].as_raw_fd()));
        assert_eq!(handles.all[handle(reader.as_raw_fd())].holders.len(), 2);
        let known = handles.all.len();
        let again = handles.add_in_flight(OwnedFd::from(writer.try_clone().unwrap())).unwrap();
        assert_eq!((again, handles.all.len()), (handle(writer.as_raw_fd()), known));
    }
}
