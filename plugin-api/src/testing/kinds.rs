//! The kit for kinds of mappings and of per-task state.

use super::{Kit, host};
use crate::{HookError, Mapping, Result, Task, TaskInfo, VmaInfo, register};
use abi_stable::std_types::ROption;
use std::{fs, io};

impl Kit {
    /// Dumps the mapping that begins at `address`, takes it away, and makes it anew where it was, by way of another place, as core
    /// does.
    ///
    /// # Safety
    ///
    /// For that time nothing is at the mapping's place: nobody may have a reference into it.
    pub unsafe fn remap<T: Mapping>(&mut self, hook: T, address: u64) -> Result<()> {
        let hook = register::mapping(hook);
        let vma = vma_at(address)?;
        let record = self.host.call(|host| hook.dump(host, &vma).into_result())?;
        let length = (vma.end - vma.start) as usize;
        // A reservation where the plugin may put it; another keeps the mapping's own place.
        let place = reserve(None, length)?;
        reserve(Some(vma.start), length)?;
        let temporary = VmaInfo {
            pid: vma.pid,
            start: place,
            end: place + length as u64,
            prot: vma.prot,
            offset: vma.offset,
            ..VmaInfo::default()
        };
        self.host.restoring = true;
        let made = self.host.call(|host| hook.map(host, &temporary, record.as_slice().into()).into_result());
        self.host.restoring = false;
        made?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let home = vma.start as *mut libc::c_void;
        // SAFETY: from the reservation, which is ours, to the place that the caller has lent.
        let moved = unsafe { libc::mremap(place as *mut libc::c_void, length, length, flags, home) };
        match moved == home {
            true => Ok(()),
            false => Err(HookError::failed("moving the mapping home", io::Error::last_os_error())),
        }
    }

    /// The record that a kind makes of this process, written and read as in an image; `None` if there is nothing to keep.
    pub fn dump_task<T: Task>(&self, hook: T) -> Result<Option<T::Record>> {
        let hook = register::task(hook);
        let bytes = self.host.call(|host| hook.dump(host, &task()).into_result())?;
        let ROption::RSome(bytes) = bytes else { return Ok(None) };
        let record = prost::Message::decode(bytes.as_slice());
        record.map(Some).map_err(|error| HookError::invalid(format!("record of {}: {error}", T::KIND)))
    }

    /// Gives this process its state back.
    pub fn restore_task<T: Task>(&mut self, hook: T, record: &T::Record) -> Result<()> {
        let hook = register::task(hook);
        let bytes = prost::Message::encode_to_vec(record);
        self.host.restoring = true;
        let restored =
            self.host.call(|host| hook.restore(host, &task(), bytes.as_slice().into()).into_result());
        self.host.restoring = false;
        restored
    }
}

fn task() -> TaskInfo {
    TaskInfo { pid: host::own_pid(), name: "test".into(), ..TaskInfo::default() }
}

/// Room without access; at `address`, in place of what is there.
fn reserve(address: Option<u64>, length: usize) -> Result<u64> {
    let fixed = if address.is_some() { libc::MAP_FIXED } else { 0 };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | fixed;
    let at = address.unwrap_or_default() as *mut libc::c_void;
    // SAFETY: a new mapping, or one in place of what the caller of `remap` has lent.
    let place = unsafe { libc::mmap(at, length, libc::PROT_NONE, flags, -1, 0) };
    match place == libc::MAP_FAILED {
        true => Err(HookError::failed("reserving a place", io::Error::last_os_error())),
        false => Ok(place as u64),
    }
}

/// What proc_pid_maps(5) says of the mapping that begins at an address.
fn vma_at(address: u64) -> Result<VmaInfo> {
    let maps = fs::read_to_string("/proc/self/maps");
    let maps = maps.map_err(|error| HookError::failed("reading /proc/self/maps", error))?;
    let found = maps.lines().find_map(|line| vma(line).filter(|vma| vma.start == address));
    found.ok_or_else(|| HookError::invalid(format!("no mapping begins at {address:#x}")))
}

fn vma(line: &str) -> Option<VmaInfo> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let hexadecimal = |text| u64::from_str_radix(text, 16).ok();
    let access = words.next()?;
    let allowed = |letter, bit: i32| if access.contains(letter) { bit.cast_unsigned() } else { 0 };
    let offset = hexadecimal(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    let dev = libc::makedev(hexadecimal(major)? as u32, hexadecimal(minor)? as u32);
    Some(VmaInfo {
        pid: host::own_pid(),
        start: hexadecimal(start)?,
        end: hexadecimal(end)?,
        prot: allowed('r', libc::PROT_READ) | allowed('w', libc::PROT_WRITE) | allowed('x', libc::PROT_EXEC),
        shared: access.contains('s'),
        offset,
        dev,
        ino: words.next()?.parse().ok()?,
        path: words.collect::<Vec<_>>().join(" ").into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Host, Selector};
    use std::io::{Read, Write};

    #[derive(Clone, PartialEq, prost::Message)]
    struct Note {
        #[prost(bytes, tag = "1")]
        text: Vec<u8>,
    }
    impl prost::Name for Note {
        const NAME: &'static str = "Note";
        const PACKAGE: &'static str = "kit.v1";
    }

    /// Shared memory, by its contents.
    struct Shared;
    impl Mapping for Shared {
        type Record = Note;
        const KIND: &'static str = "shared";
        fn selectors(&self) -> Vec<Selector> {
            vec![Selector::Mapping("/dev/zero".into())]
        }
        fn dump(&self, host: &Host<'_>, vma: &VmaInfo) -> Result<Note> {
            assert!(vma.shared && vma.prot == (libc::PROT_READ | libc::PROT_WRITE) as u32);
            let mut contents = vec![0; (vma.end - vma.start) as usize];
            host.read_memory(vma.pid, vma.start, &mut contents)?;
            host.blob_writer("shared").write_all(&contents)?;
            Ok(Note { text: vma.path.to_string().into_bytes() })
        }
        fn map(&self, host: &Host<'_>, vma: &VmaInfo, record: &Note) -> Result<()> {
            assert!(record.text.starts_with(b"/dev/zero"));
            let length = (vma.end - vma.start) as usize;
            let (prot, flags) =
                (vma.prot.cast_signed(), libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
            // SAFETY: the kit has kept this place free.
            let contents = unsafe {
                let place = libc::mmap(vma.start as *mut libc::c_void, length, prot, flags, -1, 0);
                std::slice::from_raw_parts_mut(place.cast::<u8>(), length)
            };
            Ok(host.blob_reader("shared").read_exact(contents)?)
        }
    }

    #[test]
    fn a_mapping_comes_back_with_its_contents() {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping; nobody else knows of it, and the pointer is used only while it is there.
        unsafe {
            let place = libc::mmap(std::ptr::null_mut(), 8192, prot, flags, -1, 0).cast::<u8>();
            place.add(5000).write(77);
            Kit::new().remap(Shared, place as u64).unwrap();
            assert_eq!((place.add(5000).read(), place.read()), (77, 0));
            libc::munmap(place.cast(), 8192);
        }
        // SAFETY: no mapping begins there.
        let nothing = unsafe { Kit::new().remap(Shared, 1) };
        assert!(nothing.unwrap_err().to_string().contains("no mapping begins"));
    }

    /// The name of the first thread (prctl(2)), as an example.
    struct Name;
    impl Task for Name {
        type Record = Note;
        const KIND: &'static str = "name";
        fn dump(&self, host: &Host<'_>, task: &TaskInfo) -> Result<Option<Note>> {
            assert_eq!(host.current_task(), 0);
            let text = fs::read(format!("/proc/{}/comm", task.pid))?;
            Ok((!text.is_empty()).then_some(Note { text }))
        }
        fn restore(&self, host: &Host<'_>, task: &TaskInfo, record: &Note) -> Result<()> {
            assert_eq!(host.current_task(), task.pid);
            Ok(fs::write("/proc/self/comm", &record.text)?)
        }
    }

    #[test]
    fn a_task_gets_its_state_back() {
        let mut kit = Kit::new();
        let record = kit.dump_task(Name).unwrap().unwrap();
        fs::write("/proc/self/comm", "other").unwrap();
        kit.restore_task(Name, &record).unwrap();
        assert_eq!(fs::read("/proc/self/comm").unwrap(), record.text);
    }
}
