//! What a restored task cannot do without: the processor's register set and the kernel's vdso.

use crate::proc::{ProcDir, ProcError, mappings};

/// XCR0: the register sets that the kernel has enabled (Intel SDM volume 1, 13.3). 0 without xsave.
pub fn xsave_features() -> u64 {
    if !std::arch::is_x86_feature_detected!("xsave") {
        return 0;
    }
    // SAFETY: the processor has xsave and the kernel has enabled it (that is what the detection asks).
    unsafe { read_xcr0() }
}

#[target_feature(enable = "xsave")]
fn read_xcr0() -> u64 {
    // SAFETY: XCR0 always exists where xsave does.
    unsafe { std::arch::x86_64::_xgetbv(0) }
}

/// crc32 of the vdso's contents, as big-endian bytes: code in a task may be just inside it, and its layout is known to
/// the C library.
///
/// # Errors
/// If /proc cannot be read, or has no vdso for us.
pub fn vdso_digest() -> Result<Vec<u8>, ProcError> {
    let own = ProcDir::open_self()?;
    let vdso = mappings::read(&own)?.into_iter().find(|mapping| mapping.path == b"[vdso]");
    let missing = || ProcError::Format { pid: own.pid(), file: "smaps", what: "no vdso is mapped".into() };
    let vdso = vdso.ok_or_else(missing)?;
    // SAFETY: the kernel maps these pages readable for the whole life of the process.
    let contents =
        unsafe { std::slice::from_raw_parts(vdso.start as *const u8, (vdso.end - vdso.start) as usize) };
    Ok(crc32fast::hash(contents).to_be_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vdso_is_the_same_each_time_and_x87_is_always_there() {
        assert_eq!(vdso_digest().unwrap(), vdso_digest().unwrap());
        assert!(xsave_features() & 1 == 1 || xsave_features() == 0);
    }
}
