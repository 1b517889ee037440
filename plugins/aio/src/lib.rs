//! Rings of asynchronous I/O: io_setup(2), fs/aio.c. A ring is a mapping, and its address is the number of its context; the kernel
//! follows when it is moved. Finished requests that nobody has fetched come back in their slots.
//!
//! The kernel shows nobody how many requests are under way. Those of files finish while the tree is frozen, which is waited for; what
//! has not finished then (IOCB_CMD_POLL) is lost, and every dump of a ring says so.

mod dump;
mod kernel;
mod restore;

use stasis_plugin_api::{Host, Mapping, Result, Selector, VmaInfo, export_plugin, register};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::aio::v1::Ring;

struct Aio;

impl Mapping for Aio {
    type Record = Ring;
    const KIND: &'static str = "aio";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::Mapping("/[aio]".into())]
    }

    fn dump(&self, host: &Host<'_>, vma: &VmaInfo) -> Result<Ring> {
        dump::ring(host, vma)
    }

    fn map(&self, _: &Host<'_>, vma: &VmaInfo, record: &Ring) -> Result<()> {
        restore::ring(vma, record)
    }
}

register!(mapping: Aio);
export_plugin! { name: "aio", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }

#[cfg(test)]
mod tests {
    use super::*;
    use kernel::{Context, HEADER, Header};

    /// A place that is free, below the mappings.
    fn place(size: u64) -> VmaInfo {
        // SAFETY: a new mapping, which is taken away again.
        let start = unsafe {
            let (flags, none) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, libc::PROT_NONE);
            let place = libc::mmap(std::ptr::null_mut(), size as usize, none, flags, -1, 0);
            assert_ne!(place, libc::MAP_FAILED);
            libc::munmap(place, size as usize);
            place as u64
        };
        VmaInfo { start, end: start + size, ..VmaInfo::default() }
    }

    #[test]
    fn finished_requests_come_back_in_their_slots() {
        for (head, tail) in [(0, 0), (3, 3), (5, 9), (120, 4)] {
            let count = (tail + 127 - head) % 127;
            let finished: Vec<u8> = (0..count * 32).map(|n| (n % 251) as u8).collect();
            let record = Ring { events: 127, head, tail, finished: finished.clone() };
            let vma = place(4096);
            restore::ring(&vma, &record).unwrap();
            let context = Context(vma.start);
            let header = Header::of(&context.bytes(HEADER)).unwrap();
            assert_eq!((header.events, header.head, header.tail), (127, head, tail));
            // The kernel gives them out, in order, and goes on from there.
            let mut got = Vec::new();
            for _ in 0..count {
                got.extend(context.fetch(1).unwrap());
            }
            assert_eq!(got, finished);
            assert!(context.fetch(1).unwrap().is_empty());
            let file = kernel::empty_file().unwrap();
            context.submit(&file, 200 % 126).unwrap();
            assert_eq!(context.fetch(126).unwrap().len(), 74 * 32);
            context.destroy().unwrap();
        }
    }

    #[test]
    fn damaged_records_are_refused() {
        let vma = place(4096);
        for (events, head, tail, length) in
            [(0, 0, 0, 0), (127, 127, 0, 0), (127, 0, 200, 0), (127, 0, 4, 3 * 32), (500, 0, 0, 0)]
        {
            let record = Ring { events, head, tail, finished: vec![0; length] };
            assert!(restore::ring(&vma, &record).is_err(), "{record:?}");
        }
        assert!(Header::of(&[0; HEADER]).is_none());
        assert!(Header::of(&[1, 2, 3]).is_none());
    }
}
