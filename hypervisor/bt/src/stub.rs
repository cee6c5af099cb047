//! API outline.
#![allow(missing_docs)]
use paravane_cpu::{Bus, CpuState, VcpuExit};
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;

pub type GuestRam = Arc<GuestMemoryMmap<()>>;
#[derive(Debug, Clone)]
pub struct BtConfig { pub cache_bytes: usize, pub cpus: u32, pub tsc_khz: u32, pub apic_hz: u32 }
impl Default for BtConfig { fn default() -> Self { Self { cache_bytes: 64 << 20, cpus: 1, tsc_khz: 0, apic_hz: 1_000_000_000 } } }
#[derive(Debug)]
pub struct BtError(pub String);
impl std::fmt::Display for BtError { fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.write_str(&self.0) } }
impl std::error::Error for BtError {}
#[derive(Clone)]
pub struct BtKick;
impl BtKick { pub fn kick(&self) {} }
pub struct BtVcpu { st: Box<CpuState> }
impl BtVcpu {
    pub fn new(id: u32, _mem: GuestRam, _bus: Arc<dyn Bus>, _cfg: BtConfig) -> Result<Self, BtError> { Ok(Self { st: Box::new(CpuState::reset(id)) }) }
    pub fn state(&self) -> &CpuState { &self.st }
    pub fn state_mut(&mut self) -> &mut CpuState { &mut self.st }
    pub fn run(&mut self) -> Result<VcpuExit, BtError> { Err(BtError("the engine is not built yet".into())) }
    pub fn kick_handle(&self) -> BtKick { BtKick }
    pub fn stats(&self) -> Vec<(&'static str, u64)> { Vec::new() }
    pub fn invalidate_ram(&mut self, _gpa: u64, _len: u64) {}
}
