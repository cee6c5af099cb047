//! Calls as a guest makes them, with RAM and a chipset but no vCPU. What needs a guest is in the conformance guest.

use super::*;
use crate::chipset::{Chipset, ChipsetConfig};
use paravane_cpu::cpuid::{CpuidConfig, CpuidPolicy};
use paravane_cpu::{Bus, BusOutcome, CpuState, Env, HypercallOutcome, Reg, TlbFlush};
use pv_abi::call::{ALL_ONES, Call, Error};
use pv_abi::memory::{FreeRange, Update};
use pv_abi::shared::{Clock as SharedClock, EOI_SKIP, SharedPage};
use std::io::Write;
use std::mem::offset_of;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

const RAM: u64 = 4 << 20;
const PAGE: u64 = 0x5000;
const ARRAY: u64 = 0x1_0000;

/// RAM, and a record of what was flushed.
struct Memory {
    ram: GuestRam,
    chipset: Arc<Chipset>,
    flushes: Vec<TlbFlush>,
    cpuid: CpuidPolicy,
}

impl Env for Memory {
    fn read_phys(&mut self, gpa: u64, data: &mut [u8]) {
        self.ram.read_slice(data, GuestAddress(gpa)).unwrap();
    }
    fn write_phys(&mut self, gpa: u64, data: &[u8]) {
        assert!(gpa % 4096 + data.len() as u64 <= 4096, "a write may not cross a page");
        self.ram.write_slice(data, GuestAddress(gpa)).unwrap();
    }
    fn read_pte(&mut self, gpa: u64, _: u8) -> Option<u64> {
        self.ram.read_obj(GuestAddress(gpa)).ok()
    }
    fn update_pte(&mut self, gpa: u64, _: u8, _: u64, new: u64) -> bool {
        self.write_pte(gpa, new)
    }
    fn write_pte(&mut self, gpa: u64, value: u64) -> bool {
        self.ram.write_obj(value, GuestAddress(gpa)).is_ok()
    }
    fn bus(&self) -> &dyn Bus {
        &*self.chipset
    }
    fn flush_tlb(&mut self, what: TlbFlush) {
        self.flushes.push(what);
    }
    fn host_tsc(&self) -> u64 {
        crate::tsc::rdtsc()
    }
    fn note_outcome(&mut self, _: BusOutcome) {}
    fn cpuid(&self) -> &CpuidPolicy {
        &self.cpuid
    }
    fn ram_slice(&mut self, gpa: u64, _: usize, _: bool) -> Option<*mut u8> {
        // The page at 0x9000 stands for one with translated code.
        (gpa != 0x9000).then_some(std::ptr::null_mut())
    }
}

/// What the console shows.
#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Guest {
    st: CpuState,
    env: Memory,
    screen: Screen,
}

impl Guest {
    fn new(offer: Offer) -> Self {
        Self::with_cpus(offer, 1)
    }

    fn with_cpus(offer: Offer, cpus: u32) -> Self {
        let ram = crate::memory::create(RAM).unwrap();
        let screen = Screen::default();
        let pv = PvConfig {
            offer,
            entry: Entry::Vmcall,
            unfit: Features::NONE,
            impossible: Features::NONE,
            kvm: super::KvmLeaves::Here,
            ram: ram.clone(),
            devices: 1,
        };
        let cfg = ChipsetConfig { cpus, debug_exit: false, serial: Box::new(screen.clone()), pv: Some(pv) };
        let cpuid = CpuidPolicy::host(&CpuidConfig { cpus, tsc_khz: 1_000_000, apic_hz: 1_000_000_000 });
        let env = Memory { ram, chipset: Chipset::new(cfg).unwrap(), flushes: Vec::new(), cpuid };
        let mut st = CpuState::reset(0);
        st.efer = paravane_cpu::state::efer::LMA;
        st.seg[1] = paravane_cpu::Segment::flat_code(8, 0, true);
        Self { st, env, screen }
    }

    fn raw(&mut self, number: u64, arguments: &[u64]) -> (u64, u64, HypercallOutcome) {
        self.st.gpr = [0; 16];
        self.st.gpr[Reg::Rax as usize] = number;
        for (r, a) in [Reg::Rdi, Reg::Rsi, Reg::Rdx, Reg::Rcx].into_iter().zip(arguments) {
            self.st.gpr[r as usize] = *a;
        }
        let bus = self.env.chipset.clone();
        let outcome = bus.hypercall(&mut self.st, &mut self.env).unwrap();
        (self.st.gpr[Reg::Rax as usize], self.st.gpr[Reg::Rdx as usize], outcome)
    }

    fn call(&mut self, call: Call, arguments: &[u64]) -> Result<u64, (Error, u64)> {
        let (rax, rdx, _) = self.raw(call.number(), arguments);
        if rax == 0 { Ok(rdx) } else { Err((Error::from_rax(rax).expect("a known error"), rdx)) }
    }

    /// Everything in force and a page shared.
    fn ready() -> Self {
        let mut g = Self::new(Offer::All);
        let offered = Features(u64::from(g.leaf(cpuid::FEATURES)[1]));
        assert_eq!(g.call(Call::Negotiate, &[Version::CURRENT.to_bits().into(), offered.0]), Ok(offered.0));
        assert_eq!(g.call(Call::SharePage, &[PAGE]), Ok(0));
        g
    }

    fn leaf(&self, offset: u32) -> [u32; 4] {
        let leaves = self.env.chipset.hypervisor_leaves(0, 1_000_000, 1_000_000_000);
        leaves.into_iter().find(|l| l.0 == cpuid::FIRST + offset).map_or([0; 4], |l| l.1)
    }

    fn page(&self) -> SharedPage {
        let mut bytes = vec![0; pv_abi::shared::BYTES];
        self.env.ram.read_slice(&mut bytes, GuestAddress(PAGE)).unwrap();
        SharedPage::read_from_bytes(&bytes).unwrap()
    }

    fn array<T: IntoBytes + zerocopy::Immutable>(&self, elements: &[T]) {
        self.env.ram.write_slice(elements.as_bytes(), GuestAddress(ARRAY)).unwrap();
    }
}

#[test]
fn nothing_goes_before_the_agreement() {
    let mut g = Guest::new(Offer::All);
    assert_eq!(g.call(Call::SharePage, &[PAGE]), Err((Error::NotNegotiated, 0)));
    assert_eq!(g.call(Call::Yield, &[ALL_ONES]), Err((Error::NotNegotiated, 0)));
    let version = u64::from(Version::CURRENT.to_bits());
    assert_eq!(g.call(Call::Negotiate, &[version + (1 << 16), 0]), Err((Error::BadVersion, 0)));
    assert_eq!(g.call(Call::Negotiate, &[version + 1, 0]), Err((Error::BadVersion, 0)));
    assert_eq!(g.call(Call::Negotiate, &[version | 1 << 40, 0]), Err((Error::BadVersion, 0)));
    assert_eq!(g.call(Call::Negotiate, &[version, 1 << 63]), Err((Error::BadFeatures, 0)));
    assert_eq!(g.call(Call::Negotiate, &[version, Feature::Schedule.bit()]), Ok(Feature::Schedule.bit()));
    assert_eq!(g.call(Call::Yield, &[ALL_ONES]), Ok(0));
    assert_eq!(g.call(Call::ConsoleWrite, &[0, 0]), Err((Error::NotNegotiated, 0)));
    assert_eq!(g.call(Call::Yield, &[ALL_ONES, 1]), Err((Error::InvalidArgument, 0)));
    assert_eq!(g.raw(7, &[]).0, Error::NotSupported.to_rax());
    g.st.cpl = 3;
    assert_eq!(g.call(Call::Yield, &[ALL_ONES]), Err((Error::NotPermitted, 0)));
}

#[test]
fn an_offer_says_what_there_is() {
    let mut off = Guest::new(Offer::Off);
    assert_eq!(off.leaf(cpuid::FEATURES), [0; 4]);
    assert_eq!(off.call(Call::Negotiate, &[0x1_0000, 0]), Err((Error::NotSupported, 0)));
    let all = Guest::new(Offer::All);
    let [version, low, ..] = all.leaf(cpuid::FEATURES);
    assert_eq!(version, Version::CURRENT.to_bits());
    assert!(Features(low.into()).has(Feature::VirtualIf) && Features(low.into()).has(Feature::Virtio));
    let (code, len) = cpuid::entry_code(all.leaf(cpuid::ENTRY)).unwrap();
    assert_eq!(&code[..len], Entry::Vmcall.code());
}

#[test]
fn the_page_must_be_ram_and_is_filled() {
    let mut g = Guest::new(Offer::All);
    let wanted = Features::of(&[Feature::Clock]).0;
    g.call(Call::Negotiate, &[Version::CURRENT.to_bits().into(), wanted]).unwrap();
    for bad in [PAGE + 8, RAM, RAM - 4096 + 1, 0xfee0_0000, !0xfff] {
        assert_eq!(g.call(Call::SharePage, &[bad]), Err((Error::BadAddress, 0)), "{bad:#x}");
    }
    g.env.ram.write_slice(&[0xff; 4096], GuestAddress(PAGE)).unwrap();
    g.call(Call::SharePage, &[PAGE]).unwrap();
    let page = g.page();
    assert_eq!((page.version, page.irq_enabled, page.irq_pending), (Version::CURRENT.to_bits(), 1, 0));
    assert!(page.clock.sequence.is_multiple_of(2) && page.clock.mult != 0 && page.reserved1.iter().all(|&b| b == 0));
    assert_eq!(page.stolen.ns, 0, "stolen time is not in force");
    let clock = page.clock;
    let (tsc, ns) = Clock::new().pair();
    let age = SharedClock::ns(&clock, tsc).checked_sub(clock.ns_base).unwrap();
    assert!(age < 60_000_000_000 && ns < 60_000_000_000, "{age}");
    // The guest's TSC moves, and the clock goes on from where it was.
    g.env.chipset.tsc_moved(0, 1 << 50);
    assert_eq!(g.page().clock.tsc_base, clock.tsc_base + (1 << 50));
    assert_eq!(g.page().clock.ns_base, clock.ns_base);
    // Given back, it is not written any more.
    g.call(Call::SharePage, &[0]).unwrap();
    g.env.chipset.tsc_moved(0, 0);
    assert_eq!(g.page().clock.tsc_base, clock.tsc_base + (1 << 50));
}

#[test]
fn updates_are_applied_up_to_the_first_bad_one() {
    let mut g = Guest::ready();
    let bad = Update { target: 0x2006, value: 0 };
    g.array(&[Update::set_entry(0x2008, 7), Update::invalidate(0x4000_0000, 1), bad, Update::set_entry(0x2010, 9)]);
    assert_eq!(g.call(Call::UpdatePages, &[ARRAY, 4]), Err((Error::InvalidArgument, 2)));
    assert_eq!(g.env.read_pte(0x2008, 8), Some(7));
    assert_eq!(g.env.read_pte(0x2010, 8), Some(0));
    assert_eq!(g.env.flushes, [TlbFlush::Page(0x4000_0000), TlbFlush::Page(0x4000_1000)]);
    g.env.flushes.clear();
    g.array(&[
        Update::invalidate_space(),
        Update::invalidate(0, u64::from(u32::MAX)),
        Update::set_root(0x3000),
        Update::set_root(1 << 60),
    ]);
    assert_eq!(g.call(Call::UpdatePages, &[ARRAY, 4]), Err((Error::InvalidArgument, 3)));
    assert_eq!(g.env.flushes, [TlbFlush::NonGlobal, TlbFlush::All, TlbFlush::NonGlobal]);
    assert_eq!(g.st.cr3, 0x3000);
    for (element, error) in [
        (Update::set_entry(RAM, 1), Error::BadAddress),
        (Update::set_entry(0xfee0_0000, 1), Error::BadAddress),
        (Update::set_entry(u64::MAX, 1), Error::BadAddress),
        (Update { target: 0x1008 | 2, value: 0 }, Error::InvalidArgument),
        (Update { target: 2, value: u64::MAX }, Error::InvalidArgument),
        (Update { target: 0x1000 | 3, value: 0 }, Error::InvalidArgument),
        (Update { target: 4, value: 1 }, Error::InvalidArgument),
    ] {
        g.array(&[element]);
        assert_eq!(g.call(Call::UpdatePages, &[ARRAY, 1]), Err((error, 0)), "{element:x?}");
    }
}

#[test]
fn arrays_must_be_ram_in_their_whole_length() {
    let mut g = Guest::ready();
    for (gpa, count, error) in [
        (ARRAY + 8, 1, Error::BadAddress),
        (RAM - 16, 2, Error::BadAddress),
        (RAM, 1, Error::BadAddress),
        (u64::MAX - 15, 1, Error::BadAddress),
        (ARRAY, u64::from(MAX_ELEMENTS) + 1, Error::TooMany),
        (ARRAY, u64::MAX, Error::TooMany),
    ] {
        assert_eq!(g.call(Call::UpdatePages, &[gpa, count]), Err((error, 0)), "{gpa:#x} {count}");
        assert_eq!(g.call(Call::FreePages, &[gpa, count]), Err((error, 0)), "{gpa:#x} {count}");
    }
    assert_eq!(g.call(Call::UpdatePages, &[ARRAY, 0]), Ok(0));
    g.array(&[Update::set_entry(0x2000, 5); 4096]);
    assert_eq!(g.call(Call::UpdatePages, &[ARRAY, 4096]), Ok(4096));
}

#[test]
fn a_long_array_does_not_hold_an_interrupt_up() {
    let mut g = Guest::ready();
    g.array(&[Update::set_entry(0x2000, 5); 4096]);
    g.env.chipset.mmio_write(0, crate::devices::lapic::BASE + 0xf0, &0x1ff_u32.to_le_bytes());
    assert_eq!(g.call(Call::SendIpi, &[1, 0, 0x40]), Ok(1));
    let first = g.call(Call::UpdatePages, &[ARRAY, 4096]).unwrap();
    assert!((1..4096).contains(&first), "{first}");
    assert_eq!(g.env.chipset.interrupt_ack(0), Some(0x40));
    assert_eq!(g.call(Call::UpdatePages, &[ARRAY + first * 16, 4096 - first]), Ok(4096 - first));
}

#[test]
fn the_virtual_flag_holds_interrupts_back() {
    let mut g = Guest::ready();
    let c = g.env.chipset.clone();
    let flag = GuestAddress(PAGE + offset_of!(SharedPage, irq_enabled) as u64);
    c.mmio_write(0, crate::devices::lapic::BASE + 0xf0, &0x1ff_u32.to_le_bytes());
    g.env.ram.write_obj(0_u8, flag).unwrap();
    g.call(Call::SendIpi, &[1, 0, 0x40]).unwrap();
    assert!(!c.interrupt_pending(0));
    assert_eq!(g.page().irq_pending, 1);
    assert!(c.wakes(0), "a halt does not outlast it");
    g.env.ram.write_obj(1_u8, flag).unwrap();
    assert!(c.interrupt_pending(0));
    assert_eq!(c.interrupt_ack(0), Some(0x40));
    assert_eq!(g.page().irq_pending, 0);
    assert!(!c.wakes(0));
}

#[test]
fn an_eoi_that_nobody_needs_is_skipped() {
    let mut g = Guest::ready();
    let c = g.env.chipset.clone();
    let lapic = crate::devices::lapic::BASE;
    let eoi = GuestAddress(PAGE + offset_of!(SharedPage, eoi) as u64);
    c.mmio_write(0, lapic + 0xf0, &0x1ff_u32.to_le_bytes());
    g.call(Call::SendIpi, &[1, 0, 0x40]).unwrap();
    assert_eq!(c.interrupt_ack(0), Some(0x40));
    assert_eq!(g.page().eoi, EOI_SKIP);
    // The guest ends it with a store, and the next one of a lower class is deliverable.
    g.env.ram.write_obj(0_u32, eoi).unwrap();
    g.call(Call::SendIpi, &[1, 0, 0x30]).unwrap();
    assert!(c.interrupt_pending(0));
    assert_eq!(c.interrupt_ack(0), Some(0x30));
    assert_eq!(g.page().eoi, EOI_SKIP);
    // This one is still being served when another comes: the offer is taken back, and an EOI is needed.
    g.call(Call::SendIpi, &[1, 0, 0x31]).unwrap();
    assert!(!c.interrupt_pending(0));
    assert_eq!(g.page().eoi, 0);
    c.mmio_write(0, lapic + 0xb0, &[0; 4]);
    assert_eq!(c.interrupt_ack(0), Some(0x31));
    // The page goes away: the interrupt is in service until a real EOI.
    g.call(Call::SharePage, &[0]).unwrap();
    g.call(Call::SendIpi, &[1, 0, 0x32]).unwrap();
    assert!(!c.interrupt_pending(0));
    c.mmio_write(0, lapic + 0xb0, &[0; 4]);
    assert_eq!(c.interrupt_ack(0), Some(0x32));
}

#[test]
fn timers_ipis_and_kicks_find_their_target() {
    let mut g = Guest::ready();
    let c = g.env.chipset.clone();
    c.mmio_write(0, crate::devices::lapic::BASE + 0xf0, &0x1ff_u32.to_le_bytes());
    for (mask, first, vector, error) in [
        (1, 0, 31, Error::InvalidArgument),
        (1, 0, 256, Error::InvalidArgument),
        (2, 0, 64, Error::NoSuchTarget),
        (1, 1, 64, Error::NoSuchTarget),
        (2, u64::MAX, 64, Error::NoSuchTarget),
    ] {
        assert_eq!(g.call(Call::SendIpi, &[mask, first, vector]), Err((error, 0)));
    }
    assert_eq!(g.call(Call::SetTimer, &[1, 16]), Err((Error::InvalidArgument, 0)));
    g.call(Call::SetTimer, &[1, 0x55]).unwrap();
    let began = std::time::Instant::now();
    while !c.interrupt_pending(0) {
        assert!(began.elapsed().as_secs() < 30, "the timer of a moment long gone does not fire");
        std::thread::yield_now();
    }
    assert_eq!(c.interrupt_ack(0), Some(0x55));
    g.call(Call::SetTimer, &[u64::MAX, 0x55]).unwrap();
    g.call(Call::SetTimer, &[0, 0x55]).unwrap();
    assert_eq!(g.call(Call::Kick, &[1]), Err((Error::NoSuchTarget, 0)));
    assert!(!c.wakes(0));
    g.call(Call::Kick, &[0]).unwrap();
    assert!(c.wakes(0) && !c.wakes(0), "a kick ends one halt");
    assert_eq!(g.raw(Call::Halt.number(), &[]).2, HypercallOutcome::Halt);
    assert_ne!(g.st.rflags & paravane_cpu::state::rflags::IF, 0);
}

#[test]
fn text_goes_out_and_comes_in() {
    let mut g = Guest::ready();
    g.env.ram.write_slice(b"hello", GuestAddress(0x6ffe)).unwrap();
    assert_eq!(g.call(Call::ConsoleWrite, &[0x6ffe, 5]), Ok(5));
    assert_eq!(*g.screen.0.lock().unwrap(), b"hello");
    assert_eq!(g.call(Call::ConsoleWrite, &[0x6ffe, 4097]), Err((Error::TooMany, 0)));
    assert_eq!(g.call(Call::ConsoleWrite, &[RAM - 2, 3]), Err((Error::BadAddress, 0)));
    assert_eq!(g.call(Call::ConsoleRead, &[0x7ffe, 8]), Ok(0));
    g.env.chipset.serial_input(b"typed");
    assert_eq!(g.call(Call::ConsoleRead, &[0x7ffe, 3]), Ok(3));
    assert_eq!(g.call(Call::ConsoleRead, &[0x8001, 9]), Ok(2));
    let mut got = [0; 5];
    g.env.read_phys(0x7ffe, &mut got);
    assert_eq!(&got, b"typed");
}

#[test]
fn freed_pages_lose_their_contents_but_code_does_not() {
    let mut g = Guest::ready();
    for page in 8..12 {
        g.env.ram.write_obj(page, GuestAddress(page << 12)).unwrap();
    }
    g.array(&[FreeRange { gpa: 0x8000, pages: 3 }, FreeRange { gpa: 0xb000, pages: 0 }]);
    assert_eq!(g.call(Call::FreePages, &[ARRAY, 2]), Err((Error::InvalidArgument, 1)));
    let left: Vec<u64> = (8..12).map(|n: u64| g.env.ram.read_obj(GuestAddress(n << 12)).unwrap()).collect();
    assert_eq!(left, [0, 9, 0, 11]);
    for bad in [FreeRange { gpa: RAM, pages: 1 }, FreeRange { gpa: 0, pages: RAM / 4096 + 1 }] {
        g.array(&[bad]);
        assert_eq!(g.call(Call::FreePages, &[ARRAY, 1]), Err((Error::BadAddress, 0)));
    }
}

#[test]
fn devices_answer_checked_accesses_and_ring() {
    let mut g = Guest::ready();
    let c = g.env.chipset.clone();
    assert_eq!(g.call(Call::VirtioRead, &[0, 0, 4]), Err((Error::NoSuchTarget, 0)), "announced but not there");
    let rng = virtio::devices::entropy::Entropy::new(std::fs::File::open("/dev/urandom").unwrap());
    c.add_virtio_pv(Box::new(rng), g.env.ram.clone()).unwrap();
    assert_eq!(g.call(Call::VirtioRead, &[0, 0, 4]), Ok(0x7472_6976));
    assert_eq!(g.call(Call::VirtioRead, &[0, 8, 4]), Ok(4));
    for (offset, size) in [(0, 2), (2, 4), (0x1000, 4), (u64::MAX, 1), (0x100, 3), (0x102, 4), (0, u64::MAX)] {
        let all = [Call::VirtioRead, Call::VirtioWrite].map(|call| g.call(call, &[0, offset, size]));
        assert_eq!(all, [Err((Error::InvalidArgument, 0)); 2], "{offset:#x} {size}");
    }
    assert_eq!(g.call(Call::VirtioRead, &[1, 0, 4]), Err((Error::NoSuchTarget, 0)));
    assert_eq!(g.call(Call::VirtioWrite, &[0, 0x70, 4, 1 << 32]), Err((Error::InvalidArgument, 0)));
    assert_eq!(g.call(Call::VirtioWrite, &[0, 0x70, 4, 3]), Ok(0));
    assert_eq!(g.call(Call::VirtioRead, &[0, 0x70, 4]), Ok(3));
    assert_eq!(g.call(Call::Notify, &[pv_abi::virtio::doorbell(1, 0)]), Err((Error::NoSuchTarget, 0)));
    assert_eq!(g.call(Call::Notify, &[pv_abi::virtio::doorbell(0, 9)]), Ok(1), "a queue that there is not is dropped");
    g.env.ram.write_obj(u64::MAX, GuestAddress(PAGE + offset_of!(SharedPage, doorbells) as u64)).unwrap();
    assert_eq!(g.call(Call::Notify, &[ALL_ONES]), Ok(1));
    assert_eq!(g.page().doorbells, 0);
    // Events: one interrupt for any number of bits.
    c.mmio_write(0, crate::devices::lapic::BASE + 0xf0, &0x1ff_u32.to_le_bytes());
    assert_eq!(g.call(Call::EventVector, &[31]), Err((Error::InvalidArgument, 0)));
    g.call(Call::EventVector, &[0x60]).unwrap();
    // The driver claims to be ready and has no queue: the device asks for a reset.
    g.call(Call::VirtioWrite, &[0, 0x24, 4, 1]).unwrap();
    g.call(Call::VirtioWrite, &[0, 0x20, 4, 1]).unwrap();
    g.call(Call::VirtioWrite, &[0, 0x70, 4, 0xb]).unwrap();
    g.call(Call::VirtioWrite, &[0, 0x70, 4, 0xf]).unwrap();
    assert_eq!(g.page().events, 1);
    assert_eq!(c.interrupt_ack(0), Some(0x60));
    // A new agreement ends all of it.
    g.call(Call::Negotiate, &[Version::CURRENT.to_bits().into(), 0]).unwrap();
    let all = Features::of(&[Feature::Virtio]).0;
    g.call(Call::Negotiate, &[Version::CURRENT.to_bits().into(), all]).unwrap();
    assert_eq!(g.call(Call::VirtioRead, &[0, 0x70, 4]), Ok(0));
    c.shut_down_devices();
}

#[test]
fn msrs_of_kvm_take_addresses_in_ram_only() {
    let mut g = Guest::new(Offer::Auto);
    let c = g.env.chipset.clone();
    let mut write = |msr, value| c.hypervisor_msr_write(0, msr, value, &mut g.env).is_some();
    for msr in [kvm::nr::SYSTEM_TIME, kvm::nr::PV_EOI] {
        assert!(write(msr, 0x3001) && !write(msr, 0x3003) && !write(msr, RAM + 1) && !write(msr, !2));
        assert_eq!(c.hypervisor_msr_read(0, msr), Some(0x3001));
        assert!(write(msr, 0));
    }
    if stolen::available() {
        assert!(write(kvm::nr::STEAL_TIME, 0x3041) && !write(kvm::nr::STEAL_TIME, 0x3003));
        assert!(!write(kvm::nr::STEAL_TIME, RAM | 1) && write(kvm::nr::STEAL_TIME, 0));
    }
    assert!(write(kvm::nr::WALL_CLOCK, 0x4000) && write(kvm::nr::WALL_CLOCK, RAM));
    assert!(!write(0x4b56_4d02, 0) && c.hypervisor_msr_read(0, 0x4b56_4d02).is_none());
    let seconds: u32 = g.env.ram.read_obj(GuestAddress(0x4004)).unwrap();
    assert!(seconds > 1_700_000_000);
    assert!(Guest::new(Offer::Off).env.chipset.hypervisor_msr_read(0, kvm::nr::SYSTEM_TIME).is_none());
}

#[test]
fn linux_kicks_a_halted_vcpu_by_its_apic_id() {
    let mut g = Guest::with_cpus(Offer::All, 2);
    let features = g.leaf(cpuid::STEP + 1)[0];
    assert_ne!(features & 1 << 7, 0, "two vCPUs may kick each other");
    let c = g.env.chipset.clone();
    let mut kick = |cpl: u8, to: u64| {
        g.st.cpl = cpl;
        g.st.gpr = [0; 16];
        (g.st.gpr[Reg::Rax as usize], g.st.gpr[Reg::Rdx as usize]) = (5, 7);
        g.st.gpr[Reg::Rcx as usize] = to;
        let outcome = c.hypercall(&mut g.st, &mut g.env).unwrap();
        assert_eq!((outcome, g.st.gpr[Reg::Rdx as usize]), (HypercallOutcome::Done, 7), "only RAX changes");
        g.st.gpr[Reg::Rax as usize] as i64
    };
    // Nobody of that name, and nobody who may.
    assert_eq!((kick(0, 2), kick(0, u64::MAX), kick(3, 1)), (0, 0, -1));
    assert!(!c.wakes(0) && !c.wakes(1));
    // A kick counts once, also if it comes before the halt.
    assert_eq!(kick(0, 1), 0);
    assert!(!c.wakes(0) && c.wakes(1) && !c.wakes(1));
    // One vCPU has nobody to wait for: the number means nothing then.
    let mut alone = Guest::with_cpus(Offer::All, 1);
    assert_eq!(alone.leaf(cpuid::STEP + 1)[0] & 1 << 7, 0);
    assert_eq!(alone.raw(5, &[]).0, Error::NotSupported.to_rax());
}

#[test]
fn a_masked_halt_ends_by_a_kick_and_not_by_an_interrupt() {
    let c = Guest::with_cpus(Offer::All, 2).env.chipset;
    c.inject(1, 0x40);
    let sleeper = {
        let c = c.clone();
        std::thread::spawn(move || c.wait_for_others(1))
    };
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert!(!sleeper.is_finished(), "an interrupt that is masked wakes nobody");
    c.wake(1);
    sleeper.join().unwrap();
}
