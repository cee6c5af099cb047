//! Hardware assist: guest code runs on the CPU itself, in a virtual machine that the host kernel's KVM keeps.
//!
//! The machine is the one that binary translation runs: the same RAM, given to KVM as memory slots; the same devices, which the exits for
//! port I/O and MMIO lead to; the same local APIC, unless it is left to the kernel ([`IrqChip`]). What differs is who executes instructions.
//!
//! | file | what |
//! |---|---|
//! | `vcpu` | the run loop and the exits |
//! | `run_page` | the page shared with KVM, KVM_RUN, kicks |
//! | `split` | local APICs in the kernel |
//! | `state` | `CpuState` to and from KVM |
//! | `cpuid` | the machine's CPUID, less what KVM cannot do |
//! | `env` | the environment for MSRs that KVM leaves to us |
//! | `written` | which pages were written |
//! | `report` | what is said when KVM cannot go on |
//! | `stats` | counters |
//!
//! # Kinds of KVM
//!
//! On a CPU with VMX or SVM the guest's kernel runs natively. There are hosts with a `/dev/kvm` and without either: their KVM
//! runs ring 3 natively and emulates ring 0 and real mode one instruction after the other, and gives up at an instruction that its
//! emulator does not know. [`emulates_ring0`] tells, and a guest that meets such an instruction ends with a [`Report`].
#![allow(unsafe_code)] // Gives guest RAM to KVM.

mod cpuid;
mod env;
mod report;
mod run_page;
mod split;
mod state;
mod stats;
mod vcpu;
mod written;

use std::collections::BTreeSet;
use std::fmt::Display;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::{Arc, Mutex, OnceLock};

use kvm_bindings as kvm;
use kvm_ioctls::{
    Cap, IoEventAddress, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, NoDatamatch, VmFd,
};
use paravane_cpu::Bus;
use paravane_cpu::cpuid::{CpuidConfig, CpuidPolicy};
use paravane_cpu::msr::nr;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{Doorbells, IrqChip, MachineInfo, Place, Vcpu};
use crate::devices::ioapic::PINS;
use crate::devices::lock;
use crate::host;
use crate::host::cache::Cache;
use crate::host::report::KvmKind;
use crate::host::sources::Sources;
use crate::memory::GuestRam;

pub use report::{Cause, Report};
pub use written::WriteLog;

/// Three pages that VT-x without unrestricted guests needs for real mode, in the hole below 4 GiB where nothing else is.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// One more page of the same kind.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// A problem with KVM, worded for the user.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no KVM.
    #[error("this host has no /dev/kvm; use --engine bt, which needs none")]
    Missing,
    /// It is not for this user.
    #[error("/dev/kvm cannot be opened ({0}); join the group that owns it, or use --engine bt, which needs none")]
    Denied(io::Error),
    /// It is too old or of another kind.
    #[error("this host's KVM lacks {0}; use a newer host kernel, or --engine bt")]
    Lacks(&'static str),
    /// It refused a request.
    #[error("this host's KVM refuses {0} ({1}); use --engine bt")]
    Refused(&'static str, String),
    /// KVM_RUN failed.
    #[error("this host's KVM failed to run the guest ({0}); use --engine bt")]
    Run(io::Error),
    /// A resource of the host.
    #[error("the host refuses a resource for KVM ({0}); close other programs or raise its limits")]
    Host(io::Error),
    /// State that KVM cannot hold or give.
    #[error("this host's KVM cannot hold the vCPU's {0}; use --engine bt")]
    Transfer(&'static str),
    /// An MSR value that KVM does not accept.
    #[error("this host's KVM does not accept the vCPU's MSR {0:#x}; use --engine bt")]
    Msr(u32),
    /// Something that cannot be.
    #[error("KVM did something that this version does not expect ({0}); please report it, and use --engine bt")]
    Unexpected(String),
    /// KVM cannot go on with this guest.
    #[error("{0}")]
    GaveUp(Box<Report>),
}

impl KvmError {
    fn refused(what: &'static str, why: impl Display) -> Self {
        Self::Refused(what, why.to_string())
    }
}

/// Whether this host's KVM, if there is one, can only emulate ring 0: as measured, see [`host::kvm_kind`]. Only the first call takes time.
pub fn emulates_ring0() -> bool {
    static KIND: OnceLock<KvmKind> = OnceLock::new();
    *KIND.get_or_init(|| host::kvm_kind(&Sources::host(), &Cache::user())) == KvmKind::Emulating
}

/// A virtual machine of KVM's, with the guest's RAM in it.
pub(super) struct KvmVm {
    kvm: Kvm,
    fd: VmFd,
    ram: GuestRam,
    /// KVM_CAP_XCRS.
    xcrs: bool,
    /// Numbers of pages that a log of written pages has collected already; `None` while there is no log.
    kept: Mutex<Option<BTreeSet<u64>>>,
    /// Local APICs are in the kernel.
    split: bool,
    /// It only emulates ring 0.
    emulating: bool,
    /// KVM_CAP_SYNC_REGS with general and system registers.
    sync_regs: bool,
}

impl KvmVm {
    /// Opens KVM and makes an empty machine around `ram`.
    ///
    /// # Errors
    /// See [`KvmError`].
    pub(super) fn new(ram: GuestRam, irqchip: IrqChip) -> Result<Arc<Self>, KvmError> {
        let kvm = Kvm::new().map_err(|e| opening(e.into()))?;
        if kvm.get_api_version() != kvm::KVM_API_VERSION as i32 {
            return Err(KvmError::Lacks("API version 12"));
        }
        for (cap, name) in [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
            (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
            (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
            (Cap::Xsave, "KVM_CAP_XSAVE"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Lacks(name));
            }
        }
        let fd = kvm.create_vm().map_err(|e| KvmError::refused("a virtual machine", e))?;
        let xcrs = kvm.check_extension(Cap::Xcrs);
        let wanted = (kvm::KVM_SYNC_X86_REGS | kvm::KVM_SYNC_X86_SREGS) as i32;
        let sync_regs = kvm.check_extension_int(Cap::SyncRegs) & wanted == wanted;
        let emulating = emulates_ring0();
        let split = match irqchip {
            IrqChip::Auto => !emulating && kvm.check_extension(Cap::SplitIrqchip),
            IrqChip::User => false,
            IrqChip::Split => true,
        };
        let vm = Self { kvm, fd, ram, kept: Mutex::default(), xcrs, split, emulating, sync_regs };
        if split {
            vm.split_irqchip()?;
        }
        vm.add_ram()?;
        vm.fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(|e| KvmError::refused("an identity map", e))?;
        vm.fd.set_tss_address(TSS_ADDRESS).map_err(|e| KvmError::refused("a TSS address", e))?;
        vm.take_msrs()?;
        vm.explain_failures();
        Ok(Arc::new(vm))
    }

    /// Makes vCPU `id`.
    ///
    /// # Errors
    /// See [`KvmError`].
    pub(super) fn vcpu(
        self: &Arc<Self>,
        id: u32,
        bus: Arc<dyn Bus>,
        info: &MachineInfo,
    ) -> Result<Box<dyn Vcpu>, KvmError> {
        let config = CpuidConfig { cpus: info.cpus, tsc_khz: info.tsc_khz, apic_hz: info.apic_hz };
        let mut cpuid = CpuidPolicy::host(&config).with_hypervisor_leaves(&info.hypervisor_leaves);
        cpuid::restrict(&self.kvm, &mut cpuid)?;
        Ok(Box::new(vcpu::KvmVcpu::new(self.clone(), id, bus, cpuid)?))
    }

    /// Puts local APICs into the kernel; before there is any vCPU.
    fn split_irqchip(&self) -> Result<(), KvmError> {
        if !self.kvm.check_extension(Cap::SplitIrqchip) || !self.kvm.check_extension(Cap::SignalMsi) {
            return Err(KvmError::Lacks("KVM_CAP_SPLIT_IRQCHIP"));
        }
        // The argument is how many routes are I/O APIC pins.
        self.enable(kvm::KVM_CAP_SPLIT_IRQCHIP, PINS as u64)
            .map_err(|e| KvmError::refused("local APICs in the kernel", e))
    }

    /// What KVM's own paravirtual interface offers, where local APICs are in the kernel; else it is not used.
    pub(super) fn own_features(&self) -> Option<u32> {
        const FEATURES: u32 = 0x4000_0001;
        let list = self.split.then(|| self.kvm.get_supported_cpuid(kvm::KVM_MAX_CPUID_ENTRIES).ok())??;
        Some(list.as_slice().iter().find(|e| e.function == FEATURES).map_or(0, |e| e.eax))
    }

    /// Has KVM forget all that it derived from guest memory, which somebody else may have written: with shadow paging it relies on
    /// seeing every write to a page table. No vCPU of the machine may be running: the memory is gone for a moment.
    fn forget_memory(&self) -> Result<(), KvmError> {
        self.keep_log()?;
        for slot in 0..self.ram.num_regions() {
            let nothing = kvm::kvm_userspace_memory_region { slot: slot as u32, ..Default::default() };
            // SAFETY: takes a range away.
            unsafe { self.fd.set_user_memory_region(nothing) }.map_err(|e| KvmError::refused("guest RAM", e))?;
        }
        self.add_ram()
    }

    /// Gives guest RAM to KVM, one slot per region, or says anew whether writes are logged.
    fn add_ram(&self) -> Result<(), KvmError> {
        let flags = if lock(&self.kept).is_some() { kvm::KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        for (slot, region) in self.ram.iter().enumerate() {
            let at = region.get_host_address(MemoryRegionAddress(0)).map_err(|e| KvmError::refused("guest RAM", e))?;
            let slot = kvm::kvm_userspace_memory_region {
                slot: slot as u32,
                flags,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: at as u64,
            };
            // SAFETY: the range is a mapping of ours that `self.ram` keeps for as long as the machine exists, and it is guest memory, to which
            // nobody holds Rust references.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(|e| KvmError::refused("guest RAM", e))?;
        }
        Ok(())
    }

    /// Asks for the MSRs that are the machine's: those of the local APIC, and those that KVM does not know.
    fn take_msrs(&self) -> Result<(), KvmError> {
        if !self.kvm.check_extension(Cap::X86UserSpaceMsr) || !self.kvm.check_extension(Cap::X86MsrFilter) {
            return Err(KvmError::Lacks("KVM_CAP_X86_USER_SPACE_MSR"));
        }
        let reasons =
            kvm::KVM_MSR_EXIT_REASON_INVAL | kvm::KVM_MSR_EXIT_REASON_UNKNOWN | kvm::KVM_MSR_EXIT_REASON_FILTER;
        self.enable(kvm::KVM_CAP_X86_USER_SPACE_MSR, reasons.into())
            .map_err(|e| KvmError::refused("exits for MSRs", e))?;
        // A cleared bit denies, which makes an exit. The x2APIC's MSRs cannot be filtered; without a local APIC in the kernel KVM does
        // not know them, which makes an exit too.
        let both = MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE;
        let deny = |base, msr_count, flags| MsrFilterRange { flags, base, msr_count, bitmap: &[0; 32] };
        let mut filter = vec![
            // The machine must know how far the guest's TSC is from the host's.
            deny(nr::TSC, 1, MsrFilterRangeFlags::WRITE),
            deny(nr::TSC_ADJUST, 1, MsrFilterRangeFlags::WRITE),
        ];
        if !self.split {
            filter.push(deny(nr::APIC_BASE, 1, both));
            filter.push(deny(nr::TSC_DEADLINE, 1, both));
            filter.push(deny(nr::HYPERVISOR_FIRST, nr::HYPERVISOR_LAST - nr::HYPERVISOR_FIRST + 1, both));
        }
        self.fd
            .set_msr_filter(MsrFilterDefaultAction::ALLOW, &filter)
            .map_err(|e| KvmError::refused("a filter for MSRs", e))
    }

    /// Has emulation failures come with the instruction's bytes, where KVM can.
    fn explain_failures(&self) {
        let _ = self.enable(kvm::KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1);
    }

    fn enable(&self, cap: u32, arg: u64) -> Result<(), kvm_ioctls::Error> {
        let mut c = kvm::kvm_enable_cap { cap, ..Default::default() };
        c.args[0] = arg;
        self.fd.enable_cap(&c)
    }
}

impl Doorbells for KvmVm {
    fn attach(&self, place: Place, bell: BorrowedFd<'_>) -> io::Result<()> {
        let (fd, at) = (event(bell)?, address(place));
        let done = match (place.value, place.bytes) {
            (None, _) => self.fd.register_ioevent(&fd, &at, NoDatamatch),
            (Some(v), 1) => self.fd.register_ioevent(&fd, &at, v as u8),
            (Some(v), 2) => self.fd.register_ioevent(&fd, &at, v as u16),
            (Some(v), 4) => self.fd.register_ioevent(&fd, &at, v as u32),
            (Some(v), _) => self.fd.register_ioevent(&fd, &at, v),
        };
        done.map_err(io::Error::from)
    }

    fn detach(&self, place: Place, bell: BorrowedFd<'_>) -> io::Result<()> {
        let (fd, at) = (event(bell)?, address(place));
        let done = match (place.value, place.bytes) {
            (None, _) => self.fd.unregister_ioevent(&fd, &at, NoDatamatch),
            (Some(v), 1) => self.fd.unregister_ioevent(&fd, &at, v as u8),
            (Some(v), 2) => self.fd.unregister_ioevent(&fd, &at, v as u16),
            (Some(v), 4) => self.fd.unregister_ioevent(&fd, &at, v as u32),
            (Some(v), _) => self.fd.unregister_ioevent(&fd, &at, v),
        };
        done.map_err(io::Error::from)
    }
}

fn address(place: Place) -> IoEventAddress {
    if place.port { IoEventAddress::Pio(place.address) } else { IoEventAddress::Mmio(place.address) }
}

/// The eventfd in the form that kvm-ioctls takes. KVM keeps the event itself, so the duplicate may go afterwards.
fn event(bell: BorrowedFd<'_>) -> io::Result<EventFd> {
    let own = bell.try_clone_to_owned()?;
    // SAFETY: the descriptor is ours, and owned by nobody else from here on.
    Ok(unsafe { EventFd::from_raw_fd(own.into_raw_fd()) })
}

/// Why `/dev/kvm` could not be opened, for the user.
fn opening(e: io::Error) -> KvmError {
    match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => KvmError::Missing,
        _ => KvmError::Denied(e),
    }
}
