//! What a user is told when KVM cannot go on with a guest.

use std::fmt;

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};
use kvm_bindings as kvm;
use paravane_cpu::{CpuState, Env, Seg, mem};

use super::run_page::InternalError;

/// Why KVM gave up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// KVM_INTERNAL_ERROR_EMULATION.
    Emulation,
    /// KVM_INTERNAL_ERROR_SIMUL_EX: exceptions at the same time that cannot be.
    SimultaneousExceptions,
    /// KVM_INTERNAL_ERROR_DELIVERY_EV: an exit while an event was delivered that KVM has no way to treat.
    Delivery,
    /// KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, with the hardware's reason.
    UnexpectedExit(u64),
    /// Another internal error, by its number.
    Internal(u32),
    /// The hardware refused the guest's state (KVM_EXIT_FAIL_ENTRY), with its reason.
    Entry(u64),
    /// An exit that this program does not know, by its number.
    Exit(u32),
}

impl Cause {
    pub(super) fn of(e: &InternalError) -> Self {
        match e.kind {
            kvm::KVM_INTERNAL_ERROR_EMULATION => Self::Emulation,
            kvm::KVM_INTERNAL_ERROR_SIMUL_EX => Self::SimultaneousExceptions,
            kvm::KVM_INTERNAL_ERROR_DELIVERY_EV => Self::Delivery,
            kvm::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => Self::UnexpectedExit(e.data[0]),
            n => Self::Internal(n),
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Emulation => f.write_str("it cannot emulate an instruction"),
            Self::SimultaneousExceptions => f.write_str("it met exceptions that cannot come together"),
            Self::Delivery => f.write_str("it could not deliver an exception or interrupt"),
            Self::UnexpectedExit(n) => write!(f, "it met the exit reason {n:#x}, which it does not know"),
            Self::Internal(n) => write!(f, "it reports internal error {n}"),
            Self::Entry(n) => write!(f, "the CPU refused the guest's state with reason {n:#x}"),
            Self::Exit(n) => write!(f, "it came back with exit reason {n}, which this version does not know"),
        }
    }
}

/// A guest that KVM cannot go on with: why, where, and in what state.
#[derive(Clone)]
pub struct Report {
    /// Why.
    pub cause: Cause,
    /// Whether this KVM emulates ring 0 instead of running it.
    pub emulating: bool,
    /// Bytes at RIP, as KVM gave them or memory has them; empty when they cannot be read.
    pub code: Vec<u8>,
    /// The vCPU's state at that instruction.
    pub state: Box<CpuState>,
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Report").field("cause", &self.cause).field("code", &self.code).finish_non_exhaustive()
    }
}

impl Report {
    /// The instruction at RIP as text, when there are bytes to decode.
    pub fn instruction(&self) -> Option<String> {
        let st = &self.state;
        let i = Decoder::with_ip(st.code_bits(), &self.code, st.rip, DecoderOptions::NONE).decode();
        if i.is_invalid() {
            return None;
        }
        let mut text = String::new();
        IntelFormatter::new().format(&i, &mut text);
        Some(text)
    }

    fn mode(&self) -> &'static str {
        let st = &self.state;
        match (st.protected(), st.v8086(), st.long_mode(), st.code_bits()) {
            (false, ..) => "real mode",
            (true, true, ..) => "virtual-8086 mode",
            (true, false, true, 64) => "64-bit mode",
            (true, false, true, _) => "compatibility mode",
            (true, false, false, 32) => "32-bit protected mode",
            _ => "16-bit protected mode",
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let st = &self.state;
        let kind = if self.emulating { "this host's KVM, which only emulates ring 0," } else { "this host's KVM" };
        writeln!(f, "{kind} cannot go on with the guest, because {}; try --engine bt", self.cause)?;
        let bytes: Vec<_> = self.code.iter().map(|b| format!("{b:02x}")).collect();
        match (self.instruction(), bytes.is_empty()) {
            (Some(text), _) => writeln!(f, "  at {:#018x}: {text}", st.rip)?,
            (None, false) => writeln!(f, "  at {:#018x}: no valid instruction", st.rip)?,
            (None, true) => writeln!(f, "  at {:#018x}: the instruction cannot be read", st.rip)?,
        }
        if !bytes.is_empty() {
            writeln!(f, "  bytes {}", bytes.join(" "))?;
        }
        writeln!(f, "  {}, ring {}", self.mode(), st.cpl)?;
        let names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"];
        let numbered = (8..16).map(|n| format!("r{n}"));
        let named: Vec<_> = names.into_iter().map(str::to_owned).chain(numbered).zip(st.gpr).collect();
        for row in named.chunks(4) {
            let cells: Vec<_> = row.iter().map(|(n, v)| format!("{n:<3} {v:016x}")).collect();
            writeln!(f, "  {}", cells.join("  "))?;
        }
        writeln!(f, "  rip {:016x}  rflags {:08x}", st.rip, st.rflags)?;
        writeln!(
            f,
            "  cr0 {:08x}  cr2 {:016x}  cr3 {:016x}  cr4 {:08x}  efer {:04x}",
            st.cr0, st.cr2, st.cr3, st.cr4, st.efer
        )?;
        let segments =
            [("cs", Seg::Cs), ("ss", Seg::Ss), ("ds", Seg::Ds), ("es", Seg::Es), ("fs", Seg::Fs), ("gs", Seg::Gs)];
        let mut cells = segments.map(|(n, s)| format!("{n} {:04x}", st.segment(s).selector)).to_vec();
        cells.push(format!("fs.base {:016x}", st.segment(Seg::Fs).base));
        cells.push(format!("gs.base {:016x}", st.segment(Seg::Gs).base));
        write!(f, "  {}", cells.join("  "))
    }
}

/// Up to 15 bytes at CS:RIP, as far as they are mapped.
pub(super) fn code_at_rip<E: Env>(st: &CpuState, env: &mut E) -> Vec<u8> {
    let base = if st.code64() { 0 } else { st.segment(Seg::Cs).base };
    let mut bytes = [0; 15];
    let n = mem::fetch(st, env, base.wrapping_add(st.rip), &mut bytes).unwrap_or(0);
    bytes[..n].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_is_one_sentence_and_what_cannot_be_read_is_said() {
        let causes = [
            Cause::Emulation,
            Cause::SimultaneousExceptions,
            Cause::Delivery,
            Cause::UnexpectedExit(0x31),
            Cause::Internal(9),
            Cause::Entry(0x8000_0021),
            Cause::Exit(77),
        ];
        for cause in causes {
            let report =
                Report { cause, emulating: false, code: Vec::new(), state: Box::new(CpuState::reset(0)) }.to_string();
            let (first, rest) = report.split_once('\n').unwrap();
            assert!(
                first.starts_with("this host's KVM cannot go on") && first.ends_with("; try --engine bt"),
                "{first}"
            );
            assert!(rest.contains("the instruction cannot be read") && rest.contains("real mode, ring 0"), "{rest}");
        }
    }

    #[test]
    fn code_is_decoded_in_the_mode_that_it_runs_in() {
        let mut report = Report {
            cause: Cause::Emulation,
            emulating: true,
            code: vec![0x48, 0x0f, 0xc7, 0x4d, 0x20],
            state: Box::new(CpuState::reset(0)),
        };
        assert_eq!(report.instruction().as_deref(), Some("dec ax"), "16-bit");
        report.state.efer = 1 << 10;
        report.state.seg[Seg::Cs as usize] = paravane_cpu::Segment::flat_code(8, 0, true);
        assert_eq!(report.instruction().as_deref(), Some("cmpxchg16b [rbp+20h]"));
        report.code = vec![0x0f, 0xff];
        assert!(report.to_string().contains("bytes 0f ff"));
    }
}
