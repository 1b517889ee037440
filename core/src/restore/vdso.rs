//! A kernel with another vdso (vdso(7)): tasks know the functions of theirs by address. The old one comes back as plain memory, in which
//! each function leads to that of this kernel, whose own vdso is mapped elsewhere.

use object::{Object, ObjectSymbol, SymbolKind};
use std::collections::BTreeMap;

/// Why the old vdso cannot be made to lead to the new one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum VdsoError {
    /// It is no ELF file that can be read.
    #[error("the vdso of the image cannot be read: {0}")]
    Malformed(String),
    /// A function has too little room.
    #[error("function {name} of the image's vdso has {size} bytes, too few to lead elsewhere")]
    TooSmall {
        /// Its name.
        name: String,
        /// Its size.
        size: u64,
    },
    /// Nothing here does what a function did.
    #[error("function {name} of the image's vdso has no match on this kernel")]
    NoMatch {
        /// Its name.
        name: String,
    },
}

/// A function.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Function {
    offset: u64,
    size: u64,
}

/// A vdso with its functions, by name without the prefix `__vdso_`. A name may be there twice, with and without it.
#[derive(Debug, Clone)]
pub struct Vdso {
    bytes: Vec<u8>,
    functions: BTreeMap<String, Vec<Function>>,
}

/// System calls that do the same (arch/x86/entry/syscalls/syscall_64.tbl).
const CALLS: &[(&str, u32)] =
    &[("clock_gettime", 228), ("clock_getres", 229), ("gettimeofday", 96), ("time", 201), ("getcpu", 309)];

/// Does not share state with the kernel in a layout of its own, as `getrandom` does, and needs nothing of it: stays what it was.
const SELF_CONTAINED: &[&str] = &["sgx_enter_enclave"];

/// `mov rax, TARGET; jmp rax`
fn jump(target: u64) -> Vec<u8> {
    [&[0x48, 0xb8][..], &target.to_le_bytes(), &[0xff, 0xe0]].concat()
}

/// `mov eax, NUMBER; syscall; ret`
fn call(number: u32) -> Vec<u8> {
    [&[0xb8][..], &number.to_le_bytes(), &[0x0f, 0x05, 0xc3]].concat()
}

/// The state of vgetrandom(3) has the layout of the old kernel, so its numbers come by system call; who asks for the layout (a size of
/// all ones) hears ENOSYS: `cmp r8, -1; je 1f; mov eax, 318; syscall; ret; 1: mov rax, -38; ret`.
const GETRANDOM: &[u8] = &[
    0x49, 0x83, 0xf8, 0xff, 0x74, 0x08, 0xb8, 0x3e, 0x01, 0x00, 0x00, 0x0f, 0x05, 0xc3, 0x48, 0xc7, 0xc0,
    0xda, 0xff, 0xff, 0xff, 0xc3,
];

impl Vdso {
    /// Reads a vdso as the kernel maps it.
    pub fn parse(bytes: &[u8]) -> Result<Self, VdsoError> {
        let malformed = |error: object::Error| VdsoError::Malformed(error.to_string());
        let file = object::File::parse(bytes).map_err(malformed)?;
        let mut functions: BTreeMap<String, Vec<Function>> = BTreeMap::new();
        for symbol in file.dynamic_symbols().filter(|symbol| symbol.kind() == SymbolKind::Text) {
            let name = symbol.name().map_err(malformed)?;
            let function = Function { offset: symbol.address(), size: symbol.size() };
            let inside =
                function.offset.checked_add(function.size).is_some_and(|end| end <= bytes.len() as u64);
            if symbol.is_undefined() || function.size == 0 {
                continue;
            }
            if !inside {
                return Err(VdsoError::Malformed(format!("function {name} lies outside")));
            }
            let places = functions.entry(name.trim_start_matches("__vdso_").to_owned()).or_default();
            if !places.contains(&function) {
                places.push(function);
            }
        }
        match functions.is_empty() {
            true => Err(VdsoError::Malformed("it has no functions".into())),
            false => Ok(Self { bytes: bytes.to_vec(), functions }),
        }
    }

    /// Its contents, with every function leading to that of `new`, which will be mapped at `base`.
    pub fn leading_to(&self, new: &Vdso, base: u64) -> Result<Vec<u8>, VdsoError> {
        let mut bytes = self.bytes.clone();
        for (name, places) in &self.functions {
            let code = match new.functions.get(name).and_then(|places| places.first()) {
                _ if SELF_CONTAINED.contains(&name.as_str()) => continue,
                _ if name == "getrandom" => GETRANDOM.to_vec(),
                Some(function) => jump(base.wrapping_add(function.offset)),
                None => match CALLS.iter().find(|(known, _)| known == name) {
                    Some((_, number)) => call(*number),
                    None => return Err(VdsoError::NoMatch { name: name.clone() }),
                },
            };
            for place in places {
                let start = place.offset as usize;
                let room = bytes.get_mut(start..start + place.size as usize);
                let room = room.and_then(|room| room.get_mut(..code.len()));
                let size = place.size;
                room.ok_or(VdsoError::TooSmall { name: name.clone(), size })?.copy_from_slice(&code);
            }
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine;
    use std::ptr;

    /// Executable memory with these contents.
    fn executable(bytes: &[u8]) -> u64 {
        // SAFETY: a new mapping, written to before anything runs in it.
        unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let place = libc::mmap(ptr::null_mut(), bytes.len(), access, flags, -1, 0);
            assert_ne!(place, libc::MAP_FAILED);
            ptr::copy_nonoverlapping(bytes.as_ptr(), place.cast(), bytes.len());
            assert_eq!(libc::mprotect(place, bytes.len(), libc::PROT_READ | libc::PROT_EXEC), 0);
            place as u64
        }
    }

    fn seconds(code: u64) -> i64 {
        // SAFETY: code of clock_gettime(2)'s signature, as the tests have just made it.
        let gettime: extern "C" fn(i32, *mut libc::timespec) -> i32 = unsafe { std::mem::transmute(code) };
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        assert_eq!(gettime(libc::CLOCK_REALTIME, &raw mut time), 0);
        time.tv_sec
    }

    fn now() -> i64 {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64
    }

    #[test]
    fn functions_lead_to_the_new_ones_or_to_system_calls() {
        let own = machine::vdso().unwrap();
        let vdso = Vdso::parse(&own.contents).unwrap();
        let offset = vdso.functions["clock_gettime"][0].offset;
        let leading = executable(&vdso.leading_to(&vdso, own.text).unwrap());
        assert!((seconds(leading + offset) - now()).abs() < 2);
        let bare = Vdso { functions: BTreeMap::new(), ..vdso.clone() };
        let calling = executable(&vdso.leading_to(&bare, 0).unwrap());
        assert!((seconds(calling + offset) - now()).abs() < 2);
        if let Some(random) = vdso.functions.get("getrandom") {
            let code = leading + random[0].offset;
            type Random = extern "C" fn(*mut u8, usize, u32, *mut u8, usize) -> isize;
            // SAFETY: code of this signature, made above.
            let random: Random = unsafe { std::mem::transmute(code) };
            let mut bytes = [0u8; 32];
            assert_eq!(random(bytes.as_mut_ptr(), 32, 0, ptr::null_mut(), 0), 32);
            assert_ne!(bytes, [0; 32]);
            assert_eq!(
                random(ptr::null_mut(), 0, 0, bytes.as_mut_ptr(), usize::MAX),
                -(libc::ENOSYS as isize)
            );
        }
    }

    #[test]
    fn what_cannot_be_led_elsewhere_is_named() {
        let vdso = Vdso::parse(&machine::vdso().unwrap().contents).unwrap();
        let mut odd = vdso.clone();
        odd.functions.insert("odd".into(), vec![Function { offset: 0, size: 64 }]);
        assert_eq!(odd.leading_to(&vdso, 0).unwrap_err(), VdsoError::NoMatch { name: "odd".into() });
        let mut small = vdso.clone();
        small.functions.insert("time".into(), vec![Function { offset: 0, size: 4 }]);
        assert_eq!(
            small.leading_to(&vdso, 0).unwrap_err(),
            VdsoError::TooSmall { name: "time".into(), size: 4 }
        );
        assert!(matches!(Vdso::parse(&[0; 100]), Err(VdsoError::Malformed(_))));
        assert!(matches!(Vdso::parse(b""), Err(VdsoError::Malformed(_))));
    }
}
