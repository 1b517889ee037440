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

/// The vdso of this kernel, as it is mapped in this process.
#[derive(Debug, Clone)]
pub struct OwnVdso {
    /// Its contents.
    pub contents: Vec<u8>,
    /// Its address.
    pub text: u64,
    /// Bytes of data pages before it, which are mapped together with it.
    pub data: u64,
}

impl OwnVdso {
    /// crc32 of its contents, as big-endian bytes: code in a task may be just inside it, and its layout is known to the C library.
    pub fn digest(&self) -> Vec<u8> {
        digest(&self.contents)
    }
}

/// crc32 of the contents of a vdso, as big-endian bytes.
pub fn digest(contents: &[u8]) -> Vec<u8> {
    crc32fast::hash(contents).to_be_bytes().to_vec()
}

/// Looks at our own vdso.
///
/// # Errors
/// If /proc cannot be read, or has no vdso for us.
pub fn vdso() -> Result<OwnVdso, ProcError> {
    let own = ProcDir::open_self()?;
    let mappings = mappings::read(&own)?;
    let vdso = mappings.iter().find(|mapping| mapping.path == b"[vdso]");
    let missing = || ProcError::Format { pid: own.pid(), file: "smaps", what: "no vdso is mapped".into() };
    let vdso = vdso.ok_or_else(missing)?;
    let data =
        mappings.iter().filter(|mapping| mapping.path.starts_with(b"[vvar")).map(|mapping| mapping.start);
    let first = data.min().unwrap_or(vdso.start).min(vdso.start);
    // SAFETY: the kernel maps these pages readable for the whole life of the process.
    let contents =
        unsafe { std::slice::from_raw_parts(vdso.start as *const u8, (vdso.end - vdso.start) as usize) };
    Ok(OwnVdso { contents: contents.to_vec(), text: vdso.start, data: vdso.start - first })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vdso_is_the_same_each_time_and_x87_is_always_there() {
        assert_eq!(vdso().unwrap().digest(), vdso().unwrap().digest());
        assert!(xsave_features() & 1 == 1 || xsave_features() == 0);
    }
}
