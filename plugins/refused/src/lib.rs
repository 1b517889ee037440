//! Descriptors that nobody can keep, each with the reason and with what to do about it.
//!
//! They are claimed by judgement, which comes after all other selectors: a plugin that does know one of them needs no
//! `--prefer`.

use stasis_plugin_api::{
    Described, Descriptor, Dumped, HandleInfo, HookError, Host, ObjectInfo, Result, Selector, export_plugin,
    register,
};
use std::os::fd::{BorrowedFd, OwnedFd};

mod records {
    include!(concat!(env!("OUT_DIR"), "/records.rs"));
}
use records::stasis::refused::v1::Nothing;

struct Refusal {
    /// Beginning of the descriptor's link (proc_pid_fd(5)).
    link: &'static str,
    /// What users call it.
    name: &'static str,
    why: &'static str,
    remedy: &'static str,
}

const REFUSALS: &[Refusal] = &[
    Refusal {
        link: "anon_inode:[io_uring]",
        name: "io_uring",
        why: "requests in flight, registered buffers and restrictions of a ring cannot be read from the kernel",
        remedy: "run the program without io_uring: most event loops have a setting for epoll",
    },
    Refusal {
        link: "anon_inode:[userfaultfd]",
        name: "userfaultfd",
        why: "faults that wait for an answer cannot be read from the kernel",
        remedy: "let the program give up handling its own page faults",
    },
    Refusal {
        link: "anon_inode:[perf_event]",
        name: "perf event",
        why: "its attributes cannot be read from the kernel",
        remedy: "stop profiling",
    },
    Refusal {
        link: "anon_inode:bpf-prog",
        name: "BPF program",
        why: "loaded programs stay in the kernel",
        remedy: "pin it (bpffs), and let the program open it again",
    },
    Refusal {
        link: "anon_inode:bpf_link",
        name: "BPF link",
        why: "what it attaches stays in the kernel",
        remedy: "pin it (bpffs), and let the program open it again",
    },
    Refusal {
        link: "anon_inode:seccomp notify",
        name: "seccomp listener",
        why: "system calls that wait for its answer cannot be read from the kernel",
        remedy: "dump the supervised program and its supervisor apart",
    },
    Refusal {
        link: "anon_inode:[landlock-ruleset]",
        name: "landlock ruleset",
        why: "its rules cannot be read from the kernel",
        remedy: "dump when the program has restricted itself and closed the ruleset",
    },
    Refusal {
        link: "/secretmem",
        name: "secret memory",
        why: "it is made to be read by nobody but its owner",
        remedy: "run the program without memfd_secret",
    },
];

fn refusal(link: &str) -> Option<&'static Refusal> {
    REFUSALS.iter().find(|refusal| link.starts_with(refusal.link))
}

struct Refused;

impl Descriptor for Refused {
    type Record = Nothing;
    const KIND: &'static str = "refused";

    fn selectors(&self) -> Vec<Selector> {
        vec![Selector::Predicate]
    }

    fn claims(&self, _: &Host<'_>, handle: &HandleInfo) -> bool {
        refusal(&handle.link).is_some()
    }

    fn describe(&self, _: &Host<'_>, handle: &HandleInfo, _: BorrowedFd<'_>) -> Result<Described> {
        Err(match refusal(&handle.link) {
            Some(refusal) => HookError::unsupported(refusal.name, refusal.why, refusal.remedy),
            None => HookError::invalid(format!("{} is none of the refused kinds", handle.link)),
        })
    }

    fn dump(&self, _: &Host<'_>, object: &ObjectInfo) -> Result<Dumped<Nothing>> {
        Err(HookError::invalid(format!("{} was to be refused before", object.description)))
    }

    fn create(&self, _: &Host<'_>, object: &ObjectInfo, _: &Nothing) -> Result<Vec<OwnedFd>> {
        Err(HookError::invalid(format!("{} cannot be in an image", object.description)))
    }
}

register!(descriptor: Refused);
export_plugin! { name: "refused", records: include_bytes!(concat!(env!("OUT_DIR"), "/records.bin")) }

#[cfg(test)]
mod tests {
    use super::*;
    use stasis_plugin_api::testing::Kit;

    #[test]
    fn each_entry_is_reached() {
        assert_eq!(refusal("anon_inode:bpf-prog").unwrap().name, "BPF program");
        assert!(refusal("anon_inode:[eventfd]").is_none());
        for (at, refusal) in REFUSALS.iter().enumerate() {
            let first = REFUSALS.iter().position(|other| refusal.link.starts_with(other.link));
            assert_eq!(first, Some(at), "{} is never reached", refusal.name);
        }
    }

    #[test]
    fn reason_and_remedy_are_told() {
        let mut kit = Kit::new();
        kit.plugin(Refused);
        let (reader, _writer) = std::io::pipe().unwrap();
        kit.hold(reader, Refused::KIND).unwrap();
        assert!(kit.dump().unwrap_err().to_string().contains("none of the refused kinds"));
    }
}
