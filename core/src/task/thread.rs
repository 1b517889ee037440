//! Records of the threads of a process, and the credentials that most of them share.

use super::{ProcessContext, TaskError, ThreadContext, scheduling};
use crate::{
    image::records::{Credentials, Thread},
    proc::{
        ProcError,
        status::{Stat, StatField, Status},
    },
    tree::{IdTranslation, NamespaceMap, Process},
};
use nix::errno::Errno;

/// `PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE` (include/linux/sched.h), what PR_SET_IO_FLUSHER sets: the kernel tells it only to whom
/// has CAP_SYS_RESOURCE, but shows the flags to everybody.
const IO_FLUSHER: i64 = 0x0008_0000 | 0x0010_0000;

/// prctl answers are negative where the kernel does not know the question: then the state cannot be set either.
fn answer(value: i64) -> u32 {
    u32::try_from(value).unwrap_or_default()
}

/// Credentials of the first live thread, and all live threads.
pub fn describe_all(
    process: &Process,
    context: &ProcessContext,
    namespaces: &NamespaceMap,
) -> Result<(Credentials, Vec<Thread>), TaskError> {
    let foreign_user = namespaces.is_foreign("user", process);
    let ids = |file| match foreign_user {
        true => IdTranslation::read(&process.proc, file),
        false => Ok(IdTranslation::default()),
    };
    let maps = (ids("uid_map")?, ids("gid_map")?);
    let mut first: Option<Credentials> = None;
    let mut threads = Vec::with_capacity(process.threads.len());
    for &(tid, inner) in &process.threads {
        let found = context.threads.iter().find(|thread| thread.tid == tid);
        // The guardian stopped exactly these threads.
        let found = found.ok_or(TaskError::Call { call: "PTRACE_GETREGS", tid, errno: Errno::ESRCH })?;
        refuse_keyrings(process, found)?;
        let own = credentials(process, found, &maps)?;
        let mut thread = describe(process, found, inner)?;
        match &first {
            None => first = Some(own),
            Some(first) if *first != own => thread.credentials = Some(own),
            Some(_) => {}
        }
        threads.push(thread);
    }
    let gone = TaskError::Call { call: "PTRACE_GETREGS", tid: process.host_pid, errno: Errno::ESRCH };
    Ok((first.ok_or(gone)?, threads))
}

/// Keys of a thread or a process (thread-keyring(7), process-keyring(7)) are nobody else's, and go with it.
fn refuse_keyrings(process: &Process, context: &ThreadContext) -> Result<(), TaskError> {
    let Some(details) = &context.details else { return Ok(()) };
    for (keyring, of) in details.keyrings.into_iter().zip(["thread", "process"]) {
        if keyring > 0 {
            let (pid, name) = (context.tid, process.name.clone());
            return Err(TaskError::Unsupported { pid, name, what: format!("has a {of} keyring (keyctl)") });
        }
    }
    Ok(())
}

fn describe(process: &Process, context: &ThreadContext, tid: i32) -> Result<Thread, TaskError> {
    let dir = format!("task/{}", context.tid);
    let proc = &process.proc;
    let mut name = proc.read(&format!("{dir}/comm"))?;
    name.truncate(name.trim_ascii_end().len());
    let flags = Stat::read_file(proc, &format!("{dir}/stat"))?.get(StatField::Flags)?;
    let scheduling = scheduling::read(context.tid)?;
    let (rseq_address, rseq_size, rseq_signature) = context.rseq.unwrap_or_default();
    let mut thread = Thread {
        tid,
        registers: context.registers.clone(),
        xstate: context.xstate.clone(),
        signal_mask: context.signal_mask,
        name,
        altstack_flags: libc::SS_DISABLE as u32,
        robust_list: context.robust_list.0,
        robust_list_len: context.robust_list.1,
        rseq_address,
        rseq_size,
        rseq_signature,
        pending: context.pending.clone(),
        sched_policy: scheduling.policy,
        nice: scheduling.nice,
        sched_priority: scheduling.priority,
        affinity: scheduling.affinity,
        deadline_runtime_ns: scheduling.deadline[0],
        deadline_ns: scheduling.deadline[1],
        deadline_period_ns: scheduling.deadline[2],
        sched_flags: scheduling.flags,
        utilization_min: scheduling.utilization.0,
        utilization_max: scheduling.utilization.1,
        restart: context.restart,
        io_priority: scheduling.io_priority,
        io_flusher: flags & IO_FLUSHER == IO_FLUSHER,
        ..Thread::default()
    };
    if let Some(details) = &context.details {
        thread.altstack_base = details.stack_pointer;
        thread.altstack_flags = answer(details.stack_flags);
        thread.altstack_size = details.stack_size;
        thread.clear_child_tid = details.clear_child_tid;
        thread.parent_death_signal = answer(details.parent_death_signal);
        thread.timer_slack_ns = details.timer_slack_ns.max(0) as u64;
        thread.tsc = answer(details.tsc);
        thread.cpuid = (details.cpuid >= 0).then_some(details.cpuid == 1);
        thread.machine_check = answer(details.machine_check_policy);
        thread.speculation = details.speculation.map(answer).to_vec();
        thread.memory_policy = answer(details.memory_policy);
        let nodes = details.memory_nodes.iter().rposition(|word| *word != 0).map_or(0, |last| last + 1);
        thread.memory_nodes =
            details.memory_nodes[..nodes].iter().flat_map(|word| word.to_le_bytes()).collect();
    }
    Ok(thread)
}

/// Credentials of a thread, as its own user namespace names them.
fn credentials(
    process: &Process,
    context: &ThreadContext,
    (uids, gids): &(IdTranslation, IdTranslation),
) -> Result<Credentials, ProcError> {
    let status = Status::read_file(&process.proc, &format!("task/{}/status", context.tid))?;
    let numbers = |name, map: &IdTranslation| -> Result<Vec<u32>, ProcError> {
        Ok(status.numbers(name)?.into_iter().map(|id| map.inside(id)).collect())
    };
    let details = context.details.as_ref();
    Ok(Credentials {
        uid: numbers("Uid", uids)?,
        gid: numbers("Gid", gids)?,
        groups: numbers("Groups", gids)?,
        cap_inheritable: status.hexadecimal("CapInh")?,
        cap_permitted: status.hexadecimal("CapPrm")?,
        cap_effective: status.hexadecimal("CapEff")?,
        cap_bounding: status.hexadecimal("CapBnd")?,
        cap_ambient: status.hexadecimal("CapAmb")?,
        no_new_privs: status.text("NoNewPrivs")? == "1",
        seccomp_mode: status.last_number("Seccomp")?,
        securebits: details.map_or(0, |details| answer(details.securebits)),
        keep_caps: details.is_some_and(|details| details.keep_capabilities == 1),
        seccomp_filters: context.seccomp_filters.clone(),
    })
}
