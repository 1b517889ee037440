//! A stack in deep use: frames with a pattern, held while frozen, looked at on the way back, and grown afterwards.

use std::hint::black_box;

use crate::ctl::{Ctl, Outcome, ensure};

const DEPTH: u64 = 3000;

/// Sets up, waits, checks.
pub fn run(ctl: &Ctl) -> Outcome {
    descend(DEPTH, &mut |_| ctl.wait())?;
    // 6 MiB, deeper than before: the stack must still be able to grow.
    descend(DEPTH * 2, &mut |_| Ok(false)).map(drop)
}

/// Fills a KiB of this frame, goes on, and looks whether it is still there.
#[inline(never)]
fn descend(left: u64, at_bottom: &mut dyn FnMut(u64) -> Outcome<bool>) -> Outcome<bool> {
    let mut frame = [left; 128];
    black_box(&mut frame);
    let sabotage = if left == 0 { at_bottom(left)? } else { descend(left - 1, at_bottom)? };
    if sabotage && left == DEPTH / 2 {
        frame[5] = 1;
    }
    ensure(black_box(&frame).iter().all(|&word| word == left), "a stack frame has changed")?;
    Ok(sabotage)
}
