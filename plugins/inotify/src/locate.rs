//! From an inode to a path: by file handle, by what the tree has open, by names that the tasks know.
//!
//! Nothing is opened on the way, only looked up (O_PATH): an opened directory would be an event for its watchers.

use crate::{SCAN_PATH, dump::Listed, kernel};
use stasis_plugin_api::{HandleInfo, HookError, Host, Result};
use std::{
    collections::HashMap,
    ffi::OsStr,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::MetadataExt,
        },
    },
    path::{Path, PathBuf},
};

/// Where a watched file is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// It has a path, or is found by its handle on the file system mounted at `mount`.
    Path { path: Vec<u8>, mount: Option<Vec<u8>>, mode: u32 },
    /// It is removed, and an open file description of the tree keeps it.
    Removed { handle: u32, mode: u32 },
}

/// How many directory entries a scan looks at.
const SCAN_LIMIT: usize = 1_000_000;

type Inode = (u64, u64);

/// A mounted file system of the instance's holder.
pub struct Mount {
    id: u64,
    pub dev: u64,
    pub point: Vec<u8>,
    root: OwnedFd,
}

/// Looks for watched files.
pub struct Search<'h, 'a> {
    host: &'h Host<'a>,
    /// `/proc/PID` of every task, the holder of the instance first.
    tasks: Vec<OwnedFd>,
    mounts: Vec<Mount>,
}

/// A watched file, found by its handle.
struct Opened {
    /// Index of the mount it was found on.
    mount: usize,
    inode: Inode,
    links: u64,
    mode: u32,
    /// Its path, if the kernel knows one.
    link: PathBuf,
}

/// Finds files by their handles. With a working directory of its own, a thread can name file systems without opening
/// anything on them.
fn open_all(mounts: &[Mount], listed: &[Listed]) -> io::Result<Vec<Vec<Opened>>> {
    let open = |watch: &Listed| -> io::Result<Vec<Opened>> {
        let Some((kind, data)) = &watch.handle else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for (index, mount) in mounts.iter().enumerate().filter(|(_, mount)| mount.dev == watch.dev) {
            match kernel::change_directory(mount.root.as_fd()) {
                // A mount of a single file; a watch of it is found by others, or by its name.
                Err(error) if error.kind() == io::ErrorKind::NotADirectory => continue,
                changed => changed?,
            }
            let Ok(file) = kernel::open_handle(*kind, data) else { continue };
            let stat = kernel::stat(file.as_fd())?;
            let link = fs::read_link(kernel::magic_link(file.as_fd()))?;
            let (links, mode) = (stat.st_nlink, stat.st_mode & libc::S_IFMT);
            found.push(Opened { mount: index, inode: (stat.st_dev, stat.st_ino), links, mode, link });
        }
        Ok(found)
    };
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            kernel::own_directory()?;
            listed.iter().map(open).collect()
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
    })
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}

fn below(directory: &OwnedFd, path: &str) -> PathBuf {
    kernel::magic_link(directory.as_fd()).join(path)
}

impl<'h, 'a> Search<'h, 'a> {
    pub fn new(host: &'h Host<'a>, instance: &HandleInfo) -> Result<Self> {
        let mut pids: Vec<i32> = host.tasks().iter().map(|task| task.pid).collect();
        pids.sort_by_key(|pid| !instance.holders.iter().any(|holder| holder.pid == *pid));
        let tasks = pids.into_iter().map(|pid| host.open_proc(pid)).collect::<Result<Vec<_>>>()?;
        Ok(Self { host, tasks, mounts: Vec::new() })
    }

    /// The place of each watched file.
    pub fn find(&mut self, listed: &[Listed]) -> Result<Vec<Place>> {
        if listed.is_empty() {
            return Ok(Vec::new());
        }
        if self.mounts.is_empty() {
            self.mounts = self.mounts()?;
        }
        let opened = open_all(&self.mounts, listed).map_err(failed("open watched files by handle"))?;
        let mut places: Vec<Option<Place>> =
            listed.iter().zip(opened).map(|(watch, opened)| self.by_handle(watch, opened)).collect();
        if places.iter().any(Option::is_none) {
            self.by_name(listed, &mut places);
        }
        if places.iter().any(Option::is_none) {
            self.scan(listed, &mut places);
        }
        listed.iter().zip(places).map(|(watch, place)| place.ok_or_else(|| unknown(watch))).collect()
    }

    /// The mount point of mount `id`, or of any mount of the file system on device `dev`.
    pub fn mount_point(&mut self, id: Option<u64>, dev: Option<u64>) -> Result<Option<Vec<u8>>> {
        if self.mounts.is_empty() {
            self.mounts = self.mounts()?;
        }
        let fits =
            |mount: &&Mount| id.is_none_or(|id| id == mount.id) && dev.is_none_or(|dev| dev == mount.dev);
        Ok(self.mounts.iter().find(fits).map(|mount| mount.point.clone()))
    }

    /// The mounts of the holder (proc_pid_mountinfo(5)).
    fn mounts(&self) -> Result<Vec<Mount>> {
        let Some(task) = self.tasks.first() else { return Ok(Vec::new()) };
        let text = fs::read(below(task, "mountinfo")).map_err(failed("read mountinfo"))?;
        let root = below(task, "root");
        let mount = |line: &[u8]| {
            let mut fields = line.split(|byte| *byte == b' ');
            let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
            fields.next()?;
            let (major, minor) = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
            let dev = libc::makedev(major.parse().ok()?, minor.parse().ok()?);
            let point = unescape(fields.nth(1)?);
            let inside = Path::new(OsStr::from_bytes(point.strip_prefix(b"/")?));
            Some(Mount { id, dev, root: kernel::locate(None, &root.join(inside), true).ok()?, point })
        };
        Ok(text.split(|byte| *byte == b'\n').filter_map(mount).collect())
    }

    fn by_handle(&self, watch: &Listed, opened: Vec<Opened>) -> Option<Place> {
        let mut nameless = None;
        for file in opened.into_iter().filter(|file| file.inode.1 == watch.ino) {
            if file.links == 0 {
                return self.removed(file.inode, file.mode);
            }
            let mount = Some(self.mounts.get(file.mount)?.point.clone());
            if self.leads_to(&file.link, file.inode) {
                let path = file.link.into_os_string().into_vec();
                return Some(Place::Path { path, mount, mode: file.mode });
            }
            // A file whose name the kernel has forgotten, or one outside of what a bind mount shows.
            nameless.get_or_insert((file.inode, file.mode, mount));
        }
        let (inode, mode, mount) = nameless?;
        // A name is better than a handle, which another file system does not know.
        let mut named = [None];
        self.by_name(std::slice::from_ref(&Listed { dev: inode.0, ..watch.clone() }), &mut named);
        let path = match named {
            [Some(Place::Path { path, .. })] => path,
            _ => Vec::new(),
        };
        Some(Place::Path { path, mount, mode })
    }

    fn leads_to(&self, path: &Path, wanted: Inode) -> bool {
        let same =
            |path: &Path| fs::symlink_metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == wanted);
        let inside = path.strip_prefix("/").unwrap_or(path);
        path.is_absolute()
            && (same(path) || self.tasks.first().is_some_and(|task| same(&below(task, "root").join(inside))))
    }

    /// All open file descriptions that the tree has, which are numbered from 1.
    fn handles(&self) -> impl Iterator<Item = HandleInfo> {
        (1..).map_while(|id| self.host.handle(id))
    }

    fn removed(&self, wanted: Inode, mode: u32) -> Option<Place> {
        let found = self.handles().find(|handle| (handle.dev, handle.ino) == wanted)?;
        Some(Place::Removed { handle: found.id, mode })
    }

    /// Looks at all paths that descriptors, working directories and arguments of the tasks name, and at their parents.
    fn by_name(&self, listed: &[Listed], places: &mut [Option<Place>]) {
        let wanted = wanted(listed, places);
        let mut note = |path: &Path| {
            let Some(root) = self.tasks.first().map(|task| below(task, "root")) else { return };
            for path in path.ancestors().filter(|path| path.is_absolute()) {
                let inside = path.strip_prefix("/").unwrap_or(path);
                let found = fs::symlink_metadata(root.join(inside)).or_else(|_| fs::symlink_metadata(path));
                let Ok(found) = found else { continue };
                record(&wanted, places, path, &found);
            }
        };
        for handle in self.handles().filter(|handle| handle.link.starts_with('/')) {
            note(Path::new(handle.link.as_str()));
        }
        for task in &self.tasks {
            let cwd = fs::read_link(below(task, "cwd")).unwrap_or_default();
            note(&cwd);
            let arguments = fs::read(below(task, "cmdline")).unwrap_or_default();
            for argument in arguments.split(|byte| *byte == 0).filter(|argument| !argument.is_empty()) {
                // `--file=PATH` names a path, too.
                for text in argument.splitn(2, |byte| *byte == b'=') {
                    note(&cwd.join(OsStr::from_bytes(text)));
                }
            }
        }
    }

    /// Looks below the directories that the user names. Unlike all else here, this opens directories.
    fn scan(&self, listed: &[Listed], places: &mut [Option<Place>]) {
        let Some(top) = self.host.option(SCAN_PATH) else { return };
        let wanted = wanted(listed, places);
        let mut missing = wanted.len();
        let mut left = SCAN_LIMIT;
        let mut todo: Vec<PathBuf> = top.lines().map(PathBuf::from).collect();
        while let Some(directory) = todo.pop() {
            let Ok(entries) = fs::read_dir(&directory) else { continue };
            for entry in entries.flatten() {
                let Ok(found) = entry.metadata() else { continue };
                if missing == 0 || left == 0 {
                    return;
                }
                left -= 1;
                missing -= usize::from(record(&wanted, places, &entry.path(), &found));
                if found.is_dir() {
                    todo.push(entry.path());
                }
            }
        }
    }
}

fn wanted(listed: &[Listed], places: &[Option<Place>]) -> HashMap<Inode, usize> {
    let open = listed.iter().zip(places).enumerate().filter(|(_, (_, place))| place.is_none());
    open.map(|(index, (watch, _))| ((watch.dev, watch.ino), index)).collect()
}

/// Whether this is a file that was wanted and not found before.
fn record(
    wanted: &HashMap<Inode, usize>,
    places: &mut [Option<Place>],
    path: &Path,
    found: &fs::Metadata,
) -> bool {
    let Some(place) = wanted.get(&(found.dev(), found.ino())).and_then(|&index| places.get_mut(index)) else {
        return false;
    };
    let mode = found.mode() & libc::S_IFMT;
    let new = place.is_none();
    *place = Some(Place::Path { path: path.as_os_str().as_bytes().to_vec(), mount: None, mode });
    new
}

fn unknown(watch: &Listed) -> HookError {
    let (major, minor) = (libc::major(watch.dev), libc::minor(watch.dev));
    HookError::unsupported(
        format!("inotify: watch {} on inode {} of device {major}:{minor}", watch.number, watch.ino),
        "no path leads to the watched file, and no task has it open",
        "name a directory that it is in with --irmap-scan-path",
    )
}

/// `\040` and the like of mountinfo.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, after)) = rest.split_first() {
        let octal = || std::str::from_utf8(after.get(..3)?).ok().and_then(|t| u8::from_str_radix(t, 8).ok());
        match (first == b'\\').then(octal).flatten() {
            Some(byte) => {
                plain.push(byte);
                rest = &after[3..];
            }
            None => {
                plain.push(first);
                rest = after;
            }
        }
    }
    plain
}

/// For restore: a file by its handle, on the file system mounted at `mount`.
pub fn reopen(kind: i32, data: &[u8], mount: &[u8]) -> io::Result<OwnedFd> {
    let here = kernel::locate(None, Path::new("."), true)?;
    let there = kernel::locate(None, Path::new(OsStr::from_bytes(mount)), true)?;
    kernel::change_directory(there.as_fd())?;
    let opened = kernel::open_handle(kind, data);
    kernel::change_directory(here.as_fd())?;
    opened
}

/// The kind of file behind a descriptor (`S_IFMT`).
pub fn kind_of(file: BorrowedFd<'_>) -> io::Result<u32> {
    kernel::stat(file).map(|stat| stat.st_mode & libc::S_IFMT)
}

#[cfg(test)]
#[test]
fn mount_points_are_unescaped() {
    assert_eq!(unescape(br"/a\040b\134c\"), b"/a b\\c\\");
    assert_eq!(unescape(b""), b"");
}
