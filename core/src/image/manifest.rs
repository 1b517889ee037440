//! The manifest: a few lines of text that make an image complete.
//!
//! ```text
//! stasis image 1
//! core.img 123456 89abcdef
//! pages-0.img 4096
//! checksum 01234567
//! ```
//! A line per file: name, length, and for framed files the trailer's checksum. The last line is the crc32 of all before.

use super::{Damage, FORMAT_VERSION, ImageError, MANIFEST_FILE, MANIFEST_TEMPORARY, Result, error::At};
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

/// A manifest has a line of 40 bytes per file, and there are as many page files as workers.
const MAX_LENGTH: u64 = 1 << 20;

/// What the manifest says of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub length: u64,
    pub checksum: Option<u32>,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Manifest {
    pub format: u32,
    pub files: BTreeMap<String, Entry>,
}

impl Manifest {
    pub fn new() -> Self {
        Self { format: FORMAT_VERSION, files: BTreeMap::new() }
    }

    fn render(&self) -> String {
        let mut text = format!("stasis image {}\n", self.format);
        for (name, Entry { length, checksum }) in &self.files {
            // Writing to a String cannot fail.
            let _ = match checksum {
                Some(checksum) => writeln!(text, "{name} {length} {checksum:08x}"),
                None => writeln!(text, "{name} {length}"),
            };
        }
        let checksum = crc32fast::hash(text.as_bytes());
        let _ = writeln!(text, "checksum {checksum:08x}");
        text
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let format = lines.next()?.strip_prefix("stasis image ")?.parse().ok()?;
        let mut files = BTreeMap::new();
        for line in lines {
            let mut words = line.split(' ');
            let name = words.next()?;
            if name == "checksum" {
                break;
            }
            let length = words.next()?.parse().ok()?;
            let checksum = match words.next() {
                Some(word) => Some(u32::from_str_radix(word, 16).ok()?),
                None => None,
            };
            files.insert(name.to_owned(), Entry { length, checksum });
        }
        let manifest = Self { format, files };
        // Whatever is not exactly what we would have written is damaged; this covers the checksum, too.
        (manifest.render() == text).then_some(manifest)
    }

    /// Writes it into `directory`, complete or not at all.
    pub fn write(&self, directory: &Path) -> Result<u64> {
        let temporary = directory.join(MANIFEST_TEMPORARY);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)
            .at("create", &temporary)?;
        let text = self.render();
        file.write_all(text.as_bytes()).at("write", &temporary)?;
        file.sync_all().at("sync", &temporary)?;
        let path = directory.join(MANIFEST_FILE);
        std::fs::rename(&temporary, &path).at("create", &path)?;
        File::open(directory).and_then(|directory| directory.sync_all()).at("sync", directory)?;
        Ok(text.len() as u64)
    }

    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(MANIFEST_FILE);
        let file = match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                std::fs::read_dir(directory).at("open", directory)?;
                return Err(ImageError::Incomplete { directory: directory.into() });
            }
            other => other.at("open", &path)?,
        };
        let mut bytes = Vec::new();
        file.take(MAX_LENGTH).read_to_end(&mut bytes).at("read", &path)?;
        let manifest = std::str::from_utf8(&bytes).ok().and_then(Self::parse);
        let manifest = manifest.ok_or_else(|| Damage::Manifest.at(&path, 0))?;
        if manifest.format != FORMAT_VERSION {
            return Err(ImageError::Format { path, found: manifest.format });
        }
        Ok(manifest)
    }
}
