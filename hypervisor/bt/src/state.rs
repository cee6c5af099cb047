//! The block of memory that translated code and Rust code share, one per vCPU.
//!
//! While a vCPU runs, the host's GS base points at its [`BtState`], so emitted code reaches every field as
//! `gs:[offset]` and no general-purpose register is spent on it. The offsets below are therefore part of the emitted
//! code. The architectural state comes first and is also what the rest of the hypervisor sees.

use paravane_cpu::CpuState;
use std::mem::offset_of;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

/// Entries in one view of the soft TLB.
pub(crate) const TLB_ENTRIES: usize = 1024;
/// Entries in one view of the jump cache.
pub(crate) const JC_ENTRIES: usize = 65536;
/// Soft-TLB views: what user code may reach, what supervisor code may reach while SMAP holds it back, and what
/// supervisor code may reach otherwise (SDM vol. 3, section 4.6).
pub(crate) const VIEWS: usize = 3;

/// One soft-TLB entry, 32 bytes. Tags are the *negated* linear page address, so that a lookup is one addition:
/// `ea + ntag` is the page offset when the entry matches and is 4096 or more when it does not.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct TlbEntry {
    /// Tag for loads.
    pub(crate) ntag_r: u64,
    /// Tag for stores and read-modify-writes.
    pub(crate) ntag_w: u64,
    /// Host address of the page.
    pub(crate) hva: u64,
    /// Guest-physical address of the page, with [`TLB_GLOBAL`] for a global mapping.
    pub(crate) gpa: u64,
}

/// Set in [`TlbEntry::gpa`] when the mapping is global and outlives a CR3 load.
pub(crate) const TLB_GLOBAL: u64 = 1;

/// The tag of an empty entry at `index`: no address whose index is `index` lies within a page and an operand of it.
pub(crate) const fn empty_ntag(index: usize) -> u64 {
    (((index ^ (TLB_ENTRIES / 2)) as u64) << 12).wrapping_neg()
}

/// Hash from guest RIP to host code, indexed by low bits of RIP ([`jump_index`]). Two places share an index: code jumps to the first
/// unseen, for a block's door finds out whether it was meant (see `crate::translate::door`); the second is looked at by the thunk
/// that a miss goes to.
#[repr(C)]
pub(crate) struct JumpCache {
    /// Host addresses of doors; of the thunk, where there is none.
    pub(crate) doors: [u64; JC_ENTRIES],
    pub(crate) second: [JumpEntry; JC_ENTRIES],
}

/// Low bits of RIP that do not count for the index: hardly ever are two targets that near each other.
const JC_SHIFT: u32 = 2;
/// The bits of RIP that make the index.
pub(crate) const JC_MASK: u64 = (JC_ENTRIES as u64 - 1) << JC_SHIFT;

/// Where a RIP's entries are in a jump cache.
pub(crate) const fn jump_index(rip: u64) -> usize {
    ((rip & JC_MASK) >> JC_SHIFT) as usize
}

/// A place that code jumps to.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct JumpEntry {
    /// Negated RIP, or [`empty_jump_tag`].
    pub(crate) neg_rip: u64,
    /// Host address of the block.
    pub(crate) host: u64,
}

/// The tag of an empty entry: the negation of a RIP with another index. Zero wherever possible, for fresh memory is.
pub(crate) const fn empty_jump_tag(index: usize) -> u64 {
    if index == 0 { 1 << JC_SHIFT } else { 0 }
}

/// A vCPU's shared state. Allocated page-aligned.
#[repr(C, align(4096))]
pub(crate) struct BtState {
    pub(crate) cpu: CpuState,
    /// Host stack pointer for Rust code that translated code calls.
    pub(crate) host_rsp: u64,
    /// Host stack pointer of translated code, while Rust code runs: in [`BtState::frames`].
    pub(crate) code_rsp: u64,
    /// The stack pointers of user and kernel code; of the two, the one that is not in use.
    pub(crate) side_rsp: [u64; 2],
    /// The engine, for callouts.
    pub(crate) engine: u64,
    /// Mask that selects the TLB index from an address (for PEXT).
    pub(crate) tlb_mask: u64,
    /// Mask of everything but the page offset (for PEXT).
    pub(crate) page_mask: u64,
    /// Mask that selects the jump-cache index from a RIP (for PEXT).
    pub(crate) jc_mask: u64,
    /// Mask of [`paravane_cpu::state::rflags::NATIVE`] (for PEXT and PDEP).
    pub(crate) flags_mask: u64,
    /// The constant 63, 31 (for PEXT in bit-string instructions).
    pub(crate) mask63: u64,
    pub(crate) mask31: u64,
    pub(crate) mask15: u64,
    /// Masks of the address bits that tell the windows apart (for PEXT), see [`crate::window`].
    pub(crate) high_mask: u64,
    pub(crate) low_mask: u64,
    /// What leads from guest addresses to the windows' host addresses.
    pub(crate) high_offset: u64,
    pub(crate) low_offset: u64,
    /// What to add to addresses of each TiB in kernel code, see [`crate::kernel`].
    pub(crate) kernel_table: [u64; crate::kernel::TABLE],
    /// FS base for translated code while a window is in use, else zero: FS is then left alone.
    pub(crate) window_fs: u64,
    /// FS base of Rust code on the thread that runs the vCPU.
    pub(crate) host_fs: u64,
    /// What R11 is to be when Rust sends translated code to a place of its choice.
    pub(crate) r11: u64,
    /// Places for values that must survive a lookup.
    pub(crate) tmp: [u64; 4],
    /// XSAVE component mask used for the guest's state.
    pub(crate) xmask_lo: u32,
    pub(crate) xmask_hi: u32,
    /// The host's MXCSR while Rust code runs.
    pub(crate) host_mxcsr: u32,
    /// Current translation mode, see [`crate::block::Mode`].
    pub(crate) mode: u32,
    /// The mode whose blocks each view's jump cache holds; [`NO_MODE`] when it is empty.
    pub(crate) jc_mode: [u32; VIEWS],
    /// What SYSCALL, SYSRET and IRETQ put into segment registers.
    pub(crate) fast: FastSegments,
    /// Non-zero when an interrupt is pending that IF masks: whatever sets IF must leave translated code.
    pub(crate) irq_window: u32,
    /// Non-zero while the guest's x87/SIMD state is in the host's registers and not in `cpu.xsave`.
    pub(crate) fpu_live: u32,
    /// Exception that a signal handler found.
    pub(crate) fault_vector: u32,
    /// PAUSE instructions until the next one that Rust hears of.
    pub(crate) pauses: u32,
    /// Someone wants this vCPU's attention.
    pub(crate) request: AtomicU32,
    /// The vCPU is in translated code or about to be.
    pub(crate) in_tc: AtomicU8,
    /// What the indirect branch that was taken last left word of itself in: its callout. Direct polls read it, for nothing.
    pub(crate) poll_word: u32,
    /// The address of that word. [`NOWHERE_TO_POLL`] when somebody wants the vCPU to come out: then whoever polls faults.
    pub(crate) poll_at: AtomicU64,
    /// Addresses of the thunks in [`crate::thunks`], see [`Thunk`].
    pub(crate) thunks: [u64; Thunk::COUNT],
    /// Where operands live that cannot be reached in place: MMIO, page-crossing, pages with translated code.
    pub(crate) bounce: Bounce,
    pub(crate) tlb: [[TlbEntry; TLB_ENTRIES]; VIEWS],
    pub(crate) jc: [JumpCache; VIEWS],
    /// The stacks of translated code, of user and kernel code. Calls and returns are the host's, so that the CPU predicts them; where a return
    /// arrives the guest's return address is verified. User code must never return to what kernel code called from, hence two.
    pub(crate) frames: [Frames; 2],
}

/// Words of a stack of translated code.
const FRAME_WORDS: usize = 1 << 16;

/// A stack that translated code runs on.
#[repr(C, align(4096))]
pub(crate) struct Frames {
    /// Without access: translated code that calls deeper faults here.
    pub(crate) guard: GuardPage,
    words: [u64; FRAME_WORDS],
}

/// Whose calls are in one of the [`Frames`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Side {
    User,
    Kernel,
}

impl Frames {
    /// Forgets all calls; gives the stack pointer. `underflow` is where a return without a call would go, `below` the word that is to stand
    /// below the stack pointer.
    pub(crate) fn reset(&mut self, underflow: u64, below: u64) -> u64 {
        self.words[FRAME_WORDS - 2] = below;
        self.words[FRAME_WORDS - 1] = underflow;
        &raw const self.words[FRAME_WORDS - 1] as u64
    }

    /// The word at an address, if it is in this stack.
    pub(crate) fn word(&self, address: u64) -> u64 {
        let at = address.wrapping_sub(&raw const self.words as u64) / 8;
        self.words.get(at as usize).copied().unwrap_or(0)
    }

    /// Whether an address is in this stack or its guard.
    pub(crate) fn contains(&self, address: u64) -> bool {
        let start = &raw const *self as u64;
        (start..start + size_of::<Self>() as u64).contains(&address)
    }
}

/// No mode word has this value.
pub(crate) const NO_MODE: u32 = u32::MAX;
/// No selector has this value.
pub(crate) const NO_SELECTOR: u32 = 1 << 16;

/// Segment registers as the privilege transitions inside translated code load them. The second words hold limit,
/// attributes and selector as [`paravane_cpu::Segment`] lays them out; bases of flat segments are zero.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct FastSegments {
    /// IA32_STAR that the next four were made from.
    pub(crate) star: u64,
    pub(crate) syscall_cs: u64,
    pub(crate) syscall_ss: u64,
    pub(crate) sysret_cs: u64,
    pub(crate) sysret_ss: u64,
    /// Selectors of an IRETQ to 64-bit ring 3 that the long way carried out before, or [`NO_SELECTOR`] when the short way
    /// must not be taken now.
    pub(crate) iret_cs: u32,
    pub(crate) iret_ss: u32,
    /// Where their descriptors are, and what they were. The short way compares, for the guest may change them.
    pub(crate) iret_cs_at: u64,
    pub(crate) iret_cs_descriptor: u64,
    pub(crate) iret_ss_at: u64,
    pub(crate) iret_ss_descriptor: u64,
    /// What they load.
    pub(crate) iret_cs_word: u64,
    pub(crate) iret_ss_word: u64,
    /// `iret_cs` when data segments permit the short way.
    pub(crate) iret_known: u32,
}

/// Bounce buffer for one operand.
#[repr(C, align(64))]
pub(crate) struct Bounce(pub(crate) [u8; 256]);

/// A page that nothing may be in.
#[repr(C, align(4096))]
pub(crate) struct GuardPage([u8; 4096]);

/// No address: not canonical.
pub(crate) const NOWHERE_TO_POLL: u64 = 1 << 62;

/// Slots of [`BtState::thunks`].
#[derive(Clone, Copy)]
#[repr(usize)]
pub(crate) enum Thunk {
    /// Leave translated code; R11 holds the exit code.
    Exit,
    /// An access that missed the soft TLB; RCX = address, R11D = site.
    Mem,
    /// An access in a mode with segmentation; RCX = offset, R11D = site.
    SegMem,
    /// The operand in the bounce buffer was written; R11D = site.
    Commit,
    /// Emulate one instruction; R11D = callout number.
    Emulate,
    /// Look up the block at `cpu.rip`; R11D = callout of the branch.
    Lookup,
    /// The same, but try the second entries of a view's jump cache first.
    LookupUser,
    LookupSmap,
    LookupSuper,
    /// A return arrived where it does not belong: RCX = where it does, in a view; the poll word names it.
    ReturnUser,
    ReturnSmap,
    ReturnSuper,
    /// Take, and link if possible, a direct exit; R11D = exit number.
    Chain,
    /// Load the guest's x87/SIMD state into the host's registers.
    LoadFpu,
}

impl Thunk {
    pub(crate) const COUNT: usize = 14;

    /// The lookup that continues a jump-cache miss in a view.
    pub(crate) fn lookup(view: usize) -> Self {
        [Self::LookupUser, Self::LookupSmap, Self::LookupSuper][view]
    }

    /// Where returns in a view go on that arrived at the wrong place.
    pub(crate) fn returned(view: usize) -> Self {
        [Self::ReturnUser, Self::ReturnSmap, Self::ReturnSuper][view]
    }

    /// Offset of the slot from the GS base.
    pub(crate) fn offset(self) -> i32 {
        (offset_of!(BtState, thunks) + 8 * self as usize) as i32
    }
}

/// Offsets from the GS base as emitted code wants them.
pub(crate) mod off {
    use super::*;
    use paravane_cpu::Segment;

    pub(crate) const RIP: i32 = offset_of!(BtState, cpu.rip) as i32;
    pub(crate) const RFLAGS: i32 = offset_of!(BtState, cpu.rflags) as i32;
    pub(crate) const TMP: i32 = offset_of!(BtState, tmp) as i32;
    pub(crate) const TLB_MASK: i32 = offset_of!(BtState, tlb_mask) as i32;
    pub(crate) const PAGE_MASK: i32 = offset_of!(BtState, page_mask) as i32;
    pub(crate) const JC_MASK: i32 = offset_of!(BtState, jc_mask) as i32;
    pub(crate) const FLAGS_MASK: i32 = offset_of!(BtState, flags_mask) as i32;
    pub(crate) const MASK63: i32 = offset_of!(BtState, mask63) as i32;
    pub(crate) const MASK31: i32 = offset_of!(BtState, mask31) as i32;
    pub(crate) const MASK15: i32 = offset_of!(BtState, mask15) as i32;
    pub(crate) const HIGH_MASK: i32 = offset_of!(BtState, high_mask) as i32;
    pub(crate) const LOW_MASK: i32 = offset_of!(BtState, low_mask) as i32;
    pub(crate) const HIGH_OFFSET: i32 = offset_of!(BtState, high_offset) as i32;
    pub(crate) const LOW_OFFSET: i32 = offset_of!(BtState, low_offset) as i32;
    pub(crate) const KERNEL_TABLE: i32 = offset_of!(BtState, kernel_table) as i32;
    /// A side's stack pointer while the other one runs.
    pub(crate) fn side_rsp(side: Side) -> i32 {
        (offset_of!(BtState, side_rsp) + 8 * side as usize) as i32
    }
    pub(crate) const MODE: i32 = offset_of!(BtState, mode) as i32;
    pub(crate) const IRQ_WINDOW: i32 = offset_of!(BtState, irq_window) as i32;
    pub(crate) const PAUSES: i32 = offset_of!(BtState, pauses) as i32;
    pub(crate) const REQUEST: i32 = offset_of!(BtState, request) as i32;
    pub(crate) const FPU_LIVE: i32 = offset_of!(BtState, fpu_live) as i32;
    pub(crate) const POLL_WORD: i32 = offset_of!(BtState, poll_word) as i32;
    pub(crate) const POLL_AT: i32 = offset_of!(BtState, poll_at) as i32;
    pub(crate) const TSC_AUX: i32 = offset_of!(BtState, cpu.tsc_aux) as i32;
    pub(crate) const KERNEL_GS: i32 = offset_of!(BtState, cpu.kernel_gs_base) as i32;
    pub(crate) const CR0: i32 = offset_of!(BtState, cpu.cr0) as i32;
    pub(crate) const CR2: i32 = offset_of!(BtState, cpu.cr2) as i32;
    pub(crate) const CR3: i32 = offset_of!(BtState, cpu.cr3) as i32;
    pub(crate) const CR4: i32 = offset_of!(BtState, cpu.cr4) as i32;

    pub(crate) const STAR_FAST: i32 = offset_of!(BtState, fast) as i32;
    pub(crate) const JC_MODE: i32 = offset_of!(BtState, jc_mode) as i32;
    pub(crate) const SFMASK: i32 = offset_of!(BtState, cpu.sfmask) as i32;
    pub(crate) const LSTAR: i32 = offset_of!(BtState, cpu.lstar) as i32;
    pub(crate) const CPL: i32 = offset_of!(BtState, cpu.cpl) as i32;
    pub(crate) const NMI_BLOCKED: i32 = offset_of!(BtState, cpu.nmi_blocked) as i32;

    /// A segment's limit, attributes and selector, as one word.
    pub(crate) fn seg_word(seg: usize) -> i32 {
        seg_base(seg) + offset_of!(Segment, limit) as i32
    }

    /// A segment's selector.
    pub(crate) fn seg_selector(seg: usize) -> i32 {
        seg_base(seg) + offset_of!(Segment, selector) as i32
    }

    /// A guest general-purpose register's home.
    pub(crate) fn gpr(n: usize) -> i32 {
        (offset_of!(BtState, cpu.gpr) + 8 * n) as i32
    }

    /// A segment's base address.
    pub(crate) fn seg_base(seg: usize) -> i32 {
        (offset_of!(BtState, cpu.seg) + size_of::<Segment>() * seg + offset_of!(Segment, base)) as i32
    }

    /// A field of the soft TLB's first entry in a view.
    pub(crate) fn tlb(view: usize, field: usize) -> i32 {
        (offset_of!(BtState, tlb) + size_of::<[TlbEntry; TLB_ENTRIES]>() * view + field) as i32
    }

    /// The jump cache's doors in a view; entries are 8 bytes.
    pub(crate) const fn jc_doors(view: usize) -> i32 {
        (offset_of!(BtState, jc) + size_of::<JumpCache>() * view + offset_of!(JumpCache, doors)) as i32
    }
}
