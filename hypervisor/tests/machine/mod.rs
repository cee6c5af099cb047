//! A machine of 8 MiB whose guest is some code in ring 0 of 64-bit mode, for tests and measurements of engines. Vector
//! [`STARTUP`] starts another vCPU at [`OTHERS`], in 64-bit mode too.
#![allow(dead_code, unreachable_pub)] // Each program uses its part.

use paravane::chipset::{Chipset, ChipsetConfig};
use paravane::config::parse_size;
use paravane::devices::lapic;
use paravane::engine::{EngineError, EngineKind, EngineVm, IrqChip, MachineInfo, Vcpu, Windows};
use paravane::memory::{self, GuestRam};
use paravane::pv::Offer;
use paravane::tsc;
use paravane_cpu::state::{cr0, cr4, efer};
use paravane_cpu::{CpuState, Reg, Seg, Segment, TableReg};
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use vm_memory::{Bytes, GuestAddress};

/// Where the code is.
pub const CODE: u64 = 0x10_0000;
/// The handler of vector [`VECTOR`].
pub const HANDLER: u64 = 0x11_0000;
/// Guests find this in RSI and leave answers there.
pub const ANSWER: u64 = 0x30_0000;
/// The vector with a handler.
pub const VECTOR: u8 = 0x40;
/// Code of the vCPUs that a start-up message starts. They find their APIC ID in EBX and a stack of their own.
pub const OTHERS: u64 = 0x12_0000;
/// Page of real-mode code that leads there.
pub const STARTUP: u8 = 8;
const GDT: u64 = 0x5000;
/// What LGDT reads in real mode.
const GDTR: u64 = 0x5f00;
const IDT: u64 = 0x6000;

/// Assembles a guest into the program and gives its bytes.
#[macro_export]
macro_rules! guest {
    ($name:ident, $($line:expr),+ $(,)?) => {
        std::arch::global_asm!(
            concat!(".globl guest_", stringify!($name), "\nguest_", stringify!($name), ":"),
            $($line),+,
            concat!(".globl guest_end_", stringify!($name), "\nguest_end_", stringify!($name), ":"),
        );
        pub fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("guest_", stringify!($name))]
                static START: u8;
                #[link_name = concat!("guest_end_", stringify!($name))]
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

guest!(
    start_up,
    ".code16",
    "xor ax, ax",
    "mov ds, ax",
    ".byte 0x66, 0x0f, 0x01, 0x16, 0x00, 0x5f", // lgdt [0x5f00]
    "mov eax, 0x620",                           // PAE, SSE
    "mov cr4, eax",
    "mov eax, 0x1000",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "mov eax, 0x101", // LME, SCE
    "xor edx, edx",
    "wrmsr",
    "mov eax, 0x80010033",
    "mov cr0, eax",
    ".byte 0x66, 0xea, 0x00, 0x00, 0x12, 0x00, 0x08, 0x00", // jmp 8:OTHERS
    ".code64",
);
guest!(
    enter,
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "mov esi, 0x300000",
    "mov r14d, 0xfee00000",
    "mov ebx, [r14 + 0x20]",
    "shr ebx, 24",
    "mov esp, ebx",
    "shl esp, 12",
    "add esp, 0x200000",
    ".byte 0x0f, 0x01, 0x1c, 0x25, 0x10, 0x5f, 0x00, 0x00", // lidt [0x5f10]
);

/// Serial output, kept.
#[derive(Clone, Default)]
pub struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    /// What was written so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A machine and its vCPU, ready to run.
pub struct Machine {
    pub mem: GuestRam,
    pub chipset: Arc<Chipset>,
    pub console: Console,
    pub vm: EngineVm,
    pub vcpu: Box<dyn Vcpu>,
    /// vCPUs from 1 on, which wait for a start-up message.
    pub others: Vec<Box<dyn Vcpu>>,
}

impl Machine {
    /// Puts `code` and the handler of [`VECTOR`] into a machine of the given engine.
    pub fn new(kind: EngineKind, code: &[u8], handler: &[u8], offer: Offer) -> Result<Self, EngineError> {
        Self::with_cpus(kind, 1, code, &[], handler, offer)
    }

    /// The same with several vCPUs: the others run `others` once they are started.
    pub fn with_cpus(
        kind: EngineKind,
        cpus: u32,
        code: &[u8],
        others: &[u8],
        handler: &[u8],
        offer: Offer,
    ) -> Result<Self, EngineError> {
        Self::with_irqchip(kind, IrqChip::User, cpus, code, others, handler, offer)
    }

    /// The same with local APICs where `irqchip` says.
    pub fn with_irqchip(
        kind: EngineKind,
        irqchip: IrqChip,
        cpus: u32,
        code: &[u8],
        others: &[u8],
        handler: &[u8],
        offer: Offer,
    ) -> Result<Self, EngineError> {
        let mem = memory::create(parse_size("8M").unwrap()).unwrap();
        let put = |gpa: u64, v: u64| mem.write_obj(v, GuestAddress(gpa)).unwrap();
        // 4 GiB one to one in pages of 2 MiB.
        put(0x1000, 0x2003);
        for gib in 0..4 {
            put(0x2000 + gib * 8, (0x40_0000 + gib * 0x1000) | 3);
            for n in 0..512 {
                put(0x40_0000 + gib * 0x1000 + n * 8, gib << 30 | n << 21 | 0x83);
            }
        }
        for (n, d) in [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff_u64].into_iter().enumerate() {
            put(GDT + n as u64 * 8, d);
        }
        put(IDT + u64::from(VECTOR) * 16, (HANDLER & 0xffff) | 8 << 16 | 0x8e00 << 32 | (HANDLER >> 16 & 0xffff) << 48);
        mem.write_slice(code, GuestAddress(CODE)).unwrap();
        mem.write_slice(handler, GuestAddress(HANDLER)).unwrap();
        mem.write_slice(start_up(), GuestAddress(u64::from(STARTUP) << 12)).unwrap();
        mem.write_slice(&[enter(), others].concat(), GuestAddress(OTHERS)).unwrap();
        put(GDTR, 0x37 | GDT << 16);
        put(GDTR + 16, 0xfff | IDT << 16);
        let console = Console::default();
        let vm = EngineVm::new(kind, mem.clone(), irqchip)?;
        let pv = vm.paravirt(offer, 0);
        let chipset =
            Chipset::new(ChipsetConfig { cpus, debug_exit: true, serial: Box::new(console.clone()), pv }).unwrap();
        let tsc_khz = tsc::tsc_khz();
        let make = |n| {
            let info = MachineInfo {
                cpus,
                tsc_khz,
                apic_hz: lapic::BUS_HZ,
                windows: Windows::Off,
                hypervisor_leaves: chipset.hypervisor_leaves(n, tsc_khz, lapic::BUS_HZ),
            };
            let vcpu = vm.vcpu(n, chipset.clone(), &info)?;
            chipset.set_kick(n, vcpu.kick());
            Ok::<_, EngineError>(vcpu)
        };
        let mut vcpu = make(0)?;
        chipset.use_local_apics(vm.local_apics());
        let mut others = (1..cpus).map(make).collect::<Result<Vec<_>, _>>()?;
        others.iter_mut().for_each(|v| v.state_mut().init());
        let st = vcpu.state_mut();
        *st = CpuState::reset(0);
        st.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET | cr0::MP;
        st.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        st.cr3 = 0x1000;
        st.efer = efer::LME | efer::LMA | efer::SCE;
        st.seg = [Segment::flat_data(0x10, 0); 6];
        st.seg[Seg::Cs as usize] = Segment::flat_code(8, 0, true);
        st.tr = Segment { base: 0x7000, limit: 0x67, attr: 0x8b, selector: 0x28 };
        st.ldtr = Segment::default();
        st.gdtr = TableReg { base: GDT, limit: 0x37 };
        st.idtr = TableReg { base: IDT, limit: 0xfff };
        st.rip = CODE;
        st.gpr[Reg::Rsp as usize] = 0x20_0000;
        st.gpr[Reg::Rsi as usize] = ANSWER;
        st.gpr[Reg::R14 as usize] = lapic::BASE;
        Ok(Self { mem, chipset, console, vm, vcpu, others })
    }

    /// A word of the answer.
    pub fn answer(&self, n: u64) -> u64 {
        self.mem.read_obj(GuestAddress(ANSWER + n * 8)).unwrap()
    }

    /// A counter by name.
    pub fn counter(&self, name: &str) -> u64 {
        self.vcpu.counters().into_iter().find(|(n, _)| n == name).map_or(0, |(_, v)| v)
    }
}
