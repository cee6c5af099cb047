//! A vCPU's architectural state, to and from KVM.
//!
//! [`CpuState`] is what a vCPU is; KVM has the same in six structures and a list of MSRs. The two directions are exact inverses for
//! everything KVM can hold; what it cannot hold (an MSR it does not know) stays in the [`CpuState`] as it was.
//!
//! | [`CpuState`] | KVM |
//! |---|---|
//! | `gpr`, `rip`, `rflags` | `kvm_regs` |
//! | `seg`, `ldtr`, `tr`, `gdtr`, `idtr`, `cr*`, `efer` | `kvm_sregs` |
//! | `cpl` | DPL of SS in `kvm_sregs` (SDM vol. 3, section 5.5: SS.DPL is the CPL) |
//! | `xsave` | `kvm_xsave`, standard format |
//! | `xcr0` | `kvm_xcrs` |
//! | `dr` | `kvm_debugregs` |
//! | `irq_shadow`, `nmi_blocked` | `kvm_vcpu_events` |
//! | `tsc_offset` | vCPU attribute KVM_VCPU_TSC_OFFSET |
//! | the rest | MSRs, see [`MsrMap`] |
#![allow(unsafe_code)] // Two ioctls without a safe form.

use std::os::fd::{AsRawFd, RawFd};

use kvm_bindings as kvm;
use kvm_ioctls::VcpuFd;
use paravane_cpu::msr::nr;
use paravane_cpu::snapshot::Injection;
use paravane_cpu::state::{XSAVE_BYTES, cr0, rflags};
use paravane_cpu::{CpuState, Reg, Seg, Segment, TableReg};

use super::KvmError;

/// Base of the local APIC as KVM is told, with the bits "enabled" and "bootstrap processor": fixed, for the machine keeps the true
/// one when the local APIC is in user space.
const APIC_BASE: u64 = 0xfee0_0800;
const APIC_BSP: u64 = 1 << 8;

/// Order of the general registers in `kvm_regs`.
fn gprs(r: &mut kvm::kvm_regs) -> [(Reg, &mut u64); 16] {
    [
        (Reg::Rax, &mut r.rax),
        (Reg::Rcx, &mut r.rcx),
        (Reg::Rdx, &mut r.rdx),
        (Reg::Rbx, &mut r.rbx),
        (Reg::Rsp, &mut r.rsp),
        (Reg::Rbp, &mut r.rbp),
        (Reg::Rsi, &mut r.rsi),
        (Reg::Rdi, &mut r.rdi),
        (Reg::R8, &mut r.r8),
        (Reg::R9, &mut r.r9),
        (Reg::R10, &mut r.r10),
        (Reg::R11, &mut r.r11),
        (Reg::R12, &mut r.r12),
        (Reg::R13, &mut r.r13),
        (Reg::R14, &mut r.r14),
        (Reg::R15, &mut r.r15),
    ]
}

/// General registers for KVM.
pub(super) fn regs_of(st: &CpuState) -> kvm::kvm_regs {
    let mut r = kvm::kvm_regs { rip: st.rip, rflags: st.rflags | rflags::FIXED, ..Default::default() };
    for (n, v) in gprs(&mut r) {
        *v = st.gpr[n as usize];
    }
    r
}

/// General registers from KVM.
pub(super) fn take_regs(st: &mut CpuState, mut r: kvm::kvm_regs) {
    (st.rip, st.rflags) = (r.rip, r.rflags);
    for (n, v) in gprs(&mut r) {
        st.gpr[n as usize] = *v;
    }
}

fn segment_of(s: &Segment) -> kvm::kvm_segment {
    let bit = |n: u16| (s.attr >> n & 1) as u8;
    kvm::kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attr & 15) as u8,
        present: bit(7),
        dpl: s.dpl(),
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: u8::from(!s.usable()),
        padding: 0,
    }
}

fn take_segment(k: &kvm::kvm_segment) -> Segment {
    let bit = |v: u8, n: u16| u16::from(v & 1) << n;
    let attr = u16::from(k.type_ & 15)
        | bit(k.s, 4)
        | u16::from(k.dpl & 3) << 5
        | bit(k.present, 7)
        | bit(k.avl, 12)
        | bit(k.l, 13)
        | bit(k.db, 14)
        | bit(k.g, 15);
    // VT-x keeps attributes of an unusable segment around; only "null" counts.
    let attr = if k.unusable != 0 || k.present == 0 { 0 } else { attr };
    Segment { base: k.base, limit: k.limit, attr, selector: k.selector }
}

/// System registers for KVM.
pub(super) fn sregs_of(st: &CpuState, apic_base: u64) -> kvm::kvm_sregs {
    let user = |n: Seg| {
        let mut k = segment_of(st.segment(n));
        // VT-x insists on "accessed" in whatever is usable (SDM vol. 3, section 27.3.1.2), and a loaded descriptor has it.
        k.type_ |= u8::from(k.unusable == 0);
        if st.v8086() {
            k.dpl = 3;
        }
        k
    };
    let mut ss = user(Seg::Ss);
    ss.dpl = st.cpl & 3;
    let mut tr = segment_of(&st.tr);
    if tr.unusable != 0 {
        // A task register cannot be null for VT-x; this is its value after reset.
        tr = segment_of(&Segment { base: 0, limit: 0xffff, attr: 0x8b, selector: st.tr.selector });
    }
    tr.type_ |= 2; // busy
    let table = |t: &TableReg| kvm::kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] };
    kvm::kvm_sregs {
        cs: user(Seg::Cs),
        ds: user(Seg::Ds),
        es: user(Seg::Es),
        fs: user(Seg::Fs),
        gs: user(Seg::Gs),
        ss,
        tr,
        ldt: segment_of(&st.ldtr),
        gdt: table(&st.gdtr),
        idt: table(&st.idtr),
        cr0: st.cr0,
        cr2: st.cr2,
        cr3: st.cr3,
        cr4: st.cr4,
        cr8: 0,
        efer: st.efer,
        apic_base,
        interrupt_bitmap: [0; 4],
    }
}

/// System registers from KVM. RFLAGS must have been taken before: the privilege level depends on it.
pub(super) fn take_sregs(st: &mut CpuState, k: &kvm::kvm_sregs) {
    for (n, s) in
        [(Seg::Cs, &k.cs), (Seg::Ds, &k.ds), (Seg::Es, &k.es), (Seg::Fs, &k.fs), (Seg::Gs, &k.gs), (Seg::Ss, &k.ss)]
    {
        st.seg[n as usize] = take_segment(s);
    }
    (st.ldtr, st.tr) = (take_segment(&k.ldt), take_segment(&k.tr));
    st.gdtr = TableReg { base: k.gdt.base, limit: k.gdt.limit };
    st.idtr = TableReg { base: k.idt.base, limit: k.idt.limit };
    (st.cr0, st.cr2, st.cr3, st.cr4, st.efer) = (k.cr0, k.cr2, k.cr3, k.cr4, k.efer);
    st.cpl = match (st.cr0 & cr0::PE != 0, st.rflags & rflags::VM != 0) {
        (false, _) => 0,
        (true, true) => 3,
        (true, false) => k.ss.dpl & 3,
    };
}

/// The XSAVE image for KVM.
fn xsave_of(st: &CpuState) -> kvm::kvm_xsave {
    let mut x = kvm::kvm_xsave::default();
    for (word, bytes) in x.region.iter_mut().zip(st.xsave.0.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    x
}

fn take_xsave(st: &mut CpuState, x: &kvm::kvm_xsave) {
    for (word, bytes) in x.region.iter().zip(st.xsave.0.chunks_exact_mut(4)) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    // The part that software may use for itself (SDM vol. 1, section 10.5.1) is not state.
    st.xsave.0[464..512].fill(0);
    debug_assert_eq!(XSAVE_BYTES, 4096);
}

/// Events for KVM: the shadow and the NMI mask from the state, what is in flight from `pending`.
pub(super) fn events_of(st: &CpuState, pending: &kvm::kvm_vcpu_events) -> kvm::kvm_vcpu_events {
    let mut e = *pending;
    // STI's shadow exists only with IF set (SDM vol. 3, section 27.3.1.5); else it was MOV SS.
    e.interrupt.shadow = match (st.irq_shadow != 0, st.rflags & rflags::IF != 0) {
        (false, _) => 0,
        (true, true) => kvm::KVM_X86_SHADOW_INT_STI as u8,
        (true, false) => kvm::KVM_X86_SHADOW_INT_MOV_SS as u8,
    };
    e.nmi.masked = u8::from(st.nmi_blocked != 0);
    e.flags = kvm::KVM_VCPUEVENT_VALID_SHADOW | kvm::KVM_VCPUEVENT_VALID_NMI_PENDING;
    e
}

fn take_events(st: &mut CpuState, e: &kvm::kvm_vcpu_events) {
    st.irq_shadow = u8::from(e.interrupt.shadow != 0);
    st.nmi_blocked = u8::from(e.nmi.masked != 0);
}

/// Where an MSR's value lives in the state.
type Slot = fn(&mut CpuState) -> &mut u64;

/// The MSRs that carry state beyond `kvm_sregs`, as far as this KVM knows them.
///
/// KVM_SET_MSRS stops at the first MSR it does not know, so each is tried once when the VM is made.
#[derive(Clone)]
pub(super) struct MsrMap(Vec<(u32, Slot)>);

impl MsrMap {
    /// All that have a place in [`CpuState`].
    fn all() -> Vec<(u32, Slot)> {
        let mut list: Vec<(u32, Slot)> = vec![
            (nr::KERNEL_GS_BASE, |s| &mut s.kernel_gs_base),
            (nr::STAR, |s| &mut s.star),
            (nr::LSTAR, |s| &mut s.lstar),
            (nr::CSTAR, |s| &mut s.cstar),
            (nr::FMASK, |s| &mut s.sfmask),
            (nr::TSC_AUX, |s| &mut s.tsc_aux),
            (nr::SYSENTER_CS, |s| &mut s.sysenter_cs),
            (nr::SYSENTER_ESP, |s| &mut s.sysenter_esp),
            (nr::SYSENTER_EIP, |s| &mut s.sysenter_eip),
            (nr::PAT, |s| &mut s.pat),
            (nr::MISC_ENABLE, |s| &mut s.misc_enable),
            (nr::SPEC_CTRL, |s| &mut s.spec_ctrl),
            (nr::TSC_ADJUST, |s| &mut s.tsc_adjust),
            (nr::MTRR_DEF_TYPE, |s| &mut s.mtrr_def_type),
        ];
        macro_rules! fixed {
            ($($msr:expr => $n:literal),*) => { $(list.push(($msr, |s| &mut s.mtrr_fixed[$n]));)* };
        }
        macro_rules! variable {
            ($($n:literal),*) => { $(
                list.push((nr::MTRR_PHYSBASE0 + 2 * $n, |s| &mut s.mtrr_var[$n].0));
                list.push((nr::MTRR_PHYSBASE0 + 2 * $n + 1, |s| &mut s.mtrr_var[$n].1));
            )* };
        }
        fixed!(0x250 => 0, 0x258 => 1, 0x259 => 2, 0x268 => 3, 0x269 => 4, 0x26a => 5, 0x26b => 6, 0x26c => 7,
               0x26d => 8, 0x26e => 9, 0x26f => 10);
        variable!(0, 1, 2, 3, 4, 5, 6, 7);
        list
    }

    /// Those that `vcpu` can read and write back.
    pub(super) fn probe(vcpu: &VcpuFd) -> Self {
        let works = |&(index, _): &(u32, Slot)| {
            let Ok(mut one) = kvm::Msrs::from_entries(&[kvm::kvm_msr_entry { index, ..Default::default() }]) else {
                return false;
            };
            vcpu.get_msrs(&mut one).is_ok_and(|n| n == 1) && vcpu.set_msrs(&one).is_ok_and(|n| n == 1)
        };
        Self(Self::all().into_iter().filter(works).collect())
    }

    fn read(&self, vcpu: &VcpuFd, st: &mut CpuState) -> Result<(), KvmError> {
        let entries: Vec<_> =
            self.0.iter().map(|&(index, _)| kvm::kvm_msr_entry { index, ..Default::default() }).collect();
        let mut list = kvm::Msrs::from_entries(&entries).map_err(|_| KvmError::Transfer("MSR list"))?;
        let n = vcpu.get_msrs(&mut list).map_err(|_| KvmError::Transfer("MSRs"))?;
        for (entry, (_, slot)) in list.as_slice().iter().zip(&self.0).take(n) {
            *slot(st) = entry.data;
        }
        if n == self.0.len() { Ok(()) } else { Err(KvmError::Transfer("MSRs")) }
    }

    fn write(&self, vcpu: &VcpuFd, st: &CpuState) -> Result<(), KvmError> {
        let mut st = st.clone(); // the slots are mutable places
        let entries: Vec<_> = self
            .0
            .iter()
            .map(|&(index, slot)| kvm::kvm_msr_entry { index, data: *slot(&mut st), ..Default::default() })
            .collect();
        let list = kvm::Msrs::from_entries(&entries).map_err(|_| KvmError::Transfer("MSR list"))?;
        let n = vcpu.set_msrs(&list).map_err(|_| KvmError::Transfer("MSRs"))?;
        match entries.get(n) {
            None => Ok(()),
            Some(bad) => Err(KvmError::Msr(bad.index)),
        }
    }
}

/// What of a vCPU's state this KVM can hold.
#[derive(Clone)]
pub(super) struct Shape {
    pub(super) msrs: MsrMap,
    /// RDTSC sees the vCPU's TSC offset. A KVM that only emulates ring 0 has none for what runs natively.
    pub(super) tsc: bool,
    /// KVM_CAP_XCRS and an XCR0 beyond x87.
    pub(super) xcrs: bool,
}

/// `_IOW(KVMIO, 0xe1, struct kvm_device_attr)` and its read counterpart.
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
const KVM_GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;

/// The vCPU attribute that holds guest TSC minus host TSC.
fn tsc_offset(fd: RawFd, request: libc::c_ulong, value: &mut u64) -> bool {
    let attr = kvm::kvm_device_attr {
        flags: 0,
        group: kvm::KVM_VCPU_TSC_CTRL,
        attr: kvm::KVM_VCPU_TSC_OFFSET.into(),
        addr: std::ptr::from_mut(value) as u64,
    };
    // SAFETY: the descriptor is a vCPU's; the attribute is 64 bits wide, and `addr` points to as many.
    unsafe { libc::ioctl(fd, request, &raw const attr) == 0 }
}

/// Moves a vCPU's TSC and IA32_TSC_ADJUST to what the state says.
///
/// # Errors
/// When KVM refuses.
pub(super) fn move_tsc(vcpu: &VcpuFd, st: &CpuState) -> Result<(), KvmError> {
    let entry = kvm::kvm_msr_entry { index: nr::TSC_ADJUST, data: st.tsc_adjust, ..Default::default() };
    let list = kvm::Msrs::from_entries(&[entry]).map_err(|_| KvmError::Transfer("MSR list"))?;
    let adjusted = vcpu.set_msrs(&list).is_ok_and(|n| n == 1);
    let mut offset = st.tsc_offset;
    if adjusted && tsc_offset(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &mut offset) {
        Ok(())
    } else {
        Err(KvmError::Transfer("TSC offset"))
    }
}

/// What KVM is in the middle of delivering, as an engine of any kind can take it over. Software interrupts are executed again.
pub(super) fn injection(e: &kvm::kvm_vcpu_events) -> Option<Injection> {
    let soft = matches!(e.exception.nr, 3 | 4); // INT3 and INTO
    if !soft && (e.exception.injected != 0 || e.exception.pending != 0) {
        let error_code = (e.exception.has_error_code != 0).then_some(e.exception.error_code);
        return Some(Injection::Exception { vector: e.exception.nr, error_code });
    }
    if e.nmi.injected != 0 {
        return Some(Injection::Nmi {});
    }
    (e.interrupt.injected != 0 && e.interrupt.soft == 0).then_some(Injection::Interrupt { vector: e.interrupt.nr })
}

/// The other way round.
pub(super) fn pending(injection: Option<Injection>) -> kvm::kvm_vcpu_events {
    let mut e = kvm::kvm_vcpu_events::default();
    match injection {
        None => {}
        Some(Injection::Exception { vector, error_code }) => {
            (e.exception.injected, e.exception.nr) = (1, vector);
            (e.exception.has_error_code, e.exception.error_code) =
                (error_code.is_some().into(), error_code.unwrap_or(0));
        }
        Some(Injection::Interrupt { vector }) => (e.interrupt.injected, e.interrupt.nr) = (1, vector),
        Some(Injection::Nmi {}) => e.nmi.injected = 1,
    }
    e
}

/// Reads everything out of a vCPU that is at an instruction boundary; gives what is in flight.
///
/// # Errors
/// [`KvmError::Transfer`] when KVM refuses.
pub(super) fn read(vcpu: &VcpuFd, shape: &Shape, st: &mut CpuState) -> Result<kvm::kvm_vcpu_events, KvmError> {
    let failed = |what| move |_| KvmError::Transfer(what);
    // First, because this makes KVM bring CR2 and DR6 up to date with an exception that waits.
    let events = vcpu.get_vcpu_events().map_err(failed("events"))?;
    take_events(st, &events);
    take_regs(st, vcpu.get_regs().map_err(failed("general registers"))?);
    take_sregs(st, &vcpu.get_sregs().map_err(failed("system registers"))?);
    take_xsave(st, &vcpu.get_xsave().map_err(failed("FPU state"))?);
    if shape.xcrs {
        let x = vcpu.get_xcrs().map_err(failed("XCR0"))?;
        if let Some(x) = x.xcrs.iter().take(x.nr_xcrs as usize).find(|x| x.xcr == 0) {
            st.xcr0 = x.value;
        }
    }
    let d = vcpu.get_debug_regs().map_err(failed("debug registers"))?;
    st.dr[..4].copy_from_slice(&d.db);
    (st.dr[6], st.dr[7]) = (d.dr6, d.dr7);
    shape.msrs.read(vcpu, st)?;
    let mut offset = 0;
    if tsc_offset(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR, &mut offset) {
        st.tsc_offset = offset;
    }
    Ok(events)
}

/// Puts everything into a vCPU. `apic` is IA32_APIC_BASE and CR8, where the kernel keeps the local APIC.
///
/// # Errors
/// When this KVM cannot hold the state, as without XSAVE for a guest that uses AVX.
pub(super) fn write(
    vcpu: &VcpuFd,
    shape: &Shape,
    st: &CpuState,
    pending: &kvm::kvm_vcpu_events,
    apic: Option<(u64, u64)>,
) -> Result<(), KvmError> {
    let failed = |what| move |_| KvmError::Transfer(what);
    let (base, cr8) = apic.unwrap_or((APIC_BASE | if st.id == 0 { APIC_BSP } else { 0 }, 0));
    vcpu.set_sregs(&kvm::kvm_sregs { cr8, ..sregs_of(st, base) }).map_err(failed("system registers"))?;
    vcpu.set_regs(&regs_of(st)).map_err(failed("general registers"))?;
    if shape.xcrs {
        let mut x = kvm::kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        x.xcrs[0].value = st.xcr0;
        vcpu.set_xcrs(&x).map_err(failed("XCR0"))?;
    } else if st.xcr0 & !3 != 0 {
        return Err(KvmError::Transfer("XCR0"));
    }
    // SAFETY: no state beyond the 4 KiB of `kvm_xsave` is ever enabled: dynamic features (AMX) are not asked for.
    unsafe { vcpu.set_xsave(&xsave_of(st)) }.map_err(failed("FPU state"))?;
    shape.msrs.write(vcpu, st)?;
    let mut offset = st.tsc_offset;
    if (offset != 0 && !shape.tsc) || !tsc_offset(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &mut offset) {
        return Err(KvmError::Transfer("TSC offset"));
    }
    vcpu.set_vcpu_events(&events_of(st, pending)).map_err(failed("events"))?;
    let mut d = kvm::kvm_debugregs { dr6: st.dr[6], dr7: st.dr[7], ..Default::default() };
    d.db.copy_from_slice(&st.dr[..4]);
    vcpu.set_debug_regs(&d).map_err(failed("debug registers"))
}

#[cfg(test)]
mod tests;
