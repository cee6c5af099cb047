//! Guests whose answer shows whether anything was lost on the way, and the machine they run in.
//!
//! *Compute* stays in ring 3 for some hundred milliseconds and keeps every kind of register busy: flags across iterations, memory, calls, SSE, AVX, the
//! x87 stack. *Ticks* halts in ring 0 and counts interrupts of the local APIC's timer.

use paravane::chipset::{Chipset, ChipsetConfig};
use paravane::devices::local_apics::LocalApics;
use paravane::devices::{control::StopCause, lapic};
use paravane::engine::{EngineError, EngineKind, EngineVm, IrqChip, MachineInfo, Vcpu, Windows};
use paravane::memory::{self, GuestRam};
use paravane::tsc;
use paravane_cpu::snapshot::{LapicState, VcpuSnapshot};
use paravane_cpu::state::{cr0, cr4, efer, rflags};
use paravane_cpu::{Bus, CpuState, Reg, Seg, Segment, TableReg, host_fpu};
use std::arch::global_asm;
use std::sync::{Arc, Mutex};
use vm_memory::{Bytes, GuestAddress};

const CODE: u64 = 0x10_0000;
const KERNEL: u64 = 0x11_0000;
const GDT: u64 = 0x4000;
const TSS: u64 = 0x5000;
const IDT: u64 = 0x6000;
const STACK: u64 = 0x20_0000;
/// Where the guests leave their answers.
const ANSWER: u64 = 0x30_0000;
/// What *compute* works on.
const TABLE: u64 = 0x40_0000;
const TABLE_BYTES: usize = 16384 * 8;
/// The vector of the local APIC's timer.
pub const TIMER: u8 = 0x40;

macro_rules! guest {
    ($name:ident, $($line:literal),+ $(,)?) => {
        global_asm!(
            concat!(".globl handover_", stringify!($name), "\nhandover_", stringify!($name), ":"),
            $($line),+,
            concat!(".globl handover_end_", stringify!($name), "\nhandover_end_", stringify!($name), ":"),
        );
        fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("handover_", stringify!($name))]
                static START: u8;
                #[link_name = concat!("handover_end_", stringify!($name))]
                static END: u8;
            }
            // SAFETY: the two symbols delimit bytes assembled right above.
            unsafe {
                let (a, b) = (&raw const START, &raw const END);
                std::slice::from_raw_parts(a, b as usize - a as usize)
            }
        }
    };
}

// R15 iterations; R12 not zero: AVX may be used; RBX a multiplier; RDI the table; RSI the answer.
guest!(
    compute,
    "fldz",
    "2: imul rax, rbx",
    "add rax, r13",
    "adc rdx, rax",
    "rol rdx, 7",
    "mov rcx, rax",
    "shr rcx, 50",
    "xor [rdi + rcx*8], rdx",
    "call 5f",
    "movq xmm0, rax",
    "paddq xmm1, xmm0",
    "pshufd xmm2, xmm1, 0x4e",
    "pxor xmm3, xmm2",
    "test r12d, r12d",
    "jz 3f",
    "vpermq ymm5, ymm4, 0x93",
    "vinserti128 ymm6, ymm5, xmm3, 1",
    "vpaddq ymm4, ymm4, ymm6",
    "3: fld1",
    "faddp",
    "dec r15",
    "jnz 2b",
    "mov [rsi], rdx",
    "movdqu [rsi + 16], xmm1",
    "movdqu [rsi + 32], xmm3",
    "fistp qword ptr [rsi + 48]",
    "test r12d, r12d",
    "jz 4f",
    "vmovdqu [rsi + 64], ymm4",
    "4: ud2",
    "5: push rax",
    "push rdx",
    "pop rbp",
    "pop r8",
    "lea r13, [rbp + r8*2 + 1]",
    "ret",
);

// The handler of #UD, which ring 3 ends with: SYSCALL and INT n do not work on every KVM. Ends the run with status 0x55.
guest!(end, "mov eax, 0x2a", "out 0xf4, al", "2: hlt", "jmp 2b");

// R15 interrupts to wait for; RSI the answer.
guest!(ticks, "2: sti", "hlt", "cli", "cmp [rsi], r15", "jb 2b", "mov eax, 0x2a", "out 0xf4, al", "3: hlt", "jmp 3b",);

// The timer's handler: count, end of interrupt.
guest!(tick, "inc qword ptr [rsi]", "mov dword ptr [r14 + 0xb0], 0", "iretq");

/// An engine, and where its local APIC is.
pub type Kind = (EngineKind, IrqChip);
pub const BT: Kind = (EngineKind::Bt, IrqChip::User);
pub const KVM: Kind = (EngineKind::Kvm, IrqChip::User);
pub const SPLIT: Kind = (EngineKind::Kvm, IrqChip::Split);

/// The status that both guests end with.
pub const END: StopCause = StopCause::DebugExit(0x55);

/// A guest in its machine.
pub struct Machine {
    pub mem: GuestRam,
    pub chipset: Arc<Chipset>,
    pub start: VcpuSnapshot,
    windows: Windows,
    apics: Mutex<Option<Arc<dyn LocalApics>>>,
}

fn base_state() -> CpuState {
    let mut st = CpuState::reset(0);
    st.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET | cr0::MP;
    st.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
    st.cr3 = 0x1000;
    st.efer = efer::LME | efer::LMA | efer::SCE;
    st.seg = [Segment::flat_data(0x10, 0); 6];
    st.seg[Seg::Cs as usize] = Segment::flat_code(8, 0, true);
    st.tr = Segment { base: TSS, limit: 0x67, attr: 0x8b, selector: 0x28 };
    st.ldtr = Segment::default();
    st.gdtr = TableReg { base: GDT, limit: 0x37 };
    st.idtr = TableReg { base: IDT, limit: 0xfff };
    st.rip = CODE;
    st.gpr[Reg::Rsp as usize] = STACK;
    st.gpr[Reg::Rsi as usize] = ANSWER;
    st
}

impl Machine {
    fn new(st: &CpuState, code: &[u8], kernel: &[u8], windows: Windows) -> Self {
        let mem = memory::create(64 << 20).unwrap();
        let put = |gpa: u64, v: u64| mem.write_obj(v, GuestAddress(gpa)).unwrap();
        put(0x1000, 0x2000 | 7);
        // The first 64 MiB and the APICs' pages, one to one.
        put(0x2000, 0x3000 | 7);
        put(0x2018, 0x7000 | 7);
        for n in 0..32 {
            put(0x3000 + n * 8, (n << 21) | 0x87);
        }
        put(0x7000 + 0x1f7 * 8, 0xfee0_0000 | 0x93);
        let descriptors =
            [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
        for (n, d) in descriptors.into_iter().enumerate() {
            put(GDT + n as u64 * 8, d);
        }
        put(GDT + 0x28, 0x0000_8b00_0000_0067 | TSS << 16);
        for vector in [6, u64::from(TIMER)] {
            put(IDT + vector * 16, (KERNEL & 0xffff) | 8 << 16 | 0x8e00 << 32 | (KERNEL >> 16 & 0xffff) << 48);
        }
        mem.write_obj(STACK + 0x1_0000, GuestAddress(TSS + 4)).unwrap(); // RSP0
        mem.write_slice(code, GuestAddress(CODE)).unwrap();
        mem.write_slice(kernel, GuestAddress(KERNEL)).unwrap();
        let cfg = ChipsetConfig { cpus: 1, debug_exit: true, serial: Box::new(std::io::sink()), pv: None };
        let chipset = Chipset::new(cfg).unwrap();
        let mut start = VcpuSnapshot::capture(st, tsc::rdtsc());
        start.lapic = chipset.lapic_save(0);
        Self { mem, chipset, start, windows, apics: Mutex::default() }
    }

    /// `rounds` iterations in ring 3, with AVX in use or not.
    pub fn compute(rounds: u64, windows: Windows, avx: bool) -> Self {
        let mut st = base_state();
        if avx {
            st.cr4 |= cr4::OSXSAVE;
            st.xcr0 = host_fpu::offered_xcr0() & 7;
        }
        st.cpl = 3;
        st.seg = [Segment::flat_data(0x1b, 3); 6];
        st.seg[Seg::Cs as usize] = Segment::flat_code(0x23, 3, true);
        let avx2 = avx && std::arch::is_x86_feature_detected!("avx2") && st.xcr0 & 4 != 0;
        for (r, v) in [
            (Reg::R15, rounds),
            (Reg::R12, u64::from(avx2)),
            (Reg::Rbx, 0x5851_f42d_4c95_7f2d),
            (Reg::R13, 1),
            (Reg::Rdi, TABLE),
        ] {
            st.gpr[r as usize] = v;
        }
        Self::new(&st, compute(), end(), windows)
    }

    /// `count` interrupts of a timer that ticks every `period` ns.
    pub fn ticks(count: u64, period: u32) -> Self {
        let mut st = base_state();
        st.gpr[Reg::R15 as usize] = count;
        st.gpr[Reg::R14 as usize] = lapic::BASE;
        let mut m = Self::new(&st, ticks(), tick(), Windows::Off);
        let l: &mut LapicState = m.start.lapic.as_mut().unwrap();
        l.svr = 0x1ff;
        l.lvt[1] = 1 << 17 | u32::from(TIMER);
        (l.timer_divide, l.timer_initial, l.timer_current) = (0xb, period, period);
        m.start.rflags |= rflags::IF;
        m
    }

    /// A vCPU of this machine.
    pub fn vcpu(&self, (kind, irqchip): Kind) -> Result<Box<dyn Vcpu>, EngineError> {
        let tsc_khz = tsc::tsc_khz();
        let info = MachineInfo {
            cpus: 1,
            tsc_khz,
            apic_hz: lapic::BUS_HZ,
            windows: self.windows,
            hypervisor_leaves: self.chipset.hypervisor_leaves(0, tsc_khz, lapic::BUS_HZ),
        };
        let vm = EngineVm::new(kind, self.mem.clone(), irqchip)?;
        *self.apics.lock().unwrap() = vm.local_apics();
        vm.vcpu(0, self.chipset.clone(), &info)
    }

    /// Interrupts go to the newest vCPU's local APIC from now on.
    pub fn attach_apic(&self) {
        self.chipset.use_local_apics(self.apics.lock().unwrap().clone());
    }

    /// Interrupts stay with the chipset, for the vCPU is about to change its engine.
    pub fn detach_apic(&self) {
        self.chipset.use_local_apics(None);
    }

    /// What the guest has to show: its answers, and the table.
    pub fn answer(&self) -> Vec<u8> {
        let mut bytes = vec![0; 96 + TABLE_BYTES];
        self.mem.read_slice(&mut bytes[..96], GuestAddress(ANSWER)).unwrap();
        self.mem.read_slice(&mut bytes[96..], GuestAddress(TABLE)).unwrap();
        bytes
    }

    /// The first word of it: ticks that were counted.
    pub fn count(&self) -> u64 {
        self.mem.read_obj(GuestAddress(ANSWER)).unwrap()
    }
}
