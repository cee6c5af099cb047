//! All that belongs to one vCPU's translator: caches, tables, and the way to memory and devices.
#![allow(unsafe_code)] // Reaches the state shared with translated code.

use crate::asm::Asm;
use crate::block::{BlockId, FaultKind, Key, Mode, NO_BLOCK, Tables};
use crate::cache::CodeMemory;
use crate::fetch::{CodePage, ExecTlb};
use crate::kernel::Kernel;
use crate::perf_map::PerfMap;
use crate::profile::Profiler;
use crate::state::{BtState, JC_ENTRIES, JC_MASK, NO_MODE, NO_SELECTOR, Side, Thunk, VIEWS};
use crate::stats::{Histogram, Stats};
use crate::vcpu::{BtConfig, BtError, GuestRam, StateMemory};
use crate::window::Window;
use crate::{dma, fault, softmmu, thunks};
use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic};
use paravane_cpu::cpuid::{CpuidConfig, CpuidPolicy};
use paravane_cpu::snapshot::Injection;
use paravane_cpu::{Bus, CpuState, StopReason};
use paravane_ram::{Slot, WriteWatch};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

/// A hasher for keys that are a few words of address bits: multiply and fold.
#[derive(Default)]
pub(crate) struct WordHasher(u64);

impl Hasher for WordHasher {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 32)
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(u64::from(b));
        }
    }
    fn write_u32(&mut self, v: u32) {
        self.write_u64(u64::from(v));
    }
    fn write_u64(&mut self, v: u64) {
        self.0 = (self.0.rotate_left(5) ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

pub(crate) type WordMap<K, V> = HashMap<K, V, BuildHasherDefault<WordHasher>>;

/// Which entries of a cache are in use, so that a flush costs what is in it and not what could be. An index may stand in a list
/// although its entry was replaced; clearing it then is needless but right.
#[derive(Default)]
pub(crate) struct Used {
    /// Entries that a CR3 load drops.
    pub(crate) local: Vec<u16>,
    /// Entries of global pages.
    pub(crate) global: Vec<u16>,
}

impl Used {
    /// Notes entry `n`, of a cache with `entries` of them.
    pub(crate) fn note(&mut self, n: usize, global: bool, entries: usize) {
        let list = if global { &mut self.global } else { &mut self.local };
        list.push(n as u16);
        if list.len() > 2 * entries {
            list.sort_unstable();
            list.dedup();
        }
    }

    /// Takes all indices.
    pub(crate) fn take(&mut self) -> impl Iterator<Item = usize> + use<> {
        let (a, b) = (std::mem::take(&mut self.local), std::mem::take(&mut self.global));
        a.into_iter().chain(b).map(usize::from)
    }
}

/// A run of guest RAM and where the host has it.
#[derive(Clone)]
pub(crate) struct RamRegion {
    gpa: u64,
    len: u64,
    hva: u64,
    /// File behind it, and the offset of its first byte there, when it has one that can be mapped again.
    file: Option<(i32, u64)>,
    watch: WriteWatch,
    /// This vCPU's place in the watch.
    slot: Slot,
}

/// Guest RAM by host address, for the paths that cannot afford more than a compare.
pub(crate) struct Ram {
    regions: Vec<RamRegion>,
    /// Keeps the mappings alive.
    _mem: GuestRam,
}

impl Ram {
    /// `slots`: the vCPU's place in each region's watch.
    fn new(mem: GuestRam, slots: &[Slot]) -> Self {
        let regions = mem
            .iter()
            .zip(slots)
            .filter_map(|(r, &slot)| {
                let hva = r.get_host_address(MemoryRegionAddress(0)).ok()?;
                let file = r.file_offset().map(|f| (f.file().as_raw_fd(), f.start()));
                let watch = dma::map(r).bitmap().clone();
                Some(RamRegion { gpa: r.start_addr().raw_value(), len: r.len(), hva: hva as u64, file, watch, slot })
            })
            .collect();
        Self { regions, _mem: mem }
    }

    /// The watch over the region that holds `gpa`, this vCPU's place in it, and the offset there.
    #[inline]
    pub(crate) fn watch(&self, gpa: u64) -> Option<(&WriteWatch, Slot, u64)> {
        self.regions.iter().find_map(|r| {
            let at = gpa.wrapping_sub(r.gpa);
            (at < r.len).then_some((&r.watch, r.slot, at))
        })
    }

    /// The watch over the first region, and this vCPU's place in it.
    #[inline]
    pub(crate) fn first_watch(&self) -> Option<(&WriteWatch, Slot)> {
        self.regions.first().map(|r| (&r.watch, r.slot))
    }

    /// Whether other vCPUs use this RAM.
    #[inline]
    pub(crate) fn several(&self) -> bool {
        self.regions.first().is_some_and(|r| r.watch.several())
    }

    /// The file and the offset in it that hold the page at `gpa`.
    pub(crate) fn file(&self, gpa: u64) -> Option<(i32, u64)> {
        let r = self.regions.iter().find(|r| gpa.wrapping_sub(r.gpa) < r.len)?;
        r.file.map(|(fd, start)| (fd, start + (gpa - r.gpa)))
    }

    /// Whether all RAM can be mapped a second time.
    pub(crate) fn has_files(&self) -> bool {
        self.regions.iter().all(|r| r.file.is_some())
    }

    /// Host address of `len` bytes at `gpa`, when all of them are RAM.
    #[inline]
    pub(crate) fn host(&self, gpa: u64, len: u64) -> Option<*mut u8> {
        self.regions.iter().find_map(|r| {
            let at = gpa.wrapping_sub(r.gpa);
            (at < r.len && len <= r.len - at).then_some(r.hva.wrapping_add(at) as *mut u8)
        })
    }
}

/// One vCPU's translator.
pub(crate) struct Engine {
    pub(crate) id: u32,
    pub(crate) state: *mut BtState,
    pub(crate) memory: Arc<StateMemory>,
    pub(crate) ram: Ram,
    pub(crate) bus: Arc<dyn Bus>,
    pub(crate) cpuid: CpuidPolicy,
    pub(crate) stats: Stats,
    pub(crate) profile: Profiler,
    /// Names of blocks for perf, if somebody wants them.
    pub(crate) perf_map: Option<PerfMap>,
    /// Emulated instructions by mnemonic.
    pub(crate) emulated: Vec<u64>,

    pub(crate) code: CodeMemory,
    pub(crate) tables: Tables,
    /// The block that Rust code last led to.
    pub(crate) entered: BlockId,
    pub(crate) map: WordMap<Key, BlockId>,
    /// Blocks that may be copied to where other processes have the same code.
    pub(crate) patterns: WordMap<Key, crate::relocate::Pattern>,
    /// Pages that hold translated code.
    pub(crate) pages: WordMap<u64, CodePage>,
    /// What others wrote to them or want of this vCPU.
    pub(crate) mailbox: Arc<dma::Mailbox>,
    /// How long others let this vCPU wait when it began to make code from a page.
    pub(crate) waits: Histogram,
    /// How long others kept this vCPU from running, for invalidations that they asked for.
    pub(crate) stops: Histogram,
    /// When a kick brought the vCPU out of translated code.
    pub(crate) polled: Option<std::time::Instant>,
    /// All other vCPUs are kept out of guest code.
    pub(crate) alone: bool,
    pub(crate) exec_tlb: ExecTlb,
    /// Exits linked across a page boundary, which a change of mappings must undo.
    pub(crate) cross_links: Vec<u32>,
    /// One of them touches the lower half of the address space.
    pub(crate) low_cross_links: bool,
    /// Supervisor code has run in the lower half.
    pub(crate) low_supervisor_code: bool,
    pub(crate) jc_used: [Used; VIEWS],
    pub(crate) tlb_used: [Used; VIEWS],
    /// Whether a jump-cache entry in use was noted as local.
    pub(crate) jc_local: [Vec<bool>; VIEWS],
    /// The blocks whose doors are in the jump caches, or [`NO_BLOCK`].
    pub(crate) jc_first: [Vec<BlockId>; VIEWS],
    /// The block that is looked for is the target of a direct jump, which will be linked to it.
    pub(crate) direct: bool,
    /// Large pages, by size, that the soft TLB holds parts of.
    pub(crate) large: [(u32, WordMap<u64, ()>); 3],
    /// Where the operand in the bounce buffer goes.
    pub(crate) bounce: softmmu::BounceTarget,
    /// Legacy region and header of the XSAVE image before an instruction whose fault was put off.
    pub(crate) before_fault: [u8; 576],

    pub(crate) window: Window,
    pub(crate) kernel: Kernel,
    /// The host's string instruction has faulted, and Rust has not looked yet.
    pub(crate) string_fault: bool,
    /// The modes in which the calls of each [`Side`] were made.
    pub(crate) calls_mode: [Mode; 2],
    /// [`crate::block::Mode::MIXED`] when the next block is to be of that kind.
    pub(crate) variant: u32,

    pub(crate) asm: Asm,
    pub(crate) info: InstructionInfoFactory,
    pub(crate) decoded: Vec<Instruction>,

    /// What another engine had begun to deliver.
    pub(crate) injection: Option<Injection>,
    /// Set when the vCPU must leave its loop.
    pub(crate) stop: Option<StopReason>,
    pub(crate) machine_stopping: bool,
    /// How many PAUSE instructions there are between two that count.
    pause_limit: u32,
    /// The cache must be emptied before the next translation; nobody may be inside a block then.
    pub(crate) cache_full: bool,
}

impl Engine {
    pub(crate) fn new(
        id: u32,
        memory: Arc<StateMemory>,
        mem: GuestRam,
        bus: Arc<dyn Bus>,
        cfg: &BtConfig,
    ) -> Result<Self, BtError> {
        let state = memory.ptr();
        // SAFETY: the mapping is fresh, zeroed and ours alone; every field is plain data or an atomic.
        let st = unsafe { &mut *state };
        st.cpu = CpuState::reset(id);
        st.tlb_mask = ((crate::state::TLB_ENTRIES as u64) - 1) << 12;
        st.page_mask = !0xfff;
        st.jc_mask = JC_MASK;
        st.flags_mask = paravane_cpu::state::rflags::NATIVE;
        (st.mask63, st.mask31, st.mask15) = (63, 31, 15);
        let xmask = paravane_cpu::host_fpu::offered_xcr0();
        (st.xmask_lo, st.xmask_hi) = (xmask as u32, (xmask >> 32) as u32);
        st.host_mxcsr = 0x1f80;
        st.jc_mode = [NO_MODE; VIEWS];
        st.fast.iret_cs = NO_SELECTOR;
        st.fast.iret_known = NO_SELECTOR;
        let set =
            |st: &mut BtState, t: Thunk, f: unsafe extern "sysv64" fn()| st.thunks[t as usize] = f as *const () as u64;
        set(st, Thunk::Exit, thunks::exit);
        set(st, Thunk::Mem, thunks::mem);
        set(st, Thunk::SegMem, thunks::seg_mem);
        set(st, Thunk::Commit, thunks::commit);
        set(st, Thunk::Emulate, thunks::emulate);
        set(st, Thunk::Lookup, thunks::lookup);
        set(st, Thunk::LookupUser, thunks::lookup_second::<0>);
        set(st, Thunk::LookupSmap, thunks::lookup_second::<1>);
        set(st, Thunk::LookupSuper, thunks::lookup_second::<2>);
        set(st, Thunk::ReturnUser, thunks::returned::<0>);
        set(st, Thunk::ReturnSmap, thunks::returned::<1>);
        set(st, Thunk::ReturnSuper, thunks::returned::<2>);
        set(st, Thunk::Chain, thunks::chain);
        set(st, Thunk::LoadFpu, thunks::load_fpu);
        // A spinning vCPU yields after some microseconds, sooner if there are more vCPUs than host CPUs. One alone waits for nobody.
        let host_cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let pause_limit = match cfg.cpus as usize {
            0 | 1 => u32::MAX,
            n if n > host_cpus => 64,
            _ => 512,
        };
        st.pauses = pause_limit;
        let (mailbox, slots) = dma::Mailbox::new(memory.clone(), &mem)?;
        let ram = Ram::new(mem, &slots);
        let window = Window::new(&memory, &ram, cfg.windows, cfg.cpus);
        let kernel = Kernel::new(ram.has_files(), cfg.windows, &raw mut st.kernel_table);
        (st.high_mask, st.low_mask) = (window.high().mask, crate::window::LOW_MASK);
        st.low_offset = state as u64 + crate::window::LOW_DISTANCE as u64;
        st.high_offset = window.high().distance.wrapping_neg();
        let mut e = Self {
            id,
            state,
            memory,
            ram,
            window,
            kernel,
            calls_mode: [Mode(NO_MODE); 2],
            variant: 0,
            bus,
            cpuid: CpuidPolicy::host(&CpuidConfig { cpus: cfg.cpus, tsc_khz: cfg.tsc_khz, apic_hz: cfg.apic_hz })
                .with_hypervisor_leaves(&cfg.hypervisor_leaves),
            stats: Stats::default(),
            profile: Profiler::new(state),
            perf_map: None,
            emulated: vec![0; Mnemonic::values().len()],
            code: CodeMemory::new(cfg.cache_bytes.clamp(1 << 20, 1 << 30))?,
            tables: Tables::default(),
            entered: 0,
            map: WordMap::default(),
            patterns: WordMap::default(),
            pages: WordMap::default(),
            mailbox,
            waits: Histogram::default(),
            stops: Histogram::default(),
            polled: None,
            alone: false,
            exec_tlb: ExecTlb::new(),
            cross_links: Vec::new(),
            low_cross_links: false,
            low_supervisor_code: false,
            jc_used: Default::default(),
            tlb_used: Default::default(),
            jc_local: std::array::from_fn(|_| vec![false; JC_ENTRIES]),
            jc_first: std::array::from_fn(|_| vec![NO_BLOCK; JC_ENTRIES]),
            direct: false,
            large: [21, 22, 30].map(|shift| (shift, WordMap::default())),
            bounce: softmmu::BounceTarget::default(),
            before_fault: [0; 576],
            asm: Asm::new(),
            info: InstructionInfoFactory::new(),
            decoded: Vec::with_capacity(64),
            injection: None,
            stop: None,
            machine_stopping: false,
            pause_limit,
            cache_full: false,
            string_fault: false,
        };
        for side in [Side::Kernel, Side::User] {
            e.forget_calls_in(side, Side::User);
        }
        e.clear_tlb_arrays();
        e.init_jump_caches();
        Ok(e)
    }

    /// The vCPU's architectural state.
    ///
    /// Separate from `self` because emulation takes the state and the engine (as its environment) side by side.
    #[inline]
    pub(crate) fn cpu<'a>(&self) -> &'a mut CpuState {
        // SAFETY: the state lives in memory that `self.memory` keeps; Rust code of this vCPU runs on one thread, and the
        // environment methods do not touch `cpu`, so no second reference to it is used meanwhile.
        unsafe { &mut (*self.state).cpu }
    }

    /// The rest of the shared state.
    #[inline]
    pub(crate) fn shared<'a>(&self) -> &'a mut BtState {
        // SAFETY: as in `cpu`; callers touch fields other than `cpu`.
        unsafe { &mut *self.state }
    }

    /// Forgets which calls user or kernel code is in: where they would return to may no longer be right. Not from a signal handler.
    pub(crate) fn forget_calls(&mut self, side: Side) {
        let current = self.side_of(self.shared().code_rsp);
        self.forget_calls_in(side, current);
    }

    /// As [`Self::forget_calls`], for both.
    pub(crate) fn forget_all_calls(&mut self) {
        self.forget_calls(Side::User);
        self.forget_calls(Side::Kernel);
    }

    /// The same for one side while `current` runs.
    pub(crate) fn forget_calls_in(&mut self, side: Side, current: Side) {
        let sh = self.shared();
        let n = side as usize;
        // A callout that goes on in its block returns by the word below the stack pointer.
        let below = sh.frames[n].word(sh.code_rsp.wrapping_sub(8));
        let underflow = match self.calls_mode[n].view() as u32 {
            Mode::VIEW_SMAP => thunks::underflow::<1>,
            Mode::VIEW_SUPER => thunks::underflow::<2>,
            // Also before the first call.
            _ => thunks::underflow::<0>,
        };
        let rsp = sh.frames[n].reset(underflow as *const () as u64, below);
        if side == current {
            sh.code_rsp = rsp;
        } else {
            sh.side_rsp[n] = rsp;
        }
    }

    /// Whose stack a stack pointer of translated code points into.
    pub(crate) fn side_of(&self, rsp: u64) -> Side {
        if self.shared().frames[Side::Kernel as usize].contains(rsp) { Side::Kernel } else { Side::User }
    }

    /// Translated code of the other side is entered next, unless it is the same.
    pub(crate) fn use_side(&mut self, side: Side) {
        let sh = self.shared();
        let current = self.side_of(sh.code_rsp);
        if current != side {
            sh.side_rsp[current as usize] = sh.code_rsp;
            sh.code_rsp = sh.side_rsp[side as usize];
        }
    }

    /// Whether a host address is where translated code runs out of stack, and whose stack that is.
    pub(crate) fn in_frame_guard(&self, address: u64) -> Option<Side> {
        [Side::User, Side::Kernel].into_iter().find(|&side| {
            let guard = &raw const self.shared().frames[side as usize].guard as u64;
            address.wrapping_sub(guard) < size_of::<crate::state::GuardPage>() as u64
        })
    }

    /// All counters with their names; emulated instructions by mnemonic, most frequent first.
    pub(crate) fn counters(&self) -> Vec<(String, u64)> {
        let mut out: Vec<_> = self.stats.list().into_iter().map(|(n, v)| (n.to_owned(), v)).collect();
        out.extend(self.waits.list("waits for other vCPUs"));
        out.extend(self.stops.list("stops for others' invalidations"));
        let mut by_name: Vec<_> =
            Mnemonic::values().zip(&self.emulated).filter(|(_, n)| **n != 0).map(|(m, n)| (m, *n)).collect();
        by_name.sort_by_key(|&(_, n)| std::cmp::Reverse(n));
        out.extend(by_name.into_iter().map(|(m, n)| (format!("emulated {m:?}").to_lowercase(), n)));
        out
    }

    /// Somebody changed the architectural state from outside.
    pub(crate) fn state_replaced(&mut self) {
        self.forget_iret();
        self.flush_window(paravane_cpu::TlbFlush::All);
        self.kernel.clear();
        self.flush_all_translations();
    }

    /// What stands at a host address in translated code, and the RIP its block starts at.
    pub(crate) fn fault_at(&self, rip: u64) -> Option<(FaultKind, u64)> {
        let at = self.code.offset_of(rip)?;
        let blocks = &self.tables.blocks;
        let cold = self.code.is_cold(at);
        let n =
            blocks.partition_point(|b| if cold { b.placed.cold <= at } else { b.placed.hot <= at }).checked_sub(1)?;
        let b = &blocks[n];
        let inside = b.placed.inverse(at);
        let faults = &self.tables.faults[b.faults.start as usize..b.faults.end as usize];
        let f = faults.iter().find(|f| f.at == inside)?;
        Some((f.kind(b.key.rip), b.key.rip))
    }

    /// The vCPU has executed many PAUSE instructions: it waits for another, which may need the host CPU.
    pub(crate) fn spun(&mut self) {
        self.shared().pauses = self.pause_limit;
        self.stats.yields += 1;
        std::thread::yield_now();
    }

    /// Runs the vCPU; see [`crate::BtVcpu::run`].
    pub(crate) fn run(&mut self) -> Result<paravane_cpu::VcpuExit, BtError> {
        let _alt = fault::AltStack::new()?;
        let _running = fault::Running::new(self);
        let _signals = fault::Blocked::new();
        self.shared().engine = std::ptr::from_mut(self) as u64;
        self.dispatch()
    }
}
