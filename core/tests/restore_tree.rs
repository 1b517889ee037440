//! Restores hand-made images as whole trees: pids, parents, groups, sessions, zombies, descriptors; and what is refused.
//!
//! The restored tasks do nothing but wait; what they are is read from /proc. No test harness: the process that restores
//! must have one thread.

#[allow(dead_code)]
#[path = "memory_restore/image.rs"]
mod image;

use image::Builder;
use stasis::{
    image::{
        ImageWriter, checksum_shards,
        records::{Descriptor, DescriptorTable, Handle, Header, PathRef, Task},
    },
    plugins::PluginChoice,
    restore::{RestoreError, RestoreOptions, RestoreReport, restore},
};
use std::{
    fs,
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::Path,
};

/// `1: mov eax, SYS_pause; syscall; jmp 1b`
const WAIT: &[u8] = &[0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7];

/// Extended registers, as the kernel gives them for a fresh child.
fn xstate() -> Vec<u8> {
    const NT_X86_XSTATE: i32 = 0x202;
    let mut bytes = vec![0_u8; 16 << 10];
    // SAFETY: the child only stops itself; all pointers outlive their calls.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            libc::raise(libc::SIGSTOP);
            libc::_exit(0);
        }
        libc::waitpid(child, std::ptr::null_mut(), 0);
        let mut vector = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        assert_eq!(libc::ptrace(libc::PTRACE_GETREGSET, child, NT_X86_XSTATE, &raw mut vector), 0);
        bytes.truncate(vector.iov_len);
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
    bytes
}

struct Case {
    directory: tempfile::TempDir,
    builder: Builder,
    tables: Vec<DescriptorTable>,
    handles: Vec<Handle>,
    zombies: Vec<Task>,
    header: Header,
}

fn path_ref(path: &Path) -> PathRef {
    let metadata = fs::metadata(path).unwrap();
    PathRef {
        path: path.to_str().unwrap().into(),
        mode: metadata.mode(),
        size: metadata.len(),
        dev: metadata.dev(),
        ino: metadata.ino(),
        ..PathRef::default()
    }
}

impl Case {
    fn new(tree: &[(u32, u32)]) -> Self {
        let mut builder = Builder::new(tree);
        let exe = path_ref(&std::env::current_exe().unwrap());
        let root = builder.tasks[0].pid;
        let xstate = xstate();
        for (task, (_, parent)) in builder.tasks.iter_mut().zip(&builder.tree) {
            task.ppid = parent.unwrap_or(0);
            (task.sid, task.pgid) = (root, root);
            task.exit_signal = libc::SIGCHLD;
            task.exe = Some(exe.clone());
            task.cwd = Some(path_ref(Path::new("/tmp")));
            task.root = Some(path_ref(Path::new("/")));
            task.files = task.mm;
            task.pending.clear();
            for thread in &mut task.threads {
                thread.pending.clear();
                let mut registers = vec![0_u8; 27 * 8];
                let mut set = |index: usize, value: u64| {
                    registers[index * 8..index * 8 + 8].copy_from_slice(&value.to_le_bytes());
                };
                set(16, image::CODE); // rip
                set(17, 0x33); // cs
                set(18, 0x202); // eflags
                set(19, image::STACK + 12 * image::PAGE); // rsp
                set(20, 0x2b); // ss
                set(15, u64::MAX); // orig_rax
                thread.registers = registers;
                thread.xstate = xstate.clone();
            }
        }
        let mut header = Header {
            format: stasis::image::FORMAT_VERSION,
            machine: "x86_64".into(),
            page_size: 4096,
            root_pid: root,
            ..Header::default()
        };
        header.vdso_digest = stasis::machine::vdso().unwrap().digest();
        let table = |task: &Task| DescriptorTable { id: task.files, descriptors: Vec::new() };
        let tables = builder.tasks.iter().map(table).collect();
        let directory = tempfile::tempdir().unwrap();
        Self { directory, builder, tables, handles: Vec::new(), zombies: Vec::new(), header }
    }

    fn task(&mut self, number: u32) -> &mut Task {
        &mut self.builder.tasks[number as usize - 1]
    }

    fn pid(&self, number: u32) -> i32 {
        self.builder.tasks[0].pid - 1 + number as i32
    }

    fn file(&mut self, path: &Path, flags: i32, position: u64, holders: &[(u32, u32)]) {
        let id = self.handles.len() as u32 + 1;
        let (task, fd) = holders[0];
        self.handles.push(Handle {
            id,
            status_flags: flags as u32,
            position,
            path: Some(path_ref(path)),
            first_pid: self.pid(task),
            first_fd: fd,
            ..Handle::default()
        });
        for &(task, number) in holders {
            let descriptors = &mut self.tables[task as usize - 1].descriptors;
            descriptors.push(Descriptor { number, handle: id, cloexec: number % 2 == 1 });
            descriptors.sort_by_key(|descriptor| descriptor.number);
        }
    }

    fn write(&self) {
        let (maps, pages, mut file) = self.builder.finish(WAIT);
        let writer = ImageWriter::create(self.directory.path()).unwrap();
        writer.write(&self.header).unwrap();
        for task in self.builder.tasks.iter().chain(&self.zombies) {
            writer.write(task).unwrap();
        }
        maps.iter().for_each(|map| writer.write(map).unwrap());
        pages.iter().for_each(|map| writer.write_page_map(map).unwrap());
        self.tables.iter().for_each(|table| writer.write(table).unwrap());
        self.handles.iter().for_each(|handle| writer.write(handle).unwrap());
        let mut shard = writer.shard(0).unwrap();
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        shard.write_all(&bytes).unwrap();
        let shards = checksum_shards(&[(0, &shard, bytes.len() as u64)], 1).unwrap();
        writer.finish(shards, false).unwrap();
    }

    fn restore(&self) -> Result<RestoreReport, RestoreError> {
        if !self.directory.path().join("manifest").exists() {
            self.write();
        }
        let options = RestoreOptions {
            images_dir: self.directory.path().into(),
            plugins: PluginChoice {
                directories: vec![self.directory.path().into()],
                ..PluginChoice::default()
            },
            ..RestoreOptions::default()
        };
        restore(&options)
    }

    fn refused(&self) -> String {
        let error = self.restore().map(drop).unwrap_err().to_string();
        self.assert_nothing_left();
        error
    }

    fn assert_nothing_left(&self) {
        // Orphans of killed tasks are ours to reap.
        // SAFETY: reaps children of this process.
        while unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) } > 0 {}
        for task in &self.builder.tasks {
            assert!(!Path::new(&format!("/proc/{}", task.pid)).exists(), "task {} is left", task.pid);
        }
    }

    fn end(&self) {
        for task in self.builder.tasks.iter().chain(&self.zombies) {
            // SAFETY: a process that this test has made.
            unsafe { libc::kill(task.pid, libc::SIGKILL) };
        }
        // SAFETY: reaps children of this process, orphans among them.
        while unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) } > 0 {}
    }
}

/// ppid, pgid, sid of a process (proc_pid_stat(5)), and its state.
fn stat(pid: i32) -> (char, [i32; 3]) {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_else(|e| panic!("task {pid}: {e}"));
    let fields: Vec<&str> = text.rsplit_once(") ").unwrap().1.split(' ').collect();
    (fields[0].chars().next().unwrap(), [1, 2, 3].map(|n| fields[n].parse().unwrap()))
}

fn one_task() {
    let mut case = Case::new(&[(1, 0)]);
    case.builder.threads(1, 3);
    let report = case.restore().unwrap();
    assert_eq!((report.root_pid, report.tasks, report.threads), (case.pid(1), 1, 4));
    let pid = case.pid(1);
    assert_eq!(stat(pid).1, [std::process::id() as i32, pid, pid]);
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), Path::new("/tmp"));
    assert_eq!(fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(), 0);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("TracerPid:\t0\n") && status.contains("Threads:\t4\n"), "{status}");
    eprintln!("one task: {:?}", report.elapsed);
    case.end();
}

fn a_tree_with_groups_sessions_and_a_zombie() {
    let mut case = Case::new(&[(1, 0), (2, 1), (3, 1), (4, 3), (5, 1), (6, 1)]);
    let p: Vec<i32> = (0..10).map(|n| case.pid(n)).collect();
    (case.task(2).sid, case.task(2).pgid) = (p[2], p[2]);
    case.task(3).pgid = p[3];
    case.task(4).pgid = p[3];
    // 5 was orphaned in the session of 2; 6 in a session and a group whose leaders 8 and 9 are dead.
    (case.task(5).sid, case.task(5).pgid) = (p[2], p[2]);
    (case.task(6).sid, case.task(6).pgid) = (p[8], p[9]);
    let leader = case.builder.tasks[0].clone();
    let zombie = Task {
        pid: p[7],
        ppid: p[1],
        pgid: p[3],
        zombie: true,
        exit_status: 3 << 8,
        threads: vec![],
        ..leader
    };
    case.zombies.push(Task { mm: 0, files: 0, ..zombie });
    case.restore().unwrap();
    for task in case.builder.tasks.iter().chain(&case.zombies).skip(1) {
        let (state, found) = stat(task.pid);
        assert_eq!(found, [task.ppid, task.pgid, task.sid], "task {}", task.pid);
        assert_eq!(state == 'Z', task.zombie, "task {}: {state}", task.pid);
    }
    for dead in [p[8], p[9]] {
        assert!(!Path::new(&format!("/proc/{dead}")).exists(), "helper {dead} is left");
    }
    let pending = fs::read_to_string(format!("/proc/{}/status", p[1])).unwrap();
    assert!(pending.contains("ShdPnd:\t0000000000000000"), "{pending}");
    case.end();
}

fn files_are_shared_where_they_were() {
    let mut case = Case::new(&[(1, 0), (2, 1)]);
    let file = case.directory.path().join("file");
    fs::write(&file, b"0123456789").unwrap();
    case.file(&file, libc::O_RDWR | libc::O_APPEND, 4, &[(1, 4), (2, 0), (2, 7)]);
    case.file(&file, libc::O_RDONLY, 6, &[(2, 3)]);
    case.file(Path::new("/tmp"), libc::O_RDONLY | libc::O_DIRECTORY, 0, &[(1, 3), (2, 300)]);
    case.restore().unwrap();
    let info =
        |task: u32, fd: u32| fs::read_to_string(format!("/proc/{}/fdinfo/{fd}", case.pid(task))).unwrap();
    assert!(info(1, 4).starts_with("pos:\t4\nflags:\t0102002\n"), "{}", info(1, 4));
    assert!(info(2, 7).starts_with("pos:\t4\nflags:\t02102002\n"), "{}", info(2, 7));
    assert!(info(2, 3).starts_with("pos:\t6\nflags:\t02100000\n"), "{}", info(2, 3));
    let same = |one: (u32, u64), two: (u32, u64)| {
        // SAFETY: kcmp(2), KCMP_FILE.
        unsafe { libc::syscall(libc::SYS_kcmp, case.pid(one.0), case.pid(two.0), 0, one.1, two.1) == 0 }
    };
    assert!(same((1, 4), (2, 0)) && same((2, 0), (2, 7)) && same((1, 3), (2, 300)) && !same((2, 0), (2, 3)));
    let count = fs::read_dir(format!("/proc/{}/fd", case.pid(2))).unwrap().count();
    assert_eq!(count, 4, "descriptors of ours are left");
    case.end();
}

fn a_taken_pid_is_named() {
    let mut case = Case::new(&[(1, 0), (2, 1)]);
    let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
    case.task(2).pid = child.id() as i32;
    case.task(2).threads[0].tid = child.id() as i32;
    case.builder.tree[1].0 = child.id() as i32;
    let error = case.restore().map(drop).unwrap_err().to_string();
    let expected = format!("pid {} of the image is in use: by process sleep", child.id());
    assert!(error.starts_with(&expected), "{error}");
    child.kill().unwrap();
    child.wait().unwrap();
}

fn a_shorter_file_is_named() {
    let mut case = Case::new(&[(1, 0)]);
    let file = case.directory.path().join("file");
    fs::write(&file, b"0123456789").unwrap();
    case.file(&file, libc::O_RDWR, 4, &[(1, 4)]);
    case.write();
    fs::write(&file, b"01").unwrap();
    let error = case.refused();
    assert!(error.contains("descriptor 4") && error.contains("it has 2 bytes, but had 10"), "{error}");
}

fn a_session_outside_needs_a_flag() {
    let mut case = Case::new(&[(1, 0)]);
    (case.task(1).sid, case.task(1).pgid) = (77_777, 77_777);
    assert!(case.refused().contains("--shell-job"), "{}", case.refused());
}

fn another_vdso_is_refused() {
    let mut case = Case::new(&[(1, 0)]);
    case.header.vdso_digest = vec![1, 2, 3, 4];
    let error = case.refused();
    assert!(error.contains("vdso"), "{error}");
}

fn flipped_page_bits_stop_the_restore() {
    let case = Case::new(&[(1, 0), (2, 1)]);
    case.write();
    let path = case.directory.path().join("pages-0.img");
    let mut bytes = fs::read(&path).unwrap();
    bytes[5000] ^= 4;
    fs::write(&path, bytes).unwrap();
    let error = case.refused();
    assert!(error.contains("checksum"), "{error}");
}

fn an_error_in_a_task_leaves_nothing() {
    // An executable that a task cannot map is only found out inside.
    let mut case = Case::new(&[(1, 0), (2, 1), (3, 2)]);
    case.task(3).exe = Some(path_ref(Path::new("/dev/null")));
    let error = case.refused();
    assert!(error.contains(&format!("{}", case.pid(3))), "{error}");
}

fn many_processes_and_threads() {
    let tree: Vec<(u32, u32)> = (1..=300).map(|n| (n, u32::from(n > 1))).collect();
    let mut case = Case::new(&tree);
    for task in 1..=300 {
        case.file(Path::new("/tmp"), libc::O_RDONLY | libc::O_DIRECTORY, 0, &[(task, 3)]);
    }
    eprintln!("300 processes: {:?}", case.restore().unwrap().elapsed);
    case.end();
    let mut case = Case::new(&[(1, 0)]);
    case.builder.threads(1, 999);
    eprintln!("1000 threads: {:?}", case.restore().unwrap().elapsed);
    case.end();
}

const CASES: &[(&str, fn())] = &[
    ("one_task", one_task),
    ("a_tree_with_groups_sessions_and_a_zombie", a_tree_with_groups_sessions_and_a_zombie),
    ("files_are_shared_where_they_were", files_are_shared_where_they_were),
    ("a_taken_pid_is_named", a_taken_pid_is_named),
    ("a_shorter_file_is_named", a_shorter_file_is_named),
    ("a_session_outside_needs_a_flag", a_session_outside_needs_a_flag),
    ("another_vdso_is_refused", another_vdso_is_refused),
    ("flipped_page_bits_stop_the_restore", flipped_page_bits_stop_the_restore),
    ("many_processes_and_threads", many_processes_and_threads),
    ("an_error_in_a_task_leaves_nothing", an_error_in_a_task_leaves_nothing),
];

fn main() {
    // SAFETY: takes no argument.
    if unsafe { libc::geteuid() } != 0 {
        println!("skipped: needs root");
        return;
    }
    // SAFETY: a flag of this process: what a failed case leaves comes to us.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    for (name, case) in CASES {
        if filter.as_ref().is_none_or(|filter| name.contains(filter.as_str())) {
            case();
            println!("{name} ... ok");
        }
    }
}
