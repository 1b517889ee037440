//! By which name a path-backed file is found again on restore, and what becomes of one that has lost its name.
//!
//! The link in /proc shows the name by which a file was opened. If it still leads to that file, the image keeps the name
//! alone. Otherwise the file is a *ghost*: its contents go into the image, or, if it has other names, a hard link made
//! for the image. Everything that refers to a ghost (descriptor, mapping, executable, directory) does so by its number.

use super::identity::{build_id, head_unnoticed};
use crate::{
    image::records::PathRef,
    proc::{ProcDir, ProcError},
    tree::IdTranslation,
};
use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::stat::{FileStat, lstat},
};
use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

/// What the kernel appends to the name of an unlinked file (fs/d_path.c).
const DELETED: &[u8] = b" (deleted)";

/// A file that has lost its name, to be written into the image.
#[derive(Debug)]
pub struct Ghost {
    /// Number in the image, from 1.
    pub id: u32,
    /// Its names as they were, without doubles; none if it never had one.
    pub paths: Vec<Vec<u8>>,
    /// The directory in which it lives, if it never had a name.
    pub nameless: Vec<u8>,
    /// Its inode.
    pub stat: FileStat,
    /// Owner and group in the user namespace of the tree.
    pub owner: (u32, u32),
    /// A magic link of /proc that leads to it as long as the tree is frozen.
    pub source: PathBuf,
    /// The mount namespace of its names, as in [`Space`]; 0 is that of the root task.
    pub space: u32,
}

impl Ghost {
    /// It has other names.
    pub fn is_linked(&self) -> bool {
        self.stat.st_nlink > 0
    }
}

/// Why a file cannot be found again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Covered by a mount, or in a mount that the tree cannot see.
    #[error("is not what its path leads to (a mount may cover it, or it is outside of the tree's mounts)")]
    Elsewhere,
    /// Unlinked, but with other names.
    #[error("was unlinked under this name and has others")]
    Linked,
    /// Too much to put into the image unasked.
    #[error("is deleted and has {size} bytes, which is more than the limit of {limit} bytes")]
    Large {
        /// Bytes on disk.
        size: u64,
        /// What is allowed.
        limit: u64,
    },
    /// No kind of file that can be made again.
    #[error("is deleted and neither a regular file nor a directory or symbolic link")]
    Kind,
    /// Nobody in the tree's user namespace could own it.
    #[error(
        "is deleted and belongs to user {0} or group {1}, who have no number in the tree's user namespace"
    )]
    Owner(u32, u32),
    /// A file of a thread, or of a process whose number another one has now.
    #[error("is a file of {0} of the tree, which a restore has not made yet when it opens files")]
    Thread(&'static str),
    /// Its directory is gone, so no link can be made.
    #[error("was unlinked under this name and has others, but no link can be made beside it: {0}")]
    NoPlace(Errno),
}

impl Refusal {
    /// What the user can do.
    pub fn remedy(&self) -> String {
        match self {
            Self::Elsewhere => "make it reachable by its path".into(),
            Self::Linked => "--link-remap makes a hard link beside it, for the restore".into(),
            Self::Large { size, .. } => format!("--ghost-limit {size} takes it into the image"),
            Self::Kind | Self::Owner(..) | Self::Thread(_) => "let the program close it".into(),
            Self::NoPlace(_) => "make its directory again, writable".into(),
        }
    }
}

/// What the user allows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Allowed {
    /// Largest deleted file that goes into the image, in bytes on disk.
    pub ghost_limit: u64,
    /// Whether hard links may be made for files that are unlinked under one name.
    pub link_remap: bool,
}

/// The tree's /proc.
#[derive(Debug, Clone, Default)]
pub struct Processes {
    /// Its device, if the numbers in it are those of the image.
    pub device: Option<u64>,
    /// The processes of the tree, by pid of the image.
    pub pids: HashSet<i32>,
}

/// A mount namespace of the tree other than that of its root task.
#[derive(Debug, Clone)]
pub struct Space {
    /// Number of the namespace in the image.
    pub id: u32,
    /// Processes in it, as stasis sees them.
    pub members: HashSet<i32>,
    /// What precedes its paths where stasis is.
    base: PathBuf,
}

impl Space {
    /// The namespace that `member` is in.
    pub fn new(id: u32, member: &ProcDir, members: HashSet<i32>) -> Result<Self, ProcError> {
        Ok(Self { id, members, base: base(member)? })
    }
}

/// What leads to the root of the mounts that a task sees, also from below a root directory of its own: `..` stops only at one's
/// own root (path_resolution(7)).
fn base(proc: &ProcDir) -> Result<PathBuf, ProcError> {
    let root = proc.link("root")?;
    let depth = Path::new(OsStr::from_bytes(&root)).components().count().saturating_sub(1);
    Ok(format!("/proc/{}/root{}", proc.pid(), "/..".repeat(depth)).into())
}

/// Names of the files of a tree.
#[derive(Debug, Default)]
pub struct Names {
    allowed: Allowed,
    /// What precedes the root task's paths where stasis is.
    base: PathBuf,
    spaces: Vec<Space>,
    uids: IdTranslation,
    gids: IdTranslation,
    processes: Processes,
    /// Files without their names.
    pub ghosts: Vec<Ghost>,
    by_inode: HashMap<(u64, u64), usize>,
    build_ids: HashMap<(u64, u64), Vec<u8>>,
    heads: HashMap<(u64, u64), Option<u32>>,
}

impl Names {
    /// For a tree whose root is `root`. `foreign_mounts`, `foreign_users`: it has such namespaces of its own.
    pub fn new(
        allowed: Allowed,
        root: &ProcDir,
        foreign_mounts: bool,
        foreign_users: bool,
    ) -> Result<Self, ProcError> {
        let base = if foreign_mounts { base(root)? } else { PathBuf::new() };
        let ids = |file| match foreign_users {
            true => IdTranslation::read(root, file),
            false => Ok(IdTranslation::default()),
        };
        let (uids, gids) = (ids("uid_map")?, ids("gid_map")?);
        Ok(Self { allowed, base, uids, gids, ..Self::default() })
    }

    /// Knows the files of processes, too. `foreign_pids`: the tree has a pid namespace of its own.
    #[must_use]
    pub fn with_processes(mut self, pids: HashSet<i32>, foreign_pids: bool) -> Self {
        let device = |path: &Path| lstat(path).ok().map(|stat| stat.st_dev);
        let (own, theirs) = (device(Path::new("/proc")), device(&self.outside(b"/proc")));
        // The machine's /proc shows a tree with numbers of its own by other numbers.
        self.processes = Processes { device: theirs.filter(|_| !foreign_pids || own != theirs), pids };
        self
    }

    /// Knows the mounts of other namespaces, too.
    #[must_use]
    pub fn with_spaces(self, spaces: Vec<Space>) -> Self {
        Self { spaces, ..self }
    }

    /// The namespaces in which a task's file may have its name, and what precedes its paths: its own first.
    fn spaces_of(&self, proc: &ProcDir) -> impl Iterator<Item = (u32, &Path)> {
        let (own, others): (Vec<&Space>, Vec<&Space>) =
            self.spaces.iter().partition(|space| space.members.contains(&proc.pid()));
        fn pair(space: &Space) -> (u32, &Path) {
            (space.id, &space.base)
        }
        own.into_iter().map(pair).chain([(0, self.base.as_path())]).chain(others.into_iter().map(pair))
    }

    /// For a file below /proc/PID: its path, and the process, if that is of the tree or dead.
    fn of_process(&self, link: &[u8], stat: &FileStat) -> Result<Option<(Vec<u8>, i32)>, Refusal> {
        if self.processes.device != Some(stat.st_dev) {
            return Ok(None);
        }
        let leads = self.leads(link, stat);
        let path = if leads { link } else { link.strip_suffix(DELETED).unwrap_or(link) };
        let mut parts = std::str::from_utf8(path).unwrap_or_default().split('/').skip(2);
        let Some(pid) = parts.next().and_then(|part| part.parse::<i32>().ok()) else { return Ok(None) };
        let ours = self.processes.pids.contains(&pid);
        let thread = parts.next() == Some("task") && parts.next().is_some_and(|tid| tid.parse() != Ok(pid));
        match (leads, ours) {
            _ if thread && (ours || !leads) => Err(Refusal::Thread("a thread")),
            (false, true) => Err(Refusal::Thread("a dead process with the number of another")),
            (true, false) => Ok(None),
            (true, true) | (false, false) => Ok(Some((path.to_vec(), pid))),
        }
    }

    /// How the tree's user namespace calls a user.
    pub fn uid_inside(&self, uid: u32) -> u32 {
        self.uids.inside(uid)
    }

    /// A path of the tree as stasis reaches it.
    pub fn outside(&self, path: &[u8]) -> PathBuf {
        joined(&self.base, path)
    }

    /// Whether a path leads to an inode, by the mounts of the root task.
    fn leads(&self, path: &[u8], stat: &FileStat) -> bool {
        leads(&self.base, path, stat)
    }

    /// The reference to a file of a task: `file` is a magic link below /proc/PID, `link` its text, `stat` its inode.
    pub fn refer(
        &mut self,
        proc: &ProcDir,
        file: &str,
        link: &[u8],
        stat: &FileStat,
    ) -> Result<PathRef, Refusal> {
        let mut path = PathRef {
            path: link.to_vec(),
            dev: stat.st_dev,
            ino: stat.st_ino,
            mode: stat.st_mode,
            size: stat.st_size as u64,
            ..PathRef::default()
        };
        if let Some((place, process)) = self.of_process(link, stat)? {
            (path.path, path.process) = (place, process);
            return Ok(path);
        }
        let shown_deleted = link.strip_suffix(DELETED);
        let leading = |(_, base): &(u32, &Path)| stat.st_nlink > 0 && leads(base, link, stat);
        if let Some((space, _)) = self.spaces_of(proc).find(leading) {
            path.space = space;
            return Ok(path);
        }
        let Some(name) = shown_deleted.or((stat.st_nlink == 0).then_some(link)) else {
            return Err(Refusal::Elsewhere);
        };
        path.path = name.to_vec();
        path.deleted = true;
        path.ghost = self.ghost(proc, file, name, stat)?;
        Ok(path)
    }

    /// As [`refer`](Self::refer), for a description that is only read: with the sum of its first bytes. `open` gives a duplicate.
    pub fn refer_read(
        &mut self,
        proc: &ProcDir,
        file: &str,
        link: &[u8],
        stat: &FileStat,
        open: impl FnOnce() -> Result<OwnedFd, Errno>,
    ) -> Result<PathRef, Refusal> {
        let mut path = self.refer(proc, file, link, stat)?;
        let regular = stat.st_mode & libc::S_IFMT == libc::S_IFREG && stat.st_size > 0;
        if regular && path.ghost == 0 && path.process == 0 {
            let read = || head_unnoticed(open().ok()?.as_fd(), path.size).ok();
            path.head = *self.heads.entry((stat.st_dev, stat.st_ino)).or_insert_with(read);
        }
        Ok(path)
    }

    /// As [`refer`](Self::refer), with the build id of an executable.
    pub fn refer_built(
        &mut self,
        proc: &ProcDir,
        file: &str,
        link: &[u8],
        stat: &FileStat,
    ) -> Result<PathRef, Refusal> {
        let mut path = self.refer(proc, file, link, stat)?;
        if path.ghost == 0 && stat.st_mode & libc::S_IFMT == libc::S_IFREG {
            let read = || proc.open_file(file, OFlag::O_RDONLY | OFlag::O_NONBLOCK).map(build_id);
            let known = self.build_ids.entry((stat.st_dev, stat.st_ino));
            path.build_id = known.or_insert_with(|| read().unwrap_or_default()).clone();
        }
        Ok(path)
    }

    fn ghost(&mut self, proc: &ProcDir, file: &str, name: &[u8], stat: &FileStat) -> Result<u32, Refusal> {
        let key = (stat.st_dev, stat.st_ino);
        let index = match self.by_inode.get(&key) {
            Some(&index) => index,
            None => {
                let owner = self.check(stat)?;
                let source = format!("/proc/{}/{file}", proc.pid()).into();
                let directory = parent(name);
                let same = |(_, base): &(u32, &Path)| {
                    lstat(&joined(base, directory)).is_ok_and(|found| found.st_dev == stat.st_dev)
                };
                let space = self.spaces_of(proc).find(same).map_or(0, |(space, _)| space);
                if space != 0 && stat.st_nlink > 0 {
                    // The restore takes links away by the mounts of the root task.
                    return Err(Refusal::Elsewhere);
                }
                let id = self.ghosts.len() as u32 + 1;
                let (paths, nameless) = (Vec::new(), Vec::new());
                self.ghosts.push(Ghost { id, paths, nameless, stat: *stat, owner, source, space });
                self.by_inode.insert(key, self.ghosts.len() - 1);
                self.ghosts.len() - 1
            }
        };
        let directory = parent(name);
        if stat.st_nlink > 0 {
            lstat(&self.outside(directory)).map_err(Refusal::NoPlace)?;
        }
        let ghost = &mut self.ghosts[index];
        // d_tmpfile() in fs/dcache.c.
        if stat.st_nlink == 0 && name.ends_with(format!("/#{}", stat.st_ino).as_bytes()) {
            ghost.nameless = directory.to_vec();
        } else if !ghost.paths.iter().any(|known| known == name) {
            ghost.paths.push(name.to_vec());
        }
        Ok(ghost.id)
    }

    /// Whether a ghost may go into the image; gives owner and group as the tree sees them.
    fn check(&self, stat: &FileStat) -> Result<(u32, u32), Refusal> {
        if stat.st_nlink > 0 {
            return if self.allowed.link_remap { Ok((0, 0)) } else { Err(Refusal::Linked) };
        }
        let size = (stat.st_size as u64).min(stat.st_blocks as u64 * 512);
        let limit = self.allowed.ghost_limit;
        match stat.st_mode & libc::S_IFMT {
            libc::S_IFREG if size > limit => return Err(Refusal::Large { size, limit }),
            libc::S_IFREG | libc::S_IFDIR | libc::S_IFLNK => {}
            _ => return Err(Refusal::Kind),
        }
        let inside = self.uids.inside_if_mapped(stat.st_uid).zip(self.gids.inside_if_mapped(stat.st_gid));
        inside.ok_or(Refusal::Owner(stat.st_uid, stat.st_gid))
    }
}

fn joined(base: &Path, path: &[u8]) -> PathBuf {
    let mut place = base.as_os_str().to_owned();
    place.push(OsStr::from_bytes(path));
    place.into()
}

fn leads(base: &Path, path: &[u8], stat: &FileStat) -> bool {
    let found = lstat(&joined(base, path));
    found.is_ok_and(|found| (found.st_dev, found.st_ino) == (stat.st_dev, stat.st_ino))
}

/// The directory part of an absolute path.
pub fn parent(path: &[u8]) -> &[u8] {
    let parent = Path::new(OsStr::from_bytes(path)).parent();
    parent.map_or(b"/", |parent| parent.as_os_str().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::fd::AsRawFd};

    fn names(link_remap: bool) -> Names {
        let allowed = Allowed { ghost_limit: 8192, link_remap };
        Names::new(allowed, &ProcDir::open_self().unwrap(), false, false).unwrap()
    }

    fn refer(names: &mut Names, file: &fs::File) -> Result<PathRef, Refusal> {
        let proc = ProcDir::open_self().unwrap();
        let link = format!("fd/{}", file.as_raw_fd());
        let (text, stat) = (proc.link(&link).unwrap(), proc.stat(&link).unwrap());
        names.refer(&proc, &link, &text, &stat)
    }

    #[test]
    fn names_that_lead_elsewhere_are_ghosts_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        let make = |name: &str, size: usize| {
            fs::write(dir.join(name), vec![1; size]).unwrap();
            fs::File::open(dir.join(name)).unwrap()
        };
        let path = |name: &str| dir.join(name).into_os_string().into_encoded_bytes();
        let mut names = names(false);
        // A name that looks as if it were deleted.
        let odd = make("odd (deleted)", 1);
        let found = refer(&mut names, &odd).unwrap();
        assert_eq!((found.path, found.ghost), (path("odd (deleted)"), 0));
        let (gone, again) = (make("gone", 5), fs::File::open(dir.join("gone")).unwrap());
        fs::remove_file(dir.join("gone")).unwrap();
        let found = refer(&mut names, &gone).unwrap();
        assert_eq!((found.path, found.ghost, found.deleted), (path("gone"), 1, true));
        assert_eq!(refer(&mut names, &again).unwrap().ghost, 1);
        assert_eq!(names.ghosts.len(), 1);
        let large = make("large", 10_000);
        fs::remove_file(dir.join("large")).unwrap();
        let refused = refer(&mut names, &large).unwrap_err();
        assert!(matches!(refused, Refusal::Large { limit: 8192, .. }), "{refused}");
        let linked = make("linked", 1);
        fs::hard_link(dir.join("linked"), dir.join("other")).unwrap();
        fs::remove_file(dir.join("linked")).unwrap();
        assert_eq!(refer(&mut names, &linked).unwrap_err(), Refusal::Linked);
        assert_eq!(refer(&mut self::names(true), &linked).unwrap().path, path("linked"));
        // Replaced by another one.
        let replaced = make("replaced", 1);
        fs::write(dir.join("new"), "new").unwrap();
        fs::rename(dir.join("new"), dir.join("replaced")).unwrap();
        assert_eq!(refer(&mut names, &replaced).unwrap().ghost, 2);
    }

    #[test]
    fn unlinked_names_keep_their_directory() {
        assert_eq!(parent(b"/a/b"), b"/a");
        assert_eq!(parent(b"/a"), b"/");
        assert_eq!(parent(b"/"), b"/");
    }
}
