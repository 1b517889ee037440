//! `/proc/PID/smaps` (proc_pid_smaps(5)): mappings with the kernel's flags, which `/proc/PID/maps` does not show.

use super::{ProcDir, ProcError};

/// A set of two-letter `VmFlags` mnemonics (fs/proc/task_mmu.c, show_smap_vma_flags).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VmFlags(u64);

/// The mnemonics that matter here; others are kept out of the set.
const MNEMONICS: &[(&str, VmFlags)] = &[
    ("sh", VmFlags::SHARED),
    ("mw", VmFlags::MAY_WRITE),
    ("gd", VmFlags::GROWS_DOWN),
    ("lo", VmFlags::LOCKED),
    ("lf", VmFlags::LOCK_ON_FAULT),
    ("io", VmFlags::IO),
    ("sr", VmFlags::SEQUENTIAL),
    ("rr", VmFlags::RANDOM),
    ("dc", VmFlags::DONT_FORK),
    ("dd", VmFlags::DONT_DUMP),
    ("nr", VmFlags::NO_RESERVE),
    ("ht", VmFlags::HUGETLB),
    ("wf", VmFlags::WIPE_ON_FORK),
    ("hg", VmFlags::HUGE_PAGE),
    ("nh", VmFlags::NO_HUGE_PAGE),
    ("mg", VmFlags::MERGEABLE),
    ("um", VmFlags::UFFD_MISSING),
    ("uw", VmFlags::UFFD_WRITE_PROTECT),
    ("ui", VmFlags::UFFD_MINOR),
    ("ss", VmFlags::SHADOW_STACK),
    ("sl", VmFlags::SEALED),
    ("pf", VmFlags::PFN_MAP),
    ("mm", VmFlags::MIXED_MAP),
    ("dp", VmFlags::DROPPABLE),
    ("ac", VmFlags::ACCOUNTED),
];

macro_rules! flags {
    ($($(#[$doc:meta])* $name:ident = $bit:literal;)*) => {
        impl VmFlags { $($(#[$doc])* pub const $name: Self = Self(1 << $bit);)* }
    };
}
flags! {
    /// MAP_SHARED.
    SHARED = 0;
    /// mprotect may add PROT_WRITE.
    MAY_WRITE = 1;
    /// MAP_GROWSDOWN.
    GROWS_DOWN = 2;
    /// mlock.
    LOCKED = 3;
    /// mlock2(MLOCK_ONFAULT).
    LOCK_ON_FAULT = 4;
    /// Device memory.
    IO = 5;
    /// MADV_SEQUENTIAL.
    SEQUENTIAL = 6;
    /// MADV_RANDOM.
    RANDOM = 7;
    /// MADV_DONTFORK.
    DONT_FORK = 8;
    /// MADV_DONTDUMP.
    DONT_DUMP = 9;
    /// MAP_NORESERVE.
    NO_RESERVE = 10;
    /// hugetlbfs.
    HUGETLB = 11;
    /// MADV_WIPEONFORK.
    WIPE_ON_FORK = 12;
    /// MADV_HUGEPAGE.
    HUGE_PAGE = 13;
    /// MADV_NOHUGEPAGE.
    NO_HUGE_PAGE = 14;
    /// MADV_MERGEABLE.
    MERGEABLE = 15;
    /// Registered with a userfaultfd for missing pages.
    UFFD_MISSING = 16;
    /// Registered for write protection.
    UFFD_WRITE_PROTECT = 17;
    /// Registered for minor faults.
    UFFD_MINOR = 18;
    /// A shadow stack.
    SHADOW_STACK = 19;
    /// mseal(2).
    SEALED = 20;
    /// Raw page frames.
    PFN_MAP = 21;
    /// Raw page frames and pages.
    MIXED_MAP = 22;
    /// MAP_DROPPABLE.
    DROPPABLE = 23;
    /// Counts against the commit limit.
    ACCOUNTED = 24;
}

impl VmFlags {
    /// Whether all of `other` is set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    fn parse(text: &str) -> Self {
        let bits =
            text.split_ascii_whitespace().filter_map(|word| MNEMONICS.iter().find(|(name, _)| *name == word));
        Self(bits.fold(0, |sum, (_, flag)| sum | flag.0))
    }
}

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// `PROT_*`.
    pub prot: u32,
    /// MAP_SHARED.
    pub shared: bool,
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Device, as the kernel's `makedev`.
    pub dev: u64,
    /// Inode, 0 for anonymous memory.
    pub ino: u64,
    /// Path or `[name]`; octal escapes resolved.
    pub path: Vec<u8>,
    /// Kernel flags.
    pub flags: VmFlags,
    /// Whether any transparent huge page is mapped.
    pub has_huge_pages: bool,
    /// Bytes of a page: more than 4096 for hugetlb pages.
    pub page_size: u64,
}

/// All mappings of a process, ascending.
pub fn read(proc: &ProcDir) -> Result<Vec<Mapping>, ProcError> {
    let text = proc.read("smaps")?;
    parse(&text).map_err(|what| ProcError::Format { pid: proc.pid(), file: "smaps", what })
}

fn parse(text: &[u8]) -> Result<Vec<Mapping>, String> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        // A mapping's line starts with a lower-case hexadecimal digit, a field's with a capital letter.
        if !line[0].is_ascii_uppercase() {
            mappings.push(parse_head(line).ok_or_else(|| String::from_utf8_lossy(line).into_owned())?);
            continue;
        }
        let Some(last) = mappings.last_mut() else { return Err("a field before the first mapping".into()) };
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            last.flags = VmFlags::parse(&String::from_utf8_lossy(flags));
        } else if let Some(size) = line.strip_prefix(b"KernelPageSize:") {
            let kibibytes = size.trim_ascii().strip_suffix(b" kB").and_then(|n| std::str::from_utf8(n).ok());
            last.page_size = kibibytes.and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) << 10;
        } else if let Some(size) = line.strip_prefix(b"AnonHugePages:") {
            last.has_huge_pages = !size.trim_ascii().starts_with(b"0 ");
        }
    }
    Ok(mappings)
}

fn parse_head(line: &[u8]) -> Option<Mapping> {
    // `address perms offset dev inode      path`: only the path may hold spaces.
    let mut fields = line.splitn(6, |&byte| byte == b' ');
    let mut next = || std::str::from_utf8(fields.next()?).ok();
    let (start, end) = next()?.split_once('-')?;
    let perms = next()?.as_bytes();
    let offset = u64::from_str_radix(next()?, 16).ok()?;
    let (major, minor) = next()?.split_once(':')?;
    let ino = next()?.parse().ok()?;
    let path = fields.next().map(|path| unescape(path.trim_ascii_start())).unwrap_or_default();
    let bit =
        |index: usize, letter: u8, bit: i32| if perms.get(index) == Some(&letter) { bit as u32 } else { 0 };
    Some(Mapping {
        start: u64::from_str_radix(start, 16).ok()?,
        end: u64::from_str_radix(end, 16).ok()?,
        prot: bit(0, b'r', libc::PROT_READ) | bit(1, b'w', libc::PROT_WRITE) | bit(2, b'x', libc::PROT_EXEC),
        shared: perms.get(3) == Some(&b's'),
        offset,
        dev: libc::makedev(u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
        ino,
        path,
        ..Mapping::default()
    })
}

/// Resolves `\012` for a newline, the only character that the kernel escapes there (seq_file_path).
fn unescape(path: &[u8]) -> Vec<u8> {
    if !path.contains(&b'\\') {
        return path.to_vec();
    }
    let mut plain = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((&first, tail)) = rest.split_first() {
        match tail.strip_prefix(b"012") {
            Some(after) if first == b'\\' => {
                plain.push(b'\n');
                rest = after;
            }
            _ => {
                plain.push(first);
                rest = tail;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &[u8] =
        b"7f0000000000-7f0000003000 rw-p 00001000 fd:01 42                         /a b\\012c (deleted)\n\
        Size:                 12 kB\nKernelPageSize:        4 kB\nAnonHugePages:      2048 kB\nVmFlags: rd wr mr mw me dc hg gd \n\
        7f0000003000-7f0000004000 ---s 00000000 00:00 0 \nAnonHugePages:         0 kB\nVmFlags: sh \n";

    #[test]
    fn parses_heads_flags_and_odd_paths() {
        let mappings = parse(SMAPS).unwrap();
        assert_eq!(mappings.len(), 2);
        let first = &mappings[0];
        assert_eq!(
            (first.start, first.end, first.offset, first.ino),
            (0x7f0000000000, 0x7f0000003000, 0x1000, 42)
        );
        assert_eq!(first.path, b"/a b\nc (deleted)");
        assert_eq!(first.prot, (libc::PROT_READ | libc::PROT_WRITE) as u32);
        assert_eq!(first.dev, libc::makedev(0xfd, 1));
        assert_eq!(first.page_size, 4096);
        assert!(first.has_huge_pages && first.flags.contains(VmFlags::DONT_FORK) && !first.shared);
        assert!(first.flags.contains(VmFlags::HUGE_PAGE) && first.flags.contains(VmFlags::GROWS_DOWN));
        assert!(mappings[1].shared && mappings[1].path.is_empty() && !mappings[1].has_huge_pages);
    }

    #[test]
    fn refuses_what_it_does_not_understand() {
        assert!(parse(b"nonsense").is_err());
        assert!(parse(b"VmFlags: rd\n").is_err());
    }

    #[test]
    fn reads_ourselves() {
        let mappings = read(&ProcDir::open(std::process::id() as i32).unwrap()).unwrap();
        assert!(mappings.iter().any(|mapping| mapping.path == b"[vdso]"));
        assert!(mappings.windows(2).all(|pair| pair[0].end <= pair[1].start));
    }
}
