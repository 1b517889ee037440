//! Signal descriptors: signalfd(2).
//!
//! A signal descriptor has nothing but its mask: signals that wait are pending in the reading task, and core keeps them.

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, Selector, export_plugin,
    register,
};
use std::{
    io,
    os::fd::{BorrowedFd, FromRawFd, OwnedFd},
};

mod records {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use records::stasis::signalfd::v1::SignalDescriptor;

struct Signals;

/// `sizeof(sigset_t)` of the kernel, not of the C library.
const KERNEL_SIGSET: usize = 8;

/// Reads fdinfo (fs/signalfd.c, signalfd_show_fdinfo).
fn record(handle: &HandleInfo) -> Result<SignalDescriptor> {
    let mask = u64::from_str_radix(handle.field("sigmask")?, 16)
        .map_err(|error| HookError::invalid(format!("sigmask: {error}")))?;
    Ok(SignalDescriptor { mask })
}

impl Descriptor for Signals {
    type Record = SignalDescriptor;
    const KIND: &'static str = "signalfd";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::AnonInode("[signalfd]".into())]
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
        // A signalfd cannot be opened again through /proc, so the handle is the object.
        Ok(Described {
            identity: handle.id.to_string().into(),
            description: format!("signalfd (mask {})", handle.field("sigmask")?).into(),
            ..Described::default()
        })
    }

    fn dump(&self, _: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<SignalDescriptor>> {
        record(&object.handles[0]).map(Dumped::new)
    }

    fn create(&self, _: &Host<'_>, _: &ObjectInfo, record: &SignalDescriptor) -> Result<Vec<OwnedFd>> {
        let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
        // SAFETY: the mask is as long as the size says. The system call, since the C library's sigset_t is opaque.
        let fd = unsafe { libc::syscall(libc::SYS_signalfd4, -1, &record.mask, KERNEL_SIGSET, flags) };
        if fd < 0 {
            return Err(HookError::failed("signalfd4", io::Error::last_os_error()));
        }
        // SAFETY: a new descriptor that nobody else has; descriptor numbers fit an i32.
        Ok(vec![unsafe { OwnedFd::from_raw_fd(fd as i32) }])
    }
}

register!(descriptor: Signals);
export_plugin! { name: "signalfd", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_plugin_api::testing::Kit;

    #[test]
    fn fdinfo_is_hexadecimal() {
        let fdinfo = "pos:\t0\nflags:\t02\nsigmask:\t0000000000004201\n";
        let handle = HandleInfo { fdinfo: fdinfo.into(), ..HandleInfo::default() };
        assert_eq!(record(&handle).unwrap().mask, 0x4201);
        assert!(record(&HandleInfo::default()).unwrap_err().to_string().contains("sigmask"));
    }

    #[test]
    fn mask_comes_back() {
        let mask = 1 << (libc::SIGUSR1 - 1) | 1 << (libc::SIGCHLD - 1) | 1 << 63;
        let made = Signals.create_alone(mask);
        let mut kit = Kit::new();
        kit.plugin(Signals);
        let number = kit.hold(made, Signals::KIND).unwrap();
        assert_eq!(kit.dump().unwrap(), 1);
        kit.restore().unwrap();
        let fdinfo = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap();
        assert!(fdinfo.contains(&format!("sigmask:\t{mask:016x}")), "{fdinfo}");
    }

    impl Signals {
        fn create_alone(&self, mask: u64) -> OwnedFd {
            let host = stasis_plugin_api::testing::FakeHost::default();
            let record = prost::Message::encode_to_vec(&SignalDescriptor { mask });
            let hook = stasis_plugin_api::register::descriptor(Signals);
            let fds = host
                .call(|host| {
                    hook.create(host, &ObjectInfo::default(), record.as_slice().into()).into_result()
                })
                .unwrap();
            // SAFETY: `create` gives its descriptors away.
            unsafe { OwnedFd::from_raw_fd(fds[0]) }
        }
    }
}
