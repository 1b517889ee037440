//! Whether a file is still the one that it was at the dump: by type, mode, size and build id, which survive a copy to
//! another machine. Inode numbers and times do not.

use crate::image::records::PathRef;
use nix::{
    sys::{
        mman::{MapFlags, ProtFlags, mmap, munmap},
        uio::{RemoteIoVec, process_vm_readv},
    },
    unistd::Pid,
};
use object::{Object, ReadCache};
use std::{
    fs::{File, Metadata},
    io::{self, IoSliceMut},
    num::NonZeroUsize,
    os::{
        fd::BorrowedFd,
        unix::fs::{FileExt, MetadataExt},
    },
};

/// How a file differs from what it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    /// A directory instead of a file, say.
    #[error("it is of another type than at the dump")]
    Type,
    /// Permissions.
    #[error("it has mode {now:o}, but had {then:o} at the dump")]
    Mode {
        /// As it is.
        now: u32,
        /// As it was.
        then: u32,
    },
    /// It was cut off. One that has grown may have been appended to.
    #[error("it has {now} bytes, but had {then} at the dump")]
    Shorter {
        /// As it is.
        now: u64,
        /// As it was.
        then: u64,
    },
    /// Replaced by another, or written over.
    #[error("its first bytes are others than at the dump")]
    Contents,
    /// Another build of the program or library.
    #[error("it is another build than at the dump (its build id differs)")]
    Build,
}

/// Bits of a mode that a program cannot do without: setuid and the like, and permissions.
const PERMISSIONS: u32 = 0o7777;

/// Bytes at the start of a file that tell whether it was replaced: what is appended does not change them.
const HEAD: u64 = 4096;

/// crc32 of the first bytes of a file that had `size` bytes.
pub fn head(file: &File, size: u64) -> io::Result<u32> {
    let mut bytes = vec![0; size.min(HEAD) as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(crc32fast::hash(&bytes))
}

/// As [`head`], of a descriptor of the tree: mapped, for opening or reading it would be an event for those who watch it
/// (fsnotify, fs/notify/fsnotify.c). Copied by the kernel, so that a file that is cut off meanwhile is an error and no SIGBUS.
pub fn head_unnoticed(fd: BorrowedFd<'_>, size: u64) -> io::Result<u32> {
    let mut bytes = vec![0; size.min(HEAD) as usize];
    let Some(length) = NonZeroUsize::new(bytes.len()) else { return Ok(crc32fast::hash(&bytes)) };
    // SAFETY: a new mapping at a place of the kernel's choice, to which no reference is made.
    let base = unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, fd, 0) }?;
    let remote = RemoteIoVec { base: base.as_ptr() as usize, len: length.get() };
    let copied = process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut bytes)], &[remote]);
    // SAFETY: the mapping made above, which nothing refers to.
    unsafe { munmap(base, length.get()) }?;
    if copied? == length.get() {
        Ok(crc32fast::hash(&bytes))
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// What differs; `open` is asked for the file only if its contents or its build id are known.
pub fn difference(
    then: &PathRef,
    now: &Metadata,
    open: impl FnOnce() -> io::Result<File>,
) -> io::Result<Option<Difference>> {
    if then.mode == 0 {
        return Ok(None);
    }
    if (now.mode() ^ then.mode) & libc::S_IFMT != 0 {
        return Ok(Some(Difference::Type));
    }
    if then.mode & libc::S_IFMT != libc::S_IFREG {
        return Ok(None);
    }
    if (now.mode() ^ then.mode) & PERMISSIONS != 0 {
        let (now, then) = (now.mode() & PERMISSIONS, then.mode & PERMISSIONS);
        return Ok(Some(Difference::Mode { now, then }));
    }
    if now.len() < then.size {
        return Ok(Some(Difference::Shorter { now: now.len(), then: then.size }));
    }
    if then.head.is_none() && then.build_id.is_empty() {
        return Ok(None);
    }
    let file = open()?;
    if then.head.is_some_and(|then_head| head(&file, then.size).ok() != Some(then_head)) {
        return Ok(Some(Difference::Contents));
    }
    if !then.build_id.is_empty() && build_id(file) != then.build_id {
        return Ok(Some(Difference::Build));
    }
    Ok(None)
}

/// The build id of an ELF file (elf(5), NT_GNU_BUILD_ID); empty if it has none or is no ELF file.
pub fn build_id(file: File) -> Vec<u8> {
    let mut magic = [0; 4];
    if file.read_exact_at(&mut magic, 0).is_err() || magic != *b"\x7fELF" {
        return Vec::new();
    }
    let cache = ReadCache::new(file);
    let parsed = object::File::parse(&cache).ok();
    parsed.and_then(|file| file.build_id().ok().flatten().map(<[u8]>::to_vec)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt};

    fn of(then: &PathRef, path: &std::path::Path) -> Option<Difference> {
        difference(then, &fs::metadata(path).unwrap(), || File::open(path)).unwrap()
    }

    #[test]
    fn the_head_of_a_mapping_is_that_of_the_file() {
        use std::{io::Write, os::fd::AsFd};
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 5000]).unwrap();
        for size in [0, 100, 5000] {
            assert_eq!(head_unnoticed(file.as_fd(), size).unwrap(), head(&file, size).unwrap());
        }
        file.set_len(0).unwrap();
        assert!(head_unnoticed(file.as_fd(), 5000).is_err());
    }

    #[test]
    fn files_are_told_by_type_mode_size_and_build() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "12345").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let then = PathRef { mode: libc::S_IFREG | 0o640, size: 5, ..PathRef::default() };
        assert_eq!(of(&then, &path), None);
        fs::write(&path, "12345 and more").unwrap();
        assert_eq!(of(&then, &path), None);
        let read = PathRef { head: Some(crc32fast::hash(b"12345")), ..then.clone() };
        assert_eq!(of(&read, &path), None);
        fs::write(&path, "54321 and more").unwrap();
        assert_eq!((of(&then, &path), of(&read, &path)), (None, Some(Difference::Contents)));
        fs::write(&path, "1").unwrap();
        assert_eq!(of(&then, &path), Some(Difference::Shorter { now: 1, then: 5 }));
        fs::write(&path, "12345").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(of(&then, &path), Some(Difference::Mode { now: 0o600, then: 0o640 }));
        assert_eq!(of(&then, dir.path()), Some(Difference::Type));
        let built = PathRef { build_id: vec![1], mode: libc::S_IFREG | 0o600, ..then };
        assert_eq!(of(&built, &path), Some(Difference::Build));
    }

    #[test]
    fn build_ids_are_those_of_the_linker() {
        let dir = tempfile::tempdir().unwrap();
        let none = dir.path().join("none");
        fs::write(&none, b"\x7fELF but nothing else").unwrap();
        assert!(build_id(File::open(&none).unwrap()).is_empty());
        // The C library of every distribution has one.
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let libc =
            maps.lines().find_map(|line| line.find('/').map(|at| &line[at..]).filter(|p| p.contains("libc")));
        assert_eq!(build_id(File::open(libc.unwrap()).unwrap()).len(), 20);
    }
}
