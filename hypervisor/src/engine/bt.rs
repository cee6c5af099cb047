//! Binary translation behind the seam.

use super::{EngineError, MachineInfo, Profile, Vcpu};
use crate::devices::control::Kick;
use crate::memory::GuestRam;
use paravane_bt::{BtConfig, BtKick, BtVcpu};
use paravane_cpu::snapshot::VcpuSnapshot;
use paravane_cpu::{Bus, CpuState, VcpuExit};
use std::sync::Arc;

/// Bound of a vCPU's translation cache. What boot, a shell and ten programs run does not fit into 128 MiB; memory is taken as it is used.
fn cache_bytes(cpus: u32) -> usize {
    ((512 << 20) / cpus.max(1) as usize).clamp(128 << 20, 256 << 20)
}

pub(super) struct BtEngine(BtVcpu);

struct Kicker(BtKick);

impl Kick for Kicker {
    fn kick(&self) {
        self.0.kick();
    }
    fn inside(&self) -> bool {
        self.0.inside()
    }
}

impl BtEngine {
    pub(super) fn new(id: u32, mem: GuestRam, bus: Arc<dyn Bus>, info: &MachineInfo) -> Result<Self, EngineError> {
        let cfg = BtConfig {
            cache_bytes: cache_bytes(info.cpus),
            cpus: info.cpus,
            tsc_khz: info.tsc_khz,
            apic_hz: info.apic_hz,
            windows: info.windows,
            hypervisor_leaves: info.hypervisor_leaves.clone(),
        };
        Ok(Self(BtVcpu::new(id, mem, bus, cfg)?))
    }
}

impl Vcpu for BtEngine {
    fn state_mut(&mut self) -> &mut CpuState {
        self.0.state_mut()
    }
    fn save(&mut self) -> Result<VcpuSnapshot, EngineError> {
        Ok(self.0.save())
    }
    fn load(&mut self, state: &VcpuSnapshot) -> Result<(), EngineError> {
        Ok(self.0.load(state)?)
    }
    fn run(&mut self) -> Result<VcpuExit, EngineError> {
        Ok(self.0.run()?)
    }
    fn kick(&self) -> Arc<dyn Kick> {
        Arc::new(Kicker(self.0.kick_handle()))
    }
    fn counters(&self) -> Vec<(String, u64)> {
        self.0.stats()
    }
    fn write_perf_map(&mut self, keep: bool) -> Result<(), EngineError> {
        Ok(self.0.write_perf_map(keep)?)
    }
    fn start_profile(&mut self) -> Result<(), EngineError> {
        Ok(self.0.start_profile()?)
    }
    fn take_profile(&mut self) -> Option<Profile> {
        self.0.take_profile()
    }
}
