//! Builds the no_std programs that run inside other tasks, and flattens each into a memory image.
//!
//! `$RUSTC` is called directly: a nested cargo would wait for the target directory's lock and inherit flags. The result
//! is `$OUT_DIR/NAME.bin` and `$OUT_DIR/NAME.rs`, the latter an expression of type `inject::blob::Blob`.
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::{env, fs, io};

use object::read::elf::ProgramHeader as _;
use object::{Object as _, ObjectSegment as _, ObjectSymbol as _, RelocationFlags, elf};

const PAGE: u64 = 4096;

const LINK: &str = "-nostartfiles -nostdlib -static-pie -Wl,-z,noexecstack -Wl,--build-id=none -Wl,-z,norelro \
                    -Wl,--no-eh-frame-hdr";

fn variable(name: &str) -> PathBuf {
    env::var_os(name).map(PathBuf::from).unwrap_or_default()
}

/// Builds and flattens the crate in the directory `name` beside `core/`; ends the build if it cannot.
pub fn build(name: &str) {
    let dir = variable("CARGO_MANIFEST_DIR").join("..").join(name);
    // The restorer has a file of the parasite.
    for source in [dir.join("src"), dir.join("../parasite/src/mem.rs")] {
        println!("cargo::rerun-if-changed={}", source.display());
    }
    if let Err(why) = compile(&dir, name) {
        println!("cargo::error=building {name}: {why}");
        exit(1);
    }
}

/// Compiles `DIR/src/main.rs` to a static-pie ELF and writes its memory image and description to `$OUT_DIR`.
fn compile(dir: &Path, name: &str) -> io::Result<()> {
    let out = variable("OUT_DIR");
    let program = out.join(format!("{name}.elf"));
    let status = Command::new(variable("RUSTC"))
        .args(["--edition=2024", "--crate-type=bin", "--target=x86_64-unknown-linux-gnu"])
        .arg(format!("--crate-name={name}"))
        .args(["-Cpanic=abort", "-Copt-level=s", "-Clto=fat", "-Ccodegen-units=1", "-Crelocation-model=pie"])
        .args([
            "-Ctarget-feature=+crt-static",
            "-Cstrip=symbols",
            "-Cdebug-assertions=off",
            "-Coverflow-checks=off",
        ])
        .arg(format!("-Clink-args={LINK}"))
        .arg(format!("--remap-path-prefix={}=", dir.display()))
        .arg("-o")
        .arg(&program)
        .arg(dir.join("src/main.rs"))
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .status()?;
    if !status.success() {
        return Err(io::Error::other(format!("rustc: {status}")));
    }
    flatten(&fs::read(program)?, &out, name)
}

/// Lays the segments out as the kernel would, and collects what must be added to the load address.
fn flatten(file: &[u8], out: &Path, name: &str) -> io::Result<()> {
    let bad = |what: String| io::Error::other(what);
    let parsed =
        object::read::elf::ElfFile64::<object::Endianness>::parse(file).map_err(|e| bad(e.to_string()))?;
    let end = parsed.segments().map(|s| s.address() + s.size()).max().unwrap_or(0);
    let mut image = vec![0u8; end.next_multiple_of(PAGE) as usize];
    let mut segments = String::new();
    for segment in parsed.segments() {
        let data = segment.data().map_err(|e| bad(e.to_string()))?;
        image[segment.address() as usize..][..data.len()].copy_from_slice(data);
        let flags = segment.elf_program_header().p_flags(object::Endianness::Little).0;
        let bit = |from: u32, to: i32| if flags & from != 0 { to } else { 0 };
        let protection = bit(elf::PF_R.0, 1) | bit(elf::PF_W.0, 2) | bit(elf::PF_X.0, 4);
        let start = segment.address() & !(PAGE - 1);
        let len = (segment.address() + segment.size()).next_multiple_of(PAGE) - start;
        let _ =
            write!(segments, "Segment {{ offset: {start:#x}, len: {len:#x}, protection: {protection} }}, ");
    }
    let mut relocations = String::new();
    for (offset, relocation) in parsed.dynamic_relocations().into_iter().flatten() {
        match relocation.flags() {
            RelocationFlags::Elf { r_type: elf::R_X86_64_RELATIVE } => {}
            other => {
                return Err(bad(format!(
                    "relocation {other:?} at {offset:#x}: an undefined symbol, or TLS?"
                )));
            }
        }
        image[offset as usize..][..8].copy_from_slice(&(relocation.addend() as u64).to_le_bytes());
        let _ = write!(relocations, "{offset:#x}, ");
    }
    if let Some(symbol) =
        parsed.dynamic_symbols().find(|s| s.is_undefined() && !s.name().unwrap_or("").is_empty())
    {
        return Err(bad(format!("undefined symbol {}", symbol.name().unwrap_or("?"))));
    }
    fs::write(out.join(format!("{name}.bin")), &image)?;
    fs::write(
        out.join(format!("{name}.rs")),
        format!(
            "Blob {{ image: include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.bin\")), entry: {:#x}, \
             relocations: &[{relocations}], segments: &[{segments}] }}\n",
            parsed.entry()
        ),
    )
}
