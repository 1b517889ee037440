//! A whole program through dump and restore, whose image is made to come from a kernel with another vdso: functions elsewhere, another
//! digest. No test harness: the program is this executable.

use stasis::image::{Image, ImageWriter, checksum_shards};
use std::{
    fs,
    io::Read,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

type GetTime = extern "C" fn(i32, *mut libc::timespec) -> i32;

/// Where the made-up vdso has clock_gettime: in the zeros at its end.
fn odd_place(length: u64) -> u64 {
    length - 64
}

fn own_vdso() -> (u64, u64) {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).unwrap();
    let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
    let number = |text| u64::from_str_radix(text, 16).unwrap();
    (number(start), number(end))
}

/// What is dumped. It says what it finds in DIR/said, whenever DIR/ask appears.
fn program(dir: &Path) -> ! {
    let (start, end) = own_vdso();
    let begun = Instant::now();
    fs::write(dir.join("ready"), "").unwrap();
    loop {
        thread::sleep(Duration::from_millis(5));
        if !dir.join("ask").exists() {
            continue;
        }
        fs::remove_file(dir.join("ask")).unwrap();
        // SAFETY: the image says that the function is there; if it is not, the program dies, and the test fails.
        let get_time: GetTime = unsafe { std::mem::transmute(start + odd_place(end - start)) };
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let result = get_time(libc::CLOCK_REALTIME, &raw mut time);
        // These go through the functions that the C library knows.
        let now =
            std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() as i64;
        // SAFETY: takes no pointer that is not null.
        let (second, cpu) = unsafe { (libc::time(std::ptr::null_mut()), libc::sched_getcpu()) };
        let right = result == 0 && (now - time.tv_sec).abs() < 2 && (second - now).abs() < 2 && cpu >= 0;
        let moved = own_vdso().0 != start;
        let said =
            format!("right {right}, moved {moved}, older {}", begun.elapsed() > Duration::from_millis(1));
        fs::write(dir.join("said.new"), said).unwrap();
        fs::rename(dir.join("said.new"), dir.join("said")).unwrap();
    }
}

fn wait_for(file: &Path) {
    let began = Instant::now();
    while !file.exists() {
        assert!(began.elapsed() < Duration::from_secs(20), "{} does not appear", file.display());
        thread::sleep(Duration::from_millis(2));
    }
}

fn stasis(arguments: &[&str], images: &Path) -> Result<(), String> {
    let output =
        Command::new(env!("CARGO_BIN_EXE_stasis")).args(arguments).arg("-D").arg(images).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(said) }
}

/// The symbol table of an ELF file: offset, entries; and the offset of its names.
fn symbols(elf: &[u8]) -> (usize, usize, usize) {
    let word = |at: usize, size: usize| {
        elf[at..at + size].iter().rev().fold(0usize, |n, &byte| n << 8 | usize::from(byte))
    };
    let (sections, size, count) = (word(40, 8), word(58, 2), word(60, 2));
    let section = |index: usize| sections + index * size;
    const DYNSYM: usize = 11;
    let table = (0..count).map(section).find(|&at| word(at + 4, 4) == DYNSYM).unwrap();
    let names = section(word(table + 40, 4));
    (word(table + 24, 8), word(table + 32, 8) / 24, word(names + 24, 8))
}

/// A copy of an image whose vdso has `__vdso_clock_gettime` elsewhere; with `inside`, a thread is just there.
fn rewrite(from: &Path, to: &Path, inside: bool) {
    fs::create_dir(to).unwrap();
    let mut image = Image::open(from).unwrap();
    let vdso = &mut image.header.vdso;
    let place = odd_place(vdso.len() as u64);
    assert!(vdso[place as usize..].iter().all(|byte| *byte == 0), "no zeros at the end of the vdso");
    let (table, count, names) = symbols(vdso);
    let mut moved = 0;
    for entry in (0..count).map(|index| table + index * 24) {
        let name = names + u32::from_le_bytes(vdso[entry..entry + 4].try_into().unwrap()) as usize;
        if vdso[name..].starts_with(b"__vdso_clock_gettime\0") {
            vdso[entry + 8..entry + 16].copy_from_slice(&place.to_le_bytes());
            vdso[entry + 16..entry + 24].copy_from_slice(&64u64.to_le_bytes());
            moved += 1;
        }
    }
    assert_eq!(moved, 1);
    image.header.vdso_digest = stasis::machine::digest(&image.header.vdso);
    image.header.kernel_release = "made-up".into();
    if inside {
        let map = &image.memory_maps[&image.tasks[0].mm];
        let vdso = map.vmas.iter().find(|vma| vma.kind() == stasis::image::records::VmaKind::Vdso).unwrap();
        image.tasks[0].threads[0].registers[128..136].copy_from_slice(&(vdso.start + 100).to_le_bytes());
    }
    let writer = ImageWriter::create(to).unwrap();
    writer.write(&image.header).unwrap();
    image.mapped_files.values().for_each(|record| writer.write(record).unwrap());
    image.segments.values().for_each(|record| writer.write(record).unwrap());
    image.ghosts.values().for_each(|record| writer.write(record).unwrap());
    image.tasks.iter().for_each(|record| writer.write(record).unwrap());
    image.memory_maps.values().for_each(|record| writer.write(record).unwrap());
    image.namespaces.values().for_each(|record| writer.write(record).unwrap());
    image.objects.values().for_each(|record| writer.write(record).unwrap());
    image.handles.values().for_each(|record| writer.write(record).unwrap());
    image.tables.values().for_each(|record| writer.write(record).unwrap());
    image.task_records.iter().for_each(|record| writer.write(record).unwrap());
    let pages = image.page_maps.values().chain(image.segment_pages.values());
    pages.for_each(|record| writer.write_page_map(record).unwrap());
    for (plugin, name, _) in image.blob_list().unwrap() {
        let mut bytes = Vec::new();
        image.blob_reader(plugin, name).unwrap().read_to_end(&mut bytes).unwrap();
        writer.append_blob(plugin, name, &bytes).unwrap();
    }
    let mut shards = Vec::new();
    for shard in image.shards.values() {
        let mut file = writer.shard(shard.index).unwrap();
        std::io::copy(&mut image.shard_file(shard.index).unwrap(), &mut file).unwrap();
        shards.push((shard.index, file, shard.length));
    }
    let shards: Vec<_> = shards.iter().map(|(index, file, length)| (*index, file, *length)).collect();
    writer.finish(checksum_shards(&shards, 1).unwrap(), false).unwrap();
}

fn ask(dir: &Path) -> String {
    fs::write(dir.join("ask"), "").unwrap();
    wait_for(&dir.join("said"));
    let said = fs::read_to_string(dir.join("said")).unwrap();
    fs::remove_file(dir.join("said")).unwrap();
    said
}

fn gone(pid: i32) {
    let began = Instant::now();
    // SAFETY: only takes up an end.
    while unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) } == 0 {
        assert!(began.elapsed() < Duration::from_secs(10), "{pid} does not end");
        thread::sleep(Duration::from_millis(1));
    }
}

fn play(dir: &Path) {
    let open = |name: &str| fs::File::create(dir.join(name)).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg("--program").arg(dir).stdin(Stdio::null()).stdout(open("out")).stderr(open("err"));
    // SAFETY: both calls may be made between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            // What this process has from its parents is nobody's business.
            libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32);
            Ok(())
        })
    };
    let pid = command.spawn().unwrap().id() as i32;
    wait_for(&dir.join("ready"));
    let images = |name: &str| dir.join(name);
    fs::create_dir(images("first")).unwrap();
    stasis(&["dump", "-t", &pid.to_string()], &images("first")).unwrap();
    gone(pid);
    rewrite(&images("first"), &images("inside"), true);
    let error = stasis(&["restore", "-d"], &images("inside")).unwrap_err();
    assert!(error.contains("inside a function of another kernel's vdso"), "{error}");
    rewrite(&images("first"), &images("moved"), false);
    stasis(&["restore", "-d"], &images("moved")).unwrap();
    assert_eq!(ask(dir), "right true, moved true, older true");
    // What leads to this kernel's functions is memory like any other now.
    fs::create_dir(images("second")).unwrap();
    stasis(&["dump", "-t", &pid.to_string()], &images("second")).unwrap();
    gone(pid);
    stasis(&["restore", "-d"], &images("second")).unwrap();
    assert_eq!(ask(dir), "right true, moved true, older true");
    // And once more a kernel with another one.
    fs::create_dir(images("third")).unwrap();
    stasis(&["dump", "-t", &pid.to_string()], &images("third")).unwrap();
    gone(pid);
    rewrite(&images("third"), &images("moved again"), false);
    stasis(&["restore", "-d"], &images("moved again")).unwrap();
    assert_eq!(ask(dir), "right true, moved true, older true");
    // SAFETY: ends the program.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    gone(pid);
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, flag, dir] = &arguments[..]
        && flag == "--program"
    {
        program(Path::new(dir));
    }
    // SAFETY: takes no argument.
    if unsafe { libc::geteuid() } != 0 {
        println!("skipped: needs root");
        return;
    }
    // SAFETY: a flag of this process: what is restored comes to us.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    let dir = tempfile::tempdir().unwrap();
    play(dir.path());
    println!("a_program_from_another_kernel ... ok");
}
