//! System V shared memory (shmget(2)) that tasks have attached. Segments of an IPC namespace of the tree come with that
//! namespace (plugin ns-ipc); of those of the IPC namespace that stasis runs in, the ones that only the tree has attached are kept here.
//!
//! A mapping names its segment; the segments themselves are made in the command before any task is, and filled: each with the id it had.
//! One that is still there, with nobody attached, is used again with the contents of the image. Not kept: the times of a segment and the
//! pids of its creator and last user.

mod dump;
mod kernel;
mod restore;

use stasis_plugin_api::{
    Event, Host, Lifecycle, Mapping, Result, Selector, VmaInfo, export_plugin, register,
};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::sysvshm::v1::Attachment;

struct Attachments;

impl Mapping for Attachments {
    type Record = Attachment;
    const KIND: &'static str = "sysv-attachment";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::Mapping(kernel::PREFIX.into())]
    }

    fn dump(&self, host: &Host<'_>, vma: &VmaInfo) -> Result<Attachment> {
        dump::attachment(host, vma)
    }

    fn map(&self, _: &Host<'_>, vma: &VmaInfo, record: &Attachment) -> Result<()> {
        restore::attach(vma, record)
    }
}

struct Segments;

impl Lifecycle for Segments {
    const KIND: &'static str = "sysv-segments";

    fn event(&self, host: &Host<'_>, event: Event) -> Result<()> {
        match event {
            Event::BeforeRestore => restore::make_all(host),
            Event::Restored => restore::attached(host),
            _ => Ok(()),
        }
    }
}

register!(mapping: Attachments);
register!(lifecycle: Segments);
export_plugin! { name: "sysvipc", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::stasis::sysvshm::v1::{Extent, Segment};
    use prost::Message;
    use stasis_plugin_api::{prost, testing::Kit};

    fn kit(segment: &Segment, data: &[u8]) -> Kit {
        let kit = Kit::new();
        let list = segment.encode_length_delimited_to_vec();
        kit.host.blobs.borrow_mut().insert(dump::SEGMENTS.to_owned(), list);
        kit.host.blobs.borrow_mut().insert(dump::data(segment.id), data.to_vec());
        kit
    }

    #[test]
    fn a_segment_is_made_with_its_id_and_contents_and_attached_in_parts() {
        let extents = vec![Extent { offset: 4096, length: 4096 }];
        let segment =
            Segment { id: 777_777, key: 0, size: 20_000, mode: 0o600, extents, ..Segment::default() };
        let kit = kit(&segment, &[7; 4096]);
        kit.with_host(restore::make_all).unwrap();
        let stat = kernel::stat(segment.id).unwrap();
        assert_eq!((stat.size, stat.mode & 0o777, stat.attached), (20_000, 0o600, 0));
        // SAFETY: a new mapping, taken away again: a place that is free.
        let start = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let place = libc::mmap(std::ptr::null_mut(), 8192, libc::PROT_NONE, flags, -1, 0);
            libc::munmap(place, 8192);
            place as u64
        };
        let prot = (libc::PROT_READ | libc::PROT_WRITE) as u32;
        let vma =
            VmaInfo { start, end: start + 8192, offset: 4096, prot, shared: true, ..VmaInfo::default() };
        restore::attach(&vma, &Attachment { segment: segment.id, read_only: false }).unwrap();
        // SAFETY: attached above.
        let bytes = unsafe { std::slice::from_raw_parts(start as *const u8, 8192) };
        assert!(bytes[..4096].iter().all(|byte| *byte == 7) && bytes[4096..].iter().all(|byte| *byte == 0));
        assert_eq!(kernel::stat(segment.id).unwrap().attached, 1);
        // Somebody has it: it is not ours to fill.
        assert!(kit.with_host(restore::make_all).unwrap_err().what.contains("in use"));
        // SAFETY: nobody has a reference into it any more.
        unsafe { libc::munmap(start as *mut _, 8192) };
        kernel::remove(segment.id).unwrap();
        assert!(kernel::stat(segment.id).is_none());
    }

    #[test]
    fn damaged_lists_are_refused() {
        let segment = Segment { id: 777_778, size: 4096, mode: 0o600, ..Segment::default() };
        let beyond = vec![Extent { offset: 4096, length: 1 << 40 }];
        for bad in [Segment { extents: beyond, ..segment.clone() }, Segment { size: 0, ..segment }] {
            let kit = kit(&bad, &[1; 10]);
            assert!(kit.with_host(restore::make_all).is_err());
            // What the guardian would do, and only if something had been made.
            let undo = kit.host.undo.borrow().iter().map(|entry| entry.1.clone()).collect::<Vec<_>>();
            assert_eq!(kernel::stat(bad.id).is_some(), !undo.is_empty());
            assert!(undo.iter().all(|steps| *steps == [kernel::removal(bad.id)]));
        }
    }
}
