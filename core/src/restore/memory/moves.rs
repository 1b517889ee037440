//! What is left to do when everything lies in its arena.

use super::arena::{Arenas, join};
use super::plan::{ChangedVdso, MapPlan};
use super::region::{Backing, Region, has};
use super::task::in_arena;
use crate::image::records::{Vma, VmaAdvice, VmaKind};
use crate::restore::blob::proto::{Layout, Map, Move, Setting, Span};
use std::ops::Range;

/// The restorer's share of a task's memory.
#[derive(Debug, Default, Clone)]
pub struct RestorerMoves {
    /// Arenas of this task, ascending: all else goes.
    pub keep: Vec<Range<u64>>,
    /// Where the restorer's own region may lie.
    pub blob: u64,
    /// Mappings without contents.
    pub maps: Vec<Map>,
    /// Arenas and their homes.
    pub moves: Vec<Move>,
    /// Contents of mappings that are made at home.
    pub copies: Vec<(Span, Vec<u8>)>,
    /// Gaps in what was mapped or moved as one.
    pub gaps: Vec<Span>,
    /// Protections that differ from those the mappings were made with.
    pub protects: Vec<Setting>,
    /// Advice, and guard regions.
    pub advices: Vec<Setting>,
    /// Names of anonymous memory.
    pub names: Vec<(Span, Vec<u8>)>,
    /// Locked memory.
    pub locks: Vec<Setting>,
    /// `MCL_*` of mlockall(2) for mappings to come.
    pub lock_future: u32,
    /// Sealed memory.
    pub seals: Vec<Span>,
    /// First address of vvar and vdso; 0: the task has none.
    pub vdso: u64,
    /// Layout of the memory map, without auxiliary vector and executable.
    pub layout: Layout,
    /// The auxiliary vector.
    pub auxv: Vec<u8>,
}

/// Advice that madvise(2) gives back as it was; huge pages are a matter of their own.
const ADVICE: [(VmaAdvice, i32); 6] = [
    (VmaAdvice::Dontfork, libc::MADV_DONTFORK),
    (VmaAdvice::Wipeonfork, libc::MADV_WIPEONFORK),
    (VmaAdvice::Dontdump, libc::MADV_DONTDUMP),
    (VmaAdvice::Mergeable, libc::MADV_MERGEABLE),
    (VmaAdvice::Sequential, libc::MADV_SEQUENTIAL),
    (VmaAdvice::Random, libc::MADV_RANDOM),
];
/// Since Linux 6.13 (include/uapi/asm-generic/mman-common.h).
const MADV_GUARD_INSTALL: u32 = 102;
const HUGE_ADVICE: [(VmaAdvice, i32); 2] =
    [(VmaAdvice::Hugepage, libc::MADV_HUGEPAGE), (VmaAdvice::Nohugepage, libc::MADV_NOHUGEPAGE)];

fn span(range: Range<u64>) -> Span {
    Span { start: range.start, len: range.end - range.start }
}

/// Adds a setting, to the last one if it continues that.
fn push(settings: &mut Vec<Setting>, vma: &Vma, value: u32, tolerate: bool) {
    let tolerate = tolerate.into();
    match settings.last_mut() {
        Some(last)
            if last.span.start + last.span.len == vma.start
                && last.value == value
                && last.tolerate == tolerate =>
        {
            last.span.len += vma.end - vma.start;
        }
        _ => settings.push(Setting { span: span(vma.start..vma.end), value, tolerate }),
    }
}

impl RestorerMoves {
    pub(super) fn new(plan: &MapPlan, arenas: &Arenas, blob: u64, changed: Option<&ChangedVdso>) -> Self {
        let mut moves = Self { blob, ..Self::default() };
        for region in &plan.regions {
            moves.region(region, arenas);
            // Plugins restore all of their mappings.
            if region.backing != Backing::Plugin {
                let mut end = region.home.start;
                for vma in plan.map.vmas.get(region.vmas.clone()).into_iter().flatten() {
                    if end < vma.start {
                        moves.gaps.push(span(end..vma.start));
                    }
                    end = vma.end;
                    moves.vma(vma, region, &plan.guards);
                }
            }
        }
        moves.keep = join(std::mem::take(&mut moves.keep));
        for guard in &plan.guards {
            moves.advices.push(Setting { span: span(guard.clone()), value: MADV_GUARD_INSTALL, tolerate: 0 });
        }
        let sealed = plan.map.vmas.iter().filter(|vma| has(vma, VmaAdvice::Sealed));
        moves.seals.extend(sealed.map(|vma| span(vma.start..vma.end)));
        // One kind after another, so that neighbours with the same advice are joined.
        moves.advices.sort_by_key(|advice| (advice.value, advice.span.start));
        let special = |kinds: &[VmaKind]| {
            let matching = plan.map.vmas.iter().filter(|vma| kinds.contains(&vma.kind()));
            matching.map(|vma| vma.start).min()
        };
        if special(&[VmaKind::Vdso]).is_some() {
            moves.vdso = special(&[VmaKind::Vdso, VmaKind::Vvar]).unwrap_or(0);
        }
        let vdso = plan.map.vmas.iter().find(|vma| vma.kind() == VmaKind::Vdso);
        if let (Some(vma), Some(changed)) = (vdso, changed) {
            moves.change_vdso(vma, changed);
        }
        let map = &plan.map;
        moves.layout = Layout {
            start_code: map.start_code,
            end_code: map.end_code,
            start_data: map.start_data,
            end_data: map.end_data,
            start_brk: map.start_brk,
            brk: map.brk,
            start_stack: map.start_stack,
            arg_start: map.arg_start,
            arg_end: map.arg_end,
            env_start: map.env_start,
            env_end: map.env_end,
            ..Layout::default()
        };
        moves.auxv.clone_from(&map.auxv);
        moves.lock_future = map.lock_future & (libc::MCL_FUTURE | libc::MCL_ONFAULT) as u32;
        moves
    }

    /// Plain memory where the vdso was, and that of this kernel elsewhere.
    fn change_vdso(&mut self, vma: &Vma, changed: &ChangedVdso) {
        let place = span(vma.start..vma.end);
        let (write, run) = (libc::PROT_READ | libc::PROT_WRITE, libc::PROT_READ | libc::PROT_EXEC);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        self.vdso = changed.address;
        self.maps.push(Map { span: place, prot: write as u32, flags: flags as u32 });
        self.copies.push((place, changed.contents.clone()));
        self.protects.push(Setting { span: place, value: run as u32, tolerate: 0 });
    }

    fn region(&mut self, region: &Region, arenas: &Arenas) {
        let home = &region.home;
        if in_arena(region) {
            let arena = arenas.range(home);
            self.moves.push(Move { from: arena.start, to: home.start, len: home.end - home.start });
            self.keep.push(arena);
        } else if let Backing::Anonymous { flags } = region.backing {
            self.maps.push(Map { span: span(home.clone()), prot: region.prot, flags: flags as u32 });
        }
    }

    fn vma(&mut self, vma: &Vma, region: &Region, guards: &[Range<u64>]) {
        // A segment's further mappings have the protection of the first.
        let made = match region.backing {
            Backing::Segment { .. } => (libc::PROT_READ | libc::PROT_WRITE) as u32,
            _ => region.prot,
        };
        if vma.prot != made {
            push(&mut self.protects, vma, vma.prot, false);
        }
        for (advice, value) in ADVICE {
            if has(vma, advice) {
                push(&mut self.advices, vma, value as u32, false);
            }
        }
        // Anonymous arenas have it already: it decides how they are filled.
        if !(in_arena(region) && matches!(region.backing, Backing::Anonymous { .. })) {
            for (advice, value) in HUGE_ADVICE {
                if has(vma, advice) {
                    push(&mut self.advices, vma, value as u32, false);
                }
            }
        }
        if !vma.name.is_empty() {
            self.names.push((span(vma.start..vma.end), vma.name.clone()));
        }
        if has(vma, VmaAdvice::Locked) {
            let on_fault = has(vma, VmaAdvice::Lockonfault);
            let flags = if on_fault { libc::MLOCK_ONFAULT } else { 0 };
            // Neither without access nor at a guard region can the kernel populate what it has locked.
            let guarded = guards.get(guards.partition_point(|guard| guard.end <= vma.start));
            let guarded = guarded.is_some_and(|guard| guard.start < vma.end);
            push(&mut self.locks, vma, flags, vma.prot == 0 || guarded);
        }
    }
}
