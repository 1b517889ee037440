//! From `/proc/PID/smaps` to the image's records: what each mapping is, and what is refused.

use super::{
    MemoryError, PAGE,
    plan::Contents,
    scan::{PageMapFile, Region, category},
    sharing,
};
use crate::{
    files::{Names, Refusal},
    image::records::{MappedFile, PathRef, SharedSegment, Vma, VmaAdvice, VmaKind},
    proc::{
        ProcDir,
        mappings::{Mapping, VmFlags},
    },
};
use nix::{fcntl::OFlag, sys::stat::FileStat};
use std::{collections::HashMap, fs::File};

/// User space ends here; above is the vsyscall page (Documentation/arch/x86/x86_64/mm.rst).
const TASK_SIZE: u64 = 0x7fff_ffff_f000;
const DELETED: &[u8] = b" (deleted)";
/// What mmap(2) with MAP_ANONYMOUS and MAP_HUGETLB maps (mm/mmap.c).
const HUGE_ANONYMOUS: &[u8] = b"/anon_hugepage (deleted)";

/// Kernel flag to bit of `VmaAdvice`.
const ADVICE: &[(VmFlags, VmaAdvice)] = &[
    (VmFlags::HUGE_PAGE, VmaAdvice::Hugepage),
    (VmFlags::NO_HUGE_PAGE, VmaAdvice::Nohugepage),
    (VmFlags::DONT_FORK, VmaAdvice::Dontfork),
    (VmFlags::WIPE_ON_FORK, VmaAdvice::Wipeonfork),
    (VmFlags::DONT_DUMP, VmaAdvice::Dontdump),
    (VmFlags::MERGEABLE, VmaAdvice::Mergeable),
    (VmFlags::SEQUENTIAL, VmaAdvice::Sequential),
    (VmFlags::RANDOM, VmaAdvice::Random),
    (VmFlags::LOCKED, VmaAdvice::Locked),
    (VmFlags::LOCK_ON_FAULT, VmaAdvice::Lockonfault),
    (VmFlags::NO_RESERVE, VmaAdvice::Noreserve),
    (VmFlags::ACCOUNTED, VmaAdvice::Accounted),
    (VmFlags::SEALED, VmaAdvice::Sealed),
    (VmFlags::DROPPABLE, VmaAdvice::Droppable),
];

/// States of a mapping that would be lost, with the words for them.
const REFUSED: &[(VmFlags, &str)] = &[
    (VmFlags::UFFD_MISSING, "is watched by a userfaultfd, which is not supported yet"),
    (VmFlags::UFFD_WRITE_PROTECT, "is watched by a userfaultfd, which is not supported yet"),
    (VmFlags::UFFD_MINOR, "is watched by a userfaultfd, which is not supported yet"),
    (VmFlags::SHADOW_STACK, "is a shadow stack, which is not supported yet"),
];

/// A mapping that core does not know: some plugin may.
#[derive(Debug, Clone)]
pub struct Unknown {
    /// Index in [`MemoryDescription::vmas`].
    pub vma: usize,
    /// The mapping.
    pub mapping: Mapping,
    /// Why core does not know it.
    pub why: &'static str,
}

/// Why a mapping cannot be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    /// A state of it would be lost.
    State(&'static str),
    /// Its file cannot be found again.
    File(Refusal),
}

/// The memory of one process.
#[derive(Debug, Default)]
pub struct MemoryDescription {
    /// In the order of the addresses, all of them.
    pub vmas: Vec<Vma>,
    /// Mappings that a plugin must claim.
    pub unknown: Vec<Unknown>,
    /// Mappings that cannot be kept: (mapping, why).
    pub refused: Vec<(Mapping, Refused)>,
}

/// Files and segments mapped anywhere in the tree.
#[derive(Debug, Default)]
pub struct MappedObjects {
    /// How files are found again.
    pub names: Names,
    /// Files, with their ids from 1.
    pub files: Vec<MappedFile>,
    /// Shared anonymous segments, with their ids from 1, and how to open each.
    pub segments: Vec<(SharedSegment, File)>,
    file_ids: HashMap<(Vec<u8>, u64, u64, bool), u32>,
    segment_ids: HashMap<(u64, u64), u32>,
}

impl MappedObjects {
    /// Nothing mapped yet.
    pub fn new(names: Names) -> Self {
        Self { names, ..Self::default() }
    }

    fn file(
        &mut self,
        proc: &ProcDir,
        mapping: &Mapping,
        writable: bool,
    ) -> Result<Result<u32, Refusal>, MemoryError> {
        let key = (mapping.path.clone(), mapping.dev, mapping.ino, writable);
        if let Some(&id) = self.file_ids.get(&key) {
            return Ok(Ok(id));
        }
        let id = self.files.len() as u32 + 1;
        let link = map_file(mapping);
        let stat = proc.stat(&link)?;
        // Programs and libraries are mapped privately; to look for a build id in a data file would be an event for whoever
        // watches it.
        let path = match mapping.shared {
            true => self.names.refer(proc, &link, &mapping.path, &stat),
            false => self.names.refer_built(proc, &link, &mapping.path, &stat),
        };
        let path = match path {
            Ok(path) => path,
            Err(refusal) => return Ok(Err(refusal)),
        };
        self.files.push(MappedFile { id, path: Some(path), writable, handle: 0 });
        self.file_ids.insert(key, id);
        Ok(Ok(id))
    }

    /// A file that is known by an open file description, whose id in the image is `handle`.
    pub fn described_file(&mut self, mapping: &Mapping, stat: &FileStat, writable: bool, handle: u32) -> u32 {
        let known = self.files.iter().find(|file| file.handle == handle && file.writable == writable);
        if let Some(file) = known {
            return file.id;
        }
        let id = self.files.len() as u32 + 1;
        // For messages only.
        let path = Some(PathRef { path: mapping.path.clone(), mode: stat.st_mode, ..PathRef::default() });
        self.files.push(MappedFile { id, path, writable, handle });
        id
    }

    fn segment(&mut self, proc: &ProcDir, mapping: &Mapping) -> Result<u32, MemoryError> {
        if let Some(&id) = self.segment_ids.get(&(mapping.dev, mapping.ino)) {
            return Ok(id);
        }
        let id = self.segments.len() as u32 + 1;
        let name = map_file(mapping);
        let size = proc.stat(&name)?.st_size as u64;
        let file = proc.open_file(&name, OFlag::O_RDONLY)?;
        let huge_shift = huge_shift(mapping);
        self.segments.push((SharedSegment { id, size, inode: mapping.ino, huge_shift }, file));
        self.segment_ids.insert((mapping.dev, mapping.ino), id);
        Ok(id)
    }
}

/// The magic link to the file behind a mapping, also when it is deleted.
pub fn map_file(mapping: &Mapping) -> String {
    format!("map_files/{:x}-{:x}", mapping.start, mapping.end)
}

/// log2 of the page size of a mapping of hugetlb pages, 0 for all others.
fn huge_shift(mapping: &Mapping) -> u32 {
    if mapping.flags.contains(VmFlags::HUGETLB) { mapping.page_size.trailing_zeros() % 64 } else { 0 }
}

/// Why a mapping would not be as it was, if so.
pub fn refused(mapping: &Mapping) -> Option<&'static str> {
    REFUSED.iter().find(|(flag, _)| mapping.flags.contains(*flag)).map(|(_, why)| *why)
}

/// Classifies the mappings of a process, as [`mappings::read`](crate::proc::mappings::read) gave them.
pub fn describe(
    proc: &ProcDir,
    mappings: Vec<Mapping>,
    objects: &mut MappedObjects,
) -> Result<MemoryDescription, MemoryError> {
    let mut description = MemoryDescription::default();
    for mapping in mappings {
        if mapping.start >= TASK_SIZE {
            continue;
        }
        let mut vma = Vma {
            start: mapping.start,
            end: mapping.end,
            prot: mapping.prot,
            offset: mapping.offset,
            advice: ADVICE
                .iter()
                .filter(|(f, _)| mapping.flags.contains(*f))
                .fold(0, |sum, (_, a)| sum | *a as u32),
            grows_down: mapping.flags.contains(VmFlags::GROWS_DOWN),
            may_write: mapping.flags.contains(VmFlags::MAY_WRITE),
            huge_shift: huge_shift(&mapping),
            ..Vma::default()
        };
        match classify(&mapping) {
            Class::Special(kind) => vma.set_kind(kind),
            Class::Anonymous(name) => {
                vma.set_kind(VmaKind::PrivateAnonymous);
                vma.offset = 0;
                vma.name = name;
            }
            Class::Segment => {
                vma.set_kind(VmaKind::SharedAnonymous);
                vma.file = objects.segment(proc, &mapping)?;
            }
            Class::File => {
                vma.set_kind(if mapping.shared { VmaKind::SharedFile } else { VmaKind::PrivateFile });
                vma.file = match objects.file(proc, &mapping, mapping.shared && vma.may_write)? {
                    Ok(file) => file,
                    Err(refusal) => {
                        description.refused.push((mapping, Refused::File(refusal)));
                        continue;
                    }
                };
            }
            Class::Unknown(why) => {
                vma.set_kind(VmaKind::Plugin);
                description.unknown.push(Unknown {
                    vma: description.vmas.len(),
                    mapping: mapping.clone(),
                    why,
                });
            }
        }
        match refused(&mapping) {
            Some(why) if vma.kind() != VmaKind::Plugin => {
                description.refused.push((mapping, Refused::State(why)));
            }
            _ => description.vmas.push(vma),
        }
    }
    Ok(description)
}

enum Class {
    Special(VmaKind),
    Anonymous(Vec<u8>),
    Segment,
    File,
    Unknown(&'static str),
}

fn classify(mapping: &Mapping) -> Class {
    let path = mapping.path.as_slice();
    if mapping.ino == 0 {
        return match path {
            b"[vdso]" => Class::Special(VmaKind::Vdso),
            b"[vvar]" | b"[vvar_vclock]" => Class::Special(VmaKind::Vvar),
            _ if mapping.flags.contains(VmFlags::IO) || mapping.flags.contains(VmFlags::PFN_MAP) => {
                Class::Unknown("it is device memory")
            }
            b"" | b"[heap]" | b"[stack]" if !mapping.shared => Class::Anonymous(Vec::new()),
            _ if !mapping.shared && path.starts_with(b"[anon:") => {
                Class::Anonymous(path[b"[anon:".len()..].strip_suffix(b"]").unwrap_or_default().to_vec())
            }
            _ => Class::Unknown("it is no plain memory"),
        };
    }
    if mapping.flags.contains(VmFlags::IO) || mapping.flags.contains(VmFlags::PFN_MAP) {
        return Class::Unknown("it is device memory");
    }
    let huge = path == HUGE_ANONYMOUS && mapping.flags.contains(VmFlags::HUGETLB);
    let segment = path == b"/dev/zero (deleted)" || path.starts_with(b"[anon_shmem:") || huge;
    match path.first() {
        _ if segment && mapping.shared => Class::Segment,
        _ if huge => Class::Anonymous(Vec::new()),
        // Memory files, System V segments and the like have no path one could open again.
        Some(b'/') if is_kernel_mount(mapping) => Class::Unknown("it maps an object without a path"),
        Some(b'/') => Class::File,
        _ => Class::Unknown("it maps an object without a path"),
    }
}

/// Deleted from birth, on a mount inside the kernel: the name is no path (shmem_file_setup, mm/shmem.c).
fn is_kernel_mount(mapping: &Mapping) -> bool {
    const PREFIXES: &[&[u8]] = &[b"/memfd:", b"/SYSV", b"/[", b"/dev/zero (deleted)", b"/anon_hugepage"];
    mapping.path.ends_with(DELETED) && PREFIXES.iter().any(|prefix| mapping.path.starts_with(prefix))
}

/// The pages of a process that must be kept: those of private memory, and the changed ones of private file mappings; and
/// guard regions in mappings of any kind.
/// Pages that others may share are looked for if `related`.
pub fn private_contents(proc: &ProcDir, vmas: &[Vma], related: bool) -> Result<Contents, MemoryError> {
    let map = PageMapFile::open(proc)?;
    let mut contents = Contents::default();
    let (Some(first), Some(last)) = (vmas.first(), vmas.last()) else { return Ok(contents) };
    let populated = map.populated(first.start, last.end)?;
    let mut next = 0;
    for vma in vmas {
        while next < populated.len() && populated[next].end <= vma.start {
            next += 1;
        }
        let wanted = |region: &Region| match vma.kind() {
            VmaKind::PrivateAnonymous => true,
            VmaKind::PrivateFile => region.categories & category::FILE == 0,
            _ => false,
        };
        let inside = populated[next..].iter().take_while(|region| region.start < vma.end);
        for region in inside {
            let part = Region { start: region.start.max(vma.start), end: region.end.min(vma.end), ..*region };
            if region.categories & category::GUARD != 0 {
                contents.guards.push(part.start..part.end);
                continue;
            }
            if !wanted(region) {
                continue;
            }
            if related {
                sharing::candidates(&map, part.start, part.end, &mut contents.candidates)?;
            }
            contents.regions.push(part);
        }
    }
    Ok(contents)
}

/// The pages of a shared segment that have contents, by their offsets: holes are skipped by SEEK_DATA (lseek(2)).
pub fn segment_contents(pid: i32, segment: &SharedSegment, file: &File) -> Result<Contents, MemoryError> {
    use nix::{
        errno::Errno,
        unistd::{Whence, lseek},
    };
    let failed = |offset: u64| {
        move |errno| MemoryError::Task { operation: "seek in shared memory", pid, address: offset, errno }
    };
    let mut contents = Contents::default();
    let mut at = 0;
    while at < segment.size {
        let start = match lseek(file, at as i64, Whence::SeekData) {
            Ok(offset) => offset as u64,
            Err(Errno::ENXIO) => break,
            Err(errno) => return Err(failed(at)(errno)),
        };
        let end = lseek(file, start as i64, Whence::SeekHole).map_err(failed(start))? as u64;
        contents.regions.push(Region { start, end: end.next_multiple_of(PAGE), categories: category::FILE });
        at = end;
    }
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc::mappings;

    fn kind(path: &str, ino: u64, shared: bool) -> &'static str {
        let mapping = Mapping { path: path.into(), ino, shared, ..Mapping::default() };
        match classify(&mapping) {
            Class::Special(_) => "special",
            Class::Anonymous(_) => "anonymous",
            Class::Segment => "segment",
            Class::File => "file",
            Class::Unknown(_) => "unknown",
        }
    }

    #[test]
    fn mappings_are_told_by_name_and_inode() {
        assert_eq!(kind("", 0, false), "anonymous");
        assert_eq!(kind("[heap]", 0, false), "anonymous");
        assert_eq!(kind("[anon:arena]", 0, false), "anonymous");
        assert_eq!(kind("[vvar_vclock]", 0, false), "special");
        assert_eq!(kind("[uprobes]", 0, false), "unknown");
        assert_eq!(kind("/dev/zero (deleted)", 9, true), "segment");
        assert_eq!(kind("/memfd:x (deleted)", 9, true), "unknown");
        assert_eq!(kind("/SYSV00000000 (deleted)", 9, true), "unknown");
        assert_eq!(kind("/usr/lib/x.so", 9, false), "file");
        assert_eq!(kind("/gone (deleted)", 9, false), "file");
        assert_eq!(kind("anon_inode:[x]", 9, true), "unknown");
    }

    #[test]
    fn describes_ourselves() {
        let proc = ProcDir::open(std::process::id() as i32).unwrap();
        let mut objects = MappedObjects::default();
        let description = describe(&proc, mappings::read(&proc).unwrap(), &mut objects).unwrap();
        assert!(description.unknown.is_empty() && description.refused.is_empty(), "{description:?}");
        assert!(description.vmas.iter().any(|vma| vma.kind() == VmaKind::PrivateFile));
        let contents = private_contents(&proc, &description.vmas, true).unwrap();
        assert!(contents.bytes() > 0);
        assert!(contents.regions.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }
}
