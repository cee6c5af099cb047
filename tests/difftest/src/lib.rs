//! The differential tester: random user-mode code, run natively and through the binary translator, must come to the same.
//!
//! The host CPU is the oracle. [`native`] runs a sequence in a child process, [`guest`] runs the same bytes at the same
//! addresses in ring 3 of a minimal guest; each ends with an exception, and everything that user code can see is
//! compared at that point: vector, error code, CR2, RIP, general registers, RFLAGS, segment bases, x87, MXCSR, vector
//! and mask registers, and all writable memory.
//!
//! [`catalog`] says which instructions are covered and why others are not; [`generate`] turns a seed and an index into
//! a sequence; [`minimise`](mod@minimise) shortens one that differs.

pub mod catalog;
pub mod channel;
pub mod generate;
pub mod guest;
pub mod layout;
pub mod minimise;
pub mod native;
mod operand;
pub mod rng;
pub mod sequence;
pub mod state;
mod templates;

use generate::Case;
use iced_x86::{Code, CpuidFeature, Formatter, IntelFormatter, Mnemonic};
use state::{End, Input, Outcome, Tolerance, first_difference};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;

/// Something that runs sequences from a given state to their exception.
pub trait Runner {
    /// For messages.
    fn name(&self) -> &'static str;
    /// Fills a slot ([`layout::SLOT_BYTES`] bytes).
    fn load_code(&mut self, slot: u64, code: &[u8]);
    /// Runs one sequence per input, in order.
    ///
    /// # Errors
    /// When the runner itself fails, never because of what a sequence does.
    fn run(&mut self, inputs: &[Input], outcomes: &mut [Outcome]) -> io::Result<()>;
}

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Names the run.
    pub seed: u64,
    /// Index of the first sequence.
    pub first: u64,
    /// Number of sequences.
    pub count: u64,
    /// Stops after so many differences.
    pub max_differences: usize,
    /// Status flags may differ at a fault of an instruction that computes (not at #UD or a trap).
    pub relaxed_fault_flags: bool,
    /// Compare the x87 instruction and data pointers too.
    pub x87_pointers: bool,
    /// Print a line every so many sequences; 0 for silence.
    pub progress: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            seed: 1,
            first: 0,
            count: 1000,
            max_differences: 1,
            relaxed_fault_flags: false,
            x87_pointers: false,
            progress: 0,
        }
    }
}

/// A sequence that came out differently.
#[derive(Clone, Debug)]
pub struct Difference {
    /// Index of the sequence.
    pub index: u64,
    /// The first item that differs.
    pub what: String,
    /// Seed, minimised code and starting state, for people.
    pub reproducer: String,
}

/// What a run came to.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Sequences compared.
    pub compared: u64,
    /// Sequences left out because they do not end, wrote over the native process, or set TF or AC by a wild return.
    pub skipped: u64,
    /// Index of the first of them.
    pub skipped_first: Option<u64>,
    /// Sequences whose native result differs from run to run.
    pub unsteady: u64,
    /// Differences.
    pub differences: Vec<Difference>,
    /// How often a form was part of a sequence.
    pub uses: BTreeMap<Code, u64>,
    /// How often sequences ended with a vector.
    pub vectors: BTreeMap<u32, u64>,
}

impl Report {
    /// Adds another report's figures.
    pub fn merge(&mut self, other: Self) {
        self.compared += other.compared;
        self.skipped += other.skipped;
        self.skipped_first = self.skipped_first.or(other.skipped_first);
        self.unsteady += other.unsteady;
        self.differences.extend(other.differences);
        for (k, v) in other.uses {
            *self.uses.entry(k).or_default() += v;
        }
        for (k, v) in other.vectors {
            *self.vectors.entry(k).or_default() += v;
        }
    }
}

/// Two runners and the room for their results.
pub struct Tester<'a> {
    native: &'a mut dyn Runner,
    engine: &'a mut dyn Runner,
    config: Config,
    expected: Vec<Outcome>,
    got: Vec<Outcome>,
}

impl<'a> Tester<'a> {
    /// A tester that compares `engine` with `native`.
    pub fn new(native: &'a mut dyn Runner, engine: &'a mut dyn Runner, config: Config) -> Self {
        let room = || (0..channel::BATCH).map(|_| *Outcome::new()).collect();
        Self { native, engine, config, expected: room(), got: room() }
    }

    /// Runs all sequences of the configuration.
    ///
    /// # Errors
    /// When a runner fails.
    pub fn run(&mut self) -> io::Result<Report> {
        let mut report = Report::default();
        let Config { seed, first, count, .. } = self.config;
        let mut index = first;
        while index < first + count && report.differences.len() < self.config.max_differences {
            let n = (first + count - index).min(channel::BATCH as u64);
            let cases: Vec<Case> = (index..index + n).map(|i| generate::case(seed, i)).collect();
            self.run_batch(index, &cases, &mut report)?;
            index += n;
            let every = self.config.progress;
            if every != 0 && (index - first) / every != (index - n - first) / every {
                println!("{} sequences, {} differences", index - first, report.differences.len());
            }
        }
        Ok(report)
    }

    fn run_batch(&mut self, index: u64, cases: &[Case], report: &mut Report) -> io::Result<()> {
        let inputs: Vec<Input> = cases.iter().map(|c| (*c.input).clone()).collect();
        // Both see the whole batch, and so the same bytes where a wild jump leads.
        for c in cases {
            let code = c.code();
            self.native.load_code(c.slot, &code);
            self.engine.load_code(c.slot, &code);
        }
        self.native.run(&inputs, &mut self.expected[..cases.len()])?;
        for (n, case) in cases.iter().enumerate() {
            for item in case.sequence.items.iter().flatten() {
                *report.uses.entry(item.instruction.code()).or_default() += 1;
            }
            if !is_comparable(&self.expected[n]) {
                report.skipped += 1;
                report.skipped_first.get_or_insert(index + n as u64);
                continue;
            }
            self.engine.run(&inputs[n..=n], &mut self.got[n..=n])?;
            report.compared += 1;
            *report.vectors.entry(self.expected[n].vector).or_default() += 1;
            let tolerance = self.tolerance(case, &self.expected[n]);
            let Some(what) = first_difference(&self.expected[n], &self.got[n], tolerance) else { continue };
            if self.is_unsteady(case)? {
                report.unsteady += 1;
                continue;
            }
            let number = index + n as u64;
            let reproducer = self.reproducer(number, case, &what)?;
            report.differences.push(Difference { index: number, what, reproducer });
            if report.differences.len() >= self.config.max_differences {
                break;
            }
        }
        Ok(())
    }

    /// What may differ, given how the native run ended.
    fn tolerance(&self, case: &Case, native: &Outcome) -> Tolerance {
        let Config { relaxed_fault_flags, x87_pointers, .. } = self.config;
        let mut t = Tolerance { x87_pointers, ..Tolerance::default() };
        if relaxed_fault_flags && !matches!(native.vector, 1 | 3 | 4 | 6) {
            t.flags = paravane_cpu::state::rflags::STATUS;
        }
        if matches!(native.vector, 12..=14)
            && let Some(item) = case.item_at(native.regs.rip)
        {
            let i = &item.instruction;
            // Which elements of a gather or scatter are done, and which of several faults is raised, is the
            // implementation's choice (SDM vol. 2, VPGATHERDD).
            t.partial_vector = is_gather_or_scatter(i.mnemonic());
            // A faulting MMX instruction may or may not have set TOP and the tags (SDM vol. 1, section 9.5.1, leaves it open),
            // and a faulting store of VCVTPS2PH may or may not have set MXCSR's exception flags.
            t.mmx_transition = i.code().cpuid_features().contains(&CpuidFeature::MMX)
                || (0..i.op_count()).any(|n| i.op_register(n).is_mm());
            // A packed-decimal or 80-bit store across a page is done in pieces.
            t.partial_store = i.mnemonic() == Mnemonic::Fbstp || i.code() == iced_x86::Code::Fstp_m80fp;
            t.mxcsr_flags = i.mnemonic() == Mnemonic::Vcvtps2ph;
            // A masked store that touches two pages may report either, and any active byte in it; it may have stored to the other
            // page (SDM vol. 2, MASKMOVDQU; vol. 1, section 15.6.4, speaks of elements only).
            // The same goes for the x87 state image, which is stored field by field.
            t.masked_store = paravane_cpu::is_masked_store(i)
                || matches!(
                    i.mnemonic(),
                    Mnemonic::Fnsave
                        | Mnemonic::Fnstenv
                        | Mnemonic::Fsave
                        | Mnemonic::Fstenv
                        | Mnemonic::Fxsave
                        | Mnemonic::Fxsave64
                        | Mnemonic::Xsave
                        | Mnemonic::Xsave64
                        | Mnemonic::Xsavec
                        | Mnemonic::Xsavec64
                        | Mnemonic::Xsaveopt
                        | Mnemonic::Xsaveopt64
                );
            t.partial_store |= t.masked_store;
        }
        t
    }

    /// Whether the host itself gives different results for this sequence.
    fn is_unsteady(&mut self, case: &Case) -> io::Result<bool> {
        let mut a = Outcome::new();
        let mut b = Outcome::new();
        for out in [&mut a, &mut b] {
            self.native.load_code(case.slot, &case.code());
            self.native.run(std::slice::from_ref(&*case.input), std::slice::from_mut(out))?;
        }
        Ok(first_difference(&a, &b, self.tolerance(case, &a)).is_some())
    }

    /// The first difference between two runs of one case.
    pub(crate) fn compare(&mut self, case: &Case) -> io::Result<Option<String>> {
        let mut a = Outcome::new();
        let mut b = Outcome::new();
        let input = std::slice::from_ref(&*case.input);
        self.native.load_code(case.slot, &case.code());
        self.native.run(input, std::slice::from_mut(&mut *a))?;
        if !is_comparable(&a) {
            return Ok(None);
        }
        self.engine.load_code(case.slot, &case.code());
        self.engine.run(input, std::slice::from_mut(&mut *b))?;
        Ok(first_difference(&a, &b, self.tolerance(case, &a)))
    }

    fn reproducer(&mut self, index: u64, case: &Case, what: &str) -> io::Result<String> {
        let mut small = minimise::minimise(self, case, what)?;
        let again = self.compare(&small)?;
        if again.is_none() {
            // It needs what ran before it.
            small = case.clone();
        }
        let mut s = String::new();
        let seed = self.config.seed;
        let _ = writeln!(s, "sequence {index}: {what}");
        let _ = writeln!(s, "reproduce: difftest --seed {seed} --first {index} --sequences 1");
        match again {
            Some(w) => {
                let _ = writeln!(s, "minimised to {} of {}: {w}", small.sequence.len(), case.sequence.len());
            }
            None => {
                let _ = writeln!(s, "it does not differ when run again by itself");
            }
        }
        s.push_str(&listing(&small));
        let r = &small.input.regs;
        for (name, v) in state::GPR_NAMES.iter().zip(r.gpr) {
            let _ = write!(s, "{name}={v:#x} ");
        }
        let mxcsr = u32::from_le_bytes(r.fpu[24..28].try_into().expect("four bytes"));
        let control = u16::from_le_bytes(r.fpu[0..2].try_into().expect("two bytes"));
        let _ = writeln!(
            s,
            "rflags={:#x} fs={:#x} gs={:#x} mxcsr={mxcsr:#x} fcw={control:#x} image={}",
            r.rflags, r.fs_base, r.gs_base, small.input.image
        );
        Ok(s)
    }
}

/// Whether a native run can be compared: it ended, and neither single-stepping nor alignment checks came into play (POPF ran
/// without the instruction that prepares its image).
fn is_comparable(native: &Outcome) -> bool {
    use paravane_cpu::state::rflags::{AC, TF};
    native.end == End::Exception && native.vector != 17 && native.regs.rflags & (TF | AC) == 0
}

fn is_gather_or_scatter(m: Mnemonic) -> bool {
    let name = format!("{m:?}").to_ascii_lowercase();
    name.contains("gather") || name.contains("scatter")
}

/// The code of a case, one instruction per line with address and bytes.
pub fn listing(case: &Case) -> String {
    let mut f = IntelFormatter::new();
    let base = case.input.regs.rip;
    let mut d = iced_x86::Decoder::with_ip(64, &case.encoded.bytes, base, iced_x86::DecoderOptions::NONE);
    let mut s = String::new();
    while d.can_decode() {
        let i = d.decode();
        let at = (i.ip() - base) as usize;
        let mut text = String::new();
        f.format(&i, &mut text);
        let _ = writeln!(s, "  {:x}: {:30} {text}", i.ip(), state::hex(&case.encoded.bytes[at..at + i.len()]));
    }
    s
}
