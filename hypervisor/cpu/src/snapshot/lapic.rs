//! The local APIC's registers as data (SDM vol. 3, chapter 11).

use super::StateError;
use serde::{Deserialize, Serialize};

/// Bytes of the register page that software sees, and that `KVM_GET_LAPIC` and `KVM_SET_LAPIC` pass.
pub const LAPIC_PAGE_BYTES: usize = 1024;

const ENABLE: u64 = 1 << 11;
const X2: u64 = 1 << 10;
const BSP: u64 = 1 << 8;
const LVT_MASKED: u32 = 1 << 16;

/// A local APIC, and the messages that it has accepted and the vCPU has not yet acted on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LapicState {
    /// APIC ID.
    pub id: u32,
    /// IA32_APIC_BASE.
    pub base: u64,
    /// Task priority, 8 bits; CR8 is its upper half.
    pub tpr: u32,
    /// Logical destination.
    pub ldr: u32,
    /// Destination format; all ones in x2APIC mode.
    pub dfr: u32,
    /// Spurious-interrupt vector, with the software-enable bit.
    pub svr: u32,
    /// Vectors in service, a bit each.
    pub isr: [u32; 8],
    /// Those that are level-triggered.
    pub tmr: [u32; 8],
    /// Vectors that wait.
    pub irr: [u32; 8],
    /// Error status as software reads it.
    pub esr: u32,
    /// Errors since the last write to the error status register.
    pub esr_pending: u32,
    /// Interrupt command, both halves.
    pub icr: u64,
    /// Local vector table: CMCI, timer, thermal, performance, LINT0, LINT1, error.
    pub lvt: [u32; 7],
    /// Timer: initial count.
    pub timer_initial: u32,
    /// Timer: divide configuration.
    pub timer_divide: u32,
    /// Timer: count left when the state was taken, in ticks of its divided clock of 1 GHz.
    pub timer_current: u32,
    /// IA32_TSC_DEADLINE, a value of the guest's TSC; zero when it is not armed.
    pub tsc_deadline: u64,
    /// An NMI waits.
    pub nmi: bool,
    /// An INIT waits.
    pub init: bool,
    /// A start-up message waits: its vector.
    pub sipi: Option<u8>,
}

impl LapicState {
    /// The register page as KVM and xAPIC software see it; in x2APIC mode too, with the ID in bits 24-31 (KVM's format unless
    /// `KVM_X2APIC_API_USE_32BIT_IDS` is on).
    ///
    /// Not in it: IA32_APIC_BASE, IA32_TSC_DEADLINE, and messages that wait.
    pub fn to_page(&self) -> [u8; LAPIC_PAGE_BYTES] {
        let mut page = [0; LAPIC_PAGE_BYTES];
        let mut put = |reg: usize, v: u32| page[reg * 16..reg * 16 + 4].copy_from_slice(&v.to_le_bytes());
        put(0x02, self.id << 24);
        put(0x03, 0x14 | 6 << 16);
        put(0x08, self.tpr);
        put(0x0d, self.ldr);
        put(0x0e, self.dfr);
        put(0x0f, self.svr);
        for n in 0..8 {
            put(0x10 + n, self.isr[n]);
            put(0x18 + n, self.tmr[n]);
            put(0x20 + n, self.irr[n]);
        }
        put(0x28, self.esr);
        put(0x2f, self.lvt[0]);
        put(0x30, self.icr as u32);
        put(0x31, (self.icr >> 32) as u32);
        for n in 1..7 {
            put(0x31 + n, self.lvt[n]);
        }
        put(0x38, self.timer_initial);
        put(0x39, self.timer_current);
        put(0x3e, self.timer_divide);
        page
    }

    /// Reads a register page in the form of [`LapicState::to_page`], of vCPU `id`. No message waits.
    pub fn from_page(page: &[u8; LAPIC_PAGE_BYTES], id: u32, base: u64, tsc_deadline: u64) -> Self {
        let get = |reg: usize| {
            let at = reg * 16;
            u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
        };
        let timer_mode = get(0x32) >> 17 & 3;
        Self {
            id,
            base,
            tpr: get(0x08) & 0xff,
            ldr: get(0x0d),
            dfr: get(0x0e) | 0x0fff_ffff,
            svr: get(0x0f) & 0x1ff,
            isr: std::array::from_fn(|n| get(0x10 + n)),
            tmr: std::array::from_fn(|n| get(0x18 + n)),
            irr: std::array::from_fn(|n| get(0x20 + n)),
            esr: get(0x28),
            esr_pending: 0,
            // Bit 12, delivery status, is idle at an instruction boundary.
            icr: u64::from(get(0x31)) << 32 | u64::from(get(0x30) & !(1 << 12)),
            lvt: std::array::from_fn(|n| if n == 0 { get(0x2f) | LVT_MASKED } else { get(0x31 + n) & LVT_BITS[n] }),
            timer_initial: if timer_mode == 2 { 0 } else { get(0x38) },
            timer_divide: get(0x3e) & 0xb,
            timer_current: if timer_mode == 2 { 0 } else { get(0x39).min(get(0x38)) },
            tsc_deadline: if timer_mode == 2 { tsc_deadline } else { 0 },
            nmi: false,
            init: false,
            sipi: None,
        }
    }

    /// Whether x2APIC mode is on.
    pub fn x2(&self) -> bool {
        self.base & (ENABLE | X2) == ENABLE | X2
    }

    /// Checks what the registers of an APIC with this ID can hold.
    pub(super) fn validate(&self, id: u32, phys_bits: u32) -> Result<(), StateError> {
        let wrong = |what: &str| Err(StateError::Invalid(format!("the local APIC's {what}")));
        if self.id != id {
            return wrong("ID is not the vCPU's index");
        }
        if self.base & 0x2ff != 0 || self.base >> phys_bits != 0 || self.base & (ENABLE | X2) == X2 {
            return wrong("base has reserved bits set");
        }
        if (self.base & BSP != 0) != (id == 0) {
            return wrong("base disagrees on which CPU is the bootstrap processor");
        }
        if self.tpr > 0xff || self.svr > 0x1ff {
            return wrong("task priority or spurious vector has reserved bits set");
        }
        let ldr_ok = if self.x2() { self.ldr == id >> 4 << 16 | 1 << (id & 15) } else { self.ldr & 0x00ff_ffff == 0 };
        if !ldr_ok || self.dfr & 0x0fff_ffff != 0x0fff_ffff {
            return wrong("logical destination is not one that the register can hold");
        }
        if [&self.isr, &self.tmr, &self.irr].iter().any(|set| set[0] & 0xffff != 0) {
            return wrong("vectors 0 to 15 cannot be pending");
        }
        if (self.esr | self.esr_pending) & !0xff != 0 {
            return wrong("error status has reserved bits set");
        }
        let off = self.svr & 0x100 == 0;
        if self.lvt.iter().zip(LVT_BITS).any(|(l, bits)| l & !bits != 0 || (off && l & LVT_MASKED == 0)) {
            return wrong("vector table has reserved bits set, or is not masked while the APIC is off");
        }
        let deadline = self.lvt[1] >> 17 & 3 == 2;
        if self.timer_divide & !0xb != 0
            || self.timer_current > self.timer_initial
            || (deadline && self.timer_initial != 0)
            || (!deadline && self.tsc_deadline != 0)
        {
            return wrong("timer counts what it cannot count");
        }
        Ok(())
    }
}

/// Bits of each vector-table entry that can be set.
const LVT_BITS: [u32; 7] = [0x1_07ff, 0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_e7ff, 0x1_e7ff, 0x1_00ff];
