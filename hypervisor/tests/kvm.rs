//! The KVM engine: exits of every kind, prompt stops, hypercalls, and what is said when KVM cannot go on or is not there.
//! Without `/dev/kvm` the tests say so and pass by.
#![allow(unsafe_code, missing_docs)] // Guest code is assembled into the test binary and copied out.

mod common;
mod machine;

use common::{Scratch, finish, out, pvh, run};
use machine::Machine;
use paravane::devices::control::StopCause;
use paravane::engine::kvm::{self, Cause, KvmError};
use paravane::engine::{EngineError, EngineKind, IrqChip, Place};
use paravane::pv::{HYPERCALL_PORT, Offer};
use paravane::running::{Driven, RunningVcpu, drive};
use pv_abi::call::{Call, Error};
use std::io::Read;
use std::os::fd::{AsFd, FromRawFd};
use std::os::unix::process::CommandExt;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

/// A machine on KVM; says why there is none.
fn on_kvm(code: &[u8], handler: &[u8]) -> Option<Machine> {
    match Machine::new(EngineKind::Kvm, code, handler, Offer::All) {
        Ok(m) => Some(m),
        Err(e) => {
            eprintln!("SKIPPED: {e}");
            None
        }
    }
}

/// Runs to the debug exit and checks the status written there.
fn end(m: &mut Machine, status: u8) {
    assert_eq!(drive(0, &mut *m.vcpu, &m.chipset).unwrap(), Driven::Stopped);
    assert_eq!(m.chipset.stop_cause(), Some(StopCause::DebugExit(status << 1 | 1)));
}

guest!(
    ports,
    // "ab" through a string instruction, and a device's register into memory and back.
    "mov edx, 0x3f8",
    "mov word ptr [rsi], 0x6261",
    "mov ecx, 2",
    "rep outsb",
    "mov edi, 0x300010",
    "mov edx, 0x3fb",
    "mov al, 0x1b",
    "out dx, al",
    "mov ecx, 3",
    "rep insb",
    // 4 bytes of PCI configuration space: address register, then the host bridge's identity.
    "mov edx, 0xcf8",
    "mov eax, 0x80000000",
    "out dx, eax",
    "in eax, dx",
    "mov [rdi + 5], eax",
    "mov eax, 7",
    "out 0xf4, al",
    "hlt",
);

#[test]
fn port_accesses_of_all_sizes_and_in_strings() {
    let Some(mut m) = on_kvm(ports(), &[]) else { return };
    end(&mut m, 7);
    assert_eq!(m.console.text(), "ab");
    assert_eq!(m.answer(2), 0x001b_1b1b);
    assert_eq!(m.answer(3), 0x8000_0000);
    assert_eq!((m.counter("port reads"), m.counter("port writes")), (4, 5));
}

guest!(
    memory,
    "mov eax, 0xd0000000",
    "mov dword ptr [rax], 1",
    "mov rbx, [rax]",
    "mov [rsi], rbx",
    // The local APIC's ID, version and task priority, which is also CR8.
    "mov ebx, [r14 + 0x30]",
    "mov [rsi + 8], rbx",
    "mov dword ptr [r14 + 0x80], 0x53",
    "mov rbx, cr8",
    "mov [rsi + 16], rbx",
    "mov ebx, 9",
    "mov cr8, rbx",
    "mov ebx, [r14 + 0x80]",
    "mov [rsi + 24], rbx",
    // MSRs that the machine keeps.
    "mov ecx, 0x1b",
    "rdmsr",
    "mov [rsi + 32], eax",
    "mov [rsi + 36], edx",
    // The guest's TSC, moved far ahead, and moved back.
    "mov ecx, 0x3b",
    "xor eax, eax",
    "mov edx, 0x1000",
    "wrmsr",
    "rdtsc",
    "mov [rsi + 40], rdx",
    "mov ecx, 0x3b",
    "xor edx, edx",
    "xor eax, eax",
    "wrmsr",
    "rdtsc",
    "mov [rsi + 48], rdx",
    "mov eax, 1",
    "out 0xf4, al",
    "hlt",
);

#[test]
fn device_memory_the_local_apic_and_msrs() {
    let Some(mut m) = on_kvm(memory(), &[]) else { return };
    end(&mut m, 1);
    assert_eq!((m.answer(0), m.answer(1)), (u64::MAX, 0x0006_0014));
    assert_eq!((m.answer(2), m.answer(3)), (5, 0x90), "CR8 and the task priority register are one");
    assert_eq!(m.answer(4), 0xfee0_0900);
    let (moved, back) = (m.answer(5), m.answer(6));
    // RDTSC sees no offset where the hardware has none, and the machine knows.
    let ahead = moved.wrapping_sub(back);
    let native = !kvm::emulates_ring0();
    assert!(if native { matches!(ahead, 0xfff | 0x1000) } else { ahead <= 1 }, "{ahead:#x}");
    let st = m.vcpu.state_mut();
    assert_eq!((st.tsc_offset, st.tsc_adjust), (0, 0));
}

guest!(
    halts,
    "mov dword ptr [r14 + 0xf0], 0x1ff",
    "mov dword ptr [r14 + 0x3e0], 0xb",
    "mov dword ptr [r14 + 0x320], 0x40",
    "mov r15d, 50",
    "2: mov dword ptr [r14 + 0x380], 200000",
    "sti",
    "hlt",
    "cli",
    "dec r15d",
    "jnz 2b",
    "mov eax, 2",
    "out 0xf4, al",
    "hlt",
);
guest!(tick, "inc qword ptr [rsi]", "mov dword ptr [r14 + 0xb0], 0", "iretq");

#[test]
fn halts_end_with_interrupts() {
    let Some(mut m) = on_kvm(halts(), tick()) else { return };
    end(&mut m, 2);
    // Where the emulator of ring 0 runs past the HLT with the interrupt, the halt is over before it began.
    assert_eq!(m.answer(0), 50);
    assert!(m.counter("interrupts delivered") == 50 && m.counter("halts") > 10);
}

guest!(spin, "2: jmp 2b");
guest!(spin_in_ring_3, "2: mov eax, ebx", "jmp 2b");

/// A guest that makes no exits is out within a few milliseconds of being asked, again and again.
#[test]
fn a_spinning_guest_stops_promptly() {
    for ring in [0, 3] {
        let Some(mut m) = on_kvm(if ring == 0 { spin() } else { spin_in_ring_3() }, &[]) else { return };
        if ring == 3 {
            // User pages for all: the boot tables' entries get their U/S bits.
            for entry in [0x1000, 0x2000, 0x40_0000] {
                let v: u64 = m.mem.read_obj(GuestAddress(entry)).unwrap();
                m.mem.write_obj(v | 4, GuestAddress(entry)).unwrap();
            }
            let st = m.vcpu.state_mut();
            st.cpl = 3;
            st.seg = [paravane_cpu::Segment::flat_data(0x1b, 3); 6];
            st.seg[paravane_cpu::Seg::Cs as usize] = paravane_cpu::Segment::flat_code(0x23, 3, true);
        }
        let mut best = Duration::MAX;
        for _ in 0..20 {
            let running = RunningVcpu::start(0, m.vcpu, m.chipset.clone()).unwrap();
            std::thread::sleep(Duration::from_millis(3));
            let began = Instant::now();
            let (vcpu, how) = running.pause().unwrap();
            best = best.min(began.elapsed());
            assert_eq!(how, Driven::Paused);
            m.vcpu = vcpu;
        }
        // The best of many, for a busy host delays any one.
        assert!(best < Duration::from_millis(20), "{best:?} in ring {ring}");
        let st = m.vcpu.state_mut();
        assert!((machine::CODE..machine::CODE + 4).contains(&st.rip), "{:#x}", st.rip);
    }
}

guest!(
    calls,
    // RAX is a call that does not exist; then negotiate version 1.0 and the console, and write a text.
    "mov eax, 0x12345",
    "call 5f",
    "mov [rsi], rax",
    "mov r12, rsi",
    "mov eax, 0x50560000",
    "mov rdi, [r12 + 0x100]",
    "mov rsi, [r12 + 0x108]",
    "xor edx, edx",
    "xor ecx, ecx",
    "call 5f",
    "mov [r12 + 8], rax",
    "mov [r12 + 16], rdx",
    "mov eax, 0x5056000a",
    "lea rdi, [r12 + 0x110]",
    "mov esi, 5",
    "xor edx, edx",
    "mov r15, 0x1122334455667788",
    "call 5f",
    "mov [r12 + 24], rax",
    "mov [r12 + 32], rdx",
    "mov [r12 + 40], r15",
    "mov eax, 3",
    "out 0xf4, al",
    "hlt",
    "5: out 0xe7, eax",
    "ret",
);

#[test]
fn hypercalls_by_way_of_their_port() {
    assert_eq!((HYPERCALL_PORT, Call::Negotiate as u64, Call::ConsoleWrite as u64), (0xe7, 0x5056_0000, 0x5056_000a));
    let Some(mut m) = on_kvm(calls(), &[]) else { return };
    let console = pv_abi::feature::Features::of(&[pv_abi::feature::Feature::Console]);
    let version = pv_abi::Version::CURRENT.to_bits();
    m.mem.write_obj(u64::from(version), GuestAddress(machine::ANSWER + 0x100)).unwrap();
    m.mem.write_obj(console.0, GuestAddress(machine::ANSWER + 0x108)).unwrap();
    m.mem.write_slice(b"hello", GuestAddress(machine::ANSWER + 0x110)).unwrap();
    end(&mut m, 3);
    assert_eq!(m.answer(0), Error::NotSupported.to_rax());
    assert_eq!((m.answer(1), m.answer(2)), (0, console.0), "negotiated");
    assert_eq!((m.answer(3), m.answer(4)), (0, 5), "written");
    assert_eq!(m.answer(5), 0x1122_3344_5566_7788);
    assert_eq!(m.console.text(), "hello");
    assert_eq!(m.counter("hypercalls"), 3);
}

guest!(
    bells,
    "mov edx, 0x700",
    "mov ebx, 0xd0001000",
    "mov ecx, 100",
    "2: mov eax, 5",
    "out dx, ax",
    "mov [rbx], ecx",
    "dec ecx",
    "jnz 2b",
    "mov eax, 6",
    "out dx, ax",
    "mov eax, 4",
    "out 0xf4, al",
    "hlt",
);

/// Writes to a doorbell signal its eventfd and make no exit; another value at the same place goes to the bus.
#[test]
fn doorbells_ring_without_an_exit() {
    let Some(mut m) = on_kvm(bells(), &[]) else { return };
    let eventfd = || {
        // SAFETY: makes a new descriptor, which is ours alone.
        unsafe { std::fs::File::from_raw_fd(libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)) }
    };
    let (mut port, mut memory) = (eventfd(), eventfd());
    let doorbells = m.vcpu.doorbells().unwrap();
    let at_port = Place { address: 0x700, port: true, bytes: 2, value: Some(5) };
    let in_memory = Place { address: 0xd000_1000, port: false, bytes: 4, value: None };
    doorbells.attach(at_port, port.as_fd()).unwrap();
    doorbells.attach(in_memory, memory.as_fd()).unwrap();
    assert!(doorbells.attach(at_port, memory.as_fd()).is_err(), "the place is taken");
    end(&mut m, 4);
    for bell in [&mut port, &mut memory] {
        let mut count = [0; 8];
        bell.read_exact(&mut count).unwrap();
        assert_eq!(u64::from_le_bytes(count), 100);
    }
    assert_eq!((m.counter("port writes"), m.counter("MMIO writes")), (2, 0));
    doorbells.detach(at_port, port.as_fd()).unwrap();
    assert!(doorbells.detach(at_port, port.as_fd()).is_err(), "it is gone");
}

guest!(crash, "lidt [rip + 2f]", "ud2", "2: .quad 0, 0");

#[test]
fn a_triple_fault_is_one() {
    let Some(mut m) = on_kvm(crash(), &[]) else { return };
    assert_eq!(drive(0, &mut *m.vcpu, &m.chipset).unwrap(), Driven::Stopped);
    assert_eq!(m.chipset.stop_cause(), Some(StopCause::TripleFault(0)));
}

guest!(sse, "mov eax, 0x77", "xorps xmm0, xmm1", "out 0xf4, al", "hlt");

/// What the emulator of ring 0 does not know ends in a report with the instruction, the registers, and advice.
#[test]
fn an_emulation_failure_is_reported() {
    let Some(mut m) = on_kvm(sse(), &[]) else { return };
    if !kvm::emulates_ring0() {
        eprintln!("SKIPPED: this host's KVM does not emulate ring 0");
        return;
    }
    let error = drive(0, &mut *m.vcpu, &m.chipset).unwrap_err();
    let EngineError::Kvm(KvmError::GaveUp(report)) = &error else { panic!("{error}") };
    assert_eq!(report.cause, Cause::Emulation);
    assert_eq!(report.instruction().as_deref(), Some("xorps xmm0,xmm1"));
    assert_eq!(report.state.rip, machine::CODE + 5);
    let text = error.to_string();
    let first = text.lines().next().unwrap();
    assert!(first.contains("emulates ring 0") && first.ends_with("try --engine bt"), "{first}");
    for part in ["0f 57 c1", "xorps xmm0,xmm1", "64-bit mode, ring 0", "rax 0000000000000077", "rip 0000000000100005"] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

/// The same from the command line: its own status, and the warning of one line before.
#[test]
fn the_command_line_reports_it_with_a_status_of_its_own() {
    if on_kvm(&[], &[]).is_none() || !kvm::emulates_ring0() {
        eprintln!("SKIPPED: there is no KVM that emulates ring 0");
        return;
    }
    let files = Scratch::new();
    // xorps in 32-bit protected mode.
    let kernel = files.file("kernel", &pvh(&[0x0f, 0x57, 0xc1]));
    let output = finish(run(&kernel).args(["--engine", "kvm"]));
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(4), "{text}");
    let mut lines = text.lines();
    let warning = lines.next().unwrap();
    assert!(warning.starts_with("paravane: warning: ") && warning.contains("emulates ring 0"), "{text}");
    let report = lines.next().unwrap();
    assert!(report.starts_with("paravane: this host's KVM") && report.ends_with("try --engine bt"), "{text}");
    assert!(text.contains("32-bit protected mode, ring 0") && text.contains("xorps xmm0,xmm1"), "{text}");
}

#[test]
fn what_only_binary_translation_has_is_refused() {
    if on_kvm(&[], &[]).is_none() {
        return;
    }
    let files = Scratch::new();
    let kernel = files.file("kernel", &pvh(&out(0x505, 1)));
    for option in ["--profile", "--perf-map"] {
        let output = finish(run(&kernel).args(["--engine", "kvm", option]));
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.lines().last().is_some_and(|l| l.contains(option) && l.contains("--engine bt")), "{text}");
    }
}

/// A user without rights to /dev/kvm, or a host without it, gets one sentence that says what to do.
#[test]
fn kvm_out_of_reach_is_one_sentence() {
    let files = Scratch::new();
    let kernel = files.file("kernel", &pvh(&out(0x505, 1)));
    let mut command = run(&kernel);
    command.args(["--engine", "kvm"]);
    // SAFETY: has no arguments and cannot fail.
    if unsafe { libc::geteuid() } == 0 {
        command.uid(65534).gid(65534);
    } else if std::fs::File::options().write(true).open("/dev/kvm").is_ok() {
        eprintln!("SKIPPED: this user may open /dev/kvm, and rights cannot be given up without being root");
        return;
    }
    let output = finish(&mut command);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{text}");
    let last = text.lines().last().unwrap();
    assert!(last.contains("/dev/kvm") && last.contains("--engine bt"), "{text}");
}

/// Runs a guest with local APICs in user space and in the kernel; says why not.
fn with_both_irqchips(code: &[u8], handler: &[u8], f: impl Fn(&mut Machine, IrqChip)) {
    for irqchip in [IrqChip::User, IrqChip::Split] {
        match Machine::with_irqchip(EngineKind::Kvm, irqchip, 1, code, &[], handler, Offer::All) {
            Ok(mut m) => f(&mut m, irqchip),
            Err(e) => eprintln!("SKIPPED with {irqchip:?}: {e}"),
        }
    }
}

guest!(
    level,
    "mov dword ptr [r14 + 0xf0], 0x1ff",
    "mov ebx, 0xfec00000",
    // COM1's pin, level-triggered: it stays up after its first edge, so every end brings the next one.
    "mov dword ptr [rbx], 0x19",
    "mov dword ptr [rbx + 0x10], 0",
    "mov dword ptr [rbx], 0x18",
    "mov dword ptr [rbx + 0x10], 0x8040",
    "mov edx, 0x3f9",
    "mov al, 2",
    "out dx, al",
    "mov edx, 0x3f8",
    "mov al, 0x78",
    "out dx, al",
    "sti",
    "2: pause",
    "cmp qword ptr [rsi], 5",
    "jb 2b",
    "cli",
    "mov eax, 5",
    "out 0xf4, al",
    "hlt",
);
guest!(
    level_done,
    "inc qword ptr [rsi]",
    "cmp qword ptr [rsi], 5",
    "jb 2f",
    "mov dword ptr [rbx + 0x10], 0x18040",
    "2: mov dword ptr [r14 + 0xb0], 0",
    "iretq",
);

/// The I/O APIC hears of the end of a level-triggered interrupt, and sends the next one while its pin is up.
#[test]
fn level_triggered_interrupts_come_again_after_their_end() {
    with_both_irqchips(level(), level_done(), |m, irqchip| {
        end(m, 5);
        assert_eq!(m.answer(0), 5, "{irqchip:?}");
        let ends = m.counter("ends of interrupt");
        assert!(if irqchip == IrqChip::Split { ends >= 4 } else { ends == 0 }, "{irqchip:?}: {ends}");
    });
}

guest!(
    pit,
    // The 8259A with vectors from 0x40 on and all but IRQ 0 masked, and the 8254 at 450 Hz.
    "mov al, 0x11",
    "out 0x20, al",
    "mov al, 0x40",
    "out 0x21, al",
    "mov al, 4",
    "out 0x21, al",
    "mov al, 1",
    "out 0x21, al",
    "mov al, 0xfe",
    "out 0x21, al",
    "mov al, 0x34",
    "out 0x43, al",
    "mov al, 0x50",
    "out 0x40, al",
    "mov al, 0x0a",
    "out 0x40, al",
    "sti",
    "2: hlt",
    "cmp qword ptr [rsi], 10",
    "jb 2b",
    "cli",
    "mov eax, 6",
    "out 0xf4, al",
    "hlt",
);
guest!(pit_done, "inc qword ptr [rsi]", "push rax", "mov al, 0x20", "out 0x20, al", "pop rax", "iretq");

/// Interrupts of the 8259A reach a vCPU that halts, wherever its local APIC is.
#[test]
fn the_8259a_ends_halts() {
    with_both_irqchips(pit(), pit_done(), |m, irqchip| {
        end(m, 6);
        assert!(m.answer(0) >= 10, "{irqchip:?}: {}", m.answer(0));
        assert!(m.counter("interrupts delivered") >= 10, "{irqchip:?}");
    });
}

#[test]
fn halts_end_in_the_kernel() {
    with_both_irqchips(halts(), tick(), |m, irqchip| {
        end(m, 2);
        assert_eq!(m.answer(0), 50, "{irqchip:?}");
        let exits = m.counter("KVM exits");
        assert!(irqchip == IrqChip::User || exits < 50, "{exits} exits");
    });
}

guest!(
    writes,
    "mov rax, [0x318000]",
    "mov [0x310000], rax",
    // Across a page's end, and through a string instruction.
    "mov ecx, 0x312ffc",
    "mov [rcx], rax",
    "mov edi, 0x320ff0",
    "mov ecx, 32",
    "rep stosb",
    "mov eax, 7",
    "out 0xf4, al",
    "hlt",
);

/// A log of written pages has what the guest wrote and what others wrote for it, page by page, and through a hand-over.
#[test]
fn written_pages_are_logged() {
    let Some(mut m) = on_kvm(writes(), &[]) else { return };
    // Accessed and dirty bits that are set already make no writes to page tables.
    for entry in [0x1000, 0x2000, 0x2008, 0x2010, 0x2018].into_iter().chain((0x40_0000..0x40_4000).step_by(8)) {
        let v: u64 = m.mem.read_obj(GuestAddress(entry)).unwrap();
        m.mem.write_obj(v | 0x60, GuestAddress(entry)).unwrap();
    }
    let mut log = m.vm.log_writes().unwrap();
    assert!(m.vm.log_writes().is_err(), "one at a time");
    assert!(log.take().unwrap().is_empty());
    end(&mut m, 7);
    let state = m.vcpu.save().unwrap();
    m.vcpu.load(&state).unwrap();
    m.mem.write_obj(1_u8, GuestAddress(0x33_0fff)).unwrap();
    m.mem.write_slice(&[1; 8192], GuestAddress(0x34_0800)).unwrap();
    let pages = [0x31_0000, 0x31_2000, 0x31_3000, 0x32_0000, 0x32_1000, 0x33_0000, 0x34_0000, 0x34_1000, 0x34_2000];
    assert_eq!(log.take().unwrap(), pages);
    assert!(log.take().unwrap().is_empty(), "each once");
    drop(log);
    assert!(m.vm.log_writes().is_ok());
}
