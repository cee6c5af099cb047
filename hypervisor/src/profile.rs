//! What a profiled run tells its user: which causes took the time, and where in the guest it went.
//!
//! The engine gives samples by cause, guest RIP and process ([`Profile`]). Here they get names. Kernel addresses are looked
//! up in a symbol file, System.map or kallsyms. A kernel with KASLR runs at another place than System.map says; how far off is known
//! from IA32_LSTAR, which Linux points at `entry_SYSCALL_64`. What has no name is grouped by page.

use paravane_bt::{Cause, Profile, ProfileEntry};
use std::collections::HashMap;
use std::fmt::Write;

/// How many places of the guest are listed.
const PLACES: usize = 30;
/// No function is longer than this in bytes: what is further behind a symbol is something else, such as a module.
const LONGEST_FUNCTION: u64 = 1 << 20;
/// Where Linux has its 64-bit system-call entry.
const SYSCALL_ENTRY: &str = "entry_SYSCALL_64";

/// Why a symbol file is of no use.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum SymbolsError {
    /// Not the expected text.
    #[error("line {0} of the symbol file is not \"address type name\"; give a System.map or a copy of /proc/kallsyms")]
    Line(usize),
    /// No functions in it.
    #[error("the symbol file names no functions; give a System.map or a copy of /proc/kallsyms")]
    Empty,
    /// kallsyms as an ordinary user sees it.
    #[error(
        "all addresses in the symbol file are zero; copy /proc/kallsyms as root, with kernel.kptr_restrict at 0 or 1"
    )]
    Hidden,
}

/// A kernel's functions by address.
#[derive(Debug, Default)]
pub struct Symbols {
    /// Address and name, by address, one name per address.
    functions: Vec<(u64, String)>,
    /// Address of the system-call entry.
    entry: Option<u64>,
}

impl Symbols {
    /// Reads a System.map or kallsyms: lines of a hexadecimal address, a type letter, a name, and perhaps a module in
    /// brackets.
    ///
    /// # Errors
    /// When it is something else, or has no functions.
    pub fn parse(text: &str) -> Result<Self, SymbolsError> {
        let mut functions = Vec::new();
        for (n, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
            let bad = SymbolsError::Line(n + 1);
            let mut words = line.split_whitespace();
            let address = words.next().and_then(|w| u64::from_str_radix(w, 16).ok()).ok_or(bad)?;
            let kind = words.next().filter(|w| w.len() == 1).ok_or(bad)?;
            let name = words.next().ok_or(bad)?;
            // Functions of any linkage. Everything else is data or, in the case of A, no address at all.
            if !matches!(kind, "t" | "T" | "w" | "W") {
                continue;
            }
            functions
                .push((address, words.next().map_or_else(|| name.to_owned(), |module| format!("{name} {module}"))));
        }
        if functions.is_empty() {
            return Err(SymbolsError::Empty);
        }
        if functions.iter().all(|f| f.0 == 0) {
            return Err(SymbolsError::Hidden);
        }
        functions.sort_by_key(|f| f.0);
        let entry = functions.iter().find(|f| f.1 == SYSCALL_ENTRY).map(|f| f.0);
        // Of several names, the first one in the file.
        functions.dedup_by_key(|f| f.0);
        Ok(Self { functions, entry })
    }

    /// How much higher the kernel runs than the file says, given IA32_LSTAR; `None` when that cannot be told.
    pub fn slide(&self, lstar: u64) -> Option<u64> {
        let entry = self.entry.filter(|_| lstar != 0)?;
        let slide = lstar.wrapping_sub(entry);
        // KASLR moves a kernel by whole pages; anything else is another kernel than the file's.
        slide.is_multiple_of(4096).then_some(slide)
    }

    /// The function that holds an address in a kernel that runs `slide` higher than the file says.
    pub fn name(&self, address: u64, slide: u64) -> Option<&str> {
        let address = address.wrapping_sub(slide);
        let n = self.functions.partition_point(|f| f.0 <= address).checked_sub(1)?;
        let (start, name) = &self.functions[n];
        // Modules are placed anew by every boot, independently of the kernel.
        let placed = slide == 0 || !name.ends_with(']');
        (address - start < LONGEST_FUNCTION && placed).then_some(name)
    }
}

/// The time of one place, in ns.
#[derive(Default)]
struct Place {
    code: u64,
    engine: u64,
    causes: HashMap<Cause, u64>,
}

/// The report, as text.
pub fn report(profile: &Profile, symbols: Option<&Symbols>) -> String {
    let slide = symbols.and_then(|s| s.slide(profile.lstar));
    let symbols = symbols.filter(|_| slide.is_some());
    let place = |e: &ProfileEntry| -> String {
        let Some(rip) = e.rip else { return "(between blocks)".into() };
        if let Some(process) = e.process {
            return format!("user page {:#x} of process {process:#x}", rip & !0xfff);
        }
        let name = symbols.and_then(|s| s.name(rip, slide?));
        name.map_or_else(|| format!("kernel page {:#x}", rip & !0xfff), str::to_owned)
    };

    let samples: u64 = profile.entries.iter().map(|e| e.samples).sum();
    let total: u64 = profile.entries.iter().map(|e| e.ns).sum();
    let share = |n: u64| 100.0 * n as f64 / total.max(1) as f64;
    let mut causes: HashMap<Cause, (u64, u64)> = HashMap::new();
    let mut places: HashMap<String, Place> = HashMap::new();
    for e in &profile.entries {
        let cause = causes.entry(e.cause).or_default();
        cause.0 += e.ns;
        cause.1 += e.samples;
        let p = places.entry(place(e)).or_default();
        if e.cause.is_code() {
            p.code += e.ns;
        } else {
            p.engine += e.ns;
            *p.causes.entry(e.cause).or_default() += e.ns;
        }
    }

    let mut text = format!("profile: {samples} samples of {:.2} s of CPU time", total as f64 / 1e9);
    if profile.lost != 0 {
        let _ = write!(text, "; {} more found no room", profile.lost);
    }
    text.push_str("\n\n   share   samples  cause\n");
    let mut causes: Vec<_> = causes.into_iter().collect();
    causes.sort_by_key(|&(cause, n)| (std::cmp::Reverse(n), cause));
    for (cause, (ns, samples)) in causes {
        let _ = writeln!(text, "{:7.2}% {samples:9}  {cause}", share(ns));
    }

    let mut places: Vec<_> = places.into_iter().collect();
    places.sort_by(|(a, x), (b, y)| (y.code + y.engine).cmp(&(x.code + x.engine)).then_with(|| a.cmp(b)));
    text.push_str("\n   share     code   engine  where in the guest; what the engine did most\n");
    for (name, p) in places.iter().take(PLACES) {
        let most = p.causes.iter().max_by_key(|&(&cause, &n)| (n, std::cmp::Reverse(cause)));
        let most = most.map_or_else(String::new, |(cause, _)| format!("; {cause}"));
        let [all, code, engine] = [p.code + p.engine, p.code, p.engine].map(share);
        let _ = writeln!(text, "{all:7.2}% {code:7.2}% {engine:7.2}%  {name}{most}");
    }
    if places.len() > PLACES {
        let rest: u64 = places[PLACES..].iter().map(|(_, p)| p.code + p.engine).sum();
        let _ = writeln!(text, "{:7.2}%                    {} other places", share(rest), places.len() - PLACES);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T _stext
ffffffff81000000 T startup_64
ffffffff81000100 t helper
ffffffff81000a40 T entry_SYSCALL_64
ffffffff81002000 D some_data
ffffffff81003000 W weak_one
";

    #[test]
    fn addresses_get_the_names_of_functions() {
        let s = Symbols::parse(MAP).unwrap();
        let names = [
            (0, None),
            (0xffff_ffff_80ff_ffff, None),
            (0xffff_ffff_8100_0000, Some("_stext")),
            (0xffff_ffff_8100_00ff, Some("_stext")),
            (0xffff_ffff_8100_0100, Some("helper")),
            (0xffff_ffff_8100_2004, Some("entry_SYSCALL_64")),
            (0xffff_ffff_8100_3000, Some("weak_one")),
            (0xffff_ffff_8110_2fff, Some("weak_one")),
            (0xffff_ffff_8110_3000, None),
            (u64::MAX, None),
        ];
        for (address, name) in names {
            assert_eq!(s.name(address, 0), name, "{address:#x}");
        }
    }

    #[test]
    fn the_slide_is_whole_pages_from_the_entry_or_unknown() {
        let s = Symbols::parse(MAP).unwrap();
        assert_eq!(s.slide(0xffff_ffff_8100_0a40), Some(0));
        assert_eq!(s.slide(0xffff_ffff_9f20_0a40), Some(0x1e20_0000));
        assert_eq!(s.slide(0xffff_ffff_8100_0a80), None);
        assert_eq!(s.slide(0), None);
        assert_eq!(Symbols::parse("ffffffff81000000 T startup_64").unwrap().slide(0xffff_ffff_8100_0000), None);
    }

    #[test]
    fn modules_keep_their_name_and_other_files_are_refused() {
        let s = Symbols::parse("ffffffffc0000000 t probe\t[virtio_net]\n\n").unwrap();
        assert_eq!(s.name(0xffff_ffff_c000_0010, 0), Some("probe [virtio_net]"));
        assert_eq!(s.name(0xffff_ffff_c020_0010, 0x20_0000), None);
        assert_eq!(Symbols::parse("").unwrap_err(), SymbolsError::Empty);
        assert_eq!(Symbols::parse("ffffffff81002000 D data\n").unwrap_err(), SymbolsError::Empty);
        assert_eq!(Symbols::parse("0 T a\n0 t b\n").unwrap_err(), SymbolsError::Hidden);
        for bad in ["hello", "ffffffff81000000 T", "xyz T name", "ffffffff81000000 text name"] {
            assert_eq!(Symbols::parse(&format!("{MAP}{bad}\n")).unwrap_err(), SymbolsError::Line(8), "{bad}");
        }
    }

    fn entry(cause: Cause, rip: u64, process: Option<u64>, samples: u64) -> ProfileEntry {
        ProfileEntry { cause, rip: Some(rip), process, samples, ns: samples * 10_000_000 }
    }

    #[test]
    fn shares_add_up_and_names_follow_the_slide() {
        let [kernel, user] = [false, true].map(|user| Cause::Code { user, cold: false, mapped: false });
        let slide = 0x20_0000;
        let profile = Profile {
            entries: vec![
                entry(kernel, 0xffff_ffff_8100_0100 + slide, None, 30),
                entry(kernel, 0xffff_ffff_8100_0180 + slide, None, 10),
                entry(Cause::TlbMiss, 0xffff_ffff_8100_0110 + slide, None, 10),
                entry(user, 0x40_1234, Some(0x5000), 35),
                entry(user, 0x40_1fff, Some(0x6000), 10),
                entry(Cause::Chain, 0xffff_ffff_c000_0010, None, 3),
                ProfileEntry { cause: Cause::Links, rip: None, process: None, samples: 2, ns: 20_000_000 },
            ],
            lost: 7,
            lstar: 0xffff_ffff_8100_0a40 + slide,
        };
        let text = report(&profile, Some(&Symbols::parse(MAP).unwrap()));
        for line in [
            "profile: 100 samples of 1.00 s of CPU time; 7 more found no room\n",
            "  45.00%        45  translated code, user\n",
            "  40.00%        40  translated code, kernel\n",
            "  50.00%   40.00%   10.00%  helper; TLB miss\n",
            "  35.00%   35.00%    0.00%  user page 0x401000 of process 0x5000\n",
            "  10.00%   10.00%    0.00%  user page 0x401000 of process 0x6000\n",
            "   3.00%    0.00%    3.00%  kernel page 0xffffffffc0000000; chaining\n",
            "   2.00%    2.00%    0.00%  (between blocks)\n",
        ] {
            assert!(text.contains(line), "{line:?} is not in:\n{text}");
        }
        // Another kernel's file names nothing.
        let other = Profile { lstar: profile.lstar + 8, ..profile };
        let text = report(&other, Some(&Symbols::parse(MAP).unwrap()));
        assert!(!text.contains("helper") && text.contains("kernel page 0xffffffff81200000; TLB miss"), "{text}");
    }

    #[test]
    fn long_lists_are_cut_and_nothing_is_no_division_by_zero() {
        let code = Cause::Code { user: false, cold: true, mapped: false };
        let entries = (0..40).map(|n| entry(code, n << 12, None, 40 - n)).collect();
        let text = report(&Profile { entries, ..Profile::default() }, None);
        assert!(text.contains("kernel page 0x1d000\n") && !text.contains("kernel page 0x1e000"), "{text}");
        assert!(text.ends_with("   6.71%                    10 other places\n"), "{text}");
        assert!(report(&Profile::default(), None).starts_with("profile: 0 samples of 0.00 s"));
    }
}
