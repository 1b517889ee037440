//! The root task: a bare fork of the first process. It reads the image and loads the plugins once, waits until the
//! guardian traces it, enters its namespaces and becomes the ancestor of all others.

use super::{
    RestoreOptions,
    check::{self, has_mounts},
    error::{RestoreError, Result},
    ghosts::Ghosts,
    memory::TaskMemory,
    namespaces::{self, Spaces},
    news,
    node::{Life, leave},
    shared::Shared,
    sys,
    world::{Plans, World, memory_pid},
};
use crate::{
    front::{CRASHES, default_crashes},
    plugins::HookWatch,
    proc::ProcDir,
};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use std::{
    collections::BTreeSet,
    convert::Infallible,
    io::Read,
    os::fd::{AsRawFd, IntoRawFd, OwnedFd},
};

/// What the root task is given.
pub struct RootSetup<'a> {
    /// Options of the command.
    pub options: &'a RestoreOptions,
    /// Stage, failure, slots.
    pub shared: Shared,
    /// Which hook runs.
    pub watch: &'static HookWatch,
    /// A byte comes when the guardian traces this task; the end of the file, when the command is gone.
    pub permission: OwnedFd,
}

/// In the root task; never returns.
pub fn run(setup: RootSetup<'_>) -> ! {
    let shared = setup.shared;
    let result = prepare(setup).and_then(|world| {
        let memory = TaskMemory::root(&world.memory, memory_pid(&world.plans.tree, 0))?;
        Life::new(world, 0).live(memory)
    });
    end(shared, result)
}

/// Says why this process cannot go on, and ends it.
pub fn end(shared: Shared, result: Result<Infallible>) -> ! {
    let Err(error) = result;
    // Who was only told to stop has nothing to say.
    if !matches!(error, RestoreError::Aborted(_)) {
        let failure = error.to_failure();
        shared.fail(&serde_json::to_string(&failure).unwrap_or(failure.message));
    }
    leave(1)
}

fn prepare(setup: RootSetup<'_>) -> Result<&'static World> {
    let RootSetup { options, shared, watch, permission } = setup;
    // Whatever signal comes is for the restored program. Nothing of this one may be printed by its descriptors.
    // A crash is one, all the same.
    let mut blocked = SigSet::all();
    CRASHES.into_iter().for_each(|signal| blocked.remove(signal));
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&blocked), None);
    default_crashes();
    std::panic::set_hook(Box::new(move |panic| {
        let message = format!("internal error in a task that was being restored: {panic}");
        let failure = super::error::Failure { message, pid: 0, errno: 0, status: 1 };
        shared.fail(&serde_json::to_string(&failure).unwrap_or_default());
    }));
    news::divert(shared.news());
    let mut plans = Plans::new(options)?;
    raise_descriptor_limit()?;
    let first = plans.descriptors.service.first;
    for number in plans.inherited.values_mut() {
        let moved = sys::duplicate_above(*number, first).map(IntoRawFd::into_raw_fd);
        *number = moved.map_err(RestoreError::system(format!("take on descriptor {number}")))?;
    }
    close_all_but(plans.inherited.values().copied().chain([permission.as_raw_fd()]).collect())?;
    // Hooks make files with exactly the modes they ask for; the restorer sets the mask of the image.
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    let world: &'static World = Box::leak(Box::new(World::new(plans, shared, watch)?));
    wait_for_permission(permission)?;
    become_root_inside(&world.plans)?;
    // The tree may see no /proc, or another one.
    let proc = ProcDir::open_self().map_err(|error| RestoreError::Machine { what: error.to_string() })?;
    namespaces::enter(world)?;
    // There is only one cell and only this task to fill it; likewise below.
    let _ = world.spaces.set(Spaces::make(world, &proc)?);
    drop(proc);
    if has_mounts(&world.plans) {
        check::files(&world.plans, world.spaces.get())?;
    }
    let _ = world.ghosts.set(Ghosts::make(world)?);
    Ok(world)
}

fn wait_for_permission(permission: OwnedFd) -> Result<()> {
    let mut byte = [0];
    let mut file = std::fs::File::from(permission);
    match file.read(&mut byte) {
        Ok(1) => Ok(()),
        // The command is gone, and with it everybody who wants this task.
        _ => leave(1),
    }
}

/// Inherited descriptors, standard input and output among them, are none of the image's.
pub fn close_all_but(kept: BTreeSet<i32>) -> Result<()> {
    let close = |first: i32, last: u32| {
        sys::close_range(first, last).map_err(RestoreError::system("close inherited descriptors"))
    };
    let mut first = 0;
    for kept in kept {
        if kept > first {
            close(first, kept as u32 - 1)?;
        }
        first = kept + 1;
    }
    close(first, u32::MAX)
}

/// Tables may be as large as they were; the restorer sets the limit of the image.
fn raise_descriptor_limit() -> Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raise = || {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    };
    raise().map_err(|errno| RestoreError::system("raise RLIMIT_NOFILE")(errno.into()))
}

/// In a new user namespace this task has no ids until the maps are written; uid 0 of it, if there is one, is what hooks
/// expect to be.
fn become_root_inside(plans: &Plans) -> Result<()> {
    if !plans.image.namespaces.values().any(|namespace| namespace.kind == "user") {
        return Ok(());
    }
    use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    // Refused where setgroups is denied, and there are no groups then.
    let _ = setgroups(&[]);
    let set = setresgid(gid, gid, gid).and_then(|()| setresuid(uid, uid, uid));
    set.map_err(|errno| RestoreError::system("become root of the new user namespace")(errno.into()))?;
    // Lost with the old ids; without it files below /proc/self belong to a stranger.
    sys::prctl(libc::PR_SET_DUMPABLE, 1).map(drop).map_err(RestoreError::system("set PR_SET_DUMPABLE"))
}
