use super::*;
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, accept, bind, connect, getpeername,
    getsockname, listen, shutdown, socket, socketpair,
};
use stasis_plugin_api::testing::Kit;
use std::{
    fs,
    os::fd::{AsFd, AsRawFd, FromRawFd, RawFd},
    path::{Path, PathBuf},
};

fn kit() -> Kit {
    let mut kit = Kit::new();
    kit.plugin(Unix::default());
    kit
}

fn new(kind: SockType) -> OwnedFd {
    socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None).unwrap()
}

fn directory(test: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("stasis-unix-{}-{test}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).unwrap();
    dir
}

fn listener(kind: SockType, address: &UnixAddr) -> OwnedFd {
    let listener = new(kind);
    bind(listener.as_raw_fd(), address).unwrap();
    listen(&listener, Backlog::new(7).unwrap()).unwrap();
    listener
}

/// Client and accepted socket.
fn connection(kind: SockType, listener: &OwnedFd) -> (OwnedFd, OwnedFd) {
    let client = new(kind);
    let address: UnixAddr = getsockname(listener.as_raw_fd()).unwrap();
    connect(client.as_raw_fd(), &address).unwrap();
    let accepted = accept(listener.as_raw_fd()).unwrap();
    // SAFETY: accept gave it to us.
    (client, unsafe { OwnedFd::from_raw_fd(accepted) })
}

fn send(fd: &OwnedFd, data: &[u8]) {
    sys::send(fd.as_fd(), data, &[]).unwrap();
}

fn read(kit: &Kit, fd: RawFd) -> Vec<u8> {
    let mut buffer = [0; 64];
    let length = nix::unistd::read(kit.fd(fd), &mut buffer).unwrap();
    buffer[..length].to_vec()
}

fn again(kit: &mut Kit) {
    kit.dump().unwrap();
    kit.restore().unwrap();
}

fn as_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A pair comes back with its queues, options and SO_PEERCRED; an end without peer still reads its data, then EOF.
#[test]
fn pairs_and_orphans_come_back() {
    for kind in [SockType::Stream, SockType::SeqPacket] {
        let pair = || socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let (a, b) = pair();
        send(&a, b"to b");
        send(&b, b"to a");
        let (orphan, peer) = pair();
        send(&peer, b"last");
        drop(peer);
        let mut kit = kit();
        let fds = [b, a, orphan].map(|fd| kit.hold(fd, "unix").unwrap());
        assert_eq!(kit.dump().unwrap(), 2);
        kit.restore().unwrap();
        for (fd, text) in fds.into_iter().zip([b"to b", b"to a", b"last"]) {
            assert_eq!(read(&kit, fd), text);
            let peer = sys::peer_credentials(kit.fd(fd)).unwrap();
            assert_eq!(peer.pid, std::process::id() as i32);
        }
        assert_eq!(read(&kit, fds[2]), b"");
    }
}

#[test]
fn a_peer_outside_the_tree_is_named_or_cut() {
    let (a, outside) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut kit = kit();
    let fd = kit.hold(a, "unix").unwrap();
    let refused = kit.dump().unwrap_err();
    assert!(refused.what.contains("is outside the tree"), "{refused}");
    let ino = sys::inode(outside.as_fd()).unwrap();
    kit.host.externals.push(format!("unix[{ino}]"));
    again(&mut kit);
    assert_eq!(read(&kit, fd), b"");
}

fn is_connected_through(kit: &Kit, client: RawFd, accepted: RawFd, address: &UnixAddr) {
    assert_eq!(getsockname::<UnixAddr>(accepted).unwrap(), *address);
    assert_eq!(getpeername::<UnixAddr>(client).unwrap(), *address);
    nix::unistd::write(kit.fd(client), b"question").unwrap();
    assert_eq!(read(kit, accepted), b"question");
    nix::unistd::write(kit.fd(accepted), b"answer").unwrap();
    assert_eq!(read(kit, client), b"answer");
}

#[test]
fn connections_through_a_listener_come_back() {
    if !as_root() {
        return;
    }
    let dir = directory("listener");
    let addresses = [
        UnixAddr::new(&dir.join("socket")).unwrap(),
        UnixAddr::new_abstract(format!("stasis-{}", std::process::id()).as_bytes()).unwrap(),
    ];
    for address in addresses {
        for (kind, gone) in
            [(SockType::Stream, false), (SockType::SeqPacket, false), (SockType::Stream, true)]
        {
            let listener = listener(kind, &address);
            let (client, accepted) = connection(kind, &listener);
            let (lost_client, _) = connection(kind, &listener);
            let (other, lost_accepted) = connection(kind, &listener);
            send(&client, b"early");
            send(&accepted, b"late");
            send(&other, b"bye");
            drop(other);
            let path = address.path().map(Path::to_owned);
            let mut kit = kit();
            let fds = [client, accepted, lost_client, lost_accepted].map(|fd| kit.hold(fd, "unix").unwrap());
            let listening = match gone {
                true => None,
                false => Some(kit.hold(listener.try_clone().unwrap(), "unix").unwrap()),
            };
            drop(listener);
            if let Some(path) = path.as_ref().filter(|_| gone) {
                fs::remove_file(path).unwrap();
            }
            again(&mut kit);
            assert_eq!(read(&kit, fds[1]), b"early");
            assert_eq!(read(&kit, fds[0]), b"late");
            is_connected_through(&kit, fds[0], fds[1], &address);
            assert_eq!(read(&kit, fds[2]), b"");
            assert_eq!(getpeername::<UnixAddr>(fds[2]).unwrap(), address);
            assert_eq!(read(&kit, fds[3]), b"bye");
            assert_eq!(read(&kit, fds[3]), b"");
            assert_eq!(getsockname::<UnixAddr>(fds[3]).unwrap(), address);
            if let Some(listening) = listening {
                let client = new(kind);
                connect(client.as_raw_fd(), &address).unwrap();
                assert_eq!(diag::query_here(sys::inode(kit.fd(listening)).unwrap()).unwrap().write_queue, 7);
            }
            if let Some(path) = path {
                assert_eq!(path.exists(), !gone);
                let _ = fs::remove_file(path);
            }
        }
    }
    fs::remove_dir_all(dir).unwrap();
}

#[test]
fn clients_that_wait_are_accepted_later() {
    let address = UnixAddr::new_abstract(format!("stasis-wait-{}", std::process::id()).as_bytes()).unwrap();
    for talks in [false, true] {
        let listener = listener(SockType::Stream, &address);
        let client = new(SockType::Stream);
        connect(client.as_raw_fd(), &address).unwrap();
        if talks {
            send(&client, b"hello");
        }
        let mut kit = kit();
        let client = kit.hold(client, "unix").unwrap();
        let listening = kit.hold(listener, "unix").unwrap();
        if talks {
            kit.host.leave_running = true;
            assert!(kit.dump().unwrap_err().what.contains("data was sent over it"));
            kit.host.leave_running = false;
        }
        kit.dump().unwrap();
        kit.commit().unwrap();
        // The guardian knows of every socket whose queue was looked at.
        assert_eq!(kit.host.undo.borrow().is_empty(), !talks);
        kit.restore().unwrap();
        let accepted = accept(listening).unwrap();
        // SAFETY: accept gave it to us.
        let accepted = kit.keep(unsafe { OwnedFd::from_raw_fd(accepted) }).unwrap();
        if talks {
            assert_eq!(read(&kit, accepted), b"hello");
        }
        is_connected_through(&kit, client, accepted, &address);
    }
}

#[test]
fn descriptors_on_their_way_to_nobody_are_refused() {
    let address = UnixAddr::new_abstract(format!("stasis-fds-{}", std::process::id()).as_bytes()).unwrap();
    let listener = listener(SockType::Stream, &address);
    let client = new(SockType::Stream);
    connect(client.as_raw_fd(), &address).unwrap();
    let (reader, _writer) = std::io::pipe().unwrap();
    let fds = [reader.as_raw_fd()];
    let message = [std::io::IoSlice::new(b"x")];
    let control = [nix::sys::socket::ControlMessage::ScmRights(&fds)];
    nix::sys::socket::sendmsg::<()>(
        client.as_raw_fd(),
        &message,
        &control,
        nix::sys::socket::MsgFlags::empty(),
        None,
    )
    .unwrap();
    let mut kit = kit();
    kit.hold(client, "unix").unwrap();
    kit.hold(listener, "unix").unwrap();
    assert!(kit.dump().unwrap_err().what.contains("descriptors are in flight"));
}

#[test]
fn datagrams_keep_their_senders() {
    if !as_root() {
        return;
    }
    let dir = directory("datagrams");
    let at = |name: &str| UnixAddr::new(&dir.join(name)).unwrap();
    let named = |address: &UnixAddr| {
        let socket = new(SockType::Datagram);
        bind(socket.as_raw_fd(), address).unwrap();
        socket
    };
    let (server, inside) = (named(&at("server")), named(&at("inside")));
    let (outside, nameless) = (named(&at("outside")), new(SockType::Datagram));
    let to = [at("server").path().unwrap().to_str().unwrap().as_bytes(), b"\0"].concat();
    for (sender, text) in [(&inside, "one"), (&outside, ""), (&nameless, "three")] {
        sys::send_to(sender.as_fd(), &to, text.as_bytes(), &[], None).unwrap();
    }
    connect(inside.as_raw_fd(), &at("server")).unwrap();
    let mut kit = kit();
    let server = kit.hold(server, "unix").unwrap();
    let inside = kit.hold(inside, "unix").unwrap();
    let lost = new(SockType::Datagram);
    connect(lost.as_raw_fd(), &at("outside")).unwrap();
    let lost = kit.hold(lost, "unix").unwrap();
    drop(outside);
    again(&mut kit);
    let address = |name: &str| [dir.join(name).to_str().unwrap().as_bytes(), b"\0"].concat();
    for (sender, text) in [(address("inside"), "one"), (address("outside"), ""), (Vec::new(), "three")] {
        let mut buffer = [0; 64];
        let message = sys::peek(kit.fd(server), &mut buffer).unwrap();
        assert_eq!((&buffer[..message.length], message.sender), (text.as_bytes(), sender));
        read(&kit, server);
    }
    nix::unistd::write(kit.fd(inside), b"again").unwrap();
    assert_eq!(read(&kit, server), b"again");
    assert_eq!(nix::unistd::write(kit.fd(lost), b"x"), Err(nix::Error::ECONNREFUSED));
    fs::remove_dir_all(dir).unwrap();
}

#[test]
fn halves_that_are_shut_stay_shut() {
    let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
    shutdown(a.as_raw_fd(), Shutdown::Write).unwrap();
    let mut kit = kit();
    let (a, b) = (kit.hold(a, "unix").unwrap(), kit.hold(b, "unix").unwrap());
    again(&mut kit);
    assert_eq!(read(&kit, b), b"");
    nix::unistd::write(kit.fd(b), b"back").unwrap();
    assert_eq!(read(&kit, a), b"back");
    assert_eq!(sys::send(kit.fd(a), b"x", &[]).unwrap_err().raw_os_error(), Some(libc::EPIPE));
}
