//! The architectural vCPU: its state, how it stops, and the semantics of everything that is not plain computation.
//!
//! Both engines share this crate. `state` is what a vCPU *is*; `env` is what it asks of the world around it;
//! `exit` is why it stopped. The rest is the system-level architecture in plain Rust (paging, segmentation,
//! exceptions, privileged and other rare instructions), which the binary translator calls when an instruction is not
//! worth translating.

pub mod control;
pub mod cpuid;
pub mod descriptor;
pub mod ea;
pub mod emulate;
pub mod env;
pub mod exit;
mod far;
mod gather;
pub mod host_fpu;
pub mod interrupt;
pub mod masked;
pub mod mem;
mod misc;
pub mod mmu;
pub mod msr;
pub mod operand;
pub mod rare;
mod simd;
pub mod snapshot;
mod stack;
pub mod state;
mod string;
pub mod system;
mod x87env;
mod xsave;

#[cfg(test)]
mod flat_env;
#[cfg(test)]
mod testkit;

pub use env::{Bus, BusOutcome, Env, HypercallOutcome, Startup, TlbFlush};
pub use exit::{Exception, PageFaultCode, Step, StopReason, VcpuExit};
pub use masked::is_masked_store;
pub use state::{CpuState, Reg, Seg, Segment, TableReg};
