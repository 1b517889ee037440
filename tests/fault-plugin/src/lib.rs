//! A plugin that misbehaves on request: `STASIS_FAULT=HOOK:ACTION` in the environment of the command, with the hooks'
//! names below (lifecycle events by their names in the API) and the actions of [`misbehave`].
//!
//! It claims mount contexts (fsopen(2)) without settings, so that a tree that holds one needs it.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use stasis_plugin_api::{
    Described, Descriptor, Dumped, Event, HandleInfo, HookError, Host, Lifecycle, ObjectInfo, Result,
    Selector, export_plugin, register,
};

mod records {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
mod unreadable;
use unreadable::Quiet;

/// Whether the environment asks for just this.
fn wished(wish: &str) -> bool {
    std::env::var("STASIS_FAULT").is_ok_and(|wished| wished == wish)
}

/// Does what the environment asks for in this hook.
fn misbehave(host: &Host<'_>, hook: &str) -> Result<()> {
    let Ok(wish) = std::env::var("STASIS_FAULT") else { return Ok(()) };
    let Some((_, action)) = wish.split_once(':').filter(|(at, _)| *at == hook) else { return Ok(()) };
    match action {
        "error" => Err(HookError::invalid(format!("a fault on request in {hook}"))),
        "panic" => panic!("a panic on request in {hook}"),
        "abort" => std::process::abort(),
        "exit" => std::process::exit(0),
        "segv" => {
            // Not raise(3): Rust's own handler, there for guard pages, swallows the first one that is no fault.
            // SAFETY: a write to an unmapped address, which ends this process, as was asked for.
            unsafe { std::arch::asm!("mov byte ptr [{}], 0", in(reg) 8usize) };
            Ok(())
        }
        "say" => {
            host.warn(&format!("a warning on request in {hook}"));
            tracing::info!("an event on request in {hook}");
            Ok(())
        }
        "hang" => loop {
            std::thread::sleep(std::time::Duration::from_secs(1));
        },
        _ => Ok(()),
    }
}

struct Watched;

impl Descriptor for Watched {
    type Record = Quiet;
    const KIND: &'static str = "fault";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::AnonInode("[fscontext]".into())]
    }

    fn describe(&self, host: &Host<'_>, handle: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
        misbehave(host, "describe")?;
        Ok(Described {
            identity: handle.id.to_string().into(),
            description: "fscontext".into(),
            ..Described::default()
        })
    }

    fn dump(&self, host: &Host<'_>, _: &ObjectInfo) -> Result<Dumped<Quiet>> {
        misbehave(host, "dump")?;
        Ok(Dumped::new(Quiet { unreadable: wished("dump:unreadable"), ..Quiet::default() }))
    }

    fn commit(&self, host: &Host<'_>, _: &ObjectInfo) -> Result<()> {
        misbehave(host, "commit")
    }

    fn create(&self, host: &Host<'_>, _: &ObjectInfo, _: &Quiet) -> Result<Vec<OwnedFd>> {
        misbehave(host, "create")?;
        if wished("create:closed") {
            // A number that is not open; nothing else opens one meanwhile.
            let (reader, _) = std::io::pipe()?;
            let number = reader.as_raw_fd();
            drop(reader);
            // SAFETY: none: this is the fault that is asked for. It is given away at once.
            return Ok(vec![unsafe { OwnedFd::from_raw_fd(number) }]);
        }
        if wished("create:none") {
            return Ok(Vec::new());
        }
        // SAFETY: a name that ends with NUL.
        let fd = unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), 0) };
        if fd < 0 {
            return Err(HookError::failed("fsopen", std::io::Error::last_os_error()));
        }
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(vec![unsafe { OwnedFd::from_raw_fd(fd as i32) }])
    }

    fn link(&self, host: &Host<'_>, _: &ObjectInfo, _: &Quiet) -> Result<()> {
        misbehave(host, "link")
    }

    fn settle(&self, host: &Host<'_>, _: &ObjectInfo, _: &Quiet) -> Result<()> {
        misbehave(host, "settle")
    }
}

/// Takes nothing, but is asked about all that no other kind takes by its data.
struct Judge;

impl Descriptor for Judge {
    type Record = Quiet;
    const KIND: &'static str = "fault-judge";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::Predicate]
    }

    fn claims(&self, host: &Host<'_>, _: &HandleInfo) -> bool {
        misbehave(host, "claims").is_err()
    }

    fn describe(&self, _: &Host<'_>, _: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
        Err(HookError::invalid("a fault on request in claims"))
    }

    fn dump(&self, _: &Host<'_>, _: &ObjectInfo) -> Result<Dumped<Quiet>> {
        Err(HookError::invalid("nothing was claimed"))
    }

    fn create(&self, _: &Host<'_>, _: &ObjectInfo, _: &Quiet) -> Result<Vec<OwnedFd>> {
        Err(HookError::invalid("nothing was dumped"))
    }
}

struct Events;

impl Lifecycle for Events {
    const KIND: &'static str = "fault-events";

    fn event(&self, host: &Host<'_>, event: Event) -> Result<()> {
        misbehave(host, &format!("{event:?}"))
    }
}

register!(descriptor: Watched);
register!(descriptor: Judge);
register!(lifecycle: Events);
export_plugin! { name: "fault", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }
