//! Selectors as sorted tables: what is more special comes first, and the first that fits takes the resource.

use super::{DescriptorKind, MappingKind, PluginError, PluginsError};
use nix::sys::stat::{SFlag, major, minor};
use stasis_plugin_api::{HandleInfo, Selector, VmaInfo};
use std::cell::{OnceCell, RefCell};

/// Asks a kind whether it takes something by its own judgement.
pub type Judge<'a, K> = &'a dyn Fn(&K) -> Result<bool, PluginError>;

/// Facts of a descriptor by which selectors choose. What costs a system call is looked up only if a selector asks.
pub struct HandleFacts<'a> {
    handle: &'a HandleInfo,
    filesystem: Lazy<'a, u64>,
    socket: Lazy<'a, [i32; 3]>,
    judgement: Judgement<'a, DescriptorKind>,
}

/// Kinds that judge for themselves; the first error of one of them.
struct Judgement<'a, K> {
    judge: Judge<'a, K>,
    failed: RefCell<Option<PluginError>>,
}

impl<K> Judgement<'_, K> {
    fn takes(&self, kind: &K) -> bool {
        (self.judge)(kind).unwrap_or_else(|error| {
            self.failed.borrow_mut().get_or_insert(error);
            false
        })
    }
}

/// A fact that is looked up at most once, and only if somebody asks.
struct Lazy<'a, T> {
    look_up: &'a dyn Fn() -> Option<T>,
    found: OnceCell<Option<T>>,
}

impl<'a, T: Copy> Lazy<'a, T> {
    fn new(look_up: &'a dyn Fn() -> Option<T>) -> Self {
        Self { look_up, found: OnceCell::new() }
    }

    fn get(&self) -> Option<T> {
        *self.found.get_or_init(self.look_up)
    }
}

impl<'a> HandleFacts<'a> {
    /// `handle` with link, mode and rdev filled in; `filesystem` gives the magic of statfs(2), `socket` gives
    /// `SO_DOMAIN`, `SO_TYPE` and `SO_PROTOCOL` (socket(7)). Each is called at most once; `judge` once per kind that
    /// [`Selector::Predicate`] stands for.
    pub fn new(
        handle: &'a HandleInfo,
        filesystem: &'a dyn Fn() -> Option<u64>,
        socket: &'a dyn Fn() -> Option<[i32; 3]>,
        judge: Judge<'a, DescriptorKind>,
    ) -> Self {
        let judgement = Judgement { judge, failed: RefCell::default() };
        Self { handle, filesystem: Lazy::new(filesystem), socket: Lazy::new(socket), judgement }
    }

    /// Whether a kind takes it by its own judgement.
    pub(super) fn judged(&self, kind: &DescriptorKind) -> bool {
        self.judgement.takes(kind)
    }

    /// The first error of a kind that was to judge: nobody may take the resource then.
    pub(super) fn check(&self) -> Result<(), PluginError> {
        self.judgement.failed.take().map_or(Ok(()), Err)
    }

    fn is(&self, file_type: SFlag) -> bool {
        self.handle.mode & SFlag::S_IFMT.bits() == file_type.bits()
    }

    /// Whether a data selector fits.
    pub(super) fn fits(&self, selector: &Selector) -> bool {
        let link = self.handle.link.as_str();
        match selector {
            Selector::AnonInode(name) => link.strip_prefix("anon_inode:") == Some(name.as_str()),
            Selector::Socket { domain, kind, protocol } if self.is(SFlag::S_IFSOCK) => {
                self.socket.get().is_some_and(|facts| {
                    [*domain, *kind, *protocol]
                        .iter()
                        .zip(facts)
                        .all(|(wanted, is)| *wanted == -1 || *wanted == is)
                })
            }
            Selector::CharDevice { major, first, last } if self.is(SFlag::S_IFCHR) => {
                in_range(self.handle.rdev, *major, *first, *last)
            }
            Selector::BlockDevice { major, first, last } if self.is(SFlag::S_IFBLK) => {
                in_range(self.handle.rdev, *major, *first, *last)
            }
            Selector::Filesystem(magic) => self.filesystem.get() == Some(*magic),
            Selector::PathPrefix(prefix) => link.starts_with(prefix.as_str()),
            Selector::FileType(file_type) => self.handle.mode & SFlag::S_IFMT.bits() == *file_type,
            _ => false,
        }
    }
}

/// Facts of a mapping by which selectors choose.
pub struct MappingFacts<'a> {
    vma: &'a VmaInfo,
    device: Lazy<'a, u64>,
    judgement: Judgement<'a, MappingKind>,
}

impl<'a> MappingFacts<'a> {
    /// `device` gives `st_rdev` of the mapped file if that is a character device; it is called at most once.
    pub fn new(vma: &'a VmaInfo, device: &'a dyn Fn() -> Option<u64>, judge: Judge<'a, MappingKind>) -> Self {
        let judgement = Judgement { judge, failed: RefCell::default() };
        Self { vma, device: Lazy::new(device), judgement }
    }

    /// Whether a kind takes it by its own judgement.
    pub(super) fn judged(&self, kind: &MappingKind) -> bool {
        self.judgement.takes(kind)
    }

    /// The first error of a kind that was to judge.
    pub(super) fn check(&self) -> Result<(), PluginError> {
        self.judgement.failed.take().map_or(Ok(()), Err)
    }

    pub(super) fn fits(&self, selector: &Selector) -> bool {
        match selector {
            Selector::Mapping(prefix) => self.vma.path.starts_with(prefix.as_str()),
            Selector::CharDevice { major, first, last } => {
                self.device.get().is_some_and(|device| in_range(device, *major, *first, *last))
            }
            _ => false,
        }
    }
}

fn in_range(device: u64, wanted: u32, first: u32, last: u32) -> bool {
    major(device) == u64::from(wanted) && (u64::from(first)..=u64::from(last)).contains(&minor(device))
}

/// Which kind of which plugin, by position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Claim {
    pub plugin: usize,
    pub kind: usize,
}

/// The selectors of one sort of hook, most special first.
#[derive(Debug, Default)]
pub(super) struct Table {
    entries: Vec<(Selector, Claim)>,
}

impl Table {
    /// Adds a claim. If another one is for the same, `decide(old, new)` says whether the new one replaces it.
    pub fn add(
        &mut self,
        selector: &Selector,
        claim: Claim,
        decide: impl Fn(Claim, Claim) -> Result<bool, PluginsError>,
    ) -> Result<(), PluginsError> {
        let rival = self.entries.iter().position(|(other, _)| same(other, selector));
        match rival {
            Some(at) if self.entries[at].1 == claim => {}
            Some(at) if decide(self.entries[at].1, claim)? => self.entries[at].1 = claim,
            Some(_) => {}
            None => self.entries.push((selector.clone(), claim)),
        }
        Ok(())
    }

    /// To be called when all claims are there. `preferred` says how early a plugin comes, whatever its selectors.
    pub fn sort(&mut self, preferred: impl Fn(Claim) -> usize) {
        self.entries.sort_by_key(|(selector, claim)| (preferred(*claim), rank(selector)));
    }

    /// The first claim that `fits`.
    pub fn find(&self, fits: impl Fn(&Selector, Claim) -> bool) -> Option<Claim> {
        self.entries.iter().find(|(selector, claim)| fits(selector, *claim)).map(|(_, claim)| *claim)
    }
}

/// Whether two selectors claim the same, and neither is more special. Predicates may always overlap: the first that
/// says yes has it.
fn same(a: &Selector, b: &Selector) -> bool {
    use Selector::{BlockDevice, CharDevice, Predicate};
    match (a, b) {
        (Predicate, _) => false,
        (
            CharDevice { major, first, last },
            CharDevice { major: other_major, first: other_first, last: other_last },
        )
        | (
            BlockDevice { major, first, last },
            BlockDevice { major: other_major, first: other_first, last: other_last },
        ) => {
            let overlap = first <= other_last && other_first <= last;
            let equally_wide = last.wrapping_sub(*first) == other_last.wrapping_sub(*other_first);
            major == other_major && overlap && equally_wide
        }
        _ => a == b,
    }
}

/// Precedence: class of selector, then the more special one.
fn rank(selector: &Selector) -> (u8, usize) {
    match selector {
        Selector::AnonInode(_) | Selector::Namespace(_) | Selector::Terminal(_) => (0, 0),
        Selector::Socket { kind, protocol, .. } => {
            (1, usize::from(*kind == -1) + usize::from(*protocol == -1))
        }
        Selector::CharDevice { first, last, .. } | Selector::BlockDevice { first, last, .. } => {
            (2, last.saturating_sub(*first) as usize)
        }
        Selector::Filesystem(_) => (3, 0),
        Selector::PathPrefix(prefix) | Selector::Mapping(prefix) => (4, usize::MAX - prefix.len()),
        Selector::FileType(_) => (5, 0),
        Selector::Predicate => (6, 0),
    }
}

/// A selector for messages and for `stasis plugins`.
pub fn describe_selector(selector: &Selector) -> String {
    let any = |value: &i32| if *value == -1 { "any".into() } else { value.to_string() };
    match selector {
        Selector::AnonInode(name) => format!("anon_inode:{name}"),
        Selector::Filesystem(magic) => format!("filesystem {magic:#x}"),
        Selector::FileType(mode) => format!("file type {mode:#o}"),
        Selector::Socket { domain, kind, protocol } => {
            format!("socket domain {domain} type {} protocol {}", any(kind), any(protocol))
        }
        Selector::CharDevice { major, first, last } => format!("character device {major}:{first}-{last}"),
        Selector::BlockDevice { major, first, last } => format!("block device {major}:{first}-{last}"),
        Selector::PathPrefix(prefix) => format!("path {prefix}*"),
        Selector::Namespace(kind) => format!("namespace {kind}"),
        Selector::Terminal(major) => format!("terminal {major}:*"),
        Selector::Mapping(prefix) => format!("mapping {prefix}*"),
        Selector::Predicate => "by its own judgement".into(),
    }
}
