//! The ring of a packet socket, as memory (Documentation/networking/packet_mmap.rst), and where tasks have it mapped.

use crate::records::{Mapped, Ring};
use stasis_plugin_api::{HookError, Host, Mapping, Result, Selector, VmaInfo};
use std::{
    io::{self, Read, Write},
    os::fd::{AsRawFd, BorrowedFd},
};

/// TP_STATUS_USER: the frame is the program's; otherwise the kernel's.
const USER: u32 = 1;
const CHUNK: usize = 1 << 16;

/// A mapping of our own of a whole ring.
pub struct View<'r> {
    start: *mut u8,
    ring: &'r Ring,
}

impl Ring {
    /// Bytes of it.
    pub fn size(&self) -> usize {
        self.block_size as usize * self.block_count as usize
    }

    /// Where a frame begins.
    fn offset(&self, frame: u32) -> usize {
        let per_block = (self.block_size / self.frame_size.max(1)).max(1);
        (frame / per_block * self.block_size + frame % per_block * self.frame_size) as usize
    }
}

impl<'r> View<'r> {
    /// Maps the ring of a socket.
    pub fn new(fd: BorrowedFd<'_>, ring: &'r Ring) -> Result<Self> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping where the kernel likes.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), ring.size(), prot, flags, fd.as_raw_fd(), 0) };
        match start == libc::MAP_FAILED {
            true => Err(HookError::failed("mapping a ring", io::Error::last_os_error())),
            false => Ok(Self { start: start.cast(), ring }),
        }
    }

    /// The n-th word of a frame's header (struct tpacket2_hdr).
    fn word(&self, frame: u32, n: usize) -> u32 {
        let at = self.ring.offset(frame) + 4 * n;
        // SAFETY: the frame is one of the ring, whose headers are longer than the words asked for; the kernel may write it at
        // the same time.
        unsafe { self.start.add(at).cast::<u32>().read_volatile() }
    }

    /// Whether a frame holds a packet for the program.
    pub fn is_filled(&self, frame: u32) -> bool {
        self.word(frame, 0) & USER != 0
    }

    /// The frame that the kernel fills next: after the last one that it has filled. `None` if that cannot be told.
    pub fn next(&self) -> Option<u32> {
        let count = self.ring.frame_count;
        let after = |frame: u32| (frame + 1) % count;
        let ends: Vec<u32> = (0..count).filter(|&f| self.is_filled(f) && !self.is_filled(after(f))).collect();
        match ends[..] {
            [end] => return Some(after(end)),
            [] => {}
            // Handled in another order than that of arrival.
            _ => return None,
        }
        // All or none wait to be handled: the times of arrival tell (tp_sec, tp_nsec).
        let time = |frame: u32| (self.word(frame, 4), self.word(frame, 5));
        let latest = (0..count).max_by_key(|&frame| time(frame))?;
        if time(latest) == (0, 0) { Some(0) } else { Some(after(latest)) }
    }
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        // SAFETY: ours, and nobody has a reference into it.
        unsafe { libc::munmap(self.start.cast(), self.ring.size()) };
    }
}

pub struct Rings;

fn blob(handle: u32) -> String {
    format!("ring-{handle}")
}

impl Mapping for Rings {
    type Record = Mapped;
    const KIND: &'static str = "ring";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::Mapping("socket:[".into())]
    }

    fn dump(&self, host: &Host<'_>, vma: &VmaInfo) -> Result<Mapped> {
        let refuse = |why: &str, remedy: &str| Err(HookError::unsupported(vma.path.as_str(), why, remedy));
        let Some(handle) = host.handle_of(vma.dev, vma.ino) else {
            return refuse("no task has the mapped socket open any more", "keep it open");
        };
        if !vma.shared {
            return refuse("a ring is mapped privately", "map it shared");
        }
        let name = blob(handle);
        let mut writer = host.blob_writer(&name);
        let mut buffer = vec![0; CHUNK];
        let mut at = vma.start;
        while at < vma.end && !host.is_dry_run() {
            let part = (vma.end - at).min(CHUNK as u64) as usize;
            host.read_memory(vma.pid, at, &mut buffer[..part])?;
            writer.write_all(&buffer[..part])?;
            at += part as u64;
        }
        Ok(Mapped { handle })
    }

    fn map(&self, host: &Host<'_>, vma: &VmaInfo, record: &Mapped) -> Result<()> {
        let socket = host.open_handle(record.handle)?;
        let length = (vma.end - vma.start) as usize;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        let address = vma.start as *mut libc::c_void;
        // SAFETY: core has kept this place free for the mapping.
        let place =
            unsafe { libc::mmap(address, length, prot, flags, socket.as_raw_fd(), vma.offset as i64) };
        if place != address {
            return Err(HookError::failed("mapping a ring", io::Error::last_os_error()));
        }
        // SAFETY: just mapped, with this length; the socket is not bound yet, so the kernel leaves it alone.
        let contents = unsafe { std::slice::from_raw_parts_mut(place.cast::<u8>(), length) };
        let name = blob(record.handle);
        host.blob_reader(&name).read_exact(contents)?;
        // SAFETY: the same place.
        match unsafe { libc::mprotect(place, length, vma.prot.cast_signed()) } {
            0 => Ok(()),
            _ => Err(HookError::failed("mprotect of a ring", io::Error::last_os_error())),
        }
    }
}
