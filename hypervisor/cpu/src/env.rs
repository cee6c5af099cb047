//! What a vCPU asks of the world around it: the machine's [`Bus`] (shared by all vCPUs, implemented by the machine) and
//! its [`Env`] (one per vCPU, implemented by the engine).

use crate::cpuid::CpuidPolicy;
use crate::exit::Exception;
use crate::mmu::{self, Access};
use crate::snapshot::LapicState;
use crate::state::CpuState;

/// What a write to the bus came to, for the vCPU that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusOutcome {
    /// Done; go on.
    Done,
    /// Done, and the machine is now stopping (power-off, reset, debug exit): leave the run loop promptly.
    Stopping,
}

/// What a hypercall came to, for the vCPU that made it. Its results are in the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HypercallOutcome {
    /// Done; go on.
    Done,
    /// Done; mappings may have changed.
    Resync,
    /// Done; the vCPU now waits for an interrupt.
    Halt,
    /// The machine is now stopping.
    Stopping,
}

/// A message that starts a vCPU, or makes it ready to be started (SDM vol. 3, section 9.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Startup {
    /// INIT. The local APIC has gone through it already; the rest is [`CpuState::init`].
    Init,
    /// SIPI with its vector; nothing happens unless the vCPU waits for it. See [`CpuState::start_up`].
    Sipi(u8),
}

/// The machine as one vCPU sees it: port I/O, MMIO outside RAM, the interrupt controllers, the local APIC.
///
/// Addresses are guest-physical, sizes are `data.len()` (1, 2, 4 or 8 bytes). Reads that nothing answers give all ones; writes that
/// nothing answers are dropped, as on a PC. All methods take `&self`: the machine locks what it must.
pub trait Bus: Send + Sync {
    /// IN.
    fn pio_read(&self, vcpu: u32, port: u16, data: &mut [u8]);
    /// OUT.
    fn pio_write(&self, vcpu: u32, port: u16, data: &[u8]) -> BusOutcome;
    /// Load from a guest-physical address outside RAM.
    fn mmio_read(&self, vcpu: u32, gpa: u64, data: &mut [u8]);
    /// Store to a guest-physical address outside RAM.
    fn mmio_write(&self, vcpu: u32, gpa: u64, data: &[u8]) -> BusOutcome;
    /// RDMSR of an MSR that belongs to the local APIC: IA32_APIC_BASE (0x1b), IA32_TSC_DEADLINE (0x6e0), x2APIC
    /// (0x800..=0x8ff). `None`: the access is invalid now (#GP).
    fn apic_msr_read(&self, vcpu: u32, msr: u32) -> Option<u64>;
    /// WRMSR of the same. `None`: #GP.
    fn apic_msr_write(&self, vcpu: u32, msr: u32, value: u64) -> Option<BusOutcome>;
    /// CR8 (the task priority class, 0..=15).
    fn cr8_read(&self, vcpu: u32) -> u8;
    /// MOV to CR8.
    fn cr8_write(&self, vcpu: u32, value: u8);
    /// Whether a maskable interrupt is deliverable now (local APIC and ExtINT; IF is the vCPU's own business). Cheap: one or two
    /// atomic loads when nothing is pending.
    fn interrupt_pending(&self, vcpu: u32) -> bool;
    /// Acknowledges the highest-priority deliverable interrupt and gives its vector; `None` if it went away.
    fn interrupt_ack(&self, vcpu: u32) -> Option<u8>;
    /// Takes a pending NMI, if there is one.
    fn take_nmi(&self, vcpu: u32) -> bool;
    /// The local APIC's registers and the messages that wait in it, for a hand-over or a snapshot; IA32_TSC_DEADLINE is in terms of
    /// the host's TSC, as in [`Bus::apic_msr_write`]. `None`: the machine has no local APIC, or the engine keeps it.
    fn lapic_save(&self, vcpu: u32) -> Option<LapicState> {
        let _ = vcpu;
        None
    }
    /// Replaces the local APIC's registers by what was saved, and checked, before. `false`: there is none to load.
    fn lapic_load(&self, vcpu: u32, state: &LapicState) -> bool {
        let _ = (vcpu, state);
        false
    }
    /// The guest ended a level-triggered interrupt at a local APIC that the engine keeps.
    fn end_of_interrupt(&self, vector: u8) {
        let _ = vector;
    }
    /// Takes a pending INIT, or else a pending start-up message. Cheap when there is none.
    fn take_startup(&self, vcpu: u32) -> Option<Startup> {
        let _ = vcpu;
        None
    }
    /// Whether the machine is stopping or paused and vCPUs should leave their run loops.
    fn stopping(&self) -> bool;
    /// Whether another vCPU has asked this one to drop cached translations: [`Bus::flush_as_asked`] is due before guest code runs.
    fn asked_to_flush(&self, vcpu: u32) -> bool {
        let _ = vcpu;
        false
    }
    /// Drops what was asked for, through the vCPU's own environment.
    fn flush_as_asked(&self, vcpu: u32, env: &mut dyn Env) {
        let _ = (vcpu, env);
    }
    /// Whether a halted vCPU is to go on although no interrupt is deliverable: somebody kicked it, or it masks an interrupt by means
    /// that HLT does not know.
    fn wakes(&self, vcpu: u32) -> bool {
        let _ = vcpu;
        false
    }
    /// The vCPU's TSC now differs from the host's by `offset` ticks.
    fn tsc_moved(&self, vcpu: u32, offset: u64) {
        let _ = (vcpu, offset);
    }
    /// A hypercall: number and arguments are in the registers of `st`, and so are the results. An engine whose registers live elsewhere fills
    /// in the general-purpose registers, RFLAGS, CS and CPL before, and takes the general-purpose registers and RFLAGS back. `None`: nothing
    /// here takes hypercalls, and the instruction is undefined, as it is on a CPU by itself.
    fn hypercall(&self, st: &mut CpuState, env: &mut dyn Env) -> Option<HypercallOutcome> {
        let _ = (st, env);
        None
    }
    /// RDMSR of an MSR that hypervisors define (0x4b56_4d00..=0x4b56_4dff). `None`: #GP.
    fn hypervisor_msr_read(&self, vcpu: u32, msr: u32) -> Option<u64> {
        let _ = (vcpu, msr);
        None
    }
    /// WRMSR of the same. `None`: #GP.
    fn hypervisor_msr_write(&self, vcpu: u32, msr: u32, value: u64, env: &mut dyn Env) -> Option<BusOutcome> {
        let _ = (vcpu, msr, value, env);
        None
    }
}

/// Which cached translations an instruction invalidates (SDM vol. 3, section 4.10.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlbFlush {
    /// Everything, global pages included (CR4.PGE, CR0.PG, CR0.WP, EFER.NXE and the like changed).
    All,
    /// Everything but global pages, in the current PCID (MOV to CR3 without the no-flush bit).
    NonGlobal,
    /// CR3 changed to another PCID whose cached translations stay valid (bit 63 of the value was set).
    SwitchPcid,
    /// The page that holds this linear address, global or not, in every view (INVLPG).
    Page(u64),
    /// INVPCID type 0: one address in one PCID.
    PcidPage(u16, u64),
    /// INVPCID type 1: one PCID, without globals.
    Pcid(u16),
}

/// What system-level emulation needs of the vCPU's engine.
pub trait Env {
    /// Reads guest-physical memory: RAM or MMIO. `data` does not cross a page.
    fn read_phys(&mut self, gpa: u64, data: &mut [u8]);
    /// Writes guest-physical memory: RAM (with self-modifying-code handling) or MMIO. `data` does not cross a page.
    fn write_phys(&mut self, gpa: u64, data: &[u8]);
    /// Reads a page-table entry of 4 or 8 bytes, naturally aligned. `None` when the address is not RAM.
    fn read_pte(&mut self, gpa: u64, bytes: u8) -> Option<u64>;
    /// Sets bits (accessed, dirty) in a page-table entry with an atomic compare-exchange from `old`. `false` when the entry is no
    /// longer `old`: walk again.
    fn update_pte(&mut self, gpa: u64, bytes: u8, old: u64, new: u64) -> bool;
    /// Stores a page-table entry of 8 bytes, naturally aligned, with one store. `false` when the address is not RAM.
    fn write_pte(&mut self, gpa: u64, value: u64) -> bool;
    /// Guest-physical address behind `la`, a canonical address as the mode has it, or the page fault. An engine with a TLB looks there first.
    fn translate(&mut self, st: &CpuState, la: u64, access: Access) -> Result<u64, Exception> {
        Ok(mmu::walk(st, self, la, access)?.gpa)
    }
    /// The machine's bus.
    fn bus(&self) -> &dyn Bus;
    /// Drops cached translations.
    fn flush_tlb(&mut self, what: TlbFlush);
    /// Does for other vCPUs what they wait for. Called again and again by who waits for them, so that nobody waits in a circle.
    fn attend(&mut self) {}
    /// Host TSC.
    fn host_tsc(&self) -> u64;
    /// Told of what a bus write came to, so that the engine leaves its loop when the machine is stopping.
    fn note_outcome(&mut self, outcome: BusOutcome);
    /// What CPUID answers on this machine.
    fn cpuid(&self) -> &CpuidPolicy;
    /// Hands a hypercall to [`Bus::hypercall`]: the bus gets this environment, so it cannot be borrowed from it.
    fn hypercall(&mut self, st: &mut CpuState) -> Option<HypercallOutcome> {
        let _ = st;
        None
    }
    /// Hands a write to [`Bus::hypervisor_msr_write`].
    fn hypervisor_msr_write(&mut self, vcpu: u32, msr: u32, value: u64) -> Option<BusOutcome> {
        let _ = (vcpu, msr, value);
        None
    }
    /// Host address of `len` bytes of RAM at `gpa`, for bulk copies that would be slow byte by byte. `None` sends the caller to
    /// [`Env::read_phys`] and [`Env::write_phys`], so it is always a correct answer.
    ///
    /// The range does not cross a page. With `write`, only memory may be returned that holds no translated code and whose
    /// writes nobody has to be told of. Pointers from it stay good until some other method of this `Env` is called; other vCPUs may use the
    /// same memory meanwhile, so it must be accessed with raw or volatile operations only.
    fn ram_slice(&mut self, gpa: u64, len: usize, write: bool) -> Option<*mut u8> {
        let _ = (gpa, len, write);
        None
    }
}
