//! The local APIC (SDM vol. 3, chapter 11), in xAPIC and x2APIC form.
//!
//! Time is in TSC ticks for the deadline timer and in APIC bus clocks for the others; the chipset turns both into
//! deadlines. Interrupt messages for other vCPUs come out as [`Action`]s.

use super::ioapic::Message;
use paravane_cpu::snapshot::LapicState;

/// APIC timer input clock in Hz: one tick per nanosecond keeps the arithmetic exact.
pub const BUS_HZ: u32 = 1_000_000_000;

/// Default physical address.
pub const BASE: u64 = 0xfee0_0000;

const ENABLE: u64 = 1 << 11;
const X2: u64 = 1 << 10;
const BSP: u64 = 1 << 8;

// Register numbers: xAPIC offset divided by 16, and x2APIC MSR minus 0x800.
const ID: u32 = 0x02;
const VERSION: u32 = 0x03;
const TPR: u32 = 0x08;
const APR: u32 = 0x09;
const PPR: u32 = 0x0a;
const EOI: u32 = 0x0b;
const LDR: u32 = 0x0d;
const DFR: u32 = 0x0e;
const SVR: u32 = 0x0f;
const ISR: u32 = 0x10;
const TMR: u32 = 0x18;
const IRR: u32 = 0x20;
const ESR: u32 = 0x28;
const LVT_CMCI: u32 = 0x2f;
const ICR: u32 = 0x30;
const ICR_HIGH: u32 = 0x31;
const LVT_TIMER: u32 = 0x32;
const LVT_LINT0: u32 = 0x35;
const LVT_LINT1: u32 = 0x36;
const LVT_ERROR: u32 = 0x37;
const TIMER_INITIAL: u32 = 0x38;
const TIMER_CURRENT: u32 = 0x39;
const TIMER_DIVIDE: u32 = 0x3e;
const SELF_IPI: u32 = 0x3f;

const LVT_MASKED: u32 = 1 << 16;

/// What a register access makes the rest of the machine do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    None,
    /// A level-triggered interrupt ended: tell the I/O APIC.
    EndOfInterrupt(u8),
    /// Send a message, with a destination shorthand (0 none, 1 self, 2 all, 3 all but self).
    Send(Message, u8),
    /// The timer was set up anew.
    Timer,
}

/// A vCPU's local APIC.
#[derive(Debug)]
pub struct Lapic {
    id: u32,
    base: u64,
    tpr: u32,
    ldr: u32,
    dfr: u32,
    svr: u32,
    isr: [u32; 8],
    tmr: [u32; 8],
    irr: [u32; 8],
    /// Vectors accepted since the registers were last saved.
    since_save: [u32; 8],
    esr: u32,
    esr_pending: u32,
    icr: u64,
    /// CMCI, timer, thermal, performance, LINT0, LINT1, error.
    lvt: [u32; 7],
    initial: u32,
    divide: u32,
    /// Nanosecond at which the running count was at its initial value.
    started: u64,
    tsc_deadline: u64,
    nmi: bool,
    init: bool,
    sipi: Option<u8>,
    /// The guest was told not to end the interrupt in service; it may have done so without a word.
    skippable: bool,
}

fn highest(set: &[u32; 8]) -> Option<u8> {
    (0..8).rev().find(|&n| set[n] != 0).map(|n| (n * 32 + 31 - set[n].leading_zeros() as usize) as u8)
}

fn set(bits: &mut [u32; 8], v: u8) {
    bits[usize::from(v / 32)] |= 1 << (v % 32);
}

fn clear(bits: &mut [u32; 8], v: u8) {
    bits[usize::from(v / 32)] &= !(1 << (v % 32));
}

fn has(bits: &[u32; 8], v: u8) -> bool {
    bits[usize::from(v / 32)] >> (v % 32) & 1 != 0
}

impl Lapic {
    /// The state after reset; vCPU 0 is the bootstrap processor.
    pub fn new(id: u32) -> Self {
        let mut a = Self {
            id,
            base: BASE | ENABLE | if id == 0 { BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: u32::MAX,
            svr: 0xff,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            since_save: [0; 8],
            esr: 0,
            esr_pending: 0,
            icr: 0,
            lvt: [LVT_MASKED; 7],
            initial: 0,
            divide: 0,
            started: 0,
            tsc_deadline: 0,
            nmi: false,
            init: false,
            sipi: None,
            skippable: false,
        };
        if id == 0 {
            // As firmware leaves it: the 8259A reaches the CPU through LINT0, NMI through LINT1.
            a.svr = 0x1ff;
            a.lvt[4] = 0x700;
            a.lvt[5] = 0x400;
        }
        a
    }

    fn enabled(&self) -> bool {
        self.base & ENABLE != 0 && self.svr & 0x100 != 0
    }

    /// Whether the APIC is switched on at all (IA32_APIC_BASE).
    pub fn globally_enabled(&self) -> bool {
        self.base & ENABLE != 0
    }

    /// Whether x2APIC mode is on.
    pub fn x2(&self) -> bool {
        self.base & (ENABLE | X2) == ENABLE | X2
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Physical address of the register page, when it is mapped.
    pub fn window(&self) -> Option<u64> {
        (self.base & (ENABLE | X2) == ENABLE).then_some(self.base & !0xfff)
    }

    /// Writes IA32_APIC_BASE; false when the transition is invalid (SDM vol. 3, section 11.12.5).
    pub fn set_base(&mut self, v: u64) -> bool {
        let reserved = !((1 << 46) - 1) | 0x2ff;
        let (from, to) = (self.base & (ENABLE | X2), v & (ENABLE | X2));
        if v & reserved != 0 || to == X2 || (from == ENABLE | X2 && to == ENABLE) || (from == 0 && to == ENABLE | X2) {
            return false;
        }
        if to == 0 && from != 0 {
            let (id, nmi) = (self.id, self.nmi);
            *self = Self { nmi, base: self.base, ..Self::new(id) };
        }
        self.base = v & !BSP | self.base & BSP;
        if to == ENABLE | X2 {
            self.ldr = self.id >> 4 << 16 | 1 << (self.id & 15);
        }
        true
    }

    fn ppr(&self) -> u32 {
        let service = highest(&self.isr).map_or(0, u32::from);
        if self.tpr >> 4 >= service >> 4 { self.tpr } else { service & 0xf0 }
    }

    /// The vector that would be delivered now.
    pub fn pending(&self) -> Option<u8> {
        if !self.enabled() {
            return None;
        }
        highest(&self.irr).filter(|&v| u32::from(v) >> 4 > self.ppr() >> 4)
    }

    /// Whether the 8259A's output reaches this CPU.
    pub fn accepts_extint(&self) -> bool {
        if !self.globally_enabled() {
            return true;
        }
        self.enabled() && self.lvt[4] & LVT_MASKED == 0 && self.lvt[4] >> 8 & 7 == 7
    }

    /// Moves the pending vector into service.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let v = self.pending()?;
        clear(&mut self.irr, v);
        set(&mut self.isr, v);
        Some(v)
    }

    /// Whether nobody but the guest cares when `v`, just acknowledged, ends: it is edge-triggered, and nothing else is requested or in service.
    pub fn may_skip_eoi(&self, v: u8) -> bool {
        let mut only = [0; 8];
        set(&mut only, v);
        self.isr == only && self.irr == [0; 8] && !has(&self.tmr, v)
    }

    /// The guest has been told that the interrupt in service needs no EOI.
    pub fn skip_eoi(&mut self) {
        self.skippable = true;
    }

    /// Whether [`Lapic::settle`] is due.
    pub fn eoi_skippable(&self) -> bool {
        self.skippable
    }

    /// The guest has been told that it must say again when interrupts end; `ended`: the one in service has.
    pub fn settle(&mut self, ended: bool) {
        if std::mem::take(&mut self.skippable) && ended {
            self.isr = [0; 8];
        }
    }

    /// Whether a request waits that a settlement might make deliverable.
    pub fn waits_for_settlement(&self) -> bool {
        self.skippable && self.enabled() && self.irr != [0; 8]
    }

    /// Accepts an interrupt message that is addressed to this APIC.
    pub fn accept(&mut self, m: &Message) {
        match m.delivery {
            0 | 1 => {
                if !self.enabled() {
                    return;
                }
                if m.vector < 16 {
                    self.error(1 << 6);
                    return;
                }
                set(&mut self.irr, m.vector);
                set(&mut self.since_save, m.vector);
                if m.level { set(&mut self.tmr, m.vector) } else { clear(&mut self.tmr, m.vector) }
            }
            4 => self.nmi = true,
            5 => (self.init, self.sipi) = (true, None),
            6 => self.sipi = Some(m.vector),
            _ => {}
        }
    }

    /// Takes a pending NMI.
    pub fn take_nmi(&mut self) -> bool {
        std::mem::take(&mut self.nmi)
    }

    /// Whether an NMI is pending.
    pub fn nmi_pending(&self) -> bool {
        self.nmi
    }

    /// Takes a pending INIT, which resets all registers but for the ID and IA32_APIC_BASE (SDM vol. 3, section 11.4.7.3). A start-up
    /// message that came after the INIT stays pending.
    pub fn take_init(&mut self) -> bool {
        if !self.init {
            return false;
        }
        let ldr = if self.x2() { self.ldr } else { 0 };
        *self = Self { base: self.base, ldr, sipi: self.sipi, svr: 0xff, lvt: [LVT_MASKED; 7], ..Self::new(self.id) };
        true
    }

    /// Takes a pending start-up message's vector.
    pub fn take_sipi(&mut self) -> Option<u8> {
        self.sipi.take()
    }

    /// Whether a message's destination names this APIC.
    pub fn matches(&self, m: &Message) -> bool {
        if self.x2() {
            if m.destination == u32::MAX || (m.destination == 0xff && m.destination != self.id && !m.logical) {
                return true;
            }
            if !m.logical {
                return m.destination == self.id;
            }
            return m.destination >> 16 == self.ldr >> 16 && m.destination & self.ldr & 0xffff != 0;
        }
        let d = m.destination & 0xff;
        if d == 0xff {
            return true;
        }
        if !m.logical {
            return d == self.id;
        }
        let mine = self.ldr >> 24;
        if self.dfr >> 28 == 15 { d & mine != 0 } else { d >> 4 == mine >> 4 && d & mine & 15 != 0 }
    }

    /// Rank for lowest-priority arbitration: smaller is preferred.
    pub fn priority(&self) -> u32 {
        self.ppr()
    }

    fn error(&mut self, bit: u32) {
        self.esr_pending |= bit;
        let l = self.lvt[6];
        if l & LVT_MASKED == 0 && l & 0xff >= 16 {
            set(&mut self.irr, l as u8);
        }
    }

    fn lvt_index(reg: u32) -> Option<usize> {
        match reg {
            LVT_CMCI => Some(0),
            LVT_TIMER..=LVT_ERROR => Some((reg - LVT_TIMER) as usize + 1),
            _ => None,
        }
    }

    fn timer_mode(&self) -> u32 {
        self.lvt[1] >> 17 & 3
    }

    fn divisor(&self) -> u64 {
        let code = self.divide & 3 | self.divide >> 1 & 4;
        if code == 7 { 1 } else { 2 << code }
    }

    fn current(&self, now_ns: u64) -> u32 {
        if self.initial == 0 || self.timer_mode() == 2 {
            return 0;
        }
        let gone = now_ns.saturating_sub(self.started) / self.divisor();
        let n = u64::from(self.initial);
        match self.timer_mode() {
            1 => (n - gone % n) as u32,
            _ => n.saturating_sub(gone) as u32,
        }
    }

    /// When the timer next expires: in nanoseconds of the APIC clock, or as a TSC value.
    pub fn deadline(&self, now_ns: u64) -> Option<Deadline> {
        match self.timer_mode() {
            2 => (self.tsc_deadline != 0).then_some(Deadline::Tsc(self.tsc_deadline)),
            _ if self.initial == 0 => None,
            mode => {
                let period = u64::from(self.initial) * self.divisor();
                let gone = now_ns.saturating_sub(self.started);
                match mode {
                    1 => Some(Deadline::Ns(self.started + (gone / period + 1) * period)),
                    _ if self.initial != 0 => Some(Deadline::Ns(self.started + period)),
                    _ => None,
                }
            }
        }
    }

    /// Whether the timer starts over by itself.
    pub fn periodic(&self) -> bool {
        self.timer_mode() == 1 && self.initial != 0
    }

    /// The timer expired. One-shot timers stop.
    pub fn expire(&mut self) {
        match self.timer_mode() {
            2 => self.tsc_deadline = 0,
            1 => {}
            // The reserved mode counts down once, too.
            _ => self.initial = 0,
        }
        let l = self.lvt[1];
        if self.enabled() && l & LVT_MASKED == 0 {
            if l & 0xff < 16 {
                self.error(1 << 6);
            } else {
                set(&mut self.irr, l as u8);
                clear(&mut self.tmr, l as u8);
            }
        }
    }

    /// Everything as data. The count is what it is at `now_ns`.
    pub fn save(&mut self, now_ns: u64) -> LapicState {
        self.since_save = [0; 8];
        LapicState {
            id: self.id,
            base: self.base,
            tpr: self.tpr,
            ldr: self.ldr,
            dfr: self.dfr,
            svr: self.svr,
            isr: self.isr,
            tmr: self.tmr,
            irr: self.irr,
            esr: self.esr,
            esr_pending: self.esr_pending,
            icr: self.icr,
            lvt: self.lvt,
            timer_initial: self.initial,
            timer_divide: self.divide,
            timer_current: self.current(now_ns),
            tsc_deadline: self.tsc_deadline(),
            nmi: self.nmi,
            init: self.init,
            sipi: self.sipi,
        }
    }

    /// Takes the vectors accepted since the registers were last saved out again: somebody else is to have them.
    pub fn take_since_save(&mut self) -> Vec<u8> {
        let since = std::mem::take(&mut self.since_save);
        let taken: Vec<u8> = (0..=255).filter(|&v| has(&since, v) && has(&self.irr, v)).collect();
        for &v in &taken {
            clear(&mut self.irr, v);
        }
        taken
    }

    /// Takes over what [`Lapic::save`] gave, here or elsewhere. The timer goes on from its count; its deadline is to be set anew. The
    /// state has been checked ([`paravane_cpu::snapshot::VcpuSnapshot::validate`]).
    ///
    /// What the machine's devices sent since this APIC was last saved stays pending: they sent it once.
    pub fn load(&mut self, s: &LapicState, now_ns: u64) {
        let since = std::mem::take(&mut self.since_save);
        let merge = |loaded: [u32; 8], own: [u32; 8]| std::array::from_fn(|n| loaded[n] | own[n] & since[n]);
        *self = Self {
            id: s.id,
            base: s.base,
            tpr: s.tpr,
            ldr: s.ldr,
            dfr: s.dfr,
            svr: s.svr,
            isr: s.isr,
            tmr: merge(s.tmr, self.tmr),
            irr: merge(s.irr, self.irr),
            since_save: [0; 8],
            esr: s.esr,
            esr_pending: s.esr_pending,
            icr: s.icr,
            lvt: s.lvt,
            initial: s.timer_initial,
            divide: s.timer_divide,
            started: 0,
            tsc_deadline: s.tsc_deadline,
            nmi: s.nmi,
            init: s.init,
            sipi: s.sipi,
            skippable: false,
        };
        let gone = u64::from(s.timer_initial.saturating_sub(s.timer_current)) * self.divisor();
        self.started = now_ns.saturating_sub(gone);
    }

    /// IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&self) -> u64 {
        if self.timer_mode() == 2 { self.tsc_deadline } else { 0 }
    }

    /// Writes IA32_TSC_DEADLINE; ignored in the other timer modes.
    pub fn set_tsc_deadline(&mut self, v: u64) -> Action {
        if self.timer_mode() != 2 {
            return Action::None;
        }
        self.tsc_deadline = v;
        Action::Timer
    }

    /// Task priority.
    pub fn tpr(&self) -> u8 {
        self.tpr as u8
    }

    /// Sets the task priority.
    pub fn set_tpr(&mut self, v: u8) {
        self.tpr = u32::from(v);
    }

    /// Reads a register by number. `None`: there is no such register.
    pub fn read(&mut self, reg: u32, now_ns: u64) -> Option<u32> {
        Some(match reg {
            ID => {
                if self.x2() {
                    self.id
                } else {
                    self.id << 24
                }
            }
            VERSION => 0x14 | 6 << 16,
            TPR => self.tpr,
            APR | PPR => self.ppr(),
            LDR => self.ldr,
            DFR if !self.x2() => self.dfr,
            SVR => self.svr,
            ISR..TMR => self.isr[(reg - ISR) as usize],
            TMR..IRR => self.tmr[(reg - TMR) as usize],
            IRR..ESR => self.irr[(reg - IRR) as usize],
            ESR => self.esr,
            ICR => self.icr as u32,
            ICR_HIGH => (self.icr >> 32) as u32,
            TIMER_INITIAL => self.initial,
            TIMER_CURRENT => self.current(now_ns),
            TIMER_DIVIDE => self.divide,
            _ => self.lvt[Self::lvt_index(reg)?],
        })
    }

    /// The whole of ICR, as x2APIC reads it.
    pub fn icr(&self) -> u64 {
        self.icr
    }

    /// Writes a register by number; in x2APIC mode ICR takes 64 bits. `None`: there is no such register.
    pub fn write(&mut self, reg: u32, v: u64, now_ns: u64) -> Option<Action> {
        let low = v as u32;
        match reg {
            ID if !self.x2() => {}
            TPR => self.tpr = low & 0xff,
            EOI => {
                if let Some(v) = highest(&self.isr) {
                    clear(&mut self.isr, v);
                    if has(&self.tmr, v) {
                        return Some(Action::EndOfInterrupt(v));
                    }
                }
            }
            LDR if !self.x2() => self.ldr = low & 0xff00_0000,
            DFR if !self.x2() => self.dfr = low | 0x0fff_ffff,
            SVR => {
                self.svr = low & 0x1ff;
                if low & 0x100 == 0 {
                    // Software-disabled: all LVT entries are masked.
                    for l in &mut self.lvt {
                        *l |= LVT_MASKED;
                    }
                }
            }
            ESR => {
                self.esr = std::mem::take(&mut self.esr_pending);
            }
            ICR => {
                self.icr = if self.x2() { v } else { self.icr & !0xffff_ffff | u64::from(low & !(1 << 12)) };
                return Some(self.send());
            }
            ICR_HIGH if !self.x2() => self.icr = self.icr & 0xffff_ffff | u64::from(low & 0xff00_0000) << 32,
            TIMER_INITIAL => {
                if self.timer_mode() == 2 {
                    return Some(Action::None);
                }
                self.initial = low;
                self.started = now_ns;
                return Some(Action::Timer);
            }
            TIMER_DIVIDE => {
                let left = self.current(now_ns);
                self.divide = low & 0xb;
                if self.initial != 0 {
                    // Keep the count where it is, at the new speed.
                    let gone = u64::from(self.initial.saturating_sub(left)) * self.divisor();
                    self.started = now_ns.saturating_sub(gone);
                }
                return Some(Action::Timer);
            }
            SELF_IPI if self.x2() => {
                let m = Message { destination: 0, logical: false, delivery: 0, vector: low as u8, level: false };
                return Some(Action::Send(m, 1));
            }
            ISR..TMR | TMR..IRR | IRR..ESR | VERSION | PPR | APR | TIMER_CURRENT => {
                if self.x2() {
                    return None;
                }
            }
            _ => {
                let n = Self::lvt_index(reg)?;
                let mask: u32 = match reg {
                    LVT_TIMER => 0x7_10ff,
                    LVT_LINT0 | LVT_LINT1 => 0x1_f7ff,
                    LVT_ERROR => 0x1_10ff,
                    _ => 0x1_17ff,
                };
                let old_mode = self.timer_mode();
                self.lvt[n] = low & mask & !(1 << 12);
                if self.svr & 0x100 == 0 {
                    self.lvt[n] |= LVT_MASKED;
                }
                if reg == LVT_TIMER {
                    let mode = self.timer_mode();
                    if mode != old_mode && (mode == 2 || old_mode == 2) {
                        (self.initial, self.tsc_deadline) = (0, 0);
                    }
                    return Some(Action::Timer);
                }
            }
        }
        Some(Action::None)
    }

    fn send(&mut self) -> Action {
        let icr = self.icr;
        let destination = if self.x2() { (icr >> 32) as u32 } else { (icr >> 56) as u32 };
        let delivery = (icr >> 8 & 7) as u8;
        let level = icr & 1 << 15 != 0;
        if delivery == 5 && level && icr & 1 << 14 == 0 {
            return Action::None; // INIT level de-assert, which later processors ignore.
        }
        if delivery <= 1 && icr as u8 <= 15 {
            self.error(1 << 5);
            return Action::None;
        }
        let m = Message { destination, logical: icr & 1 << 11 != 0, delivery, vector: icr as u8, level: false };
        Action::Send(m, (icr >> 18 & 3) as u8)
    }
}

/// A timer deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deadline {
    /// Nanosecond of the APIC clock.
    Ns(u64),
    /// TSC value.
    Tsc(u64),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixed(vector: u8, level: bool) -> Message {
        Message { destination: 0, logical: false, delivery: 0, vector, level }
    }

    #[test]
    fn priorities_nest_by_class() {
        let mut a = Lapic::new(0);
        a.accept(&fixed(0x31, false));
        a.accept(&fixed(0x52, false));
        assert_eq!(a.acknowledge(), Some(0x52));
        assert_eq!(a.pending(), None, "class 3 waits for class 5");
        a.accept(&fixed(0x5f, false));
        assert_eq!(a.pending(), None, "the same class waits too");
        a.accept(&fixed(0x60, false));
        assert_eq!(a.acknowledge(), Some(0x60));
        a.write(EOI, 0, 0);
        a.write(EOI, 0, 0);
        assert_eq!(a.acknowledge(), Some(0x5f));
        a.write(EOI, 0, 0);
        a.set_tpr(0x30);
        assert_eq!(a.pending(), None);
        a.set_tpr(0x2f);
        assert_eq!(a.pending(), Some(0x31));
    }

    #[test]
    fn an_eoi_is_skipped_only_when_nothing_waits() {
        let mut a = Lapic::new(0);
        a.accept(&fixed(0x40, false));
        a.acknowledge();
        assert!(a.may_skip_eoi(0x40));
        a.skip_eoi();
        a.accept(&fixed(0x30, false));
        assert!(a.pending().is_none() && a.waits_for_settlement());
        a.settle(true);
        assert_eq!(a.acknowledge(), Some(0x30));
        a.accept(&fixed(0x31, false));
        assert!(!a.may_skip_eoi(0x30), "another one waits");
        a.write(EOI, 0, 0);
        a.acknowledge();
        a.accept(&fixed(0x50, false));
        a.acknowledge();
        assert!(!a.may_skip_eoi(0x50), "another one is in service");
        a.settle(true);
        assert_eq!(a.pending(), None, "a settlement without an offer ends nothing");
        let mut level = Lapic::new(0);
        level.accept(&fixed(0x40, true));
        level.acknowledge();
        assert!(!level.may_skip_eoi(0x40));
    }

    #[test]
    fn only_level_interrupts_report_their_end() {
        let mut a = Lapic::new(0);
        a.accept(&fixed(0x40, true));
        a.acknowledge();
        assert_eq!(a.write(EOI, 0, 0), Some(Action::EndOfInterrupt(0x40)));
        a.accept(&fixed(0x40, false));
        a.acknowledge();
        assert_eq!(a.write(EOI, 0, 0), Some(Action::None));
    }

    #[test]
    fn timer_counts_and_expires() {
        let mut a = Lapic::new(0);
        a.write(LVT_TIMER, 0x20040, 0);
        a.write(TIMER_DIVIDE, 0b1011, 0);
        a.write(TIMER_INITIAL, 1000, 5000);
        assert_eq!(a.read(TIMER_CURRENT, 5400), Some(600));
        assert_eq!(a.deadline(5400), Some(Deadline::Ns(6000)));
        assert_eq!(a.deadline(6500), Some(Deadline::Ns(7000)), "periodic");
        a.expire();
        assert_eq!(a.pending(), Some(0x40));
        a.write(TIMER_DIVIDE, 0, 5500);
        a.write(LVT_TIMER, 0x41, 5500);
        a.write(TIMER_INITIAL, 10, 6000);
        assert_eq!(a.deadline(6000), Some(Deadline::Ns(6020)), "divide by 2");
    }

    #[test]
    fn tsc_deadline_mode() {
        let mut a = Lapic::new(0);
        assert_eq!(a.set_tsc_deadline(77), Action::None);
        a.write(LVT_TIMER, 0x4_0050, 0);
        assert_eq!(a.set_tsc_deadline(77), Action::Timer);
        assert_eq!(a.deadline(0), Some(Deadline::Tsc(77)));
        a.expire();
        assert_eq!((a.tsc_deadline(), a.pending()), (0, Some(0x50)));
    }

    #[test]
    fn destinations() {
        let mut a = Lapic::new(2);
        a.write(SVR, 0x1ff, 0);
        a.write(LDR, 0x0400_0000, 0);
        let to = |d, logical| Message { destination: d, logical, ..fixed(0x40, false) };
        assert!(a.matches(&to(2, false)) && !a.matches(&to(1, false)) && a.matches(&to(0xff, false)));
        assert!(a.matches(&to(0x06, true)) && !a.matches(&to(0x03, true)));
        assert!(a.set_base(BASE | ENABLE | X2));
        assert!(a.matches(&to(4, true)) && !a.matches(&to(0x1_0004, true)) && a.matches(&to(u32::MAX, true)));
    }

    #[test]
    fn base_transitions() {
        let mut a = Lapic::new(0);
        assert!(!a.set_base(BASE | X2));
        assert!(a.set_base(BASE | ENABLE | X2));
        assert!(!a.set_base(BASE | ENABLE), "x2APIC can only be left through off");
        assert!(a.set_base(BASE));
        assert!(!a.set_base(BASE | ENABLE | X2), "and off leads to xAPIC first");
        assert!(a.set_base(BASE | ENABLE));
        assert_eq!(a.base(), BASE | ENABLE | BSP);
    }

    #[test]
    fn saved_registers_go_on_elsewhere() {
        let mut a = Lapic::new(0);
        a.write(LVT_TIMER, 0x20040, 0);
        a.write(TIMER_DIVIDE, 0b1011, 0);
        a.write(TIMER_INITIAL, 1000, 5000);
        a.accept(&fixed(0x31, true));
        a.accept(&fixed(0x52, false));
        a.acknowledge();
        let state = a.save(5400);
        assert_eq!((state.timer_current, state.irr[1], state.tmr[1], state.isr[2]), (600, 1 << 17, 1 << 17, 1 << 18));
        let mut b = Lapic::new(0);
        b.load(&state, 9_000_400);
        assert_eq!(b.deadline(9_000_400), Some(Deadline::Ns(9_001_000)), "600 ns are left");
        assert_eq!(b.save(9_000_400), state);
        b.write(EOI, 0, 0);
        assert_eq!(b.acknowledge(), Some(0x31));
        // A device's interrupt between save and load is not lost; what was acknowledged meanwhile is.
        let state = a.save(5400);
        a.accept(&fixed(0x77, false));
        a.write(EOI, 0, 0);
        a.load(&state, 5500);
        assert_eq!(a.acknowledge(), Some(0x77));
        assert_eq!(a.pending(), None, "0x31 waits for 0x52");
    }

    #[test]
    fn illegal_vectors_are_errors() {
        let mut a = Lapic::new(0);
        a.accept(&fixed(5, false));
        a.write(ESR, 0, 0);
        assert_eq!(a.read(ESR, 0), Some(1 << 6));
    }
}
