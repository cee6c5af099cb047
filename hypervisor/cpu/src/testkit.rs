//! A small computer for the tests of system-level semantics: descriptor tables, a TSS and stacks in flat RAM, and a way to run
//! instructions given as bytes.

use iced_x86::{Decoder, DecoderOptions};

use crate::emulate;
use crate::flat_env::FlatEnv;
use crate::state::{Seg, Segment, TableReg, rflags};
use crate::{CpuState, Exception, Reg, Step};

pub(crate) const GDT: u64 = 0x4000;
pub(crate) const IDT: u64 = 0x5000;
pub(crate) const TSS: u64 = 0x7000;
/// RSP0 or ESP0 in the TSS.
pub(crate) const STACK0: u64 = 0x9000;
/// IST1 in the 64-bit TSS.
pub(crate) const IST1: u64 = 0xa000;
/// Stack pointer at the start.
pub(crate) const STACK: u64 = 0xb000;
/// Where instructions run.
pub(crate) const CODE: u64 = 0x1000;
/// Handler of vector `v` is at `HANDLERS + v`.
pub(crate) const HANDLERS: u64 = 0xc000;

// Selectors in the GDT.
pub(crate) const KCODE32: u16 = 0x08;
pub(crate) const KCODE64: u16 = 0x10;
pub(crate) const KDATA: u16 = 0x18;
pub(crate) const UCODE32: u16 = 0x23;
pub(crate) const UDATA: u16 = 0x2b;
pub(crate) const UCODE64: u16 = 0x33;
pub(crate) const TSS_SEL: u16 = 0x40;
/// A conforming 64-bit code segment of ring 0.
pub(crate) const CONFORMING: u16 = 0x50;
/// Data, not present.
pub(crate) const ABSENT: u16 = 0x58;
/// A call gate (16 bytes in long mode).
pub(crate) const GATE: u16 = 0x60;
/// Read-only data of ring 0.
pub(crate) const READONLY: u16 = 0x70;
/// 16-bit code of ring 0 with a limit of 0xfff.
pub(crate) const KCODE16: u16 = 0x78;
/// An LDT (16 bytes in long mode) with nothing in it.
pub(crate) const LDT: u16 = 0x80;

/// The machine under test.
pub(crate) struct Machine {
    pub(crate) st: CpuState,
    pub(crate) env: FlatEnv,
}

/// A segment descriptor; `access` is the access byte, `flags` the four bits G, D/B, L, AVL.
pub(crate) fn descriptor(base: u64, limit: u64, access: u64, flags: u64) -> u64 {
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

impl Machine {
    fn tables(mut self, long: bool) -> Self {
        let entries = [
            (KCODE32, descriptor(0, 0xf_ffff, 0x9b, 0xc)),
            (KCODE64, descriptor(0, 0xf_ffff, 0x9b, 0xa)),
            (KDATA, descriptor(0, 0xf_ffff, 0x93, 0xc)),
            (UCODE32, descriptor(0, 0xf_ffff, 0xfb, 0xc)),
            (UDATA, descriptor(0, 0xf_ffff, 0xf3, 0xc)),
            (UCODE64, descriptor(0, 0xf_ffff, 0xfb, 0xa)),
            (TSS_SEL, descriptor(TSS, 0xfff, 0x89, 0)),
            (CONFORMING, descriptor(0, 0xf_ffff, 0x9e, 0xa)),
            (ABSENT, descriptor(0, 0xf_ffff, 0x73, 0xc)),
            (READONLY, descriptor(0, 0xf_ffff, 0x90, 0xc)),
            (KCODE16, descriptor(0x1_0000, 0xfff, 0x9b, 0)),
            (LDT, descriptor(0xe000, 0x7, 0x82, 0)),
        ];
        for (selector, value) in entries {
            self.env.put64(GDT + u64::from(selector & !7), value);
        }
        self.st.gdtr = TableReg { base: GDT, limit: 0xff };
        self.st.idtr = TableReg { base: IDT, limit: if long { 0xfff } else { 0x7ff } };
        self.st.tr = Segment { base: TSS, limit: 0xfff, attr: 0x8b, selector: TSS_SEL };
        self.st.gpr[Reg::Rsp as usize] = STACK;
        self.st.rip = CODE;
        self
    }

    /// 64-bit mode in ring `cpl`, every vector with an interrupt gate to [`KCODE64`].
    pub(crate) fn long(cpl: u8) -> Self {
        let (mut st, env) = FlatEnv::long_mode();
        if cpl == 0 {
            st.seg = [Segment::flat_data(KDATA, 0); 6];
            st.seg[Seg::Cs as usize] = Segment::flat_code(KCODE64, 0, true);
            st.cpl = 0;
        }
        let mut m = Self { st, env }.tables(true);
        m.env.put64(TSS + 4, STACK0);
        m.env.put64(TSS + 0x24, IST1);
        for v in 0..=255 {
            m.gate64(v, KCODE64, HANDLERS + u64::from(v), 0x8e, 0);
        }
        m
    }

    /// Flat 32-bit protected mode without paging in ring `cpl`, every vector with an interrupt gate to [`KCODE32`].
    pub(crate) fn protected(cpl: u8) -> Self {
        let (st, env) = FlatEnv::legacy(32);
        let mut m = Self { st, env }.tables(false);
        let (cs, ds) = if cpl == 0 { (KCODE32, KDATA) } else { (UCODE32, UDATA) };
        m.st.seg = [Segment::flat_data(ds, cpl); 6];
        m.st.seg[Seg::Cs as usize] = Segment::flat_code(cs, cpl, false);
        m.st.cpl = cpl;
        m.env.put64(TSS + 4, STACK0 | u64::from(KDATA) << 32);
        for v in 0..=255 {
            m.gate32(v, KCODE32, HANDLERS + u64::from(v), 0x8e);
        }
        m
    }

    /// Real mode with a vector table at 0 that points to `HANDLERS + v`.
    pub(crate) fn real() -> Self {
        let (st, env) = FlatEnv::legacy(16);
        let mut m = Self { st, env };
        m.st.idtr = TableReg { base: 0, limit: 0x3ff };
        m.st.gpr[Reg::Rsp as usize] = STACK;
        for v in 0..256 {
            m.put32(v * 4, (HANDLERS + v) as u32);
        }
        m
    }

    /// Virtual-8086 mode with the given IOPL, over [`Machine::protected`].
    pub(crate) fn v8086(iopl: u64) -> Self {
        let mut m = Self::protected(3);
        m.st.rflags |= rflags::VM | iopl << 12;
        for (n, seg) in m.st.seg.iter_mut().enumerate() {
            *seg = Segment { attr: 0xf3, ..Segment::real(if n == Seg::Cs as usize { 0 } else { n as u16 }) };
        }
        m.st.seg[Seg::Ss as usize].selector = 0;
        m.st.seg[Seg::Ss as usize].base = 0;
        m
    }

    pub(crate) fn gate64(&mut self, v: u8, selector: u16, offset: u64, access: u64, ist: u64) {
        let at = IDT + u64::from(v) * 16;
        self.env.put64(at, gate(selector, offset, access) | ist << 32);
        self.env.put64(at + 8, offset >> 32);
    }

    pub(crate) fn gate32(&mut self, v: u8, selector: u16, offset: u64, access: u64) {
        self.env.put64(IDT + u64::from(v) * 8, gate(selector, offset, access));
    }

    pub(crate) fn put32(&mut self, at: u64, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) {
        self.env.mem[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn get64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.env.mem[at as usize..at as usize + 8].try_into().unwrap())
    }

    pub(crate) fn get32(&self, at: u64) -> u32 {
        self.get64(at) as u32
    }

    pub(crate) fn get16(&self, at: u64) -> u16 {
        self.get64(at) as u16
    }

    pub(crate) fn gpr(&self, r: Reg) -> u64 {
        self.st.gpr[r as usize]
    }

    pub(crate) fn set(&mut self, r: Reg, value: u64) {
        self.st.gpr[r as usize] = value;
    }

    /// Fills the stack with `values` of `size` bytes, the first one at the top (popped first).
    pub(crate) fn frame(&mut self, size: usize, values: &[u64]) {
        let sp = self.gpr(Reg::Rsp);
        for (n, v) in values.iter().enumerate() {
            self.put(sp + (n * size) as u64, &v.to_le_bytes()[..size]);
        }
    }

    /// Decodes `bytes` at RIP in the current mode and carries the instruction out.
    pub(crate) fn run(&mut self, bytes: &[u8]) -> Result<Step, Exception> {
        let i = Decoder::with_ip(self.st.code_bits(), bytes, self.st.rip, DecoderOptions::NONE).decode();
        assert_eq!(i.len(), bytes.len(), "the test's bytes are one instruction");
        emulate::step(&mut self.st, &mut self.env, &i)
    }

    /// Runs an instruction that must fail, and checks that it changed no register.
    pub(crate) fn fault(&mut self, bytes: &[u8]) -> Exception {
        let before = registers(&self.st);
        let e = self.run(bytes).expect_err("the instruction must fault");
        assert_eq!(registers(&self.st), before, "a fault leaves the registers alone");
        e
    }
}

/// An eight-byte interrupt, trap or call gate.
pub(crate) fn gate(selector: u16, offset: u64, access: u64) -> u64 {
    (offset & 0xffff) | u64::from(selector) << 16 | access << 40 | (offset >> 16 & 0xffff) << 48
}

type Registers = ([u64; 16], u64, u64, [Segment; 6], u8, [u64; 5], u8);

/// Everything that a faulting instruction must not change.
pub(crate) fn registers(st: &CpuState) -> Registers {
    (st.gpr, st.rip, st.rflags, st.seg, st.cpl, [st.cr0, st.cr2, st.cr3, st.cr4, st.efer], st.irq_shadow)
}
