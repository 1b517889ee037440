//! Pseudoterminals: pty(7), pts(4). An object is one terminal: its master (role 0), the descriptors of its slave (1),
//! and those opened as /dev/tty (2). Data in its buffers can only be read by taking them out and are refused for now.

mod dump;
mod ioctl;
mod restore;

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, Host, ObjectInfo, Result, Selector, Session, SessionInfo,
    export_plugin, register,
};
use std::os::fd::{BorrowedFd, OwnedFd};

mod record {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use record::stasis::pty::v1::Terminal;

/// Major number of /dev/tty and /dev/ptmx (Documentation/admin-guide/devices.txt).
const AUX_MAJOR: u32 = 5;
/// Slaves have the major numbers 136 to 143; the kernel uses the first.
const SLAVE_MAJOR: u32 = 136;
const SLAVE_MAJORS: std::ops::RangeInclusive<u32> = SLAVE_MAJOR..=143;
/// Highest minor number (20 bits).
const LAST_MINOR: u32 = (1 << 20) - 1;

/// Roles of handles.
const MASTER: u32 = 0;
const SLAVE: u32 = 1;
const DEV_TTY: u32 = 2;

struct Pty;

impl Descriptor for Pty {
    type Record = Terminal;
    const KIND: &'static str = "pty";

    fn selectors(&self) -> Vec<Selector> {
        let mut selectors = vec![
            Selector::CharDevice { major: AUX_MAJOR, first: 0, last: 0 },
            Selector::CharDevice { major: AUX_MAJOR, first: 2, last: 2 },
        ];
        let slave = |major| Selector::CharDevice { major, first: 0, last: LAST_MINOR };
        selectors.extend(SLAVE_MAJORS.map(slave));
        selectors
    }

    fn describe(&self, host: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
        dump::describe(host, handle, fd)
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Terminal>> {
        dump::dump(host, object)
    }

    fn create(&self, _: &Host<'_>, object: &ObjectInfo, record: &Terminal) -> Result<Vec<OwnedFd>> {
        restore::create(object, record)
    }

    fn settle(&self, host: &Host<'_>, object: &ObjectInfo, record: &Terminal) -> Result<()> {
        restore::settle(host, object, record)
    }
}

impl Session for Pty {
    const KIND: &'static str = "pty";

    fn selectors(&self) -> Vec<Selector> {
        SLAVE_MAJORS.map(Selector::Terminal).collect()
    }

    fn describe(&self, host: &Host<'_>, session: &SessionInfo) -> Result<Option<Described>> {
        dump::describe_session(host, session)
    }
}

register!(descriptor: Pty);
register!(session: Pty);
export_plugin! { name: "pty", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }
