//! The files beside an image that callers of CRIU look for. Each has two magic numbers, and then one record after its size
//! (CRIU's images, "Image file format"); all numbers are little-endian.

use super::records::{DumpStats, Inventory, RestoreStats, Stats};
use crate::{dump::DumpReport, memory, restore::RestoreReport};
use prost::Message;
use std::{fs, io, path::Path, time::Duration};

/// Of images.
const IMAGE_MAGIC: u32 = 0x5456_4319;
const INVENTORY_MAGIC: u32 = 0x5831_3116;
/// Of what is not needed for a restore.
const SERVICE_MAGIC: u32 = 0x5510_5940;
const STATS_MAGIC: u32 = 0x5709_3306;
/// The version of the format of images that have the first magic.
const FORMAT: u32 = 2;

/// That a dump is complete, to those who look for this name.
pub const INVENTORY: &str = "inventory.img";

fn write(path: &Path, magics: [u32; 2], record: &impl Message) -> io::Result<()> {
    let record = record.encode_to_vec();
    let size = u32::try_from(record.len()).map_err(io::Error::other)?;
    let numbers = [magics[0], magics[1], size].into_iter().flat_map(u32::to_le_bytes);
    fs::write(path, numbers.chain(record).collect::<Vec<u8>>())
}

fn microseconds(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

/// Writes `inventory.img`.
pub fn write_inventory(images_dir: &Path) -> io::Result<()> {
    write(&images_dir.join(INVENTORY), [IMAGE_MAGIC, INVENTORY_MAGIC], &Inventory { img_version: FORMAT })
}

/// Writes `stats-dump`. Pages go from the tasks to the image in one copy, so all their time is that of one step; pages without contents
/// are not counted as scanned, since the kernel leaves them out.
pub fn write_dump_stats(directory: &Path, report: &DumpReport) -> io::Result<()> {
    let pages = report.page_bytes / memory::PAGE;
    let dump = DumpStats {
        freezing_time: microseconds(report.freezing),
        frozen_time: microseconds(report.frozen),
        memdump_time: microseconds(report.copying),
        memwrite_time: 0,
        pages_scanned: pages,
        pages_skipped_parent: 0,
        pages_written: pages,
        pages_lazy: 0,
    };
    let stats = Stats { dump: Some(dump), restore: None };
    write(&directory.join("stats-dump"), [SERVICE_MAGIC, STATS_MAGIC], &stats)
}

/// Writes `stats-restore`. No page is compared with another, and forks are no step of their own.
pub fn write_restore_stats(directory: &Path, report: &RestoreReport) -> io::Result<()> {
    let restore = RestoreStats {
        pages_compared: 0,
        pages_skipped_cow: 0,
        forking_time: 0,
        restore_time: microseconds(report.elapsed),
    };
    let stats = Stats { dump: None, restore: Some(restore) };
    write(&directory.join("stats-restore"), [SERVICE_MAGIC, STATS_MAGIC], &stats)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_as_others_read_them() {
        let directory = tempfile::tempdir().unwrap();
        write_inventory(directory.path()).unwrap();
        let inventory = fs::read(directory.path().join("inventory.img")).unwrap();
        // Two magics, two bytes, field 1 is 2: written down by hand.
        let expected = [0x19, 0x43, 0x56, 0x54, 0x16, 0x31, 0x31, 0x58, 2, 0, 0, 0, 8, 2];
        assert_eq!(inventory, expected);

        let milliseconds = Duration::from_millis;
        let report = DumpReport {
            freezing: milliseconds(1),
            frozen: milliseconds(2),
            copying: milliseconds(3),
            page_bytes: 5 << 12,
            ..DumpReport::default()
        };
        write_dump_stats(directory.path(), &report).unwrap();
        let bytes = fs::read(directory.path().join("stats-dump")).unwrap();
        assert_eq!(bytes[..8], [0x40, 0x59, 0x10, 0x55, 0x06, 0x33, 0x09, 0x57]);
        assert_eq!(usize::from(bytes[8]), bytes.len() - 12);
        let dump = Stats::decode(&bytes[12..]).unwrap().dump.unwrap();
        assert_eq!((dump.freezing_time, dump.frozen_time, dump.memdump_time), (1000, 2000, 3000));
        assert_eq!((dump.pages_written, dump.pages_lazy), (5, 0));

        let report = RestoreReport { root_pid: 1, tasks: 1, threads: 1, elapsed: milliseconds(7) };
        write_restore_stats(directory.path(), &report).unwrap();
        let bytes = fs::read(directory.path().join("stats-restore")).unwrap();
        assert_eq!(Stats::decode(&bytes[12..]).unwrap().restore.unwrap().restore_time, 7000);
    }
}
