//! A world for unit tests: a flat piece of RAM, optional identity page tables in it, and a bus that records.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, OnceLock};

use crate::cpuid::{CpuidConfig, CpuidPolicy};
use crate::state::{Segment, cr0, cr4, efer};
use crate::{Bus, BusOutcome, CpuState, Env, Exception, Seg, Step, TlbFlush};

/// Where [`FlatEnv::long_mode`] puts its four page tables; RAM below it is free for tests.
pub(crate) const TABLES: u64 = 0x1f_0000;
const PT: u64 = TABLES + 0x3000;
const RAM: usize = 0x20_0000;

/// What came over the bus.
#[derive(Default)]
pub(crate) struct RecordingBus {
    pub(crate) outs: Mutex<Vec<(u16, Vec<u8>)>>,
    next_in: AtomicU8,
}

impl Bus for RecordingBus {
    fn pio_read(&self, _: u32, _: u16, data: &mut [u8]) {
        data.fill_with(|| self.next_in.fetch_add(1, Ordering::Relaxed).wrapping_add(1));
    }
    fn pio_write(&self, _: u32, port: u16, data: &[u8]) -> BusOutcome {
        self.outs.lock().unwrap().push((port, data.to_vec()));
        BusOutcome::Done
    }
    fn mmio_read(&self, _: u32, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u32, _: u64, _: &[u8]) -> BusOutcome {
        BusOutcome::Done
    }
    fn apic_msr_read(&self, _: u32, msr: u32) -> Option<u64> {
        (msr == 0x1b).then_some(0xfee0_0900)
    }
    fn apic_msr_write(&self, _: u32, _: u32, _: u64) -> Option<BusOutcome> {
        None
    }
    fn cr8_read(&self, _: u32) -> u8 {
        0
    }
    fn cr8_write(&self, _: u32, _: u8) {}
    fn interrupt_pending(&self, _: u32) -> bool {
        false
    }
    fn interrupt_ack(&self, _: u32) -> Option<u8> {
        None
    }
    fn take_nmi(&self, _: u32) -> bool {
        false
    }
    fn stopping(&self) -> bool {
        false
    }
}

/// The test world.
pub(crate) struct FlatEnv {
    pub(crate) mem: Vec<u8>,
    pub(crate) bus: RecordingBus,
    pub(crate) tsc: u64,
    pub(crate) flushes: Vec<TlbFlush>,
    /// Hand out host pointers for bulk copies.
    pub(crate) fast: bool,
}

impl FlatEnv {
    /// `bytes` of RAM, at least enough for the page tables if they are wanted.
    pub(crate) fn new(bytes: usize) -> Self {
        Self { mem: vec![0; bytes], bus: RecordingBus::default(), tsc: 0, flushes: Vec::new(), fast: false }
    }

    /// A ring-3 64-bit vCPU whose first 2 MiB are identity-mapped in 4 KiB user pages, and its world.
    pub(crate) fn long_mode() -> (CpuState, Self) {
        let mut env = Self::new(RAM);
        for level in 0..3 {
            env.put64(TABLES + level * 0x1000, (TABLES + (level + 1) * 0x1000) | 7);
        }
        for page in 0..512 {
            env.put64(PT + page * 8, (page << 12) | 7);
        }
        let mut st = CpuState::reset(0);
        st.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::WP | cr0::NE;
        st.cr3 = TABLES;
        st.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXSAVE;
        st.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        st.xcr0 = crate::host_fpu::offered_xcr0();
        st.seg = [Segment::flat_data(0x2b, 3); 6];
        st.seg[Seg::Cs as usize] = Segment::flat_code(0x33, 3, true);
        st.cpl = 3;
        st.rip = 0x1000;
        (st, env)
    }

    /// A ring-0 vCPU in flat 32-bit (or, with `bits` 16, real-address) mode without paging.
    pub(crate) fn legacy(bits: u32) -> (CpuState, Self) {
        let env = Self::new(RAM);
        let mut st = CpuState::reset(0);
        st.rip = 0x1000;
        if bits == 32 {
            st.cr0 |= cr0::PE;
            st.seg = [Segment::flat_data(0x10, 0); 6];
            st.seg[Seg::Cs as usize] = Segment::flat_code(0x08, 0, false);
        } else {
            st.seg = [Segment::real(0); 6];
        }
        (st, env)
    }

    /// Makes the page of `la` not present.
    pub(crate) fn unmap(&mut self, la: u64) {
        self.put64(PT + (la >> 12) * 8, 0);
    }

    /// Makes the page of `la` read-only.
    pub(crate) fn protect(&mut self, la: u64) {
        self.put64(PT + (la >> 12) * 8, (la & !0xfff) | 5);
    }

    pub(crate) fn put64(&mut self, at: u64, value: u64) {
        self.mem[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
    }
}

impl Env for FlatEnv {
    fn read_phys(&mut self, gpa: u64, data: &mut [u8]) {
        match self.mem.get(gpa as usize..gpa as usize + data.len()) {
            Some(from) => data.copy_from_slice(from),
            None => data.fill(0xff),
        }
    }
    fn write_phys(&mut self, gpa: u64, data: &[u8]) {
        if let Some(to) = self.mem.get_mut(gpa as usize..gpa as usize + data.len()) {
            to.copy_from_slice(data);
        }
    }
    fn read_pte(&mut self, gpa: u64, bytes: u8) -> Option<u64> {
        let mut b = [0; 8];
        b[..bytes.into()].copy_from_slice(self.mem.get(gpa as usize..gpa as usize + usize::from(bytes))?);
        Some(u64::from_le_bytes(b))
    }
    fn update_pte(&mut self, gpa: u64, bytes: u8, old: u64, new: u64) -> bool {
        let same = self.read_pte(gpa, bytes) == Some(old);
        if same {
            self.write_phys(gpa, &new.to_le_bytes()[..bytes.into()]);
        }
        same
    }
    fn write_pte(&mut self, gpa: u64, value: u64) -> bool {
        let ram = self.read_pte(gpa, 8).is_some();
        if ram {
            self.write_phys(gpa, &value.to_le_bytes());
        }
        ram
    }
    fn bus(&self) -> &dyn Bus {
        &self.bus
    }
    fn flush_tlb(&mut self, what: TlbFlush) {
        self.flushes.push(what);
    }
    fn host_tsc(&self) -> u64 {
        self.tsc
    }
    fn note_outcome(&mut self, _: BusOutcome) {}
    fn cpuid(&self) -> &CpuidPolicy {
        static POLICY: OnceLock<CpuidPolicy> = OnceLock::new(); // CPUID is slow under some hypervisors
        POLICY.get_or_init(|| {
            CpuidPolicy::host(&CpuidConfig { cpus: 1, tsc_khz: 2_000_000, apic_hz: 1_000_000_000 })
                .with_hypervisor_leaves(&[(0x4000_0000, [0x4000_0010, u32::from_le_bytes(*b"Para"), 0, 0])])
        })
    }
    fn ram_slice(&mut self, gpa: u64, len: usize, _: bool) -> Option<*mut u8> {
        if !self.fast {
            return None;
        }
        self.mem.get_mut(gpa as usize..gpa as usize + len).map(<[u8]>::as_mut_ptr)
    }
}

/// Decodes `bytes` at the vCPU's RIP and carries them out.
pub(crate) fn run(st: &mut CpuState, env: &mut FlatEnv, bytes: &[u8]) -> Option<Result<Step, Exception>> {
    let i = iced_x86::Decoder::with_ip(st.code_bits(), bytes, st.rip, iced_x86::DecoderOptions::NONE).decode();
    assert_ne!(i.mnemonic(), iced_x86::Mnemonic::INVALID, "test bytes {bytes:02x?}");
    crate::rare::emulate(st, env, &i)
}

/// A small generator of test values (xorshift).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn fill(&mut self, data: &mut [u8]) {
        data.fill_with(|| self.next() as u8);
    }
}
