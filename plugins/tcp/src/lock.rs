//! The network lock: from the freeze to the restore no packet of a connection passes, so that nothing changes behind the
//! dump's back, and nobody's kernel answers for a socket that is not there.
//!
//! During a dump, and during a restore, it is a table of nf_tables that goes with its netlink socket: the guardian holds
//! that of the dump, and closes it when the connections are as they were. Just before the tree is killed a second table
//! is made that stays; the restore removes it, whether it succeeds or not, or `stasis unlock`.
//!
//! Each net namespace has its own. One that is made anew gets a table from the first task that makes a connection in it.

use crate::{CLOSE, ESTABLISHED, kernel, nft, record::stasis::tcp::v1::Locked};
use stasis_plugin_api::{
    Event, HandleInfo, HookError, Host, Lifecycle, Result, UndoStep,
    prost::Message,
    socket::{self, inject::Path},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI32, Ordering},
    },
};

/// Blobs: the name of the table, and the connections.
const NAME: &str = "lock";
pub(crate) const CONNECTIONS: &str = "connections";
/// No list of connections is longer.
const LONGEST_LIST: u64 = 1 << 28;

/// What this process knows of the tree's connections.
struct State {
    /// By inode number: the net namespace, and the two directions.
    connections: BTreeMap<u64, (u64, [Path; 2])>,
    namespaces: BTreeMap<u64, File>,
    table: String,
    /// Sockets that own tables.
    owners: Vec<OwnedFd>,
    kept: bool,
    restoring: bool,
}

static STATE: Mutex<State> = Mutex::new(State {
    connections: BTreeMap::new(),
    namespaces: BTreeMap::new(),
    table: String::new(),
    owners: Vec::new(),
    kept: false,
    restoring: false,
});

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn directions(local: &[u8], peer: &[u8]) -> std::option::Option<[Path; 2]> {
    Some([Path::new(local, peer)?, Path::new(peer, local)?])
}

/// Notes a connection that is to be locked once all is frozen.
pub(crate) fn note(host: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<()> {
    let state_of = kernel::info(fd)?.state;
    let keeps = host.has_option(ESTABLISHED) && !host.has_option(CLOSE);
    if !keeps || !kernel::state::CONNECTED.contains(&state_of) {
        return Ok(());
    }
    let failed = |error| HookError::failed("the addresses of a connection", error);
    let local = socket::local_address(fd).map_err(failed)?;
    let peer = socket::peer_address(fd).map_err(failed)?.unwrap_or_default();
    let Some(paths) = directions(&local, &peer) else { return Ok(()) };
    let namespace = socket::namespace(fd)?;
    let number = namespace.metadata().map_err(failed)?.ino();
    let mut state = state();
    state.connections.insert(handle.ino, (number, paths));
    state.namespaces.entry(number).or_insert(namespace);
    Ok(())
}

/// Whether the lock holds for a socket.
pub(crate) fn covers(ino: u64) -> bool {
    let state = state();
    !state.owners.is_empty() && state.connections.contains_key(&ino)
}

/// Whether a socket is in another net namespace than this process.
pub(crate) fn is_inside(ino: u64) -> Result<bool> {
    let own = own_namespace().map_err(failed)?;
    Ok(state().connections.get(&ino).is_some_and(|(namespace, _)| *namespace != own))
}

fn failed(error: io::Error) -> HookError {
    HookError::failed("the network lock (nf_tables)", error)
        .remedy("needs CAP_NET_ADMIN and a kernel with nf_tables; or end the connections with --tcp-close")
}

fn own_namespace() -> io::Result<u64> {
    Ok(std::fs::metadata("/proc/self/ns/net")?.ino())
}

impl State {
    fn paths(&self, namespace: u64) -> Vec<Path> {
        let of_it = self.connections.values().filter(|(number, _)| *number == namespace);
        of_it.flat_map(|(_, paths)| *paths).collect()
    }

    /// All is frozen.
    fn lock(&mut self, host: &Host<'_>) -> Result<()> {
        if self.connections.is_empty() {
            return Ok(());
        }
        let mut random = [0; 8];
        File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random)).map_err(failed)?;
        self.table = format!("stasis-{:016x}", u64::from_ne_bytes(random));
        host.blob_writer(NAME).write_all(self.table.as_bytes()).map_err(failed)?;
        for (number, namespace) in &self.namespaces {
            let netlink = socket::in_namespace(namespace, nft::open).map_err(failed)?;
            // Held by the guardian until every socket is as it was.
            host.undo(netlink.as_fd(), &[])?;
            nft::send(&netlink, &nft::lock(&self.table, &self.paths(*number), true)).map_err(failed)?;
            self.owners.push(netlink);
        }
        Ok(())
    }

    /// The tree is about to be killed: a table that stays, in each namespace. One of the tree's own goes with it, but some time
    /// after its last task.
    fn keep(&mut self, host: &Host<'_>) -> Result<()> {
        // Asked for each connection, done once.
        if self.kept || self.connections.is_empty() {
            return Ok(());
        }
        self.kept = true;
        let table = kept(&self.table);
        for (number, namespace) in &self.namespaces {
            let netlink = socket::in_namespace(namespace, nft::open).map_err(failed)?;
            host.undo(netlink.as_fd(), &[UndoStep::Write(nft::unlock(&table).as_slice().into())])?;
            nft::send(&netlink, &nft::lock(&table, &self.paths(*number), false)).map_err(failed)?;
        }
        Ok(())
    }
}

/// The name of the table that stays.
fn kept(table: &str) -> String {
    format!("{table}-kept")
}

/// Makes the lock outlive the dump.
pub(crate) fn keep(host: &Host<'_>) -> Result<()> {
    state().keep(host)
}

/// What the image says of its connections.
pub(crate) fn connections(host: &Host<'_>) -> Result<Vec<Locked>> {
    let mut bytes = Vec::new();
    let read = host.blob_reader(CONNECTIONS).take(LONGEST_LIST).read_to_end(&mut bytes);
    read.map_err(|error| HookError::failed("reading the list of connections", error))?;
    let mut rest = bytes.as_slice();
    let mut list = Vec::new();
    while !rest.is_empty() {
        let one = Locked::decode_length_delimited(&mut rest);
        list.push(one.map_err(|error| HookError::invalid(format!("the list of connections: {error}")))?);
    }
    Ok(list)
}

/// The name that the dump gave to its table; none if it had no connections.
fn name(host: &Host<'_>) -> Result<Option<String>> {
    let mut table = String::new();
    let read = host.blob_reader(NAME).take(64).read_to_string(&mut table);
    read.map_err(|error| HookError::failed("reading the name of the lock", error))?;
    let valid = |name: &str| name.bytes().all(|byte| byte.is_ascii_hexdigit());
    Ok(table.strip_prefix("stasis-").is_some_and(valid).then_some(table))
}

/// Removes a table, if it is there.
fn remove(netlink: &OwnedFd, table: &str) -> Result<()> {
    match nft::send(netlink, &nft::unlock(table)) {
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(failed(error)),
        _ => Ok(()),
    }
}

/// Removes the table that the dump has left, if it is still there.
fn lift_kept(host: &Host<'_>) -> Result<()> {
    match name(host)? {
        Some(table) => remove(&nft::open().map_err(failed)?, &kept(&table)),
        None => Ok(()),
    }
}

/// The table in a namespace that this restore has made.
fn inner(table: &str) -> String {
    format!("{table}-inner")
}

/// Before a connection is made in a namespace of the tree's own: what it sends, and what comes, waits until all are there. It goes
/// with the namespace if the restore fails.
pub(crate) fn lock_inside(host: &Host<'_>) -> Result<()> {
    static DONE: AtomicI32 = AtomicI32::new(0);
    // A fork knows it, too; what another task has done is seen at the table.
    if DONE.swap(1, Ordering::Relaxed) != 0 {
        return Ok(());
    }
    let table = name(host)?.ok_or_else(|| HookError::invalid("connections without a lock"))?;
    let list = connections(host)?;
    let inside = list.iter().filter(|one| one.inside);
    let paths: Vec<Path> = inside.filter_map(|one| directions(&one.local, &one.peer)).flatten().collect();
    let netlink = nft::open().map_err(failed)?;
    match nft::send(&netlink, &nft::lock(&inner(&table), &paths, false)) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(failed(error)),
        _ => Ok(()),
    }
}

/// A lock of the restore's own: that of the dump may be gone, or was on another machine.
fn lock_for_restore(host: &Host<'_>) -> Result<()> {
    let list = connections(host)?;
    if list.is_empty() || host.has_option(CLOSE) {
        return Ok(());
    }
    // Those of other namespaces, with the same addresses, are none of ours.
    let here = list.iter().filter(|one| !one.inside);
    let paths: Vec<Path> = here.filter_map(|one| directions(&one.local, &one.peer)).flatten().collect();
    if paths.is_empty() {
        return Ok(());
    }
    let table = format!("stasis-restore-{}", std::process::id());
    let netlink = nft::open().map_err(failed)?;
    nft::send(&netlink, &nft::lock(&table, &paths, true)).map_err(failed)?;
    state().owners.push(netlink);
    Ok(())
}

/// Everything is in place: packets pass again, and every connection asks its peer where it is.
fn release(host: &Host<'_>) -> Result<()> {
    state().owners.clear();
    lift_kept(host)?;
    if host.has_option(CLOSE) {
        return Ok(());
    }
    let list = connections(host)?;
    let open = |connection: &Locked| {
        // In flight inside another socket's queue: `settle` has done it.
        let held = host.handle(connection.handle).is_some_and(|handle| !handle.holders.is_empty());
        held.then(|| host.open_handle(connection.handle)).transpose()
    };
    lift_inside(host, &list, open)?;
    for connection in &list {
        if let Some(fd) = open(connection)? {
            kernel::leave_repair(fd.as_fd(), kernel::REPAIR_OFF, connection.reuse_address)?;
        }
    }
    Ok(())
}

/// Lifts the locks in namespaces of the tree's own: that of the restore, and that of the dump if it was only entered.
fn lift_inside(
    host: &Host<'_>,
    list: &[Locked],
    open: impl Fn(&Locked) -> Result<Option<OwnedFd>>,
) -> Result<()> {
    let Some(table) = name(host)? else { return Ok(()) };
    let mut lifted = BTreeSet::new();
    for connection in list.iter().filter(|connection| connection.inside) {
        let Some(fd) = open(connection)? else { continue };
        let namespace = socket::namespace(fd.as_fd())?;
        if lifted.insert(namespace.metadata().map_err(failed)?.ino()) {
            let netlink = socket::in_namespace(&namespace, nft::open).map_err(failed)?;
            remove(&netlink, &inner(&table))?;
            remove(&netlink, &kept(&table))?;
        }
    }
    Ok(())
}

/// Its hooks.
pub(crate) struct NetworkLock;

impl Lifecycle for NetworkLock {
    const KIND: &'static str = "network-lock";

    fn event(&self, host: &Host<'_>, event: Event) -> Result<()> {
        match event {
            Event::Frozen => state().lock(host),
            Event::BeforeRestore => {
                state().restoring = true;
                lock_for_restore(host)
            }
            Event::Restored => release(host),
            Event::Unlock => lift_kept(host),
            // From here on the guardian alone holds the lock, and lets go when it has put back all else.
            Event::BeforeResume | Event::Dumped => {
                state().owners.clear();
                Ok(())
            }
            Event::Aborted => {
                state().owners.clear();
                if state().restoring { lift_kept(host) } else { Ok(()) }
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_plugin_api::testing::Kit;

    fn with_blob(name: &str, bytes: &[u8]) -> Kit {
        let kit = Kit::new();
        kit.host.blobs.borrow_mut().insert(name.to_owned(), bytes.to_vec());
        kit
    }

    #[test]
    fn the_list_of_connections_is_read_back_and_a_damaged_one_refused() {
        let one =
            Locked { handle: 7, local: vec![1; 16], peer: vec![2; 16], reuse_address: true, inside: true };
        let two = Locked { handle: 8, ..Locked::default() };
        let bytes = [&one, &two].map(|locked| locked.encode_length_delimited_to_vec()).concat();
        let read = |bytes: &[u8]| with_blob(CONNECTIONS, bytes).with_host(connections);
        assert_eq!(read(&bytes).unwrap(), [one, two]);
        assert!(read(&[]).unwrap().is_empty());
        assert!(read(&bytes[..bytes.len() - 1]).is_err());
        assert!(read(&[255; 30]).is_err());
    }

    #[test]
    fn only_tables_of_our_own_are_removed() {
        for name in ["filter", "stasis-../x", "stasis-12 34", ""] {
            with_blob(NAME, name.as_bytes()).with_host(lift_kept).unwrap();
        }
    }

    #[test]
    fn both_directions_of_a_connection_are_locked() {
        let address = |last: u8, port: u16| {
            let mut bytes = (libc::AF_INET as u16).to_ne_bytes().to_vec();
            bytes.extend(port.to_be_bytes());
            bytes.extend([127, 0, 0, last]);
            bytes.resize(16, 0);
            bytes
        };
        let [there, back] = directions(&address(1, 80), &address(2, 81)).unwrap();
        assert_eq!((there.from, there.to), (back.to, back.from));
        assert_eq!(there.from, ([127, 0, 0, 1].into(), 80));
        assert!(directions(&[], &[]).is_none());
    }
}
