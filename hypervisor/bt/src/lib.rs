//! The binary-translation engine: guest code of every privilege level runs in user space, without /dev/kvm.
//!
//! Guest and host share an instruction set, so there is no intermediate form. A guest instruction's way leads through
//! these modules:
//!
//! | stage | module |
//! |---|---|
//! | the run loop: events, then translated code | `dispatch` |
//! | from RIP to a block: fetch, find or translate | `fetch` |
//! | what a block is, its key and its exits | `block` |
//! | decode, classify, emit | `translate`, with `regs` (register homes) and `asm` |
//! | code memory | `cache` |
//! | doors between Rust and translated code | `thunks`, `state` (the shared memory) |
//! | what Rust does for translated code | `callouts`, `softmmu` (TLB fills, stores into code) |
//! | host signals that become guest exceptions | `fault` |
//! | the vCPU's state out of the engine and into it | `handover` |
//! | where the time goes | `profile`, `perf_map` (names for perf) |
//!
//! What instructions mean when they are not copied is in `paravane-cpu`.

mod alone;
mod asm;
mod block;
mod cache;
mod callouts;
mod dispatch;
mod dma;
mod engine;
mod environment;
mod fault;
mod fetch;
mod handover;
mod kernel;
mod perf_map;
mod profile;
mod regs;
mod relocate;
mod requirements;
mod softmmu;
mod state;
mod stats;
mod thunks;
mod translate;
mod vcpu;
mod window;

pub use profile::{Cause, Profile, ProfileEntry};
pub use requirements::{Requirement, requirements};
pub use vcpu::{BtConfig, BtError, BtKick, BtVcpu, GuestRam, Windows};
