//! A stasis plugin: connections of redis clients to a server outside of the tree, over a unix socket.
//!
//! A dump leaves the server alone. A restore connects again, and the client goes on: replies that it had not read wait for it as
//! they did. The connection is a new one for the server, so it may have no state there (`SELECT`, `MULTI`, `SUBSCRIBE`, a name
//! ...), or the dump is refused.
//!
//! The plugin takes connections to `--redis-socket=PATH` alone. Since the plugin `unix` claims all unix sockets, this one must be
//! preferred: `stasis dump --prefer redis-link --redis-socket=/run/redis/redis.sock ...`.

mod resp;
mod server;

use resp::Reply;
use server::Server;
use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, HookError, Host, ObjectInfo, OptionDeclaration, Result,
    Selector, export_plugin, register,
    socket::{self, options},
};
use std::{
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

mod records {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use records::redis_link::v1::{Link, Option as Saved};

const OPTION: &str = "redis-socket";
/// How long the server may take to read what the client has sent, and to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// More unread replies than that are refused.
const LARGEST: i32 = 1 << 20;

struct Links;

fn failed(what: &'static str) -> impl Fn(io::Error) -> HookError {
    move |error| HookError::failed(what, error)
}

/// The path that a unix socket is connected to (`sockaddr_un`, unix(7)).
fn server_path(fd: BorrowedFd<'_>) -> Option<String> {
    let address = socket::peer_address(fd).ok()??;
    let path = address.get(2..).filter(|_| socket::family(&address) == libc::AF_UNIX)?;
    let end = path.iter().position(|byte| *byte == 0).unwrap_or(path.len());
    String::from_utf8(path[..end].to_vec()).ok().filter(|path| path.starts_with('/'))
}

/// Everything in the receive queue, which stays there.
fn peek(fd: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let length = socket::ioctl_int(fd, libc::FIONREAD)?;
    let mut buffer = vec![0; length.clamp(0, LARGEST + 1) as usize];
    if buffer.is_empty() {
        return Ok(buffer);
    }
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the buffer is as long as is said.
    let n = unsafe { libc::recv(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags) };
    match usize::try_from(n) {
        Ok(n) => buffer.truncate(n),
        Err(_) => return Err(io::Error::last_os_error()),
    }
    Ok(buffer)
}

/// Waits until `done`; whether it came to that.
fn wait(done: impl Fn() -> io::Result<bool>) -> io::Result<bool> {
    let began = Instant::now();
    while !done()? {
        if began.elapsed() > PATIENCE {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(true)
}

impl Descriptor for Links {
    type Record = Link;
    const KIND: &'static str = "redis-link";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::Predicate]
    }

    fn claims(&self, host: &Host<'_>, handle: &HandleInfo) -> bool {
        let Some(wanted) = host.option(OPTION) else { return false };
        let is_wanted = |fd: OwnedFd| server_path(fd.as_fd()).is_some_and(|path| path == wanted);
        handle.mode & libc::S_IFMT == libc::S_IFSOCK && host.open_handle(handle.id).is_ok_and(is_wanted)
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, fd: BorrowedFd<'_>) -> Result<Described> {
        let server = server_path(fd).ok_or_else(|| HookError::invalid("it is connected no more"))?;
        Ok(Described {
            identity: handle.ino.to_string().into(),
            description: format!("{} to {server}", handle.link).into(),
            ..Described::default()
        })
    }

    fn dump(&self, host: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Link>> {
        let refuse =
            |why: &str, remedy: &str| HookError::unsupported(object.description.as_str(), why, remedy);
        let owned = host.open_handle(object.handles[0].id)?;
        let fd = owned.as_fd();
        let server = server_path(fd).ok_or_else(|| HookError::invalid("it is connected no more"))?;
        if socket::poll(fd, libc::POLLRDHUP).map_err(failed("poll"))? & libc::POLLRDHUP != 0 {
            return Err(refuse("the server has hung up", "let the client notice it first"));
        }
        // Sent, and not read by the server.
        let all_read = || Ok(socket::ioctl_int(fd, libc::TIOCOUTQ)? == 0);
        if !wait(all_read).map_err(failed("SIOCOUTQ"))? {
            return Err(refuse("the server does not read what was sent", "try again when it is less busy"));
        }
        // Redis answers in the order of its reading: what it had read before is answered when this is.
        Server::connect(&server)?.clients_have_no_state(object.description.as_str())?;
        let unread = peek(fd).map_err(failed("peeking at the replies"))?;
        if unread.len() > LARGEST as usize {
            return Err(refuse("more than 1 MiB of replies are not read", "let the client read them"));
        }
        // Those of a kind that cannot be brought about again are refused now.
        Reply::parse(&unread).map_err(|why| refuse(why, "let the client read its replies"))?;
        let options = options::read(fd, &[options::SOCKET])?;
        let option =
            |option: options::Saved| Saved { level: option.level, name: option.name, value: option.value };
        let options = options.into_iter().map(option).collect();
        Ok(Dumped::new(Link { server, unread, options }))
    }

    fn create(&self, _: &Host<'_>, _: &ObjectInfo, record: &Link) -> Result<Vec<OwnedFd>> {
        let mut link = UnixStream::connect(&record.server).map_err(|error| {
            HookError::failed(format!("connect to {}", record.server), error).remedy("start the server first")
        })?;
        let option = |option: &Saved| options::Saved {
            level: option.level,
            name: option.name,
            value: option.value.clone(),
        };
        let saved: Vec<_> = record.options.iter().map(option).collect();
        options::write(link.as_fd(), &[options::SOCKET], &saved)?;
        for reply in Reply::parse(&record.unread).map_err(HookError::invalid)? {
            link.write_all(&reply.request()).map_err(failed("asking for a reply again"))?;
        }
        // Exactly what was unread, whatever the server makes of the requests.
        let arrived =
            wait(|| Ok(peek(link.as_fd())? == record.unread)).map_err(failed("peeking at the replies"))?;
        match arrived {
            true => Ok(vec![link.into()]),
            false => Err(HookError::invalid("the server does not give the unread replies again")),
        }
    }
}

register!(descriptor: Links);
export_plugin! {
    name: "redis-link",
    records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")),
    options: [OptionDeclaration::value(OPTION, "connections to the redis server at this path come back as new ones")],
}
