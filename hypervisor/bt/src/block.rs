//! What a translated block is: its key, its ways out, and what the engine must know about places inside it.

use crate::asm::Reloc;
use crate::cache::Placed;
use crate::state::Side;
use iced_x86::Instruction;
use paravane_cpu::state::{cr0, cr4, efer, rflags};
use paravane_cpu::{CpuState, Seg, Segment};

/// Every mode bit that changes translation, in one word. Together with the guest-physical address and RIP it is the
/// complete key of a block: two vCPU states with equal keys run the same translated code correctly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Mode(pub(crate) u32);

impl Mode {
    /// Code size in bits 0-1: 0 = 16, 1 = 32, 2 = 64.
    const SIZE: u32 = 3;
    /// CPL is 3 (supervisor otherwise; CPL 1 and 2 count as supervisor for paging and go through callouts for the rest).
    pub(crate) const USER: u32 = 1 << 2;
    /// Soft-TLB view in bits 3-4.
    const VIEW_SHIFT: u32 = 3;
    /// CS, DS, ES and SS are flat: offsets are linear addresses and no limit can be exceeded. Always set in 64-bit mode.
    pub(crate) const FLAT: u32 = 1 << 5;
    /// The stack pointer is 32 (or 64) bits wide, not 16.
    pub(crate) const WIDE_STACK: u32 = 1 << 6;
    /// CR0.EM or CR0.TS: x87/SIMD instructions raise #NM or #UD.
    pub(crate) const FPU_OFF: u32 = 1 << 7;
    /// CR4.OSFXSR.
    pub(crate) const SSE: u32 = 1 << 8;
    /// CR4.OSXSAVE and XCR0 has SSE and AVX.
    pub(crate) const AVX: u32 = 1 << 9;
    /// AVX and XCR0 has opmask, ZMM_Hi256 and Hi16_ZMM.
    pub(crate) const AVX512: u32 = 1 << 10;
    /// RFLAGS.TF: one instruction per block, #DB behind it.
    pub(crate) const STEP: u32 = 1 << 11;
    /// CPL may use CLI and STI, and IOPL, NT, TF and VM are zero: the second byte of RFLAGS is IF alone.
    pub(crate) const PLAIN_IF: u32 = 1 << 12;
    /// CR4.FSGSBASE.
    pub(crate) const FSGSBASE: u32 = 1 << 13;
    /// The guest's TSC is the host's.
    const SAME_TSC: u32 = 1 << 14;
    /// CR4.SMAP.
    pub(crate) const SMAP: u32 = 1 << 15;
    /// FS has a 4 GiB limit, whatever its base (outside 64-bit mode; set in it).
    pub(crate) const FLAT_FS: u32 = 1 << 16;
    /// The same of GS.
    pub(crate) const FLAT_GS: u32 = 1 << 25;
    const FLAT_FSGS: u32 = Self::FLAT_FS | Self::FLAT_GS;
    /// One instruction per block although TF is clear (an interrupt shadow runs out, or code that must not be kept).
    pub(crate) const SINGLE: u32 = 1 << 17;
    /// IA-32e mode, for the few instructions that differ between compatibility and legacy mode.
    pub(crate) const LONG: u32 = 1 << 18;
    /// Virtual-8086 mode.
    pub(crate) const V86: u32 = 1 << 19;
    /// RFLAGS.DF.
    pub(crate) const DF: u32 = 1 << 22;
    /// EFER.SCE: SYSCALL and SYSRET are there.
    pub(crate) const SCE: u32 = 1 << 23;
    /// CR4.TSD.
    const TSD: u32 = 1 << 24;
    /// The code page is mapped global. Found by the lookup, not part of the vCPU's state; it decides which links outlive a
    /// CR3 load.
    pub(crate) const GLOBAL: u32 = 1 << 21;
    /// User code reaches memory through the windows (see [`crate::window`]). The engine's choice, not the guest's state.
    pub(crate) const WINDOW: u32 = 1 << 26;
    /// A window block whose first instruction may access either window: nothing is concluded from its checks. Entered where a block's
    /// own conclusion proves wrong, also that of another such block.
    pub(crate) const MIXED: u32 = 1 << 27;
    /// A window block that takes the stack pointer to be in the high window, or near enough that an access by it reaches
    /// nothing but what is reserved around. See [`crate::window`].
    pub(crate) const STACKED: u32 = 1 << 28;
    /// CPL is not 0 (it may be 1 or 2, which paging counts as supervisor).
    pub(crate) const RING: u32 = 1 << 20;

    /// Ring-0 code reaches memory through kernel mappings (see [`crate::kernel`]) in the view that SMAP holds back; the other view has the bit to come
    /// back from. The engine's choice, not the guest's state.
    pub(crate) const MAPPED: u32 = 1 << 29;

    pub(crate) const VIEW_USER: u32 = 0;
    pub(crate) const VIEW_SMAP: u32 = 1;
    pub(crate) const VIEW_SUPER: u32 = 2;

    /// The mode of a vCPU's state.
    pub(crate) fn of(st: &CpuState) -> Self {
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        let mut m = match st.code_bits() {
            64 => 2,
            32 => 1,
            _ => 0,
        };
        let user = st.cpl == 3;
        m |= flag(user, Self::USER) | flag(st.cpl != 0, Self::RING);
        let smap = st.cr4 & cr4::SMAP != 0;
        let view = if user {
            Self::VIEW_USER
        } else if smap && st.rflags & rflags::AC == 0 {
            Self::VIEW_SMAP
        } else {
            Self::VIEW_SUPER
        };
        m |= view << Self::VIEW_SHIFT;
        m |= flag(smap, Self::SMAP);
        let flat = |s: Seg, attr: u16| {
            let s = st.segment(s);
            s.base == 0 && s.limit == u32::MAX && s.attr & (Segment::P | attr) == (Segment::P | attr)
        };
        // Expand-down data segments have bit 2 set; a flat one is not flat at all.
        let up = |s: Seg| st.segment(s).attr & 0xc == 0;
        let code64 = st.code64();
        let all_flat = code64
            || (st.protected()
                && !st.v8086()
                && flat(Seg::Cs, 0)
                && [Seg::Ds, Seg::Es, Seg::Ss].iter().all(|&s| flat(s, 2) && up(s)));
        m |= flag(all_flat, Self::FLAT);
        m |= flag(code64 || st.segment(Seg::Ss).attr & Segment::DB != 0, Self::WIDE_STACK);
        let fsgs = |s: Seg| {
            let s = st.segment(s);
            s.limit == u32::MAX && s.attr & (Segment::P | 0xe) == (Segment::P | 2)
        };
        m |= flag(code64 || fsgs(Seg::Fs), Self::FLAT_FS) | flag(code64 || fsgs(Seg::Gs), Self::FLAT_GS);
        m |= flag(st.cr0 & (cr0::EM | cr0::TS) != 0, Self::FPU_OFF);
        m |= flag(st.cr4 & cr4::OSFXSR != 0, Self::SSE);
        let xsave = st.cr4 & cr4::OSXSAVE != 0 && st.protected() && !st.v8086();
        m |= flag(xsave && st.xcr0 & 6 == 6, Self::AVX);
        m |= flag(xsave && st.xcr0 & 0xe6 == 0xe6, Self::AVX512);
        m |= flag(st.rflags & rflags::TF != 0, Self::STEP);
        let special = rflags::IOPL | rflags::NT | rflags::TF | rflags::VM;
        m |= flag(st.rflags & special == 0 && st.cpl == 0, Self::PLAIN_IF);
        m |= flag(st.cr4 & cr4::FSGSBASE != 0, Self::FSGSBASE);
        m |= flag(st.tsc_offset == 0, Self::SAME_TSC) | flag(st.cr4 & cr4::TSD != 0, Self::TSD);
        m |= flag(st.rflags & rflags::DF != 0, Self::DF) | flag(st.efer & efer::SCE != 0, Self::SCE);
        m |= flag(st.efer & efer::LMA != 0, Self::LONG);
        m |= flag(st.v8086(), Self::V86);
        Self(m)
    }

    /// Whether RDTSC may run natively: CR4.TSD permits it and the guest's TSC is the host's.
    pub(crate) fn native_tsc(self) -> bool {
        self.has(Self::SAME_TSC) && (!self.has(Self::RING) || !self.has(Self::TSD))
    }

    /// What does not depend on the privilege level or the flags.
    const COMMON: u32 = Self::FPU_OFF
        | Self::SSE
        | Self::AVX
        | Self::AVX512
        | Self::FSGSBASE
        | Self::SAME_TSC
        | Self::SMAP
        | Self::LONG
        | Self::SCE
        | Self::TSD;

    /// The mode of 64-bit ring 0 code under the same control registers, with AC, DF, IOPL, NT and TF clear.
    pub(crate) fn kernel64(self) -> Self {
        let view = if self.has(Self::SMAP) { Self::VIEW_SMAP } else { Self::VIEW_SUPER };
        let m = self.0 & Self::COMMON | 2 | Self::FLAT | Self::WIDE_STACK | Self::FLAT_FSGS | Self::PLAIN_IF;
        Self(m | view << Self::VIEW_SHIFT)
    }

    /// The mode of 64-bit ring 3 code under the same control registers, with DF, IOPL, NT and TF clear.
    pub(crate) fn user64(self) -> Self {
        let m = self.0 & Self::COMMON | 2 | Self::FLAT | Self::WIDE_STACK | Self::FLAT_FSGS | Self::USER | Self::RING;
        Self(m | Self::VIEW_USER << Self::VIEW_SHIFT)
    }

    pub(crate) fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }

    pub(crate) fn bits(self) -> u32 {
        16 << (self.0 & Self::SIZE)
    }

    pub(crate) fn is64(self) -> bool {
        self.0 & Self::SIZE == 2
    }

    pub(crate) fn view(self) -> usize {
        ((self.0 >> Self::VIEW_SHIFT) & 3) as usize
    }

    pub(crate) fn with_view(self, view: u32) -> Self {
        Self((self.0 & !(3 << Self::VIEW_SHIFT)) | (view << Self::VIEW_SHIFT))
    }

    /// Whose calls blocks of this mode make.
    pub(crate) fn side(self) -> Side {
        if self.has(Self::USER) { Side::User } else { Side::Kernel }
    }

    /// Whether blocks of this mode may call and return by the translated code's own stack: user code with windows, and 64-bit kernel code.
    /// The latter in one view only, so that STAC and CLAC need not forget the calls of the other.
    pub(crate) fn calls(self) -> bool {
        !self.alone() && (self.has(Self::WINDOW) || self.0 & !(Self::GLOBAL | Self::MAPPED) == self.kernel64().0)
    }

    /// Whether blocks of this mode stand alone: never linked, never in the jump cache.
    pub(crate) fn alone(self) -> bool {
        self.0 & (Self::STEP | Self::SINGLE) != 0
    }
}

/// Identifies a block for lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Guest-physical address of the first byte.
    pub(crate) gpa: u64,
    /// RIP of the first instruction.
    pub(crate) rip: u64,
    pub(crate) mode: Mode,
}

pub(crate) type BlockId = u32;

/// No block has this number.
pub(crate) const NO_BLOCK: BlockId = BlockId::MAX;
/// No door is at this offset.
pub(crate) const NO_DOOR: u32 = u32::MAX;

/// A block in the translation cache.
pub(crate) struct Block {
    pub(crate) key: Key,
    /// Guest bytes it was translated from.
    pub(crate) guest_len: u32,
    /// Bytes of the first page that tell which flags are live where the block ends: offsets in the page.
    pub(crate) seen: std::ops::Range<u16>,
    /// Guest-physical page of the tail when the last instruction crosses into it.
    pub(crate) second_page: Option<u64>,
    /// Where the code is in the cache.
    pub(crate) placed: Placed,
    /// Offset of the entry point.
    pub(crate) entry: u32,
    /// Offset of the way in for indirect jumps, or [`NO_DOOR`] before the first one.
    pub(crate) door: u32,
    /// The first of the exits that jump straight here, or [`NO_EXIT`]; the others follow by [`Exit::next`].
    pub(crate) incoming: u32,
    /// This block's own exits: a range of [`Tables::exits`].
    pub(crate) exits: std::ops::Range<u32>,
    /// Places that may fault: a range of [`Tables::faults`].
    pub(crate) faults: std::ops::Range<u32>,
    /// Still findable. A dead block's code stays until the cache is emptied, for a vCPU may be inside it.
    pub(crate) live: bool,
}

/// A direct way out of a block.
pub(crate) struct Exit {
    pub(crate) block: BlockId,
    pub(crate) target_rip: u64,
    pub(crate) target_mode: Mode,
    /// Cache offset of the jump's 32-bit displacement.
    pub(crate) patch: u32,
    /// Cache offset of the stub that the jump takes while unlinked.
    pub(crate) stub: u32,
    pub(crate) linked: Option<BlockId>,
    /// The next exit that is linked to the same block, or [`NO_EXIT`].
    pub(crate) next: u32,
}

/// Ends a list of exits.
pub(crate) const NO_EXIT: u32 = u32::MAX;

/// A memory access that may take the slow path.
#[derive(Clone, Copy)]
pub(crate) struct Site {
    pub(crate) block: BlockId,
    /// Distance of the instruction from the block's first one.
    pub(crate) delta: u32,
    /// Where the access starts over once the soft TLB has its page: an offset in the block as it was assembled.
    pub(crate) retry: u32,
    /// The guest register that R11 has to hold there.
    pub(crate) shadow: Option<u8>,
    pub(crate) size: u16,
    pub(crate) read: bool,
    pub(crate) write: bool,
    /// Where the slow path begins, for accesses through a window: an offset in the block as it was assembled.
    pub(crate) slow: u32,
    /// The access goes through a window.
    pub(crate) window: bool,
    /// The access goes through kernel mappings.
    pub(crate) kernel: bool,
    /// The block has x87/SIMD state live.
    pub(crate) simd: bool,
    /// Alignment in bytes below which the instruction raises #GP; that goes before any page fault.
    pub(crate) align: u16,
    /// An x87 instruction that waits for pending exceptions first.
    pub(crate) x87: bool,
    /// A store that an unmasked floating-point exception of the same instruction prevents.
    pub(crate) late_fault: bool,
    /// Masked vector access: only some of the operand's bytes are touched.
    pub(crate) masked: bool,
    /// Segment number; 2 is SS (or the base is RSP or RBP): faults of form are #SS.
    pub(crate) seg: u8,
}

impl Site {
    /// A site in a block with nothing particular about it.
    pub(crate) fn plain(block: BlockId) -> Self {
        Self {
            block,
            delta: 0,
            retry: 0,
            shadow: None,
            size: 0,
            read: false,
            write: false,
            slow: 0,
            window: false,
            kernel: false,
            simd: false,
            align: 0,
            x87: false,
            late_fault: false,
            masked: false,
            seg: 3,
        }
    }
}

/// An instruction that Rust carries out.
pub(crate) struct Callout {
    pub(crate) block: BlockId,
    pub(crate) instr: Instruction,
    pub(crate) action: Action,
    pub(crate) simd: bool,
    /// No code follows in the block.
    pub(crate) ends: bool,
}

/// In place of a callout's number: there is none.
pub(crate) const NO_CALLOUT: u32 = u32::MAX;

/// What a callout does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Emulate the instruction.
    Emulate,
    /// The same, of a string instruction that goes on by itself once what it misses is where it looks: between the kernel and user memory.
    StringAcross,
    /// Raise #NM or #UD because CR0.TS or CR0.EM is set.
    FpuOff,
    /// Raise #UD.
    Undefined,
    /// Raise #DB: a single step is complete at the instruction's own RIP (which is the next one to run).
    StepDone,
    /// Nothing: the record is for a branch that must be undone when its target is not canonical.
    Branch,
    /// Raise #GP(0) at the instruction: it is longer than 15 bytes.
    TooLong,
}

/// A place in translated code where the host CPU may raise an exception on the guest's behalf. There is one for every other
/// guest instruction, so it is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FaultSite {
    /// Offset in the block as it was assembled, hot part first.
    pub(crate) at: u32,
    /// Distance of a RIP from the block's first one.
    delta: i32,
    /// [`FaultSite::POLL`], [`FaultSite::POLL_INDIRECT`], or a borrowed host register plus one; with [`FaultSite::WINDOW`],
    /// `delta` is the number of a site.
    what: u8,
}

impl FaultSite {
    const POLL: u8 = 0xff;
    const POLL_INDIRECT: u8 = 0xfe;
    const WINDOW: u8 = 0x40;
    const STRING: u8 = 0xfd;
    const ROUND: u8 = 0xfc;

    /// Packs what stands at `at`. `None`: the RIP is too far away.
    pub(crate) fn new(at: u32, kind: FaultKind, start_rip: u64) -> Option<Self> {
        let (delta, what) = match kind {
            FaultKind::Guest { delta, borrowed } => (i32::try_from(delta).ok()?, borrowed.map_or(0, |h| h + 1)),
            FaultKind::Window { site, borrowed } => (site as i32, Self::WINDOW | borrowed.map_or(0, |h| h + 1)),
            FaultKind::String { site } => (site as i32, Self::STRING),
            FaultKind::Round { site } => (site as i32, Self::ROUND),
            FaultKind::Poll { rip } => (i32::try_from(rip.wrapping_sub(start_rip) as i64).ok()?, Self::POLL),
            FaultKind::PollIndirect => (0, Self::POLL_INDIRECT),
        };
        Some(Self { at, delta, what })
    }

    /// The same in a block whose sites have numbers that are higher.
    pub(crate) fn renumbered(self, sites: u32) -> Self {
        let numbered = self.what <= Self::STRING && self.what & Self::WINDOW != 0;
        if numbered { Self { delta: self.delta.wrapping_add(sites as i32), ..self } } else { self }
    }

    /// What stands there.
    pub(crate) fn kind(self, start_rip: u64) -> FaultKind {
        match self.what {
            Self::POLL => FaultKind::Poll { rip: start_rip.wrapping_add(i64::from(self.delta) as u64) },
            Self::POLL_INDIRECT => FaultKind::PollIndirect,
            Self::STRING => FaultKind::String { site: self.delta as u32 },
            Self::ROUND => FaultKind::Round { site: self.delta as u32 },
            n if n & Self::WINDOW != 0 => {
                FaultKind::Window { site: self.delta as u32, borrowed: (n & !Self::WINDOW).checked_sub(1) }
            }
            n => FaultKind::Guest { delta: self.delta as u32, borrowed: n.checked_sub(1) },
        }
    }
}

/// What stands at a [`FaultSite`].
#[derive(Clone, Copy)]
pub(crate) enum FaultKind {
    /// A guest instruction at key.rip + `delta`; `borrowed` is a host register to reload from a temporary slot first.
    Guest { delta: u32, borrowed: Option<u8> },
    /// An access through a window; `borrowed` as above.
    Window { site: u32, borrowed: Option<u8> },
    /// An instruction of a loop's rounds: [`Site::slow`] is the way out.
    Round { site: u32 },
    /// A REP string instruction on host addresses: [`Site::read`] if RSI takes part.
    String { site: u32 },
    /// A poll before going to RIP.
    Poll { rip: u64 },
    /// A poll; the target is in RCX, and R11 has where it goes.
    PollIndirect,
}

/// Side tables of all blocks; emitted code refers to them by index.
#[derive(Default)]
pub(crate) struct Tables {
    pub(crate) blocks: Vec<Block>,
    pub(crate) exits: Vec<Exit>,
    pub(crate) sites: Vec<Site>,
    pub(crate) callouts: Vec<Callout>,
    pub(crate) faults: Vec<FaultSite>,
    /// What copies of blocks must change.
    pub(crate) relocs: Vec<Reloc>,
}

impl Tables {
    pub(crate) fn clear(&mut self) {
        self.blocks.clear();
        self.exits.clear();
        self.sites.clear();
        self.callouts.clear();
        self.faults.clear();
        self.relocs.clear();
    }
}
