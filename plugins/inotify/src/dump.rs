//! Reading an instance.

use crate::{
    kernel,
    locate::{Place, Search},
    records::stasis::inotify::v1::{FileHandle, Instance, Watch},
};
use stasis_plugin_api::{Dumped, HandleInfo, HookError, Host, ObjectInfo, Result};
use std::os::fd::AsFd;

/// A watch as fdinfo has it (fs/notify/fdinfo.c, inotify_fdinfo).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub number: i32,
    pub ino: u64,
    pub dev: u64,
    pub mask: u32,
    /// Type and bytes; file systems that cannot make handles have none.
    pub handle: Option<(i32, Vec<u8>)>,
}

/// The watches of an instance, ascending.
pub fn listed(handle: &HandleInfo) -> Result<Vec<Listed>> {
    let lines = handle.fdinfo.lines().filter(|line| line.starts_with("inotify "));
    let mut watches = lines
        .map(|line| {
            watch(line)
                .ok_or_else(|| HookError::invalid(format!("fdinfo line of an inotify: {:?}", line.trim())))
        })
        .collect::<Result<Vec<_>>>()?;
    watches.sort_by_key(|watch| watch.number);
    Ok(watches)
}

/// `inotify wd:1 ino:13 sdev:fe00000 mask:fff ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:1300000000000000`,
/// all of it hexadecimal.
fn watch(line: &str) -> Option<Listed> {
    Some(Listed {
        number: i32::try_from(number(line, "wd")?).ok()?,
        mask: number(line, "mask")? as u32,
        ..inode(line)?
    })
}

/// A hexadecimal field of a line.
pub fn number(line: &str, name: &str) -> Option<u64> {
    u64::from_str_radix(text(line, name)?, 16).ok()
}

fn text<'l>(line: &'l str, name: &str) -> Option<&'l str> {
    line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix(':'))
}

/// The kernel's own MKDEV (include/linux/kdev_t.h): 20 bits of minor number.
pub fn device(number: u64) -> u64 {
    libc::makedev((number >> 20) as u32, (number & 0xf_ffff) as u32)
}

/// The inode of a line.
pub fn inode(line: &str) -> Option<Listed> {
    let handle = || {
        let text = text(line, "f_handle")?;
        let byte = |at: usize| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
        let bytes = (0..text.len()).step_by(2).map(byte).collect::<Option<Vec<u8>>>()?;
        Some((i32::try_from(number(line, "fhandle-type")?).ok()?, bytes))
    };
    let (ino, dev) = (number(line, "ino")?, device(number(line, "sdev")?));
    Some(Listed { number: 0, ino, dev, mask: 0, handle: handle() })
}

/// Makes the record of an instance.
pub fn instance(host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Instance>> {
    let handle = &object.handles[0];
    let descriptor = host.open_handle(handle.id)?;
    let queued = kernel::queued(descriptor.as_fd()).map_err(|error| HookError::failed("FIONREAD", error))?;
    if queued > 0 {
        host.warn(&format!(
            "{}: {queued} bytes of unread events become one IN_Q_OVERFLOW in the restored process",
            object.description
        ));
    }
    let listed = listed(handle)?;
    let places = Search::new(host, handle)?.find(&listed)?;
    let mut record = Instance { watches: Vec::with_capacity(listed.len()), overflow: queued > 0 };
    let mut uses = Vec::new();
    for (listed, place) in listed.into_iter().zip(places) {
        record.watches.push(record_of(listed, place, &mut uses));
    }
    Ok(Dumped { uses: uses.into(), ..Dumped::new(record) })
}

/// What the image keeps of a watched file; `uses` gets the handle through which it is found, if any.
pub fn record_of(listed: Listed, place: Place, uses: &mut Vec<u32>) -> Watch {
    let (path, handle, mount, mode) = match place {
        Place::Path { path, mount, mode } => (path, 0, mount, mode),
        Place::Removed { handle, mode } => {
            uses.push(handle);
            (Vec::new(), handle, None, mode)
        }
    };
    let file = match (mount, listed.handle) {
        (Some(mount), Some((kind, data))) => Some(FileHandle { r#type: kind, data, mount }),
        _ => None,
    };
    let (number, mask) = (listed.number, listed.mask);
    Watch { number, mask, path, handle, file, mode }
}
