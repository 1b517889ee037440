//! Files that the image has because they have no name, or no longer the one by which they were opened.
//!
//! The root task makes them before it forks anybody, and holds each with O_PATH; whoever needs one opens it through
//! /proc/self/fd. So that /proc shows the old name with " (deleted)" behind it, the file is made under that name, which is
//! taken away at once. In between the guardian does not kill the root task, whatever happens (`Shared::names`): no name is
//! ever left behind. Directories that are gone are made for the moment, too.

use super::{
    error::{RestoreError, Result},
    namespaces::Spaces,
    shared::Shared,
    sys,
    world::World,
};
use crate::{
    files::names::parent,
    image::{
        GHOST_PLUGIN, Image, ghost_blob,
        records::{GhostFile, PathRef},
    },
};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, open},
    sys::{
        stat::{FileStat, Mode, UtimensatFlags, fchmodat, fstat, stat, utimensat},
        time::TimeSpec,
    },
    unistd::{Gid, Uid, UnlinkatFlags, fchownat, linkat, mkdir, symlinkat, unlinkat},
};
use std::{
    collections::BTreeMap,
    ffi::{CString, OsStr},
    fs::File,
    io::{Seek, SeekFrom, Write},
    os::{
        fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

/// Bytes copied at once.
const PIECE: usize = 1 << 20;
/// How many other names are tried where the old one is in use again.
const ATTEMPTS: usize = 1000;

/// Descriptors of our own that ghosts need: one for each name.
pub fn count(image: &Image) -> i32 {
    let names = image.ghosts.values().map(|ghost| ghost.paths.len().max(1));
    names.sum::<usize>().try_into().unwrap_or(i32::MAX / 2)
}

/// The files, held.
#[derive(Debug, Default)]
pub struct Ghosts {
    /// By id: O_PATH descriptors, each with the name that it shows.
    holders: BTreeMap<u32, Vec<(Vec<u8>, RawFd)>>,
}

impl Ghosts {
    /// Makes all files of the image that have no names.
    pub fn make(world: &World) -> Result<Self> {
        let image = world.plans.image;
        let mut ghosts = Self::default();
        if image.ghosts.is_empty() {
            return Ok(ghosts);
        }
        let mut named = Vec::with_capacity(image.ghosts.len());
        {
            let mut names = Made::new(world.shared, world.spaces.get());
            let (directories, others): (Vec<_>, Vec<_>) =
                image.ghosts.values().partition(|ghost| kind(ghost) == libc::S_IFDIR);
            // From the top, so that a removed directory is found again by those that were in it.
            let mut directories: Vec<(&Vec<u8>, &GhostFile)> =
                directories.into_iter().flat_map(|ghost| ghost.paths.first().zip(Some(ghost))).collect();
            directories.sort_by_key(|(path, _)| path.len());
            let in_order = directories.into_iter().map(|(_, ghost)| ghost).chain(others);
            for ghost in in_order {
                let opened = names.make(ghost).map_err(|errno| failed(ghost, "make", errno))?;
                let moved = opened.shown.into_iter().map(|(path, fd)| {
                    let moved = sys::duplicate_above(fd.as_raw_fd(), world.plans.descriptors.service.first);
                    Ok((path, moved?.into_raw_fd()))
                });
                let moved: std::io::Result<Vec<_>> = moved.collect();
                let held = moved.map_err(RestoreError::system("move a descriptor out of the way"))?;
                ghosts.holders.insert(ghost.id, held);
                named.push((ghost, opened.writable));
            }
        }
        for (ghost, writable) in named.into_iter().filter(|(ghost, _)| ghost.link.is_empty()) {
            if let Some(file) = writable {
                fill(world, ghost, file)?;
            }
            let Some(&(_, holder)) = ghosts.holders.get(&ghost.id).and_then(|held| held.first()) else {
                continue;
            };
            settle(ghost, holder)
                .map_err(|errno| failed(ghost, "set owner, mode, attributes and times of", errno))?;
        }
        Ok(ghosts)
    }

    /// The descriptor that holds a path.
    pub fn holder(&self, path: &PathRef) -> Option<RawFd> {
        let held = self.holders.get(&path.ghost)?;
        let same = held.iter().find(|(name, _)| *name == path.path);
        same.or(held.first()).map(|(_, fd)| *fd)
    }

    /// All descriptors.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.holders.values().flatten().map(|(_, fd)| *fd)
    }
}

/// Hard links that were made for the image, to be taken away when the tree runs: directories, as they are below `root`
/// (the root directory of the root task), and names in them.
pub fn links(image: &Image, root: &Path) -> Vec<(OwnedFd, PathBuf)> {
    let links = image.ghosts.values().filter(|ghost| !ghost.link.is_empty());
    let open_parent = |ghost: &GhostFile| {
        let mut place = root.as_os_str().to_owned();
        place.push(OsStr::from_bytes(parent(&ghost.link)));
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(Path::new(&place), flags, Mode::empty()).ok()?;
        let name = Path::new(OsStr::from_bytes(&ghost.link)).file_name()?;
        Some((directory, PathBuf::from(name)))
    };
    links.filter_map(open_parent).collect()
}

fn kind(ghost: &GhostFile) -> u32 {
    ghost.mode & libc::S_IFMT
}

fn failed(ghost: &GhostFile, operation: &str, errno: Errno) -> RestoreError {
    let name = ghost.paths.first().unwrap_or(&ghost.nameless);
    let (name, link) = (String::from_utf8_lossy(name), String::from_utf8_lossy(&ghost.link));
    let linked = if ghost.link.is_empty() { String::new() } else { format!(" (from its link {link})") };
    RestoreError::system(format!("{operation} the unlinked file {name}{linked}"))(errno.into())
}

/// A file that was just made.
struct Opened {
    /// O_PATH descriptors with the names that they show.
    shown: Vec<(Vec<u8>, OwnedFd)>,
    /// For its contents.
    writable: Option<File>,
}

/// Names that exist for the moment. When this is dropped, they are gone.
struct Made<'a> {
    shared: Shared,
    spaces: Option<&'a Spaces>,
    files: Vec<PathBuf>,
    directories: Vec<PathBuf>,
    /// Directories that existed before, with their times.
    touched: BTreeMap<PathBuf, FileStat>,
}

impl<'a> Made<'a> {
    fn new(shared: Shared, spaces: Option<&'a Spaces>) -> Self {
        shared.hold();
        Self { shared, spaces, files: Vec::new(), directories: Vec::new(), touched: BTreeMap::new() }
    }

    /// Where a name of a ghost is for the root task.
    fn place(&self, ghost: &GhostFile, path: &[u8]) -> nix::Result<PathBuf> {
        let path = Path::new(OsStr::from_bytes(path));
        match self.spaces {
            Some(spaces) => spaces.place(ghost.space, path, 0).ok_or(Errno::ENOENT),
            None => Ok(path.to_owned()),
        }
    }

    fn make(&mut self, ghost: &GhostFile) -> nix::Result<Opened> {
        if !ghost.nameless.is_empty() {
            let directory = self.place(ghost, &ghost.nameless)?;
            self.make_directories(&directory)?;
            let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
            let file = open(&directory, flags, Mode::empty())?;
            let held = reopen(&file, OFlag::O_PATH)?;
            let name = ghost.paths.first().unwrap_or(&ghost.nameless).clone();
            return Ok(Opened { shown: vec![(name, held)], writable: Some(file.into()) });
        }
        let mut opened = Opened { shown: Vec::with_capacity(ghost.paths.len()), writable: None };
        for path in &ghost.paths {
            let wanted = self.place(ghost, path)?;
            let directory = self.place(ghost, parent(path))?;
            self.make_directories(&directory)?;
            let place = self.name(ghost, &wanted, &directory, &mut opened)?;
            let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            opened.shown.push((path.clone(), open(&place, flags, Mode::empty())?));
        }
        self.remove_files();
        Ok(opened)
    }

    /// Gives a file the name that it had, or one beside it if that is in use again.
    fn name(
        &mut self,
        ghost: &GhostFile,
        wanted: &Path,
        directory: &Path,
        opened: &mut Opened,
    ) -> nix::Result<PathBuf> {
        let others = (0..ATTEMPTS).map(|n| directory.join(format!(".stasis-ghost.{}.{n}", ghost.id)));
        for place in std::iter::once(wanted.to_owned()).chain(others) {
            match create(ghost, &place, opened) {
                Ok(()) if kind(ghost) == libc::S_IFDIR && ghost.link.is_empty() => {
                    self.directories.push(place.clone());
                    return Ok(place);
                }
                Ok(()) => {
                    self.files.push(place.clone());
                    return Ok(place);
                }
                Err(Errno::EEXIST) => {}
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::EEXIST)
    }

    /// Makes a directory and what is missing above it, and notes the times of the first that exists.
    fn make_directories(&mut self, directory: &Path) -> nix::Result<()> {
        let missing: Vec<&Path> = directory.ancestors().take_while(|path| stat(*path).is_err()).collect();
        let existing = directory.ancestors().nth(missing.len()).unwrap_or(Path::new("/"));
        if !self.touched.contains_key(existing) && !self.directories.iter().any(|made| made == existing) {
            self.touched.insert(existing.to_owned(), stat(existing)?);
        }
        for path in missing.into_iter().rev() {
            mkdir(path, Mode::S_IRWXU)?;
            self.directories.push(path.to_owned());
        }
        Ok(())
    }

    fn remove_files(&mut self) {
        for file in self.files.drain(..).rev() {
            let _ = unlinkat(AT_FDCWD, &file, UnlinkatFlags::NoRemoveDir);
        }
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        self.remove_files();
        for directory in self.directories.drain(..).rev() {
            let _ = unlinkat(AT_FDCWD, &directory, UnlinkatFlags::RemoveDir);
        }
        for (directory, before) in &self.touched {
            // Refused for a directory of a user whom this user namespace does not know: it keeps the time of now.
            let _ = set_times(
                directory,
                times(before.st_atime, before.st_atime_nsec),
                times(before.st_mtime, before.st_mtime_nsec),
            );
        }
        self.shared.let_go();
    }
}

fn times(seconds: i64, nanoseconds: i64) -> TimeSpec {
    TimeSpec::new(seconds, nanoseconds)
}

fn set_times(path: &Path, accessed: TimeSpec, modified: TimeSpec) -> nix::Result<()> {
    utimensat(AT_FDCWD, path, &accessed, &modified, UtimensatFlags::FollowSymlink)
}

/// Makes the file, or one more name of it.
fn create(ghost: &GhostFile, place: &Path, opened: &mut Opened) -> nix::Result<()> {
    if let Some((_, first)) = opened.shown.first() {
        return link(first, place);
    }
    if !ghost.link.is_empty() {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        return link(&open(Path::new(OsStr::from_bytes(&ghost.link)), flags, Mode::empty())?, place);
    }
    match kind(ghost) {
        libc::S_IFDIR => mkdir(place, Mode::S_IRWXU),
        libc::S_IFLNK => symlinkat(OsStr::from_bytes(&ghost.target), AT_FDCWD, place),
        _ => {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_CLOEXEC;
            opened.writable = Some(open(place, flags, Mode::S_IRUSR | Mode::S_IWUSR)?.into());
            Ok(())
        }
    }
}

fn link(file: &OwnedFd, place: &Path) -> nix::Result<()> {
    let source = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(AT_FDCWD, source.as_str(), AT_FDCWD, place, AtFlags::AT_SYMLINK_FOLLOW)
}

fn reopen(file: &OwnedFd, flags: OFlag) -> nix::Result<OwnedFd> {
    open(format!("/proc/self/fd/{}", file.as_raw_fd()).as_str(), flags | OFlag::O_CLOEXEC, Mode::empty())
}

/// Puts the contents in.
fn fill(world: &World, ghost: &GhostFile, mut file: File) -> Result<()> {
    let failed = |error: std::io::Error| {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        failed(ghost, "write the contents of", errno)
    };
    file.set_len(ghost.size).map_err(failed)?;
    let Ok(mut blobs) = world.blobs.try_borrow_mut() else { return Err(failed(Errno::EBUSY.into())) };
    let (name, mut at) = (ghost_blob(ghost.id), 0);
    let mut buffer = vec![0; PIECE];
    for extent in &ghost.extents {
        file.seek(SeekFrom::Start(extent.offset)).map_err(failed)?;
        let mut left = extent.length;
        while left > 0 {
            let room = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let n = blobs.read_at(GHOST_PLUGIN, &name, at, &mut buffer[..room])?;
            if n == 0 {
                return Err(failed(Errno::ENODATA.into()));
            }
            file.write_all(&buffer[..n]).map_err(failed)?;
            at += n as u64;
            left -= n as u64;
        }
    }
    Ok(())
}

/// Owner, mode, attributes and times, in this order: a new owner takes bits and capabilities away, and everything sets times.
fn settle(ghost: &GhostFile, holder: RawFd) -> nix::Result<()> {
    let path = format!("/proc/self/fd/{holder}");
    let path = Path::new(&path);
    // SAFETY: holders stay open as long as this program runs in the task.
    let held = unsafe { std::os::fd::BorrowedFd::borrow_raw(holder) };
    let now = fstat(held)?;
    if (now.st_uid, now.st_gid) != (ghost.uid, ghost.gid) {
        let (uid, gid) = (Uid::from_raw(ghost.uid), Gid::from_raw(ghost.gid));
        fchownat(held, "", Some(uid), Some(gid), AtFlags::AT_EMPTY_PATH)?;
    }
    if kind(ghost) != libc::S_IFLNK {
        let mode = Mode::from_bits_truncate(ghost.mode & 0o7777);
        fchmodat(AT_FDCWD, path, mode, nix::sys::stat::FchmodatFlags::FollowSymlink)?;
    }
    let c_path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
    for attribute in &ghost.attributes {
        let name = CString::new(attribute.name.clone()).map_err(|_| Errno::EINVAL)?;
        let value = &attribute.value;
        // SAFETY: path and name are NUL-terminated, the value has the length that is given.
        Errno::result(unsafe {
            libc::setxattr(c_path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0)
        })?;
    }
    set_times(
        path,
        times(ghost.accessed_s, ghost.accessed_ns.into()),
        times(ghost.modified_s, ghost.modified_ns.into()),
    )
}
