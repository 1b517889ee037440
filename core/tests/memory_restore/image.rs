//! Images made by hand.

use stasis::image::records::{
    Credentials, Limit, MappedFile, MemoryMap, PageExtent, PageMap, SharedSegment, SignalAction, Task,
    Thread, Vma, VmaKind,
};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};

pub const PAGE: u64 = 4096;
/// Machine code of every task.
pub const CODE: u64 = 0x40_0000;
/// Pairs of an address and the word expected there.
pub const EXPECTED: u64 = 0x50_0000;
pub const HEAP: u64 = 0x5555_5678_9000;
pub const STACK: u64 = 0x7ffd_1234_0000;
/// What core and the restorer know of the vdso here: two mappings before it.
pub const VDSO: u64 = 0x7ffd_4321_0000;

pub struct Builder {
    pub tree: Vec<(i32, Option<i32>)>,
    pub tasks: Vec<Task>,
    pub maps: Vec<MemoryMap>,
    pub files: Vec<MappedFile>,
    pub segments: Vec<SharedSegment>,
    extents: Vec<PageMap>,
    expected: Vec<Vec<(u64, u64)>>,
    page_file: BufWriter<File>,
    length: u64,
    known: HashMap<u64, u64>,
    base: i32,
}

impl Builder {
    /// Tasks by number (from 1) and parent; the number is the id of the memory map as well.
    pub fn new(tree: &[(u32, u32)]) -> Self {
        let base = free_pids();
        let mut image = Self {
            tree: Vec::new(),
            tasks: Vec::new(),
            maps: Vec::new(),
            files: Vec::new(),
            segments: Vec::new(),
            extents: Vec::new(),
            expected: Vec::new(),
            page_file: BufWriter::new(tempfile::tempfile_in("/dev/shm").unwrap()),
            length: 0,
            known: HashMap::new(),
            base,
        };
        for &(number, parent) in tree {
            let pid = base + number as i32;
            image.tree.push((pid, (parent != 0).then_some(base + parent as i32)));
            image.tasks.push(task(pid, number));
            image.maps.push(MemoryMap {
                id: number,
                start_code: CODE,
                end_code: CODE + PAGE,
                start_data: EXPECTED,
                end_data: EXPECTED + PAGE,
                start_brk: HEAP,
                brk: HEAP,
                start_stack: STACK + 8 * PAGE,
                arg_start: STACK + 9 * PAGE,
                arg_end: STACK + 9 * PAGE + 8,
                env_start: STACK + 9 * PAGE + 8,
                env_end: STACK + 9 * PAGE + 16,
                auxv: vec![0; 16],
                ..MemoryMap::default()
            });
            image.extents.push(PageMap { mm: number, ..PageMap::default() });
            image.expected.push(Vec::new());
            let code = Vma { start: CODE, end: CODE + PAGE, prot: 5, ..Vma::default() };
            image.vma(number, code);
            let stack =
                Vma { start: STACK, end: STACK + 16 * PAGE, prot: 3, grows_down: true, ..Vma::default() };
            image.vma(number, stack);
            image.pages(number, STACK + 8 * PAGE, 8, 0x3_0000 + 16 * u64::from(number));
            let vvar = Vma { kind: VmaKind::Vvar.into(), prot: 1, ..Vma::default() };
            image.vma(number, Vma { start: VDSO, end: VDSO + 4 * PAGE, ..vvar.clone() });
            image.vma(number, Vma { start: VDSO + 4 * PAGE, end: VDSO + 6 * PAGE, ..vvar });
            let vdso = Vma { kind: VmaKind::Vdso.into(), prot: 5, ..Vma::default() };
            image.vma(number, Vma { start: VDSO + 6 * PAGE, end: VDSO + 8 * PAGE, ..vdso });
        }
        image
    }

    pub fn vma(&mut self, task: u32, vma: Vma) {
        self.maps[task as usize - 1].vmas.push(vma);
    }

    pub fn expect(&mut self, task: u32, address: u64, word: u64) {
        self.expected[task as usize - 1].push((address, word));
    }

    /// Contents: page n of them consists of the word `first + n`. The same word is the same page of the page file.
    pub fn pages(&mut self, task: u32, start: u64, count: u64, first: u64) {
        let range = start..start + count * PAGE;
        self.extents[task as usize - 1].extents.retain(|extent| !range.contains(&extent.address));
        self.pages_unchecked(task, start, count, first);
        for page in 0..count {
            let address = start + page * PAGE;
            self.expected[task as usize - 1].retain(|(at, _)| at & !(PAGE - 1) != address);
            self.expect(task, address + page % 512 * 8, first + page);
        }
    }

    pub fn pages_unchecked(&mut self, task: u32, start: u64, count: u64, first: u64) {
        for page in 0..count {
            let offset = self.page(first + page);
            self.extent(task, start + page * PAGE, offset, false);
        }
    }

    pub fn huge_pages(&mut self, task: u32, start: u64, count: u64, first: u64) {
        for page in 0..count {
            let offset = self.page(first + page);
            self.extent(task, start + page * PAGE, offset, true);
        }
        self.expect(task, start + 1000 * PAGE, first + 1000);
    }

    pub fn segment_pages(&mut self, segment: u32, first_page: u64, count: u64, first: u64) {
        let mut map = PageMap { segment, ..PageMap::default() };
        for page in 0..count {
            let offset = self.page(first + page);
            map.extents.push(PageExtent {
                address: (first_page + page) * PAGE,
                pages: 1,
                offset,
                ..PageExtent::default()
            });
        }
        self.extents.push(map);
    }

    pub fn hole(&mut self, task: u32, address: u64) {
        self.extents[task as usize - 1].extents.retain(|extent| extent.address != address);
        self.expected[task as usize - 1].retain(|(at, _)| at & !(PAGE - 1) != address);
    }

    pub fn threads(&mut self, task: u32, more: i32) {
        let base = self.base + 1000;
        let task = &mut self.tasks[task as usize - 1];
        for index in 0..more {
            let leader = task.threads[0].clone();
            let name = format!("worker-{index}").into_bytes();
            task.threads.push(Thread { tid: base + index, name, pending: Vec::new(), ..leader });
        }
    }

    fn page(&mut self, word: u64) -> u64 {
        if let Some(&offset) = self.known.get(&word) {
            return offset;
        }
        let bytes = word.to_le_bytes().repeat(PAGE as usize / 8);
        self.raw_page(word, &bytes)
    }

    fn raw_page(&mut self, key: u64, bytes: &[u8]) -> u64 {
        self.page_file.write_all(bytes).unwrap();
        let offset = self.length;
        self.length += PAGE;
        self.known.insert(key, offset);
        offset
    }

    fn extent(&mut self, task: u32, address: u64, offset: u64, huge: bool) {
        let extents = &mut self.extents[task as usize - 1].extents;
        extents.push(PageExtent { address, pages: 1, shard: 0, offset, huge, shared: true });
    }

    /// The records, complete: with the expectations and the code among the memory.
    pub fn finish(&self, code: &[u8]) -> (Vec<MemoryMap>, Vec<PageMap>, File) {
        use std::os::unix::fs::FileExt as _;
        let mut maps = self.maps.clone();
        let mut pages = self.extents.clone();
        let mut file = self.page_file.get_ref().try_clone().unwrap();
        file.write_all(self.page_file.buffer()).unwrap();
        let mut length = self.length;
        let mut append = |bytes: &[u8]| {
            file.write_all_at(bytes, length).unwrap();
            let offset = length;
            length += bytes.len() as u64;
            offset
        };
        let mut code = code.to_vec();
        code.resize(PAGE as usize, 0);
        let code = append(&code);
        for (index, expected) in self.expected.iter().enumerate() {
            let mut bytes: Vec<u8> = expected
                .iter()
                .flat_map(|(at, word)| [at.to_le_bytes(), word.to_le_bytes()])
                .flatten()
                .collect();
            bytes.resize(bytes.len().next_multiple_of(PAGE as usize).max(PAGE as usize), 0);
            let len = bytes.len() as u64;
            let offset = append(&bytes);
            maps[index].vmas.push(Vma { start: EXPECTED, end: EXPECTED + len, prot: 1, ..Vma::default() });
            maps[index].vmas.sort_by_key(|vma| vma.start);
            let extent = |address, bytes: u64, offset| PageExtent {
                address,
                pages: (bytes / PAGE) as u32,
                offset,
                ..PageExtent::default()
            };
            pages[index].extents.push(extent(CODE, PAGE, code));
            pages[index].extents.push(extent(EXPECTED, len, offset));
            pages[index].extents.sort_by_key(|extent| extent.address);
        }
        (maps, pages, file)
    }

    pub fn expectations(&self, index: usize) -> u64 {
        self.expected[index].len() as u64
    }
}

/// Two thousand pids that nobody has, the highest there are.
fn free_pids() -> i32 {
    let most: i32 = fs::read_to_string("/proc/sys/kernel/pid_max").unwrap().trim().parse().unwrap();
    let used = |pid: i32| std::path::Path::new(&format!("/proc/{pid}")).exists();
    (1..10).map(|step| most - 2010 * step).find(|&base| !(base..base + 2005).any(used)).unwrap()
}

fn status_field(status: &str, name: &str, radix: u32) -> Vec<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.split_whitespace().map(|word| u64::from_str_radix(word, radix).unwrap()).collect()
}

fn task(pid: i32, map: u32) -> Task {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let capability = |name: &str| status_field(&status, name, 16)[0];
    let ids = |name: &str| status_field(&status, name, 10).into_iter().map(|id| id as u32).collect();
    let credentials = Credentials {
        uid: ids("Uid:"),
        gid: ids("Gid:"),
        groups: ids("Groups:"),
        cap_inheritable: capability("CapInh:"),
        cap_permitted: capability("CapPrm:"),
        cap_effective: capability("CapEff:"),
        cap_bounding: capability("CapBnd:"),
        cap_ambient: capability("CapAmb:"),
        ..Credentials::default()
    };
    let limits = (0..16)
        .map(|which| {
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: writes one struct.
            unsafe { libc::getrlimit(which, &mut limit) };
            Limit { soft: limit.rlim_cur, hard: limit.rlim_max }
        })
        .collect();
    let mut pending = vec![0_u8; 128];
    pending[0] = libc::SIGRTMIN() as u8;
    pending[8] = 0xff;
    pending[9..12].fill(0xff); // si_code: SI_QUEUE
    let leader = Thread {
        tid: pid,
        name: b"restored".to_vec(),
        altstack_flags: libc::SS_DISABLE as u32,
        timer_slack_ns: 50_000,
        pending: vec![pending.clone()],
        ..Thread::default()
    };
    Task {
        pid,
        mm: map,
        umask: 0o22,
        dumpable: 1,
        credentials: Some(credentials),
        actions: vec![SignalAction::default(); 64],
        limits,
        pending: vec![pending],
        threads: vec![leader],
        ..Task::default()
    }
}
