//! The architectural vCPU: its state, how it stops, and the semantics of everything that is not plain computation.
//!
//! Both engines share this crate. `state` is what a vCPU *is*; `env` is what it asks of the world around it;
//! `exit` is why it stopped. The rest is the system-level architecture in plain Rust (paging, segmentation,
//! exceptions, privileged and other rare instructions), which the binary translator calls when an instruction is not
//! worth translating.

pub mod cpuid;
pub mod descriptor;
pub mod ea;
pub mod env;
pub mod exit;
mod host_fpu;
pub mod interrupt;
pub mod mem;
pub mod mmu;
pub mod msr;
pub mod operand;
mod stack;
pub mod state;

pub use env::{Bus, BusOutcome, Env, TlbFlush};
pub use exit::{Exception, PageFaultCode, Step, StopReason, VcpuExit};
pub use state::{CpuState, Reg, Seg, Segment, TableReg};
