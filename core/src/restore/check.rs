//! Everything that can be known to fail before anything is created.

use super::{
    RestoreOptions,
    error::{RestoreError, Result},
    namespaces::{self, Spaces},
    vdso::Vdso,
    world::{Plans, task_name},
};
use crate::{
    files::identity::difference,
    image::records::{PathRef, Task, VmaKind},
};
use std::{
    collections::{BTreeMap, HashSet},
    ffi::OsStr,
    fs::File,
    os::unix::ffi::OsStrExt,
    path::PathBuf,
};

/// Checks machine, tasks and files.
pub fn check(plans: &Plans, options: &RestoreOptions) -> Result<()> {
    machine(plans)?;
    tasks(plans)?;
    externals(plans)?;
    session(plans, options)?;
    // Behind a mount namespace of the image, paths mean nothing yet; there the root task does this.
    if has_mounts(plans) { Ok(()) } else { files(plans, None) }
}

/// Whether the tasks have mounts of their own.
pub fn has_mounts(plans: &Plans) -> bool {
    plans.image.namespaces.values().any(|namespace| namespace.clone_flag & libc::CLONE_NEWNS as u64 != 0)
}

fn machine(plans: &Plans) -> Result<()> {
    let header = &plans.image.header;
    let wrong = |what: String| Err(RestoreError::Machine { what });
    let here =
        nix::sys::utsname::uname().map_err(|e| RestoreError::system("ask for the machine")(e.into()))?;
    if here.machine() != OsStr::new(&header.machine) {
        return wrong(format!("it was written on {}, this is {}", header.machine, here.machine().display()));
    }
    if header.page_size != 4096 {
        return wrong(format!("its pages have {} bytes", header.page_size));
    }
    let missing = header.xsave_features & !crate::machine::xsave_features();
    if missing != 0 {
        return wrong(format!("its CPU features {missing:#x} (bits of XCR0) are missing here"));
    }
    let vdso = crate::machine::vdso().map_err(|error| RestoreError::Machine { what: error.to_string() })?;
    if header.vdso_digest == vdso.digest() {
        return Ok(());
    }
    let release = here.release().display();
    let other = format!("its vdso is that of kernel {}, this is {release}", header.kernel_release);
    if header.vdso.is_empty() || header.vdso_digest != crate::machine::digest(&header.vdso) {
        return wrong(other);
    }
    changed_vdso(plans, &vdso).map_err(|error| match error {
        RestoreError::Machine { what } => RestoreError::Machine { what: format!("{other}: {what}") },
        error => error,
    })
}

/// Whether all tasks can go on with a vdso that leads to another one.
fn changed_vdso(plans: &Plans, own: &crate::machine::OwnVdso) -> Result<()> {
    let wrong = |what: String| RestoreError::Machine { what };
    let parse = |bytes: &[u8]| Vdso::parse(bytes).map_err(|error| wrong(error.to_string()));
    let old = &plans.image.header.vdso;
    parse(old)?.leading_to(&parse(&own.contents)?, 0).map_err(|error| wrong(error.to_string()))?;
    for task in plans.image.tasks.iter().filter(|task| !task.zombie) {
        let vmas = plans.image.memory_maps.get(&task.mm).map_or(&[][..], |map| &map.vmas);
        for vma in vmas.iter().filter(|vma| vma.kind() == VmaKind::Vdso) {
            if vma.end - vma.start != old.len() as u64 {
                return Err(wrong(format!("that of task {} has another size", task.pid)));
            }
            // struct user_regs_struct: the instruction pointer is the 17th word.
            let place = |registers: &[u8]| {
                registers.get(128..136).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
            };
            if task.threads.iter().any(|thread| (vma.start..vma.end).contains(&place(&thread.registers))) {
                let what = "a thread inside a function of another kernel's vdso (dump it again)";
                return Err(RestoreError::Unsupported { pid: task.pid, name: task_name(task), what });
            }
        }
    }
    Ok(())
}

/// What was external at the dump must be given now.
fn externals(plans: &Plans) -> Result<()> {
    let mut handles = plans.image.handles.values().filter(|handle| !handle.external.is_empty());
    match handles.find(|handle| !plans.inherited.contains_key(&handle.external)) {
        None => Ok(()),
        Some(handle) => Err(RestoreError::NeedsFlag {
            what: format!(
                "descriptor {} of task {} was external at the dump",
                handle.first_fd, handle.first_pid
            ),
            flag: format!("--inherit-fd 'fd[N]:{}' to give it one", handle.external),
        }),
    }
}

fn tasks(plans: &Plans) -> Result<()> {
    let mut memory: BTreeMap<u32, i32> = BTreeMap::new();
    for task in plans.image.tasks.iter().filter(|task| !task.zombie) {
        let refuse = |what| Err(RestoreError::Unsupported { pid: task.pid, name: task_name(task), what });
        if memory.insert(task.mm, task.pid).is_some() {
            return refuse("memory shared with another process (CLONE_VM)");
        }
        if task.fs != 0 && !forked_by_sharer(plans, task, |task| task.fs) {
            return refuse("root and cwd shared with a process that cannot fork it (CLONE_FS)");
        }
        if !forked_by_sharer(plans, task, |task| task.files) {
            return refuse("a descriptor table shared with a process that cannot fork it (CLONE_FILES)");
        }
        if task.threads.is_empty() {
            return refuse("a process without threads");
        }
    }
    Ok(())
}

/// Whether a process is forked by another that has the same `what`, or is the first of all those.
fn forked_by_sharer(plans: &Plans, task: &Task, what: fn(&Task) -> u32) -> bool {
    let shares = |other: &Task| what(other) == what(task) && other.pid != task.pid && !other.zombie;
    let Some(node) = plans.tree.find(task.pid) else { return false };
    let creator = plans.tree.nodes[node].creator.and_then(|creator| plans.task(creator));
    if creator.is_some_and(shares) {
        return true;
    }
    let above = |other: &Task| {
        let up = |task: &Task| plans.image.task(task.ppid);
        std::iter::successors(plans.image.task(other.ppid), |task| up(task)).any(|up| up.pid == task.pid)
    };
    plans.image.tasks.iter().filter(|other| shares(other)).all(above)
}

/// A session of which the leader is outside the tree is replaced by that of stasis, if the user wants that.
fn session(plans: &Plans, options: &RestoreOptions) -> Result<()> {
    let Some(root) = plans.image.tasks.iter().find(|task| task.ppid == 0) else { return Ok(()) };
    let led = plans.image.tasks.iter().any(|task| task.pid == root.sid);
    let pid_namespace = super::pids::has_namespace(plans);
    if led || options.shell_job || pid_namespace && root.sid == 0 {
        return Ok(());
    }
    let what = format!(
        "task {} ({}) belongs to session {}, whose leader is not in the image",
        root.pid,
        task_name(root),
        root.sid
    );
    Err(RestoreError::NeedsFlag { what, flag: "--shell-job to restore it into the session of stasis".into() })
}

/// Whether every file that the tasks need is there, and is what it was. The one place where that is looked at: files that
/// change in the moment until they are opened are their changer's doing.
pub fn files(plans: &Plans, spaces: Option<&Spaces>) -> Result<()> {
    let image = plans.image;
    let mut seen = HashSet::new();
    for task in image.tasks.iter().filter(|task| !task.zombie) {
        let own = [("executable", &task.exe), ("working directory", &task.cwd), ("root", &task.root)];
        for (use_of, path) in own {
            if let Some(path) = path.as_ref().filter(|path| seen.insert(*path)) {
                file(plans, spaces, task, use_of, path)?;
            }
        }
        for vma in image.memory_maps.get(&task.mm).map_or(&[][..], |map| &map.vmas) {
            let of_file = matches!(vma.kind(), VmaKind::PrivateFile | VmaKind::SharedFile);
            let mapped = image.mapped_files.get(&vma.file).filter(|mapped| of_file && mapped.handle == 0);
            let path = mapped.and_then(|mapped| mapped.path.as_ref());
            if let Some(path) = path.filter(|path| seen.insert(*path)) {
                file(plans, spaces, task, &format!("mapping {:#x}", vma.start), path)?;
            }
        }
    }
    for handle in image.handles.values().filter(|handle| handle.object == 0) {
        let none = Task { pid: handle.first_pid, ..Task::default() };
        let task = image.tasks.iter().find(|task| task.host_pid == handle.first_pid).unwrap_or(&none);
        if let Some(path) = handle.path.as_ref().filter(|path| seen.insert(*path)) {
            file(plans, spaces, task, &format!("descriptor {}", handle.first_fd), path)?;
        }
    }
    Ok(())
}

fn file(plans: &Plans, spaces: Option<&Spaces>, task: &Task, use_of: &str, path: &PathRef) -> Result<()> {
    // Those the image brings along (the link to one that has other names is looked at when it is used), and those of
    // processes that do not exist yet.
    if path.ghost != 0 || path.process != 0 {
        return Ok(());
    }
    let place = PathBuf::from(OsStr::from_bytes(&path.path));
    // Paths of /proc resolve their links; what is a link here was opened as one (O_PATH).
    let found = namespaces::place(spaces, path, 0).ok_or(std::io::ErrorKind::NotFound.into());
    let difference = match found.and_then(std::fs::symlink_metadata) {
        Err(error) => error.to_string(),
        Ok(_) if !plans.file_check => return Ok(()),
        Ok(now) => match difference(path, &now, || {
            namespaces::place(spaces, path, 0).ok_or(std::io::ErrorKind::NotFound.into()).and_then(File::open)
        }) {
            Ok(None) => return Ok(()),
            Ok(Some(difference)) => {
                format!("{difference} (put it back as it was, or use --no-file-check)")
            }
            Err(error) => error.to_string(),
        },
    };
    let (pid, name) = (task.pid, task_name(task));
    Err(RestoreError::File { pid, name, use_of: use_of.to_owned(), path: place, difference })
}
