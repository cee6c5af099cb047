//! What leaving the guest costs, kind by kind, on each engine: `cargo bench -p paravane --bench exits`.
//!
//! A guest in ring 0 does one thing over and over and reads the TSC before and after; a loop of nothing is taken off. Figures are the
//! least of five runs, in nanoseconds. "halt" is how much later than its deadline a timer's handler has run and returned.
#![allow(unsafe_code, missing_docs)] // Guest code is assembled into the program and copied out.

#[path = "../tests/machine/mod.rs"]
mod machine;

use machine::Machine;
use paravane::engine::{EngineKind, IrqChip};
use paravane::pv::Offer;
use paravane::running::drive;
use paravane::tsc;

macro_rules! measured {
    ($name:ident, $count:literal, [$($setup:literal),*], $($op:literal),+) => {
        guest!(
            $name,
            "mov dword ptr [r14 + 0xf0], 0x1ff",
            "mov dword ptr [r14 + 0x3e0], 0xb",
            "mov dword ptr [r14 + 0x320], 0x40",
            $($setup,)*
            concat!("mov r15d, ", $count),
            "rdtsc",
            "mov [rsi + 8], eax",
            "mov [rsi + 12], edx",
            "2:",
            $($op),+,
            "dec r15d",
            "jnz 2b",
            "rdtsc",
            "mov [rsi + 16], eax",
            "mov [rsi + 20], edx",
            "xor eax, eax",
            "out 0xf4, al",
            "hlt",
        );
    };
}

measured!(nothing, 2000, [], "nop");
measured!(pio_write, 2000, ["xor eax, eax"], "out 0x80, al");
measured!(pio_read, 2000, [], "in al, 0x80");
measured!(mmio_write, 2000, ["mov ebx, 0xd0000000"], "mov [rbx], eax");
measured!(mmio_read, 2000, ["mov ebx, 0xd0000000"], "mov eax, [rbx]");
measured!(apic_write, 2000, [], "mov dword ptr [r14 + 0x80], 0");
measured!(msr_read, 2000, ["mov ecx, 0x6e0"], "rdmsr");
measured!(call_port, 2000, [], "xor eax, eax", "out 0xe7, eax");
measured!(call_vmcall, 2000, [], "xor eax, eax", "vmcall");
measured!(interrupt, 2000, [], "mov dword ptr [r14 + 0x300], 0x40040", "sti", "nop", "nop", "cli");
measured!(halt, 200, [], "mov dword ptr [r14 + 0x380], 300000", "sti", "hlt", "cli");
guest!(handler, "inc qword ptr [rsi]", "mov dword ptr [r14 + 0xb0], 0", "iretq");

/// Nanoseconds per round and what was counted in one run, or why not.
fn run((kind, irqchip): (EngineKind, IrqChip), code: &[u8], rounds: u64, counter: &str) -> Result<(f64, u64), String> {
    let mut best = (f64::INFINITY, 0);
    for _ in 0..5 {
        let mut m =
            Machine::with_irqchip(kind, irqchip, 1, code, &[], handler(), Offer::All).map_err(|e| e.to_string())?;
        drive(0, &mut *m.vcpu, &m.chipset).map_err(|e| e.to_string())?;
        let ticks = m.answer(2).wrapping_sub(m.answer(1));
        let ns = ticks as f64 * 1e6 / f64::from(tsc::tsc_khz()) / rounds as f64;
        if ns < best.0 {
            best = (ns, m.counter(counter));
        }
    }
    Ok(best)
}

/// Name, code for KVM (twice) and BT, rounds, the counter to show, nanoseconds to take off.
type Kind = (&'static str, [&'static [u8]; 3], u64, &'static str, f64);

fn main() {
    let engines =
        [(EngineKind::Kvm, IrqChip::User), (EngineKind::Kvm, IrqChip::Split), (EngineKind::Bt, IrqChip::User)];
    let empty = engines.map(|k| run(k, nothing(), 2000, "").map(|r| r.0));
    if let Err(e) = &empty[0] {
        println!("KVM is left out: {e}");
    }
    println!(
        "{:<22}{:>12}{:>8}{:>12}{:>8}{:>12}{:>8}",
        "kind", "KVM ns", "exits", "split ns", "exits", "BT ns", "count"
    );
    let cell = |r: Result<f64, String>| r.map_or("-".into(), |ns| format!("{ns:.0}"));
    print!("{:<22}", "nop, dec, jnz");
    empty.iter().for_each(|e| print!("{:>12}{:>8}", cell(e.clone()), ""));
    println!();
    let kinds: [Kind; 9] = [
        ("port write", [pio_write(); 3], 2000, "port writes", 0.0),
        ("port read", [pio_read(); 3], 2000, "port reads", 0.0),
        ("MMIO write", [mmio_write(); 3], 2000, "MMIO writes", 0.0),
        ("MMIO read", [mmio_read(); 3], 2000, "MMIO reads", 0.0),
        ("local APIC write", [apic_write(); 3], 2000, "MMIO writes", 0.0),
        ("MSR read (APIC's)", [msr_read(); 3], 2000, "MSR reads", 0.0),
        ("hypercall", [call_port(), call_port(), call_vmcall()], 2000, "hypercalls", 0.0),
        ("interrupt to oneself", [interrupt(); 3], 2000, "interrupts delivered", 0.0),
        ("halt, past deadline", [halt(); 3], 200, "halts", 300_000.0),
    ];
    for (name, code, rounds, counter, off) in kinds {
        print!("{name:<22}");
        for n in 0..engines.len() {
            match (run(engines[n], code[n], rounds, counter), &empty[n]) {
                (Ok((ns, count)), Ok(e)) => print!("{:>12.0}{count:>8}", ns - e - off),
                _ => print!("{:>12}{:>8}", "-", "-"),
            }
        }
        println!();
    }
}
