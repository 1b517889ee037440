//! kcmp(2): do two tasks share a kernel object? Its answers are a total order, so that sharing among n is found in
//! n log n calls.

use super::ProcError;
use nix::errno::Errno;
use std::cmp::Ordering;

/// What to compare (include/uapi/linux/kcmp.h).
#[repr(i32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// An open file description.
    File = 0,
    /// The memory descriptor.
    Memory = 1,
    /// The descriptor table.
    Files = 2,
    /// Root, cwd and umask.
    Fs = 3,
    /// Signal handlers.
    SignalHandlers = 4,
    /// The I/O context.
    Io = 5,
    /// The list of semaphore undo operations.
    SemaphoreUndo = 6,
}

/// Orders two tasks by the kernel object they use; `index` is the descriptor number for [`Resource::File`], else 0.
///
/// # Errors
/// kcmp's errno, e.g. `EPERM` or `ESRCH`.
pub fn compare(resource: Resource, first: (i32, u64), second: (i32, u64)) -> Result<Ordering, ProcError> {
    // SAFETY: kcmp reads and writes no memory of ours for these types.
    let answer =
        unsafe { libc::syscall(libc::SYS_kcmp, first.0, second.0, resource as i32, first.1, second.1) };
    match answer {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        // 3: not equal, no order (for debugging kernels); a stable order of our own will do.
        3 => Ok(first.cmp(&second)),
        _ => Err(ProcError::Compare { first: first.0, second: second.0, errno: Errno::last() }),
    }
}

/// Finds equal objects: keeps a sorted list and says for each new one whether it is known.
#[derive(Debug)]
pub struct SharingSet<T> {
    resource: Resource,
    sorted: Vec<((i32, u64), T)>,
}

impl<T: Copy> SharingSet<T> {
    /// An empty set for one kind of kernel object.
    pub fn new(resource: Resource) -> Self {
        Self { resource, sorted: Vec::new() }
    }

    /// The value that was given for the same kernel object before, or `None`, in which case it is `value` from now on.
    pub fn find_or_insert(&mut self, subject: (i32, u64), value: T) -> Result<Option<T>, ProcError> {
        let (mut low, mut high) = (0, self.sorted.len());
        while low < high {
            let middle = usize::midpoint(low, high);
            match compare(self.resource, self.sorted[middle].0, subject)? {
                Ordering::Equal => return Ok(Some(self.sorted[middle].1)),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        self.sorted.insert(low, (subject, value));
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn duplicates_are_the_same_file_and_reopened_ones_are_not() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let duplicate = file.try_clone().unwrap();
        let other = std::fs::File::open("/dev/null").unwrap();
        let pid = std::process::id() as i32;
        let mut set = SharingSet::new(Resource::File);
        let subject = |f: &std::fs::File| (pid, f.as_raw_fd() as u64);
        assert_eq!(set.find_or_insert(subject(&file), 1).unwrap(), None);
        assert_eq!(set.find_or_insert(subject(&other), 2).unwrap(), None);
        assert_eq!(set.find_or_insert(subject(&duplicate), 3).unwrap(), Some(1));
        assert_eq!(set.find_or_insert(subject(&other), 4).unwrap(), Some(2));
    }
}
