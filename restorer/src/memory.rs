//! The address space: everything away that is not the task's, everything of the task's home.

use crate::proto::{Arguments, Setting, Step};
use crate::sys::{Failure, Outcome, call, nr, step};

const MAP_FIXED: u32 = 0x10;
const MREMAP_MAYMOVE_FIXED: u64 = 1 | 2;
const ARCH_MAP_VDSO_64: u64 = 0x2003;
const PR_SET_VMA: u64 = 0x5356_4d41;
const PR_SET_MM: u64 = 35;
const PR_SET_MM_MAP: u64 = 14;
const ENOMEM: u32 = 12;

/// Restores the address space.
pub fn restore(arguments: &Arguments) -> Outcome {
    for (index, span) in arguments.unmap.entries().iter().enumerate() {
        // SAFETY: core left out the blob's region and the arenas; nothing else is used from here on.
        unsafe { step(Step::Unmap, index, nr::MUNMAP, [span.start, span.len])? };
    }
    // Before anything is home, so that no neighbour can push it away from the wished address.
    vdso(arguments.vdso)?;
    for (index, map) in arguments.maps.entries().iter().enumerate() {
        let flags = u64::from(map.flags | MAP_FIXED);
        let place = [map.span.start, map.span.len, map.prot.into(), flags, u64::MAX, 0];
        // SAFETY: homes are clear of arenas and of the blob (core plans them so), all else is unmapped.
        unsafe { step(Step::Map, index, nr::MMAP, place)? };
    }
    for copied in arguments.copies.entries() {
        let (from, to) = (copied.from as *const u8, copied.to as *mut u8);
        // SAFETY: core put the bytes into the blob's memory, and has the target mapped above, writable and as long.
        unsafe { core::ptr::copy_nonoverlapping(from, to, copied.len as usize) };
    }
    for (index, entry) in arguments.moves.entries().iter().enumerate() {
        let place = [entry.from, entry.len, entry.len, MREMAP_MAYMOVE_FIXED, entry.to];
        // SAFETY: as above.
        unsafe { step(Step::Move, index, nr::MREMAP, place)? };
    }
    for (index, span) in arguments.gaps.entries().iter().enumerate() {
        // SAFETY: a part of what has just been mapped or moved, which the task did not have.
        unsafe { step(Step::Unmap, index, nr::MUNMAP, [span.start, span.len])? };
    }
    for (index, setting) in arguments.protects.entries().iter().enumerate() {
        set(Step::Protect, index, nr::MPROTECT, setting)?;
    }
    for (index, setting) in arguments.advices.entries().iter().enumerate() {
        set(Step::Advise, index, nr::MADVISE, setting)?;
    }
    for (index, name) in arguments.names.entries().iter().enumerate() {
        // SAFETY: only names memory of the task; the name is in the blob's memory.
        unsafe {
            step(
                Step::NameMemory,
                index,
                nr::PRCTL,
                [PR_SET_VMA, 0, name.span.start, name.span.len, name.name],
            )?
        };
    }
    for (index, setting) in arguments.locks.entries().iter().enumerate() {
        set(Step::Lock, index, nr::MLOCK2, setting)?;
    }
    let layout = &raw const arguments.layout as u64;
    let size = size_of_val(&arguments.layout) as u64;
    // SAFETY: the kernel reads `size` bytes at `layout`, and the auxiliary vector it names.
    unsafe { step(Step::Layout, 0, nr::PRCTL, [PR_SET_MM, PR_SET_MM_MAP, layout, size, 0])? };
    if arguments.lock_future != 0 {
        // SAFETY: without MCL_CURRENT it touches no mapping that exists.
        unsafe { step(Step::Lock, 0, nr::MLOCKALL, [arguments.lock_future])? };
    }
    // Nothing of it can be changed from here on.
    for (index, span) in arguments.seals.entries().iter().enumerate() {
        // SAFETY: marks memory of the task.
        unsafe { step(Step::Seal, index, nr::MSEAL, [span.start, span.len, 0])? };
    }
    Ok(())
}

/// mprotect(2), madvise(2) and mlock2(2) take the same arguments.
fn set(what: Step, index: usize, number: u64, setting: &Setting) -> Outcome {
    // SAFETY: changes memory of the task alone, to what it was in the image.
    match unsafe { step(what, index, number, [setting.span.start, setting.span.len, setting.value.into()]) } {
        Err(failure) if setting.tolerate != 0 && failure.errno == ENOMEM => Ok(()),
        outcome => outcome.map(|_| ()),
    }
}

/// Maps vvar and vdso at `address` (arch/x86/entry/vdso/vma.c: the address is a hint, so look whether it was taken).
fn vdso(address: u64) -> Outcome {
    if address == 0 {
        return Ok(());
    }
    // SAFETY: maps new memory where nothing is.
    unsafe { step(Step::Vdso, 0, nr::ARCH_PRCTL, [ARCH_MAP_VDSO_64, address])? };
    let mut resident = 0_u8;
    // SAFETY: writes one byte to this stack frame.
    match unsafe { call(nr::MINCORE, [address, 4096, &raw mut resident as u64]) } {
        0 => Ok(()),
        error => Err(Failure { step: Step::Vdso, errno: error.unsigned_abs() as u32, index: 1 }),
    }
}
