//! The files of a tmpfs, as a stream: for each an entry, preceded by its length, then the bytes of its segments.

use crate::record::stasis::ns_mnt::v1::{Attribute, Entry, Segment};
use stasis_plugin_api::{HookError, Result, namespace::IdMap, prost::Message};
use std::{
    collections::HashMap,
    ffi::{CString, OsStr},
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{MetadataExt, OpenOptionsExt, lchown},
        },
    },
    path::{Path, PathBuf},
};

/// Longest entry that is accepted from an image: paths and attributes have limits of 4 KiB and 64 KiB each.
const LARGEST_ENTRY: u32 = 16 << 20;

/// `uid_map` and `gid_map` of the namespace's tasks.
pub(crate) struct Maps {
    pub uids: IdMap,
    pub gids: IdMap,
}

/// Name of the blob of a mount.
pub(crate) fn blob(namespace: u32, index: usize) -> String {
    format!("tmpfs/{namespace}/{index}")
}

/// Name of the blob of what a mount shows, if that was removed.
pub(crate) fn removed_blob(namespace: u32, index: usize) -> String {
    format!("removed/{namespace}/{index}")
}

/// A path by which a descriptor of this process is reached.
pub(crate) fn path_of(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// A root that is reached through a link in /proc is wanted itself, not the link.
fn below(base: &Path, relative: &Path) -> PathBuf {
    if !relative.as_os_str().is_empty() {
        base.join(relative)
    } else if fs::metadata(base).is_ok_and(|stat| stat.is_dir()) {
        base.join(".")
    } else {
        base.to_owned()
    }
}

/// Writes all that is below `tree`, which may be a single file. Parents come before their children.
pub(crate) fn save(tree: &OwnedFd, mountpoint: &str, maps: &Maps, out: &mut impl Write) -> Result<()> {
    let base = path_of(tree);
    let mut seen: HashMap<u64, PathBuf> = HashMap::new();
    let mut queue = vec![PathBuf::new()];
    while let Some(relative) = queue.pop() {
        let shown = Path::new(mountpoint).join(&relative);
        let failed = |error: io::Error| HookError::failed(format!("reading {}", shown.display()), error);
        let path = below(&base, &relative);
        let follow = relative.as_os_str().is_empty();
        let stat = if follow { fs::metadata(&path) } else { fs::symlink_metadata(&path) }.map_err(failed)?;
        let id = |map: &IdMap, id: u32| {
            map.inside(id).ok_or_else(|| {
                let why = format!("its owner {id} does not exist in the namespace");
                HookError::unsupported(shown.display().to_string(), why, "")
            })
        };
        let mut entry = Entry {
            path: relative.as_os_str().as_bytes().to_vec(),
            mode: stat.mode(),
            uid: id(&maps.uids, stat.uid())?,
            gid: id(&maps.gids, stat.gid())?,
            atime: stat.atime(),
            atime_nsec: stat.atime_nsec(),
            mtime: stat.mtime(),
            mtime_nsec: stat.mtime_nsec(),
            ..Entry::default()
        };
        let mut data = None;
        if let Some(first) = seen.get(&stat.ino()) {
            (entry.is_link, entry.link_to) = (true, first.as_os_str().as_bytes().to_vec());
        } else {
            if stat.nlink() > 1 && !stat.is_dir() {
                seen.insert(stat.ino(), relative.clone());
            }
            entry.attributes = attributes(&path, follow).map_err(failed)?;
            match stat.mode() & libc::S_IFMT {
                libc::S_IFDIR => {
                    for child in fs::read_dir(&path).map_err(failed)? {
                        queue.push(relative.join(child.map_err(failed)?.file_name()));
                    }
                }
                libc::S_IFLNK => {
                    entry.target = fs::read_link(&path).map_err(failed)?.into_os_string().as_bytes().to_vec()
                }
                libc::S_IFREG => {
                    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOATIME).open(&path);
                    let file = file.map_err(failed)?;
                    entry.size = stat.len();
                    entry.segments = segments(&file, stat.len()).map_err(failed)?;
                    data = Some(file);
                }
                _ => entry.rdev = stat.rdev(),
            }
        }
        out.write_all(&(entry.encoded_len() as u32).to_le_bytes())
            .and_then(|()| out.write_all(&entry.encode_to_vec()))
            .map_err(failed)?;
        if let Some(mut file) = data {
            for segment in &entry.segments {
                file.seek(SeekFrom::Start(segment.offset)).map_err(failed)?;
                let copied =
                    io::copy(&mut Read::by_ref(&mut file).take(segment.length), out).map_err(failed)?;
                if copied != segment.length {
                    return Err(HookError::invalid(format!("{} shrank while it was read", shown.display())));
                }
            }
        }
    }
    Ok(())
}

/// Where a file has data (lseek(2), SEEK_DATA).
fn segments(file: &File, size: u64) -> io::Result<Vec<Segment>> {
    let seek = |offset: u64, whence: i32| -> io::Result<Option<u64>> {
        // SAFETY: no pointers.
        match unsafe { libc::lseek(file.as_raw_fd(), offset as i64, whence) } {
            found @ 0.. => Ok(Some(found as u64)),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
                error => Err(error),
            },
        }
    };
    let mut segments = Vec::new();
    let mut at = 0;
    while at < size
        && let Some(start) = seek(at, libc::SEEK_DATA)?
    {
        let end = seek(start, libc::SEEK_HOLE)?.unwrap_or(size).min(size);
        segments.push(Segment { offset: start, length: end - start });
        at = end;
    }
    Ok(segments)
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

type ListXattr = unsafe extern "C" fn(*const libc::c_char, *mut libc::c_char, usize) -> isize;
type GetXattr =
    unsafe extern "C" fn(*const libc::c_char, *const libc::c_char, *mut libc::c_void, usize) -> isize;

fn attributes(path: &Path, follow: bool) -> io::Result<Vec<Attribute>> {
    let path = c_path(path)?;
    let (list, get) = match follow {
        true => (libc::listxattr as ListXattr, libc::getxattr as GetXattr),
        false => (libc::llistxattr as ListXattr, libc::lgetxattr as GetXattr),
    };
    let mut names = vec![0u8; 65_536];
    // SAFETY: writes at most the vector's length.
    let length = unsafe { list(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    if length < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::EOPNOTSUPP) { Ok(Vec::new()) } else { Err(error) };
    }
    let mut attributes = Vec::new();
    for name in names[..length as usize].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let c_name = CString::new(name)?;
        let mut value = vec![0u8; 65_536];
        // SAFETY: writes at most the vector's length.
        let length = unsafe { get(path.as_ptr(), c_name.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
        if length < 0 {
            return Err(io::Error::last_os_error());
        }
        value.truncate(length as usize);
        attributes.push(Attribute { name: name.to_vec(), value });
    }
    Ok(attributes)
}

/// A path of the image must stay below the root that it is joined to.
fn checked(path: &[u8]) -> Result<&Path> {
    let path = Path::new(OsStr::from_bytes(path));
    let plain = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    if plain {
        Ok(path)
    } else {
        Err(HookError::invalid(format!("the image has the path {}", path.display())))
    }
}

/// Makes the files again, below the empty directory `base`; or a single file at `base`.
pub(crate) fn load(base: &Path, mountpoint: &str, input: &mut impl Read) -> Result<()> {
    let mut directories = Vec::new();
    loop {
        let mut length = [0; 4];
        let failed =
            |error: io::Error| HookError::failed(format!("reading the files of {mountpoint}"), error);
        match input.read(&mut length[..1]).map_err(failed)? {
            0 => break,
            _ => input.read_exact(&mut length[1..]).map_err(failed)?,
        }
        let length = u32::from_le_bytes(length);
        if length > LARGEST_ENTRY {
            return Err(HookError::invalid(format!("the files of {mountpoint} in the image are malformed")));
        }
        let mut bytes = vec![0; length as usize];
        input.read_exact(&mut bytes).map_err(failed)?;
        let entry = Entry::decode(bytes.as_slice()).map_err(|error| {
            HookError::invalid(format!("the files of {mountpoint} in the image: {error}"))
        })?;
        let relative = checked(&entry.path)?;
        let path = below(base, relative);
        let shown = Path::new(mountpoint).join(relative);
        let failed = |error: io::Error| HookError::failed(format!("making {}", shown.display()), error);
        if entry.is_link {
            fs::hard_link(base.join(checked(&entry.link_to)?), &path).map_err(failed)?;
            continue;
        }
        make(&path, &entry, input).map_err(failed)?;
        match entry.mode & libc::S_IFMT {
            // Their times change, and their modes may forbid, as children are made.
            libc::S_IFDIR => directories.push((path, shown, entry)),
            _ => finish(&path, &entry).map_err(failed)?,
        }
    }
    for (path, shown, entry) in directories.iter().rev() {
        finish(path, entry)
            .map_err(|error| HookError::failed(format!("finishing {}", shown.display()), error))?;
    }
    Ok(())
}

fn make(path: &Path, entry: &Entry, input: &mut impl Read) -> io::Result<()> {
    match entry.mode & libc::S_IFMT {
        libc::S_IFDIR if entry.path.is_empty() => Ok(()),
        libc::S_IFDIR => fs::create_dir(path),
        libc::S_IFLNK => std::os::unix::fs::symlink(OsStr::from_bytes(&entry.target), path),
        libc::S_IFREG => {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
            file.set_len(entry.size)?;
            for segment in &entry.segments {
                file.seek(SeekFrom::Start(segment.offset))?;
                if io::copy(&mut input.by_ref().take(segment.length), &mut file)? != segment.length {
                    return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
                }
            }
            Ok(())
        }
        _ => {
            let path = c_path(path)?;
            // SAFETY: the path is NUL-terminated.
            match unsafe { libc::mknod(path.as_ptr(), entry.mode, entry.rdev) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        }
    }
}

/// Owner, mode, attributes, times: in this order, since each may undo what stands after it.
fn finish(path: &Path, entry: &Entry) -> io::Result<()> {
    lchown(path, Some(entry.uid), Some(entry.gid))?;
    let c_path = c_path(path)?;
    if entry.mode & libc::S_IFMT != libc::S_IFLNK {
        // SAFETY: the path is NUL-terminated.
        if unsafe { libc::chmod(c_path.as_ptr(), entry.mode & 0o7777) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    for Attribute { name, value } in &entry.attributes {
        let name = CString::new(name.as_slice())?;
        // SAFETY: both strings are NUL-terminated, and the value is read within its length.
        let result =
            unsafe { libc::lsetxattr(c_path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let times = [(entry.atime, entry.atime_nsec), (entry.mtime, entry.mtime_nsec)]
        .map(|(tv_sec, tv_nsec)| libc::timespec { tv_sec, tv_nsec });
    // SAFETY: a NUL-terminated path and two times.
    let result = unsafe {
        libc::utimensat(libc::AT_FDCWD, c_path.as_ptr(), times.as_ptr(), libc::AT_SYMLINK_NOFOLLOW)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_as_they_were() {
        let maps = Maps { uids: IdMap::parse("0 0 4294967295"), gids: IdMap::parse("0 0 4294967295") };
        let directory = std::env::temp_dir().join(format!("stasis-contents-{}", std::process::id()));
        let (from, to) = (directory.join("from"), directory.join("to"));
        fs::create_dir_all(from.join("d/e")).unwrap();
        fs::create_dir_all(&to).unwrap();
        fs::write(from.join("d/file"), b"hello").unwrap();
        fs::hard_link(from.join("d/file"), from.join("again")).unwrap();
        std::os::unix::fs::symlink("nowhere", from.join("link")).unwrap();
        let mut sparse = File::create(from.join("sparse")).unwrap();
        sparse.seek(SeekFrom::Start(10 << 20)).unwrap();
        sparse.write_all(b"end").unwrap();
        sparse.set_len(20 << 20).unwrap();
        nix::unistd::mkfifo(&from.join("fifo"), nix::sys::stat::Mode::from_bits_retain(0o640)).unwrap();
        fs::set_permissions(from.join("d"), std::os::unix::fs::PermissionsExt::from_mode(0o1511)).unwrap();

        let open = |path: &Path| OwnedFd::from(File::open(path).unwrap());
        let mut stream = Vec::new();
        save(&open(&from), "/t", &maps, &mut stream).unwrap();
        assert!(stream.len() < 1 << 20, "holes are not stored");
        load(&to, "/t", &mut stream.as_slice()).unwrap();

        for name in ["", "d", "d/e", "d/file", "again", "link", "sparse", "fifo"] {
            let stat = |base: &Path| {
                let stat = fs::symlink_metadata(base.join(name)).unwrap();
                (stat.mode(), stat.uid(), stat.mtime(), stat.mtime_nsec(), stat.nlink(), stat.rdev())
            };
            assert_eq!(stat(&from), stat(&to), "{name}");
        }
        assert_eq!(fs::read(to.join("again")).unwrap(), b"hello");
        assert_eq!(fs::read(from.join("sparse")).unwrap(), fs::read(to.join("sparse")).unwrap());
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("nowhere"));

        // A hostile image cannot leave the root.
        for path in ["../x", "/x", "d/../../x"] {
            let entry = Entry { path: path.into(), mode: libc::S_IFDIR, ..Entry::default() };
            let mut bytes = (entry.encoded_len() as u32).to_le_bytes().to_vec();
            bytes.extend(entry.encode_to_vec());
            assert!(load(&to, "/t", &mut bytes.as_slice()).is_err());
        }
        assert!(load(&to, "/t", &mut &stream[..stream.len() / 2]).is_err());
        fs::remove_dir_all(directory).unwrap();
    }
}
