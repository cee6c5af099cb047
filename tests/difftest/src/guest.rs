//! The engine under test: a minimal guest that runs sequences in ring 3 and takes every exception in ring 0.
//!
//! The guest has page tables that mirror [`crate::layout`], a GDT with Linux's user selectors, a TSS whose RSP0 receives
//! exceptions and an IDT of 256 gates. Each gate leads to a `hlt` of its own, so the place where the vCPU halts tells
//! the vector, and the frame on the kernel stack tells the rest, as a kernel would see it. The starting state is put into
//! the vCPU directly.
#![allow(unsafe_code)] // memfd_create.

use crate::Runner;
use crate::layout::{self, PAGE};
use crate::state::{End, FPU_BYTES, FPU_MASK, Input, Outcome, host_components};
use paravane_bt::{BtConfig, BtVcpu, Windows};
use paravane_cpu::state::{cr0, cr4, efer};
use paravane_cpu::{Bus, BusOutcome, CpuState, Reg, Seg, Segment, TableReg, VcpuExit};
use paravane_ram::{GuestRam, WriteWatch};
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// Guest RAM in bytes.
const RAM: usize = 64 << 20;
/// Guest-physical places.
const PAGE_TABLES: u64 = 0x1_0000;
const GDT: u64 = 0x10_0000;
const TSS: u64 = 0x10_1000;
const IDT: u64 = 0x10_2000;
const STUBS: u64 = 0x10_4000;
const KERNEL_STACK_TOP: u64 = 0x11_0000;
const IMAGE: u64 = 0x20_0000;
const READ_ONLY: u64 = 0x21_0000;
const CODE: u64 = 0x80_0000;
/// Linear address of guest-physical 0 for the kernel (the first 2 MiB are mapped).
const KERNEL_BASE: u64 = 0xffff_8000_0000_0000;
/// Bytes between exception stubs.
const STUB_STRIDE: u64 = 16;

const KERNEL_CS: u16 = 0x10;
const USER_SS: u16 = 0x2b;
const USER_CS: u16 = 0x33;
const TR: u16 = 0x40;

/// Time one batch piece may take before the engine is told to stop.
const HANG: Duration = Duration::from_secs(3);

/// A machine without devices.
#[derive(Default)]
struct NoDevices {
    stopping: AtomicBool,
}

impl Bus for NoDevices {
    fn pio_read(&self, _vcpu: u32, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _vcpu: u32, _port: u16, _data: &[u8]) -> BusOutcome {
        BusOutcome::Done
    }
    fn mmio_read(&self, _vcpu: u32, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _vcpu: u32, _gpa: u64, _data: &[u8]) -> BusOutcome {
        BusOutcome::Done
    }
    fn apic_msr_read(&self, _vcpu: u32, _msr: u32) -> Option<u64> {
        None
    }
    fn apic_msr_write(&self, _vcpu: u32, _msr: u32, _value: u64) -> Option<BusOutcome> {
        None
    }
    fn cr8_read(&self, _vcpu: u32) -> u8 {
        0
    }
    fn cr8_write(&self, _vcpu: u32, _value: u8) {}
    fn interrupt_pending(&self, _vcpu: u32) -> bool {
        false
    }
    fn interrupt_ack(&self, _vcpu: u32) -> Option<u8> {
        None
    }
    fn take_nmi(&self, _vcpu: u32) -> bool {
        false
    }
    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }
}

/// Runs batches through the binary translator.
pub struct Guest {
    memory: GuestRam,
    vcpu: BtVcpu,
    bus: Arc<NoDevices>,
    /// Counts runs, for the watchdog; 0 ends it.
    progress: Arc<AtomicU64>,
    images: Vec<Vec<u8>>,
    watchdog: Option<std::thread::JoinHandle<()>>,
}

impl Guest {
    /// A guest ready to run sequences.
    pub fn new(windows: Windows) -> io::Result<Self> {
        let cfg = BtConfig { windows, ..BtConfig::default() };
        let memory = Arc::new(ram()?);
        build(&memory)?;
        let bus = Arc::new(NoDevices::default());
        let vcpu = BtVcpu::new(0, memory.clone(), bus.clone(), cfg).map_err(io::Error::other)?;
        let progress = Arc::new(AtomicU64::new(1));
        let watchdog = {
            let (kick, bus, progress) = (vcpu.kick_handle(), bus.clone(), progress.clone());
            std::thread::spawn(move || {
                watch(&progress, || {
                    bus.stopping.store(true, Ordering::SeqCst);
                    kick.kick();
                })
            })
        };
        let images = (0..layout::IMAGES).map(layout::image).collect();
        let mut g = Self { memory, vcpu, bus, progress, images, watchdog: Some(watchdog) };
        kernel_state(g.vcpu.state_mut());
        Ok(g)
    }

    /// The engine's counters.
    pub fn stats(&self) -> Vec<(String, u64)> {
        self.vcpu.stats()
    }

    fn run_one(&mut self, input: &Input, out: &mut Outcome) -> io::Result<()> {
        self.write(IMAGE, &self.images[input.image as usize % layout::IMAGES])?;
        enter_user(self.vcpu.state_mut(), input);
        self.progress.fetch_add(2, Ordering::SeqCst);
        let exit = self.vcpu.run();
        self.progress.fetch_add(2, Ordering::SeqCst);
        let st = self.vcpu.state();
        out.regs.gpr = st.gpr;
        out.regs.fs_base = st.seg[Seg::Fs as usize].base;
        out.regs.gs_base = st.seg[Seg::Gs as usize].base;
        out.regs.fpu.copy_from_slice(&st.xsave.0[..FPU_BYTES]);
        (out.vector, out.error, out.cr2) = (u32::MAX, 0, 0);
        out.end = match exit {
            Ok(VcpuExit::Halt | VcpuExit::HaltMasked) => End::Exception,
            Ok(VcpuExit::Stopped) => {
                self.bus.stopping.store(false, Ordering::SeqCst);
                End::Hang
            }
            Ok(VcpuExit::TripleFault) => {
                kernel_state(self.vcpu.state_mut());
                End::Broken
            }
            Ok(VcpuExit::AwaitsStartup) => return Err(io::Error::other("the only vCPU waits for a start-up message")),
            Err(e) => return Err(io::Error::other(e)),
        };
        if out.end == End::Exception {
            self.read_frame(out)?;
        }
        self.memory.read_slice(&mut out.memory, GuestAddress(IMAGE)).map_err(io::Error::other)
    }

    /// Finds the vector by the stub that halted and the rest in the exception frame (SDM vol. 3, section 6.14.2).
    fn read_frame(&self, out: &mut Outcome) -> io::Result<()> {
        let st = self.vcpu.state();
        let at = st.rip.wrapping_sub(KERNEL_BASE + STUBS);
        if st.cpl != 0 || at >= 256 * STUB_STRIDE {
            out.end = End::Broken;
            out.regs.rip = st.rip;
            return Ok(());
        }
        let vector = (at / STUB_STRIDE) as u32;
        let has_error = matches!(vector, 8 | 10..=14 | 17);
        let mut frame = [0u8; 48];
        let words = if has_error { 6 } else { 5 };
        let part = &mut frame[..words * 8];
        let rsp = st.gpr[Reg::Rsp as usize];
        self.memory
            .read_slice(part, GuestAddress(rsp.wrapping_sub(KERNEL_BASE) % RAM as u64))
            .map_err(io::Error::other)?;
        let word = |i: usize| u64::from_le_bytes(frame[8 * i..8 * i + 8].try_into().expect("eight bytes"));
        let base = usize::from(has_error);
        out.vector = vector;
        out.error = if has_error { word(0) } else { 0 };
        out.cr2 = if vector == 14 { st.cr2 } else { 0 };
        // Linux does not tell user space which of its own addresses are mapped: a fault from the last user page upwards is
        // always reported as a protection violation.
        if vector == 14 && st.cr2 >= 0x7fff_ffff_f000 {
            out.error |= 1;
        }
        out.regs.rip = word(base);
        out.regs.rflags = word(base + 2);
        out.regs.gpr[Reg::Rsp as usize] = word(base + 3);
        let aligned = rsp.wrapping_sub(KERNEL_BASE) + words as u64 * 8 == KERNEL_STACK_TOP;
        if word(base + 1) != u64::from(USER_CS) || word(base + 4) != u64::from(USER_SS) || !aligned {
            out.end = End::Broken;
        }
        Ok(())
    }

    fn write(&self, gpa: u64, data: &[u8]) -> io::Result<()> {
        self.memory.write_slice(data, GuestAddress(gpa)).map_err(io::Error::other)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.progress.store(0, Ordering::SeqCst);
        if let Some(w) = self.watchdog.take() {
            w.thread().unpark();
            let _ = w.join();
        }
    }
}

impl Runner for Guest {
    fn name(&self) -> &'static str {
        "engine"
    }

    fn load_code(&mut self, slot: u64, code: &[u8]) {
        let gpa = CODE + slot % layout::SLOTS * layout::SLOT_BYTES;
        self.write(gpa, code).expect("the code window lies within guest RAM");
        self.vcpu.invalidate_ram(gpa, layout::SLOT_BYTES);
    }

    fn run(&mut self, inputs: &[Input], outcomes: &mut [Outcome]) -> io::Result<()> {
        for (i, o) in inputs.iter().zip(outcomes) {
            self.run_one(i, o)?;
        }
        Ok(())
    }
}

/// The watchdog: calls `stop` when a run (the count is odd after `1 + 2k` and moves by 2 on entry and exit) takes too long.
fn watch(progress: &AtomicU64, stop: impl Fn()) {
    let mut last = (0, 0u32);
    loop {
        std::thread::park_timeout(HANG / 6);
        let now = progress.load(Ordering::SeqCst);
        if now == 0 {
            return;
        }
        let inside = now % 4 == 3;
        last = if inside && last.0 == now { (now, last.1 + 1) } else { (now, 0) };
        if last.1 >= 6 {
            stop();
            last.1 = 0;
        }
    }
}

/// Descriptor of a 64-bit system segment or a flat segment as raw words.
fn descriptor(access: u64, flags: u64, base: u64, limit: u64) -> u64 {
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

/// Guest RAM with a file behind it, which the engine can map again.
fn ram() -> io::Result<GuestMemoryMmap<WriteWatch>> {
    // SAFETY: the name is a valid C string; the descriptor is new and has no other owner.
    let file = unsafe {
        let fd = libc::memfd_create(c"difftest-ram".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    file.set_len(RAM as u64)?;
    GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), RAM, Some(FileOffset::new(file, 0)))])
        .map_err(io::Error::other)
}

/// Fills guest memory: page tables, descriptor tables, stubs.
fn build(memory: &GuestMemoryMmap<WriteWatch>) -> io::Result<()> {
    let put = |gpa: u64, v: u64| memory.write_obj(v, GuestAddress(gpa)).map_err(io::Error::other);
    let (present, write, user, large, nx) = (1u64, 2u64, 4u64, 1u64 << 7, 1u64 << 63);
    let table = present | write | user;
    let mut next = PAGE_TABLES + PAGE;
    let mut fresh = || {
        next += PAGE;
        next - PAGE
    };
    // One PDPT and PD for the low 4 GiB's first, a PT per 2 MiB; one large page for the kernel.
    let (pdpt, pd, kernel_pdpt, kernel_pd) = (fresh(), fresh(), fresh(), fresh());
    put(PAGE_TABLES + (layout::base() >> 39) * 8, pdpt | table)?;
    put(PAGE_TABLES + 256 * 8, kernel_pdpt | present | write)?;
    put(kernel_pdpt, kernel_pd | present | write)?;
    put(kernel_pd, present | write | large)?;
    put(pdpt, pd | table)?;
    let mut tables = std::collections::BTreeMap::new();
    let mut map = |la: u64, gpa: u64, bits: u64| -> io::Result<()> {
        let la = la - layout::base();
        let pt = match tables.get(&(la >> 21)) {
            Some(pt) => *pt,
            None => {
                let pt = fresh();
                put(pd + (la >> 21) * 8, pt | table)?;
                tables.insert(la >> 21, pt);
                pt
            }
        };
        put(pt + (la >> 12 & 511) * 8, gpa | bits)
    };
    for (la, at, len) in layout::writable() {
        for page in (0..len).step_by(PAGE as usize) {
            map(la + page, IMAGE + at + page, present | write | user | nx)?;
        }
    }
    map(layout::data_ro(), READ_ONLY, present | user | nx)?;
    for slot in 0..layout::SLOTS {
        for page in (0..layout::SLOT_BYTES).step_by(PAGE as usize) {
            let gpa = CODE + slot * layout::SLOT_BYTES + page;
            map(layout::slot_address(slot) + page, gpa, present | user)?;
        }
    }
    memory.write_slice(&layout::read_only_page(), GuestAddress(READ_ONLY)).map_err(io::Error::other)?;

    // Linux's order: kernel CS 0x10, kernel DS 0x18, user 32-bit CS 0x20, user DS 0x28, user CS 0x30, TSS 0x40.
    put(GDT + 0x10, descriptor(0x9b, 0xa, 0, 0xf_ffff))?;
    put(GDT + 0x18, descriptor(0x93, 0xc, 0, 0xf_ffff))?;
    put(GDT + 0x20, descriptor(0xfb, 0xc, 0, 0xf_ffff))?;
    put(GDT + 0x28, descriptor(0xf3, 0xc, 0, 0xf_ffff))?;
    put(GDT + 0x30, descriptor(0xfb, 0xa, 0, 0xf_ffff))?;
    put(GDT + 0x40, descriptor(0x8b, 0, KERNEL_BASE + TSS, 0x67))?;
    put(GDT + 0x48, (KERNEL_BASE + TSS) >> 32)?;
    put(TSS + 4, KERNEL_BASE + KERNEL_STACK_TOP)?;
    // I/O map base beyond the limit: no port is open to ring 3.
    memory.write_obj(0x68u16, GuestAddress(TSS + 0x66)).map_err(io::Error::other)?;
    for vector in 0..256u64 {
        let stub = STUBS + vector * STUB_STRIDE;
        memory.write_obj(0xf4u8, GuestAddress(stub)).map_err(io::Error::other)?;
        let la = KERNEL_BASE + stub;
        // Interrupt gate; user code may reach #BP and #OF, as under Linux.
        let dpl = if matches!(vector, 3 | 4) { 3u64 } else { 0 };
        let low = (la & 0xffff) | u64::from(KERNEL_CS) << 16 | (0x8e | dpl << 5) << 40 | (la >> 16 & 0xffff) << 48;
        put(IDT + vector * 16, low)?;
        put(IDT + vector * 16 + 8, la >> 32)?;
    }
    Ok(())
}

/// System registers of a 64-bit kernel.
fn kernel_state(st: &mut CpuState) {
    *st = CpuState::reset(0);
    st.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
    st.cr3 = PAGE_TABLES;
    // As Linux has it: CR4.DE is clear.
    st.cr4 = cr4::PAE
        | cr4::PGE
        | cr4::OSFXSR
        | cr4::OSXMMEXCPT
        | cr4::UMIP
        | cr4::FSGSBASE
        | cr4::OSXSAVE
        | cr4::SMEP
        | cr4::SMAP;
    st.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
    st.xcr0 = host_components();
    st.gdtr = TableReg { base: KERNEL_BASE + GDT, limit: 0x4f };
    st.idtr = TableReg { base: KERNEL_BASE + IDT, limit: 0xfff };
    st.tr = Segment { base: KERNEL_BASE + TSS, limit: 0x67, attr: 0x8b, selector: TR };
    st.ldtr = Segment { base: 0, limit: 0, attr: 0, selector: 0 };
}

/// Ring 3 with the registers of `input`.
fn enter_user(st: &mut CpuState, input: &Input) {
    let r = &input.regs;
    st.gpr = r.gpr;
    st.rip = r.rip;
    st.rflags = r.rflags;
    st.cr2 = 0;
    st.cpl = 3;
    st.halted = 0;
    st.irq_shadow = 0;
    let null = Segment { base: 0, limit: 0, attr: 0, selector: 0 };
    st.seg = [null; 6];
    st.seg[Seg::Cs as usize] = Segment::flat_code(USER_CS, 3, true);
    st.seg[Seg::Ss as usize] = Segment::flat_data(USER_SS, 3);
    st.seg[Seg::Fs as usize].base = r.fs_base;
    st.seg[Seg::Gs as usize].base = r.gs_base;
    st.xsave.0[..FPU_BYTES].copy_from_slice(&r.fpu);
    let bv = u64::from_le_bytes(r.fpu[512..520].try_into().expect("eight bytes")) & FPU_MASK & host_components();
    st.xsave.0[512..520].copy_from_slice(&bv.to_le_bytes());
    st.xsave.0[520..576].fill(0);
}
