//! Everything that can be known to fail before anything is created.

use super::{
    RestoreOptions,
    error::{RestoreError, Result},
    world::{Plans, task_name},
};
use crate::image::records::{PathRef, Task};
use std::{
    collections::BTreeMap,
    ffi::OsStr,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::PathBuf,
};

/// Checks machine, tasks and files.
pub fn check(plans: &Plans, options: &RestoreOptions) -> Result<()> {
    machine(plans)?;
    tasks(plans)?;
    session(plans, options)?;
    // Behind a mount namespace of the image, paths mean nothing yet.
    let mounts = libc::CLONE_NEWNS as u64;
    if !plans.image.namespaces.values().any(|namespace| namespace.clone_flag & mounts != 0) {
        files(plans)?;
    }
    Ok(())
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
    let vdso =
        crate::machine::vdso_digest().map_err(|error| RestoreError::Machine { what: error.to_string() })?;
    if header.vdso_digest != vdso {
        let release = here.release().display();
        return wrong(format!("its vdso is that of kernel {}, this is {release}", header.kernel_release));
    }
    Ok(())
}

fn tasks(plans: &Plans) -> Result<()> {
    let mut memory: BTreeMap<u32, i32> = BTreeMap::new();
    for task in plans.image.tasks.iter().filter(|task| !task.zombie) {
        let refuse = |what| Err(RestoreError::Unsupported { pid: task.pid, name: task_name(task), what });
        if memory.insert(task.mm, task.pid).is_some() {
            return refuse("memory shared with another process (CLONE_VM)");
        }
        if task.threads.is_empty() {
            return refuse("a process without threads");
        }
    }
    Ok(())
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
    Err(RestoreError::NeedsFlag { what, flag: "--shell-job to restore it into the session of stasis" })
}

fn files(plans: &Plans) -> Result<()> {
    let image = plans.image;
    for task in image.tasks.iter().filter(|task| !task.zombie) {
        for (use_of, path) in
            [("executable", &task.exe), ("working directory", &task.cwd), ("root", &task.root)]
        {
            if let Some(path) = path {
                file(task, use_of, path, false)?;
            }
        }
        let map = image.memory_maps.get(&task.mm);
        let mut seen = None;
        for vma in map.map_or(&[][..], |map| &map.vmas) {
            let mapped = image.mapped_files.get(&vma.file).filter(|_| {
                matches!(
                    vma.kind(),
                    crate::image::records::VmaKind::PrivateFile | crate::image::records::VmaKind::SharedFile
                )
            });
            if let Some(mapped) = mapped.filter(|mapped| seen != Some(mapped.id)) {
                seen = Some(mapped.id);
                let path = mapped.path.clone().unwrap_or_default();
                file(task, &format!("mapping {:#x}", vma.start), &path, true)?;
            }
        }
    }
    for handle in image.handles.values().filter(|handle| handle.object == 0) {
        let none = Task { pid: handle.first_pid, ..Task::default() };
        let task = image.task(handle.first_pid).unwrap_or(&none);
        if let Some(path) = &handle.path {
            file(task, &format!("descriptor {}", handle.first_fd), path, true)?;
        }
    }
    Ok(())
}

fn file(task: &Task, use_of: &str, path: &PathRef, sized: bool) -> Result<()> {
    let place = PathBuf::from(OsStr::from_bytes(&path.path));
    let difference = if path.deleted {
        "it was deleted before the dump, and its contents are not in the image".to_owned()
    } else {
        match std::fs::metadata(&place) {
            Err(error) => error.to_string(),
            Ok(now) if path.mode != 0 && (now.mode() ^ path.mode) & libc::S_IFMT != 0 => {
                "it is of another type than at the dump".to_owned()
            }
            Ok(now) if sized && path.mode & libc::S_IFMT == libc::S_IFREG && now.len() < path.size => {
                format!(
                    "it has {} bytes, but had {} at the dump (put it back as it was)",
                    now.len(),
                    path.size
                )
            }
            Ok(_) => return Ok(()),
        }
    };
    let (pid, name) = (task.pid, task_name(task));
    Err(RestoreError::File { pid, name, use_of: use_of.to_owned(), path: place, difference })
}
