//! Credentials of one thread, in the one order that needs no power already given away (capabilities(7)).

use crate::proto::{Credentials, Step};
use crate::sys::{Failure, Outcome, call, nr, step};

const PR_SET_KEEPCAPS: u64 = 8;
const PR_GET_KEEPCAPS: u64 = 7;
const PR_CAPBSET_READ: u64 = 23;
const PR_CAPBSET_DROP: u64 = 24;
const PR_GET_SECUREBITS: u64 = 27;
const PR_SET_SECUREBITS: u64 = 28;
const PR_SET_NO_NEW_PRIVS: u64 = 38;
const PR_CAP_AMBIENT: u64 = 47;
const PR_CAP_AMBIENT_IS_SET: u64 = 1;
const PR_CAP_AMBIENT_RAISE: u64 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: u64 = 4;
const LINUX_CAPABILITY_VERSION_3: u64 = 0x2008_0522;
const EPERM: u32 = 1;

/// Three sets of 64 bits, as `struct __user_cap_data_struct[2]` has them.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Sets {
    effective: u64,
    permitted: u64,
    inheritable: u64,
}

/// Sets the credentials of the calling thread.
pub fn set(wanted: &Credentials) -> Outcome {
    let before = capabilities()?;
    // SAFETY: no memory is involved in any prctl(2) of this function.
    let keeping = unsafe { call(nr::PRCTL, [PR_GET_KEEPCAPS]) };
    if keeping == 0 {
        // Lets the change of user keep the permitted set. Refused only where securebits lock it, and then the change
        // either needs no capabilities any more or fails below by name.
        // SAFETY: as above.
        unsafe { call(nr::PRCTL, [PR_SET_KEEPCAPS, 1]) };
    }
    groups(wanted)?;
    users(wanted)?;
    let permitted = capabilities()?.permitted & before.permitted;
    let powers = Sets { effective: permitted, permitted, inheritable: wanted.inheritable };
    if capabilities()? != powers {
        set_capabilities(powers)?;
    }
    ambient(wanted)?;
    for capability in 0..64 {
        let dropped = wanted.bounding >> capability & 1 == 0;
        // SAFETY: as above. A number that the kernel does not know gives EINVAL.
        if dropped && unsafe { call(nr::PRCTL, [PR_CAPBSET_READ, capability]) } == 1 {
            // SAFETY: as above.
            unsafe { step(Step::Bounding, capability as usize, nr::PRCTL, [PR_CAPBSET_DROP, capability])? };
        }
    }
    let bits = u64::from(wanted.securebits & !KEEP_CAPS_BIT);
    // SAFETY: as above.
    if unsafe { call(nr::PRCTL, [PR_GET_SECUREBITS]) } as u64 & !u64::from(KEEP_CAPS_BIT) != bits {
        // SAFETY: as above.
        unsafe { step(Step::SecureBits, 0, nr::PRCTL, [PR_SET_SECUREBITS, bits])? };
    }
    // SAFETY: as above.
    if unsafe { call(nr::PRCTL, [PR_GET_KEEPCAPS]) } != i64::from(wanted.keep_caps) {
        // SAFETY: as above.
        unsafe { step(Step::SecureBits, 1, nr::PRCTL, [PR_SET_KEEPCAPS, wanted.keep_caps.into()])? };
    }
    let last =
        Sets { effective: wanted.effective, permitted: wanted.permitted, inheritable: wanted.inheritable };
    if capabilities()? != last {
        set_capabilities(last)?;
    }
    if wanted.no_new_privs != 0 {
        // SAFETY: as above.
        unsafe { step(Step::NoNewPrivs, 0, nr::PRCTL, [PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0])? };
    }
    Ok(())
}

/// SECBIT_KEEP_CAPS has a call of its own that needs no privilege.
const KEEP_CAPS_BIT: u32 = 1 << 4;

/// Supplementary groups; a user namespace may forbid setgroups(2), which is no harm when they are right.
fn groups(wanted: &Credentials) -> Outcome {
    let groups = wanted.groups.entries();
    let mut now = [0_u32; 64];
    // SAFETY: the kernel writes at most as many groups as are told; EINVAL when there are more.
    let count = unsafe { call(nr::GETGROUPS, [now.len() as u64, now.as_mut_ptr() as u64]) };
    if usize::try_from(count).ok().and_then(|count| now.get(..count)) != Some(groups) {
        let place = [groups.len() as u64, groups.as_ptr() as u64];
        // SAFETY: the kernel reads the table.
        unsafe { step(Step::Groups, 0, nr::SETGROUPS, place)? };
    }
    Ok(())
}

fn users(wanted: &Credentials) -> Outcome {
    let [real, effective, saved, files] = wanted.gid.map(u64::from);
    // SAFETY: no memory is involved. setfsgid(2) and setfsuid(2) give the previous id, so a second call tells.
    unsafe {
        step(Step::UserIds, 1, nr::SETRESGID, [real, effective, saved])?;
        call(nr::SETFSGID, [files]);
        if call(nr::SETFSGID, [files]) as u32 != wanted.gid[3] {
            return Err(Failure { step: Step::UserIds, errno: EPERM, index: 2 });
        }
    }
    let [real, effective, saved, files] = wanted.uid.map(u64::from);
    // SAFETY: as above.
    unsafe {
        step(Step::UserIds, 3, nr::SETRESUID, [real, effective, saved])?;
        call(nr::SETFSUID, [files]);
        if call(nr::SETFSUID, [files]) as u32 != wanted.uid[3] {
            return Err(Failure { step: Step::UserIds, errno: EPERM, index: 4 });
        }
    }
    Ok(())
}

fn ambient(wanted: &Credentials) -> Outcome {
    // SAFETY: no memory is involved.
    unsafe {
        let superfluous = (0..64).any(|capability| {
            wanted.ambient >> capability & 1 == 0
                && call(nr::PRCTL, [PR_CAP_AMBIENT, PR_CAP_AMBIENT_IS_SET, capability, 0, 0]) == 1
        });
        if superfluous {
            step(Step::Ambient, 64, nr::PRCTL, [PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0])?;
        }
        for capability in (0..64).filter(|capability| wanted.ambient >> capability & 1 == 1) {
            let place = [PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0];
            step(Step::Ambient, capability as usize, nr::PRCTL, place)?;
        }
    }
    Ok(())
}

fn capabilities() -> Result<Sets, Failure> {
    let header = LINUX_CAPABILITY_VERSION_3;
    let mut data = [0_u32; 6];
    // SAFETY: the header is a version and a zero pid; the kernel writes six words.
    unsafe {
        step(Step::Capabilities, 0, nr::CAPGET, [&raw const header as u64, data.as_mut_ptr() as u64])?;
    }
    let join = |low: usize| u64::from(data[low]) | u64::from(data[low + 3]) << 32;
    Ok(Sets { effective: join(0), permitted: join(1), inheritable: join(2) })
}

fn set_capabilities(sets: Sets) -> Outcome {
    let header = LINUX_CAPABILITY_VERSION_3;
    let mut data = [0_u32; 6];
    for (at, set) in [sets.effective, sets.permitted, sets.inheritable].into_iter().enumerate() {
        data[at] = set as u32;
        data[at + 3] = (set >> 32) as u32;
    }
    // SAFETY: the kernel reads header and six words.
    unsafe { step(Step::Capabilities, 1, nr::CAPSET, [&raw const header as u64, data.as_ptr() as u64])? };
    Ok(())
}
