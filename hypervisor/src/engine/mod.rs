//! The seam between the machine and what runs its vCPUs.
//!
//! An engine runs guest code and calls the machine's [`paravane_cpu::Bus`] for everything outside the vCPU; it comes back only when the
//! vCPU stops or policy must decide ([`VcpuExit`]). Guest faults never surface here.

mod bt;
pub mod kvm;

use crate::devices::control::Kick;
use crate::devices::local_apics::LocalApics;
use crate::host;
use crate::host::cache::Cache;
use crate::host::report::EngineName;
use crate::host::sources::Sources;
use crate::memory::GuestRam;
use crate::pv::{Entry, KvmLeaves, Offer, PvConfig};
use paravane_cpu::snapshot::{StateError, VcpuSnapshot};
use paravane_cpu::{Bus, CpuState, VcpuExit};
use pv_abi::feature::{Feature, Features};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

pub use paravane_bt::{Profile, Windows};

/// Which engine a user asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// Whichever fits this host.
    Auto,
    /// Hardware assist through KVM.
    Kvm,
    /// Binary translation.
    Bt,
}

/// One vCPU of an engine.
pub trait Vcpu: Send {
    /// The architectural state, to be set before the first run.
    fn state_mut(&mut self) -> &mut CpuState;
    /// Everything architectural, at an instruction boundary: the vCPU is at one whenever `run` has come back.
    ///
    /// # Errors
    /// When the host or the engine cannot give it.
    fn save(&mut self) -> Result<VcpuSnapshot, EngineError>;
    /// Goes on from a state that this or another engine saved. Guest memory may have changed since this vCPU last ran.
    ///
    /// # Errors
    /// When the state is not valid or this engine cannot hold it; the vCPU is as it was, then.
    fn load(&mut self, state: &VcpuSnapshot) -> Result<(), EngineError>;
    /// Runs until the vCPU stops or policy must decide.
    ///
    /// # Errors
    /// When the host fails, never because of what the guest does.
    fn run(&mut self) -> Result<VcpuExit, EngineError>;
    /// Makes `run` look at the bus, from any thread.
    fn kick(&self) -> Arc<dyn Kick>;
    /// Named counters.
    fn counters(&self) -> Vec<(String, u64)>;
    /// Writes names of generated code for perf, and keeps them or not; before the first run.
    ///
    /// # Errors
    /// When the host refuses.
    fn write_perf_map(&mut self, keep: bool) -> Result<(), EngineError>;
    /// Samples what time is spent on, from the next run on.
    ///
    /// # Errors
    /// When the host refuses.
    fn start_profile(&mut self) -> Result<(), EngineError>;
    /// What was sampled, if anything was to be.
    fn take_profile(&mut self) -> Option<Profile>;
    /// Doorbells of the vCPU's machine that need no exit. `None`: this engine has none, and every write comes to the bus.
    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        None
    }
}

/// A place whose writes ring a bell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Port number or guest-physical address.
    pub address: u64,
    /// Whether it is a port.
    pub port: bool,
    /// Size of the writes that count, in bytes: 1, 2, 4 or 8.
    pub bytes: u8,
    /// The only value that counts, or `None` for any value and any size.
    pub value: Option<u64>,
}

/// Doorbells that the engine's kernel side rings by itself: a write there signals an eventfd and the vCPU goes on, without an exit to the bus.
pub trait Doorbells: Send + Sync {
    /// Has writes to a place signal `bell`, an eventfd. The engine keeps what it needs of it.
    ///
    /// # Errors
    /// When the host refuses; the writes go to the bus then, as before.
    fn attach(&self, place: Place, bell: BorrowedFd<'_>) -> io::Result<()>;
    /// Takes that back; all that was given must be the same.
    ///
    /// # Errors
    /// When there is no such doorbell.
    fn detach(&self, place: Place, bell: BorrowedFd<'_>) -> io::Result<()>;
}

/// A host problem of an engine.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// KVM cannot work here, or cannot go on.
    #[error(transparent)]
    Kvm(#[from] kvm::KvmError),
    /// An option that only one engine has.
    #[error("{0} is about translated code; add --engine bt")]
    OnlyBt(&'static str),
    /// Something that only one engine has.
    #[error("binary translation has no such thing as {0}; add --engine kvm")]
    OnlyKvm(&'static str),
    /// Binary translation cannot work here.
    #[error(transparent)]
    Bt(#[from] paravane_bt::BtError),
    /// A vCPU's state cannot be saved or loaded.
    #[error(transparent)]
    State(#[from] StateError),
}

/// What an engine is told about the machine.
pub struct MachineInfo {
    /// Number of vCPUs.
    pub cpus: u32,
    /// TSC frequency in kHz.
    pub tsc_khz: u32,
    /// Frequency of the local APIC timer in Hz.
    pub apic_hz: u32,
    /// When guest processes get host mappings under binary translation.
    pub windows: Windows,
    /// What the paravirtual interfaces answer in CPUID: leaf, and EAX to EDX.
    pub hypervisor_leaves: Vec<(u32, [u32; 4])>,
}

/// Decides for an engine; gives the reason too, for the user to read. `only_bt` names an option that only binary translation has.
///
/// This is the only place of the decision; what `auto` does follows from [`host::choose`].
pub fn choose(kind: EngineKind, only_bt: Option<&str>) -> (EngineKind, String) {
    match (kind, only_bt) {
        (EngineKind::Bt | EngineKind::Kvm, _) => (kind, "asked for".into()),
        (EngineKind::Auto, Some(option)) => (EngineKind::Bt, format!("{option} is about translated code")),
        (EngineKind::Auto, None) => {
            let choice = host::choose(&Sources::host(), &Cache::user());
            let kind = match choice.engine {
                EngineName::Kvm => EngineKind::Kvm,
                EngineName::Bt => EngineKind::Bt,
            };
            (kind, choice.reason)
        }
    }
}

/// Where a machine's local APICs are on KVM. Binary translation has its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IrqChip {
    /// Whichever fits this host's KVM.
    #[default]
    Auto,
    /// In user space, with all other interrupt controllers.
    User,
    /// In the kernel; I/O APIC and 8259A in user space.
    Split,
}

/// What the paravirtual interfaces are like on the chosen engine with local APICs in user space: how a guest calls, and what does not pay
/// there (measured in docs/decisions/0010-paravirtual-abi.md).
pub fn paravirt(kind: EngineKind, offer: Offer, mem: &GuestRam, devices: u32) -> Option<PvConfig> {
    let kvm = kind == EngineKind::Kvm;
    // A VMCALL ends in the kernel. KVM does not see what user space writes to page tables, nor can it be told to drop
    // translations (see docs/kvm.md).
    let impossible = if kvm { Features::of(&[Feature::PageTables, Feature::TlbFlush]) } else { Features::NONE };
    Some(PvConfig {
        offer,
        entry: if kvm { Entry::Port } else { Entry::Vmcall },
        unfit: Features::of(&[Feature::VirtualIf]),
        impossible,
        kvm: KvmLeaves::Here,
        ram: mem.clone(),
        devices,
    })
}

/// What the vCPUs of one machine share in an engine.
pub struct EngineVm {
    kind: EngineKind,
    mem: GuestRam,
    kvm: Option<Arc<kvm::KvmVm>>,
}

impl EngineVm {
    /// Prepares the chosen engine for a machine with this memory.
    ///
    /// # Errors
    /// When the host cannot support it.
    pub fn new(kind: EngineKind, mem: GuestRam, irqchip: IrqChip) -> Result<Self, EngineError> {
        let kvm = match kind {
            EngineKind::Bt | EngineKind::Auto => None,
            EngineKind::Kvm => Some(kvm::KvmVm::new(mem.clone(), irqchip)?),
        };
        Ok(Self { kind, mem, kvm })
    }

    /// What the paravirtual interfaces are like here, see [`paravirt`].
    pub fn paravirt(&self, offer: Offer, devices: u32) -> Option<PvConfig> {
        let mut pv = paravirt(self.kind, offer, &self.mem, devices)?;
        if let Some(features) = self.kvm.as_ref().and_then(|vm| vm.own_features()) {
            // These need to know of every interrupt or halt, which the kernel sees to by itself.
            let blind = [Feature::VirtualIf, Feature::LazyEoi, Feature::Schedule, Feature::StolenTime];
            pv.impossible = Features(pv.impossible.0 | Features::of(&blind).0);
            pv.kvm = KvmLeaves::Kernel(features);
        }
        Some(pv)
    }

    /// Starts a log of the pages that are written, by guest code, devices and everybody else who reports to the RAM's watch.
    ///
    /// # Errors
    /// When the host refuses, there is such a log already, or the engine is binary translation, which has none.
    pub fn log_writes(&self) -> Result<kvm::WriteLog, EngineError> {
        match &self.kvm {
            Some(vm) => Ok(kvm::WriteLog::start(vm.clone())?),
            None => Err(EngineError::OnlyKvm("a log of written pages")),
        }
    }

    /// The local APICs, where the engine keeps them: they are for [`crate::chipset::Chipset::use_local_apics`].
    pub fn local_apics(&self) -> Option<Arc<dyn LocalApics>> {
        let vm = self.kvm.as_ref().filter(|vm| vm.own_features().is_some())?;
        Some(vm.clone())
    }

    /// Makes vCPU `id`, in its reset state.
    ///
    /// # Errors
    /// When the host cannot support it.
    pub fn vcpu(&self, id: u32, bus: Arc<dyn Bus>, info: &MachineInfo) -> Result<Box<dyn Vcpu>, EngineError> {
        match &self.kvm {
            None => Ok(Box::new(bt::BtEngine::new(id, self.mem.clone(), bus, info)?)),
            Some(vm) => Ok(vm.vcpu(id, bus, info)?),
        }
    }
}

/// Makes the only vCPU of a machine, whose local APIC is the chipset's.
///
/// # Errors
/// When the host cannot support it.
pub fn make(
    kind: EngineKind,
    id: u32,
    mem: GuestRam,
    bus: Arc<dyn Bus>,
    info: &MachineInfo,
) -> Result<Box<dyn Vcpu>, EngineError> {
    EngineVm::new(kind, mem, IrqChip::User)?.vcpu(id, bus, info)
}
