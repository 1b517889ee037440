//! Descriptor tables, open file descriptions and path-backed files: what core keeps for every kind of descriptor.

pub mod table;

use crate::image::records::PathRef;
use nix::sys::stat::FileStat;

/// A path with what identifies the file behind it.
pub fn path_ref(path: Vec<u8>, stat: &FileStat) -> PathRef {
    PathRef {
        path,
        deleted: stat.st_nlink == 0,
        dev: stat.st_dev,
        ino: stat.st_ino,
        mode: stat.st_mode,
        size: stat.st_size as u64,
    }
}
