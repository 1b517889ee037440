//! What plugins of namespaces share: namespaces(7), user_namespaces(7).

use crate::{HookError, Host, NamespaceInfo, Result};
use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd, OwnedFd},
};

/// Refuses a namespace that only a part of the tree is in: it would have to be entered in the middle of the tree.
pub fn whole_tree(host: &Host<'_>, namespace: &NamespaceInfo) -> Result<()> {
    let outside = host.tasks().into_iter().find(|task| !namespace.members.contains(&task.pid));
    // Ended tasks are in no namespace any more.
    match outside.filter(|task| host.open_proc(task.pid).is_ok_and(|proc| is_alive(&proc))) {
        None => Ok(()),
        Some(task) => Err(HookError::unsupported(
            format!("{}:[{}]", namespace.kind, namespace.ino),
            format!("task {} ({}) of the tree is not in it", task.pid, task.name),
            "dump a tree whose tasks are all in one namespace of this type",
        )),
    }
}

fn is_alive(proc: &OwnedFd) -> bool {
    fs::read_link(format!("/proc/self/fd/{}/ns/user", proc.as_raw_fd())).is_ok()
}

/// A member of a namespace by which it can be reached: its /proc directory.
pub fn member(host: &Host<'_>, namespace: &NamespaceInfo) -> Result<OwnedFd> {
    let first = namespace.members.first().copied();
    host.open_proc(first.ok_or_else(|| HookError::invalid("a namespace without members"))?)
}

/// Runs `f` in a thread of this process that has entered the namespace `kind` of the task whose /proc directory is `proc`
/// (setns(2)): those of types "uts", "ipc", "net" and "cgroup".
pub fn within<T: Send>(proc: &OwnedFd, kind: &str, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let failed = |what: &str| {
        let operation = format!("{what} the {kind} namespace of a task");
        move |error| HookError::failed(operation, error)
    };
    let file =
        File::open(format!("/proc/self/fd/{}/ns/{kind}", proc.as_raw_fd())).map_err(failed("opening"))?;
    let entered = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: integer arguments; only this thread changes.
            match unsafe { libc::setns(file.as_raw_fd(), 0) } {
                0 => f(),
                _ => Err(failed("entering")(io::Error::last_os_error())),
            }
        });
        thread.join()
    });
    // A panic of the hook goes on in the thread that called it.
    entered.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// `uid_map` or `gid_map` of a task: how its user namespace calls the users of this one.
#[derive(Debug, Clone, Default)]
pub struct IdMap {
    text: String,
}

impl IdMap {
    /// Reads one from a /proc directory; `file` is "uid_map" or "gid_map".
    pub fn of(proc: &impl AsRawFd, file: &str) -> Result<Self> {
        Self::read(&format!("/proc/self/fd/{}/{file}", proc.as_raw_fd()))
    }

    /// Reads one by its path.
    pub fn read(path: &str) -> Result<Self> {
        let text = fs::read_to_string(path);
        Ok(Self { text: text.map_err(|error| HookError::failed(format!("reading {path}"), error))? })
    }

    /// One of the lines of such a file: `inside outside count`.
    pub fn parse(text: &str) -> Self {
        Self { text: text.into() }
    }

    /// The id inside of an id of this namespace; none if it has no name there.
    pub fn inside(&self, outside: u32) -> Option<u32> {
        self.text.lines().find_map(|line| {
            let mut numbers = line.split_whitespace().map(|word| word.parse::<u32>().ok());
            let (first, start, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
            let offset = outside.checked_sub(start).filter(|offset| *offset < count)?;
            first.checked_add(offset)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_translated_by_range() {
        let map = IdMap::parse("0 100000 1000\n5000 7 1\n");
        assert_eq!([100_000, 100_999, 7].map(|id| map.inside(id)), [Some(0), Some(999), Some(5000)]);
        assert_eq!(map.inside(101_000), None);
        assert_eq!(IdMap::parse("0 4294967295 5\nnonsense").inside(4_294_967_295), Some(0));
    }

    #[test]
    fn a_thread_enters_a_namespace_and_its_panic_comes_back() {
        let proc = File::open("/proc/self").unwrap().into();
        match within(&proc, "uts", || Ok(7)) {
            Ok(seven) => assert_eq!(seven, 7),
            Err(error) => assert!(error.to_string().contains("entering the uts namespace"), "{error}"),
        }
        assert!(within(&proc, "nothing", || Ok(7)).is_err());
    }
}
