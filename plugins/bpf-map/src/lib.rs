//! BPF maps (bpf(2)) that are used as tables by processes alone: hashes, arrays and tries, with their entries.
//!
//! A map that a loaded program uses belongs to that program, which stays in the kernel: it is refused. A map that a process outside
//! of the tree has open, too, becomes a copy. The order of last use of an LRU map is that in which its entries are
//! listed.

use kernel::{Create, MapInfo};
use records::stasis::bpfmap::v1::Map;
use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, Selector, export_plugin,
    register,
};
use std::{
    fs,
    io::{self, BufReader, BufWriter, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

mod kernel;
mod records {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}

/// Number (enum bpf_map_type), and whether an entry has a value for each processor.
const KINDS: [(u32, bool); 7] = [
    (1, false),  // BPF_MAP_TYPE_HASH
    (2, false),  // BPF_MAP_TYPE_ARRAY
    (5, true),   // BPF_MAP_TYPE_PERCPU_HASH
    (6, true),   // BPF_MAP_TYPE_PERCPU_ARRAY
    (9, false),  // BPF_MAP_TYPE_LRU_HASH
    (10, true),  // BPF_MAP_TYPE_LRU_PERCPU_HASH
    (11, false), // BPF_MAP_TYPE_LPM_TRIE
];

/// BPF_F_NO_PREALLOC, NO_COMMON_LRU, ZERO_SEED, RDONLY_PROG, WRONLY_PROG.
const KNOWN_FLAGS: u32 = 1 | 1 << 1 | 1 << 6 | 1 << 7 | 1 << 8;
const RDONLY: u32 = 1 << 3;
const WRONLY: u32 = 1 << 4;

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}

/// How many processors there can ever be: a range such as `0-3`.
fn processors() -> Result<u32> {
    let text = fs::read_to_string("/sys/devices/system/cpu/possible").map_err(failed("count processors"))?;
    let last = text.trim().rsplit(['-', ',']).next().and_then(|last| last.parse::<u32>().ok());
    last.map(|last| last + 1).ok_or_else(|| HookError::invalid(format!("processors {text:?}")))
}

fn is_per_processor(kind: u32) -> Option<bool> {
    KINDS.iter().find(|known| known.0 == kind).map(|known| known.1)
}

impl Map {
    /// Bytes of a key and of all values of an entry.
    fn lengths(&self) -> Result<(usize, usize)> {
        let value = match self.processors {
            0 => self.value_size as usize,
            count => self.value_size.next_multiple_of(8) as usize * count as usize,
        };
        // What the kernel would refuse, and more than a buffer should be.
        if self.key_size == 0 || self.key_size > 1 << 16 || value == 0 || value > 1 << 28 {
            return Err(HookError::invalid("a BPF map of impossible size"));
        }
        Ok((self.key_size as usize, value))
    }
}

fn access(handle: &HandleInfo) -> u32 {
    match handle.status_flags as i32 & libc::O_ACCMODE {
        libc::O_RDONLY => RDONLY,
        libc::O_WRONLY => WRONLY,
        _ => 0,
    }
}

fn write_entries(map: BorrowedFd<'_>, record: &Map, mut to: impl Write) -> Result<u64> {
    let (key_len, value_len) = record.lengths()?;
    let (mut key, mut next, mut value) = (vec![0; key_len], vec![0; key_len], vec![0; value_len]);
    let mut count = 0;
    let mut more = kernel::next_key(map, None, &mut next).map_err(failed("list the keys of a BPF map"))?;
    while more && count < u64::from(record.max_entries) {
        std::mem::swap(&mut key, &mut next);
        if kernel::lookup(map, &key, &mut value).map_err(failed("read an entry of a BPF map"))? {
            to.write_all(&key)
                .and_then(|()| to.write_all(&value))
                .map_err(failed("write entries of a BPF map"))?;
            count += 1;
        }
        more = kernel::next_key(map, Some(&key), &mut next).map_err(failed("list the keys of a BPF map"))?;
    }
    to.flush().map_err(failed("write entries of a BPF map"))?;
    Ok(count)
}

fn read_entries(map: BorrowedFd<'_>, record: &Map, mut from: impl Read) -> Result<()> {
    let (key_len, value_len) = record.lengths()?;
    let (mut key, mut value) = (vec![0; key_len], vec![0; value_len]);
    for _ in 0..record.entries {
        from.read_exact(&mut key)
            .and_then(|()| from.read_exact(&mut value))
            .map_err(failed("entries of a BPF map"))?;
        kernel::update(map, &key, &value).map_err(failed("write an entry of a BPF map"))?;
    }
    Ok(())
}

/// What entries alone would not bring back.
fn refuse_more_than_a_table(info: &MapInfo, label: &str) -> Result<()> {
    let apart = "let the program make a plain map, or close it";
    let (why, remedy) = if is_per_processor(info.kind).is_none() {
        (format!("maps of type {} cannot be listed or hold more than data", info.kind), apart)
    } else if info.flags & !KNOWN_FLAGS != 0 || info.extra != 0 || info.ifindex != 0 {
        (format!("its flags {:#x} ask for more than a table", info.flags), apart)
    } else if info.btf_id != 0 {
        ("it has type information (BTF)".into(), "let the program make it without")
    } else if let Some(program) =
        kernel::user_of(info.id).map_err(failed("look for programs of a BPF map"))?
    {
        let why = format!("the loaded BPF program {program} uses it, and stays in the kernel");
        (why, "unload the program, or pin the map and let the tree open it again")
    } else {
        return Ok(());
    };
    Err(HookError::unsupported(label, why, remedy))
}

struct Maps;

impl Descriptor for Maps {
    type Record = Map;
    const KIND: &'static str = "bpf-map";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::AnonInode("bpf-map".into())]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
        let id = handle.field("map_id")?;
        let label = format!("bpf-map:[{id}]");
        refuse_more_than_a_table(&kernel::info(fd).map_err(failed("ask for a BPF map"))?, &label)?;
        Ok(Described { identity: id.into(), description: label.into(), ..Described::default() })
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Map>> {
        let Some(handle) = object.handles.iter().find(|handle| access(handle) != WRONLY) else {
            let why = "it is open for writing only";
            return Err(HookError::unsupported(
                object.description.as_str(),
                why,
                "keep a descriptor that can read it",
            ));
        };
        let owned = host.open_handle(handle.id)?;
        let map = owned.as_fd();
        let info = kernel::info(map).map_err(failed("ask for a BPF map"))?;
        let mut record = Map {
            r#type: info.kind,
            key_size: info.key_size,
            value_size: info.value_size,
            max_entries: info.max_entries,
            flags: info.flags,
            name: info.name.iter().copied().take_while(|&byte| byte != 0).collect(),
            frozen: handle.field("frozen").is_ok_and(|frozen| frozen == "1"),
            processors: if is_per_processor(info.kind) == Some(true) { processors()? } else { 0 },
            access: object.handles.iter().map(access).collect(),
            ..Map::default()
        };
        if !host.is_dry_run() {
            let name = object.id.to_string();
            record.entries = write_entries(map, &record, BufWriter::new(host.blob_writer(&name)))?;
        }
        Ok(Dumped::new(record))
    }

    fn create(&self, host: &Host<'_>, object: &ObjectInfo, record: &Map) -> Result<Vec<OwnedFd>> {
        let per_processor = is_per_processor(record.r#type)
            .ok_or_else(|| HookError::invalid(format!("no BPF map of type {}", record.r#type)))?;
        if per_processor && processors()? != record.processors {
            let what = format!("a BPF map has values for {} processors", record.processors);
            return Err(
                HookError::invalid(what).remedy("restore on a machine with as many possible processors")
            );
        }
        let mut create = Create {
            kind: record.r#type,
            key_size: record.key_size,
            value_size: record.value_size,
            max_entries: record.max_entries,
            flags: record.flags,
            ..Create::default()
        };
        let length = record.name.len().min(create.name.len() - 1);
        create.name[..length].copy_from_slice(&record.name[..length]);
        let map = kernel::create(&create).map_err(|error| {
            HookError::failed("make a BPF map", error).remedy("needs CAP_BPF in the first user namespace")
        })?;
        let name = object.id.to_string();
        read_entries(map.as_fd(), record, BufReader::new(host.blob_reader(&name)))?;
        if record.frozen {
            kernel::freeze(map.as_fd()).map_err(failed("freeze a BPF map"))?;
        }
        let id = kernel::info(map.as_fd()).map_err(failed("ask for a BPF map"))?.id;
        let mut whole = Some(map);
        let handle = |&flags: &u32| match whole.take_if(|_| flags == 0) {
            Some(map) => Ok(map),
            None => kernel::open(id, flags).map_err(failed("open a BPF map again")),
        };
        record.access.iter().map(handle).collect()
    }
}

register!(descriptor: Maps);
export_plugin! { name: "bpf-map", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_plugin_api::testing::Kit;

    fn map(kind: u32, name: &[u8]) -> Option<OwnedFd> {
        let mut create = Create { kind, key_size: 4, value_size: 12, max_entries: 8, ..Create::default() };
        create.name[..name.len()].copy_from_slice(name);
        // Not everybody may, and not every kernel can.
        kernel::create(&create).ok()
    }

    #[test]
    fn entries_come_back() {
        for kind in [1, 2, 5, 6, 9] {
            let Some(fd) = map(kind, b"table") else { continue };
            let record = Map { key_size: 4, value_size: 12, processors: 0, ..Map::default() };
            let processors = if is_per_processor(kind) == Some(true) { processors().unwrap() } else { 0 };
            let (_, len) = Map { processors, ..record }.lengths().unwrap();
            let value: Vec<u8> = (0..len).map(|n| n as u8 & 7).collect();
            kernel::update(fd.as_fd(), &3u32.to_ne_bytes(), &value).unwrap();
            let mut kit = Kit::new();
            kit.plugin(Maps);
            let number = kit.hold(fd, Maps::KIND).unwrap();
            assert_eq!(kit.dump().unwrap(), 1);
            kit.restore().unwrap();
            let mut got = vec![0; len];
            assert!(kernel::lookup(kit.fd(number), &3u32.to_ne_bytes(), &mut got).unwrap());
            // Padding between processors' values is not kept.
            assert_eq!(got[..12], value[..12], "type {kind}");
            assert_eq!(&kernel::info(kit.fd(number)).unwrap().name[..6], b"table\0");
        }
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for (key_size, value_size, processors) in
            [(0, 4, 0), (4, 0, 0), (1 << 20, 4, 0), (4, 1 << 20, 1 << 20)]
        {
            assert!(Map { key_size, value_size, processors, ..Map::default() }.lengths().is_err());
        }
    }
}
