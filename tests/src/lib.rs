//! Workloads, scenarios and the harness that runs them, each in a sandbox of its own.
//!
//! A *workload* ([`workloads`]) sets up one behaviour, says that it is ready, waits, and on request finds out for
//! itself whether all is as it was. A *scenario* ([`scenario`]) takes a workload through a dump and a restore by the
//! `stasis` binary, compares `/proc` of the tree before and after ([`snapshot`]), and asks the workload. Every scenario
//! runs in fresh pid, mount and network namespaces ([`sandbox`]), so that a defect cannot reach the machine.

pub mod bench;
pub mod ctl;
pub mod emulator;
pub mod external;
pub mod hugepages;
pub mod launch;
pub mod mounts;
pub mod net;
pub mod sandbox;
pub mod scenario;
pub mod snapshot;
pub mod suite;
pub mod sys;
pub mod terminal;
pub mod tool;
pub mod unix;
pub mod workloads;
