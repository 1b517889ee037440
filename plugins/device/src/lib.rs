//! The memory devices without state: /dev/null, zero, full, random and urandom (null(4), full(4), random(4)).
//!
//! A device is opened again by its path. Where the task does not find it there (a container's engine may have opened it
//! outside, so that its path has no meaning inside), the device of the same number in /dev is taken, with a warning.

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, Selector, export_plugin,
    register,
};
use std::{
    ffi::OsStr,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
        },
    },
    path::Path,
};

mod records {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use records::stasis::device::v1::MemoryDevice;

/// Major number of the memory devices (Documentation/admin-guide/devices.txt).
const MEM: u32 = 1;

/// Minor numbers and names; whatever else has this major number is not without state.
const DEVICES: [(u32, &str); 5] =
    [(3, "/dev/null"), (5, "/dev/zero"), (7, "/dev/full"), (8, "/dev/random"), (9, "/dev/urandom")];

/// Flags that only open(2) sets; core sets the others.
const OPEN_FLAGS: i32 = libc::O_ACCMODE | libc::O_PATH | libc::O_NOFOLLOW | libc::O_SYNC | libc::O_DSYNC;

struct Memory;

fn usual_name(rdev: u64) -> Option<&'static str> {
    let name = |(minor, name): &(u32, &'static str)| (libc::makedev(MEM, *minor) == rdev).then_some(*name);
    DEVICES.iter().find_map(name)
}

fn record(handle: &HandleInfo) -> MemoryDevice {
    MemoryDevice {
        path: handle.link.as_bytes().to_vec(),
        rdev: handle.rdev,
        flags: handle.status_flags & OPEN_FLAGS.cast_unsigned(),
    }
}

/// Opens `path` and makes sure that it is the device.
fn open(path: &Path, record: &MemoryDevice) -> io::Result<OwnedFd> {
    let flags = record.flags.cast_signed();
    // The standard library insists on setting the access mode itself, and knows no mode 3 (only ioctl).
    let raw = {
        let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: `path` ends with a zero byte.
        unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC | libc::O_NOCTTY | libc::O_NONBLOCK) }
    };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else has.
    let file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(raw) };
    let meta = file.metadata()?;
    match meta.file_type().is_char_device() && meta.rdev() == record.rdev {
        true => Ok(file.into()),
        false => Err(io::Error::from_raw_os_error(libc::ENODEV)),
    }
}

/// Refuses to open anything by a path that is not a device: opening may have effects.
fn check(path: &Path, record: &MemoryDevice) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_PATH).open(path)?;
    match file.metadata()?.rdev() == record.rdev {
        true => Ok(()),
        false => Err(io::Error::from_raw_os_error(libc::ENODEV)),
    }
}

impl Descriptor for Memory {
    type Record = MemoryDevice;
    const KIND: &'static str = "device";

    fn selectors(&self) -> Vec<Selector> {
        let selector =
            |(minor, _): &(u32, &str)| Selector::CharDevice { major: MEM, first: *minor, last: *minor };
        DEVICES.iter().map(selector).collect()
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
        // Open file descriptions of one device have nothing in common, so each is an object.
        Ok(Described {
            identity: handle.id.to_string().into(),
            description: handle.link.clone(),
            ..Described::default()
        })
    }

    fn dump(&self, _: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<MemoryDevice>> {
        Ok(Dumped::new(record(&object.handles[0])))
    }

    fn create(&self, host: &Host<'_>, _: &ObjectInfo, record: &MemoryDevice) -> Result<Vec<OwnedFd>> {
        let path = Path::new(OsStr::from_bytes(&record.path));
        let error = match check(path, record).and_then(|()| open(path, record)) {
            Ok(fd) => return Ok(vec![fd]),
            Err(error) => error,
        };
        let usual = usual_name(record.rdev).map(Path::new).filter(|usual| *usual != path);
        let found = usual.and_then(|usual| check(usual, record).and_then(|()| open(usual, record)).ok());
        let (minor, shown) = (libc::minor(record.rdev), path.display());
        match (found, usual) {
            (Some(fd), Some(usual)) => {
                host.warn(&format!("{shown} is not there ({error}): opened {} instead", usual.display()));
                Ok(vec![fd])
            }
            _ => Err(HookError::failed(format!("open {shown} as the device {MEM}:{minor}"), error)
                .remedy(format!("make it: mknod {shown} c {MEM} {minor}"))),
        }
    }
}

register!(descriptor: Memory);
export_plugin! { name: "device", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_plugin_api::testing::Kit;
    use std::io::{Read, Write};

    fn restored(file: File) -> (File, Vec<String>) {
        let mut kit = Kit::new();
        kit.plugin(Memory);
        let number = kit.hold(file, Memory::KIND).unwrap();
        kit.dump().unwrap();
        kit.restore().unwrap();
        let warnings = kit.host.warnings.take();
        (kit.fd(number).try_clone_to_owned().unwrap().into(), warnings)
    }

    #[test]
    fn each_device_comes_back_with_its_access_mode() {
        for (minor, path) in DEVICES {
            let (mut file, warnings) = restored(File::open(path).unwrap());
            assert_eq!(file.metadata().unwrap().rdev(), libc::makedev(MEM, minor), "{path}");
            assert!(warnings.is_empty(), "{warnings:?}");
            assert_eq!(file.write(b"x").unwrap_err().raw_os_error(), Some(libc::EBADF), "{path}");
            assert_eq!(file.read(&mut [0; 4]).unwrap(), if minor == 3 { 0 } else { 4 }, "{path}");
        }
        let (mut full, _) = restored(OpenOptions::new().write(true).open("/dev/full").unwrap());
        assert_eq!(full.write(b"x").unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    }

    #[test]
    fn a_path_that_leads_elsewhere_is_replaced_with_a_warning() {
        let host = stasis_plugin_api::testing::FakeHost::default();
        let hook = register_create();
        for path in ["/etc/passwd", "/nowhere/null", "/dev/zero"] {
            let record = MemoryDevice { path: path.into(), rdev: libc::makedev(MEM, 3), flags: 0 };
            let bytes = prost::Message::encode_to_vec(&record);
            let object = ObjectInfo::default();
            let fds = host.call(|h| hook.create(h, &object, bytes.as_slice().into()).into_result()).unwrap();
            // SAFETY: `create` gives its descriptors away.
            let file = unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fds[0]) };
            assert_eq!(file.metadata().unwrap().rdev(), libc::makedev(MEM, 3));
        }
        assert_eq!(host.warnings.borrow().len(), 3);
    }

    #[test]
    fn an_unknown_device_that_is_missing_is_an_error_with_a_remedy() {
        let host = stasis_plugin_api::testing::FakeHost::default();
        let record = MemoryDevice { path: "/nowhere/x".into(), rdev: libc::makedev(MEM, 99), flags: 0 };
        let bytes = prost::Message::encode_to_vec(&record);
        let object = ObjectInfo::default();
        let hook = register_create();
        let result = host.call(|h| hook.create(h, &object, bytes.as_slice().into()).into_result());
        assert!(result.unwrap_err().to_string().contains("mknod /nowhere/x c 1 99"));
    }

    fn register_create() -> stasis_plugin_api::abi::DescriptorBox {
        stasis_plugin_api::register::descriptor(Memory)
    }
}
