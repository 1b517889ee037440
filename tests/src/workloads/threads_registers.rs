//! General and vector registers (xmm, and ymm and zmm where the processor has them), held in a loop that makes no
//! system call: whatever freezes the thread, it must find every register as it was.

use std::arch::asm;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::ctl::{Ctl, Outcome, changed, ensure};

static GO_ON: AtomicU64 = AtomicU64::new(1);
static LOOPS: AtomicU64 = AtomicU64::new(0);

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    let spin = std::thread::spawn(hold_xmm);
    let wide = std::thread::spawn(|| {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has it.
            unsafe { hold_zmm() }
        } else if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has it.
            unsafe { hold_ymm() }
        } else {
            true
        }
    });
    crate::ctl::poll_until("the loops run", || LOOPS.load(Ordering::Relaxed) > 1000)?;

    let sabotage = ctl.wait()?;

    GO_ON.store(if sabotage { 2 } else { 0 }, Ordering::SeqCst);
    ensure(spin.join().map_err(|_| changed("a thread panicked".into()))?, "general or xmm registers have changed")?;
    ensure(wide.join().map_err(|_| changed("a thread panicked".into()))?, "wide registers have changed")
}

/// Loads the registers, loops until told, compares.
fn hold_xmm() -> bool {
    let (mut same, mut flag): (u64, u64) = (0, 1);
    let marks: [u64; 4] = [0x1111_2222_3333_4444, 0x5555_6666_7777_8888, 0x9999_aaaa_bbbb_cccc, 0xdddd_eeee_ffff_0123];
    let mut out = [0u64; 4];
    // SAFETY: reads and writes only the named places; every register it uses is declared.
    unsafe {
        asm!(
            "movdqu xmm7, [{marks}]",
            "movdqu xmm15, [{marks} + 16]",
            "mov r12, 0x123456789abcdef",
            "mov r13, 0x23456789abcdef1",
            "std",
            "2:",
            "lock inc qword ptr [{loops}]",
            "mov {flag}, qword ptr [{go}]",
            "cmp {flag}, 1",
            "je 2b",
            "pushfq",
            "pop {same}",
            "cld",
            "and {same}, 0x400",
            "add {same}, r12",
            "add {same}, r13",
            "movdqu [{out}], xmm7",
            "movdqu [{out} + 16], xmm15",
            marks = in(reg) marks.as_ptr(),
            out = in(reg) out.as_mut_ptr(),
            loops = in(reg) LOOPS.as_ptr(),
            go = in(reg) GO_ON.as_ptr(),
            flag = inout(reg) flag,
            same = inout(reg) same,
            out("r12") _, out("r13") _, out("xmm7") _, out("xmm15") _,
        );
    }
    flag == 0 && same == 0x0123_4567_89ab_cdef + 0x0234_5678_9abc_def1 + 0x400 && out == marks
}

/// The upper halves of ymm.
#[target_feature(enable = "avx2")]
fn hold_ymm() -> bool {
    let marks: [u64; 8] = std::array::from_fn(|n| crate::sys::word(81, n));
    let mut out = [0u64; 8];
    // SAFETY: as in `hold_xmm`.
    unsafe {
        asm!(
            "vmovdqu ymm3, [{marks}]",
            "vmovdqu ymm12, [{marks} + 32]",
            "2:",
            "cmp qword ptr [{go}], 1",
            "je 2b",
            "vmovdqu [{out}], ymm3",
            "vmovdqu [{out} + 32], ymm12",
            marks = in(reg) marks.as_ptr(),
            out = in(reg) out.as_mut_ptr(),
            go = in(reg) GO_ON.as_ptr(),
            out("ymm3") _, out("ymm12") _,
        );
    }
    out == marks
}

/// zmm, the upper sixteen of them, and a mask register.
#[target_feature(enable = "avx512f")]
fn hold_zmm() -> bool {
    let marks: [u64; 16] = std::array::from_fn(|n| crate::sys::word(82, n));
    let (mut out, mut mask) = ([0u64; 16], 0x5aa5u64);
    // SAFETY: as in `hold_xmm`.
    unsafe {
        asm!(
            "vmovdqu64 zmm5, [{marks}]",
            "vmovdqu64 zmm29, [{marks} + 64]",
            "kmovw k3, {mask:e}",
            "2:",
            "cmp qword ptr [{go}], 1",
            "je 2b",
            "vmovdqu64 [{out}], zmm5",
            "vmovdqu64 [{out} + 64], zmm29",
            "kmovw {mask:e}, k3",
            marks = in(reg) marks.as_ptr(),
            out = in(reg) out.as_mut_ptr(),
            go = in(reg) GO_ON.as_ptr(),
            mask = inout(reg) mask,
            out("zmm5") _, out("zmm29") _, out("k3") _,
        );
    }
    out == marks && mask == 0x5aa5
}
