//! A small guest: a page of user code at ring 3, a kernel of a few instructions, and a hook, which is Rust code that stands for
//! the rest of the kernel and changes page tables in guest RAM.
//!
//! | guest-linear address | what is there |
//! |---|---|
//! | [`LOW`] or [`HIGH`], the test's base | the user code, in one page |
//! | base + [`DATA`] | a page of data |
//! | below base + [`STACK`] | four pages of stack |
//! | [`KERNEL`] | guest RAM from its start, for the supervisor alone, as global 2 MiB pages |
//!
//! SYSCALL takes a number in RAX: 0 halts the vCPU, which ends the run; all others write DIL to port [`REPORT`], where the
//! hook is called, and then 2 reloads CR3, 3 executes INVLPG on \[RSI\], 4 loads CR3 with its value XOR RBP, without a flush.
//! RAX, RDX, R12 (and RCX, R11) are lost. #SS, #GP and #PF store what they found as a [`Fault`] on the kernel's stack, and
//! write to port [`FAULT`], where the hook may look at it and say where to go on.
#![allow(unsafe_code)] // Guest RAM is a memfd; host features are asked of the C library.

use paravane_bt::{BtConfig, BtVcpu, GuestRam, Windows};
use paravane_cpu::state::{cr0, cr4, efer};
use paravane_cpu::{Bus, BusOutcome, Reg, Seg, Segment, TableReg, VcpuExit};
use std::cell::Cell;
use std::fs::File;
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// Bases of user code in the two windows. Both begin a GiB.
pub(crate) const LOW: u64 = 0x4000_0000;
pub(crate) const HIGH: u64 = 0x5600_0000_0000;
/// From the base on: a page of data, the end of the stack, and room for what a test maps itself.
pub(crate) const DATA: u64 = 0x10_0000;
pub(crate) const STACK: u64 = 0x20_0000;
pub(crate) const ROOM: u64 = 0x2000_0000;
pub(crate) const KERNEL: u64 = 0xffff_8000_0000_0000;

/// Guest-physical places.
pub(crate) const ROOT: u64 = 0x1000;
pub(crate) const GDT: u64 = 0x2000;
pub(crate) const TSS: u64 = 0x2100;
pub(crate) const IDT: u64 = 0x3000;
pub(crate) const KERNEL_STACK: u64 = 0x9000;
pub(crate) const SYSCALL_CODE: u64 = 0x1_0000;
pub(crate) const FAULT_CODE: u64 = 0x1_1000;
pub(crate) const TABLES: u64 = 0x10_0000;
pub(crate) const CODE_RAM: u64 = 0x40_0000;
pub(crate) const STACK_RAM: u64 = 0x41_0000;
pub(crate) const DATA_RAM: u64 = 0x50_0000;
pub(crate) const OTHER_RAM: u64 = 0x60_0000;
pub(crate) const POOL: u64 = 0x200_0000;
pub(crate) const RAM: u64 = 64 << 20;
pub(crate) const MMIO: u64 = 0xd000_0000;

pub(crate) const REPORT: u16 = 0xe9;
pub(crate) const FAULT: u16 = 0xea;

/// Page-table entry bits: present, writable, user, accessed, dirty; large; global.
pub(crate) const PAGE: u64 = 0x67;
pub(crate) const LARGE: u64 = 0x80;
pub(crate) const GLOBAL: u64 = 0x100;

pub(crate) const STACK_FAULT: u64 = 12;
pub(crate) const GENERAL_PROTECTION: u64 = 13;
pub(crate) const PAGE_FAULT: u64 = 14;

/// What the kernel's stack holds when it reports a fault, from the top of stack on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Fault {
    pub(crate) cr2: u64,
    pub(crate) rdi: u64,
    pub(crate) rsi: u64,
    pub(crate) rdx: u64,
    pub(crate) rcx: u64,
    pub(crate) vector: u64,
    pub(crate) error: u64,
    pub(crate) rip: u64,
    pub(crate) rsp: u64,
}

impl Fault {
    /// Where the kernel's stack pointer is then: 13 words below the end.
    pub(crate) const AT: u64 = KERNEL_STACK - 13 * 8;
    pub(crate) const RIP: u64 = Self::AT + 8 * 8;

    pub(crate) fn read(ram: &Ram) -> Self {
        let word = |n: u64| ram.get(Self::AT + n * 8);
        Self {
            cr2: word(0),
            rdi: word(1),
            rsi: word(2),
            rdx: word(3),
            rcx: word(4),
            vector: word(6),
            error: word(7),
            rip: word(8),
            rsp: word(11),
        }
    }
}

guest!(
    syscall_entry,
    "test eax, eax; jz 5f; mov r12, rax; mov edx, 0xe9; mov eax, edi; out dx, al; cmp r12d, 2",
    "je 2f; cmp r12d, 3; je 3f; cmp r12d, 4; je 4f; sysretq",
    "2: mov rax, cr3; mov cr3, rax; sysretq",
    "3: invlpg [rsi]; sysretq",
    "4: mov rax, cr3; xor rax, rbp; bts rax, 63; mov cr3, rax; sysretq",
    "5: hlt; jmp 5b",
);

// One entry each 16 bytes for vectors 12, 13 and 14.
guest!(
    fault_entries,
    "push 12; jmp 2f; .balign 16; push 13; jmp 2f; .balign 16; push 14",
    "2: push rax; push rcx; push rdx; push rsi; push rdi; mov rax, cr2; push rax; mov edx, 0xea",
    "out dx, al; pop rax; pop rdi; pop rsi; pop rdx; pop rcx; pop rax; add rsp, 16; iretq",
);

/// Guest RAM, as the hook sees it.
#[derive(Clone)]
pub(crate) struct Ram(pub(crate) GuestRam);

impl Ram {
    pub(crate) fn get(&self, gpa: u64) -> u64 {
        self.0.read_obj(GuestAddress(gpa)).unwrap()
    }

    pub(crate) fn put(&self, gpa: u64, value: u64) {
        self.0.write_obj(value, GuestAddress(gpa)).unwrap();
    }

    /// Where the entry that maps `la` is: a PTE (`shift` 12), or the entry of a large page (21 or 30). Its tables must exist.
    pub(crate) fn entry(&self, la: u64, shift: u32) -> u64 {
        let index = |shift: u32| (la >> shift & 0x1ff) * 8;
        let mut at = ROOT + index(39);
        for level in [30, 21, 12].into_iter().filter(|&s| s >= shift) {
            let table = self.get(at);
            assert!(table & 1 != 0, "no page table for {la:#x}");
            at = (table & !0xfff) + index(level);
        }
        at
    }

    /// Guest-physical address of what a small page maps at `la`.
    pub(crate) fn gpa(&self, la: u64) -> u64 {
        (self.get(self.entry(la, 12)) & !0xfff) | la & 0xfff
    }

    /// Writes what small pages map from `la` on.
    pub(crate) fn write(&self, la: u64, bytes: &[u8]) {
        let mut at = 0;
        while at < bytes.len() {
            let here = la + at as u64;
            let len = (bytes.len() - at).min(0x1000 - (here & 0xfff) as usize);
            self.0.write_slice(&bytes[at..at + len], GuestAddress(self.gpa(here))).unwrap();
            at += len;
        }
    }

    /// Reads the same way.
    pub(crate) fn read(&self, la: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        let mut at = 0;
        while at < bytes.len() {
            let here = la + at as u64;
            let len = (bytes.len() - at).min(0x1000 - (here & 0xfff) as usize);
            self.0.read_slice(&mut bytes[at..at + len], GuestAddress(self.gpa(here))).unwrap();
            at += len;
        }
        bytes
    }
}

/// What the hook is told: a report, or a fault.
pub(crate) enum Event<'a> {
    Report(u8),
    Fault(&'a Fault),
}

pub(crate) type Hook = Box<dyn FnMut(Event<'_>) + Send>;

/// Everything around the vCPU.
pub(crate) struct Devices {
    pub(crate) ram: Ram,
    pub(crate) hook: Mutex<Option<Hook>>,
    pub(crate) faults: Mutex<Vec<Fault>>,
    pub(crate) mmio_reads: AtomicU64,
    pub(crate) mmio_writes: AtomicU64,
}

impl Bus for Devices {
    fn pio_read(&self, _: u32, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _: u32, port: u16, data: &[u8]) -> BusOutcome {
        let mut hook = self.hook.lock().unwrap();
        match (port, &mut *hook) {
            (REPORT, Some(hook)) => hook(Event::Report(data[0])),
            (FAULT, hook) => {
                let fault = Fault::read(&self.ram);
                self.faults.lock().unwrap().push(fault);
                match hook {
                    Some(hook) => hook(Event::Fault(&fault)),
                    None => panic!("the guest must not fault here: {fault:x?}"),
                }
            }
            _ => {}
        }
        BusOutcome::Done
    }
    fn mmio_read(&self, _: u32, _: u64, data: &mut [u8]) {
        data.fill(self.mmio_reads.fetch_add(1, Ordering::SeqCst) as u8 + 1);
    }
    fn mmio_write(&self, _: u32, _: u64, _: &[u8]) -> BusOutcome {
        self.mmio_writes.fetch_add(1, Ordering::SeqCst);
        BusOutcome::Done
    }
    no_interrupts!();
    fn stopping(&self) -> bool {
        false
    }
}

/// Held by the guest that may have the windows.
pub(crate) static TURN: Mutex<()> = Mutex::new(());

/// A guest that is ready to run its user code.
pub(crate) struct Guest {
    pub(crate) vcpu: BtVcpu,
    pub(crate) ram: Ram,
    pub(crate) bus: Arc<Devices>,
    pub(crate) policy: Windows,
    pub(crate) base: u64,
    pub(crate) next_table: u64,
    _turn: Option<MutexGuard<'static, ()>>,
}

impl Guest {
    pub(crate) fn new(policy: Windows, base: u64, code: &[u8]) -> Self {
        Self::with_ram(policy, base, code, RAM)
    }

    pub(crate) fn with_ram(policy: Windows, base: u64, code: &[u8], bytes: u64) -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        Self { _turn: Some(turn), ..Self::beside(policy, base, code, bytes) }
    }

    /// A guest beside another one.
    pub(crate) fn beside(policy: Windows, base: u64, code: &[u8], bytes: u64) -> Self {
        eprintln!("windows {policy:?} of one of {} vCPUs, user code at {base:#x}", CPUS.get());
        // SAFETY: takes a name and a flag; a failure shows when the file is used.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(bytes).unwrap();
        let range = (GuestAddress(0), bytes as usize, Some(FileOffset::new(file, 0)));
        let ram = Ram(Arc::new(GuestMemoryMmap::from_ranges_with_files([range]).unwrap()));
        let bus = Arc::new(Devices {
            ram: ram.clone(),
            hook: Mutex::new(None),
            faults: Mutex::default(),
            mmio_reads: AtomicU64::new(0),
            mmio_writes: AtomicU64::new(0),
        });
        let config = BtConfig { windows: policy, cpus: CPUS.get(), ..BtConfig::default() };
        let vcpu = BtVcpu::new(0, ram.0.clone(), bus.clone(), config).unwrap();
        let mut g = Self { vcpu, ram, bus, policy, base, next_table: TABLES, _turn: None };
        g.lay_out(code);
        g
    }

    /// Puts kernel and user code in place.
    pub(crate) fn lay_out(&mut self, code: &[u8]) {
        assert!(code.len() <= 4096);
        for la in (0..RAM).step_by(2 << 20) {
            self.map_with(KERNEL + la, la | 3 | LARGE | GLOBAL, 21);
        }
        for (n, descriptor) in
            [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff]
                .into_iter()
                .enumerate()
        {
            self.ram.put(GDT + n as u64 * 8, descriptor);
        }
        self.ram.put(TSS + 4, KERNEL + KERNEL_STACK);
        for vector in [STACK_FAULT, GENERAL_PROTECTION, PAGE_FAULT] {
            let entry = KERNEL + FAULT_CODE + (vector - 12) * 16;
            self.ram.put(IDT + vector * 16, entry & 0xffff | 8 << 16 | 0x8e << 40 | (entry >> 16 & 0xffff) << 48);
            self.ram.put(IDT + vector * 16 + 8, entry >> 32);
        }
        for (at, code) in [(SYSCALL_CODE, syscall_entry::code()), (FAULT_CODE, fault_entries::code()), (CODE_RAM, code)]
        {
            self.ram.0.write_slice(code, GuestAddress(at)).unwrap();
        }
        let base = self.base;
        self.map(base, CODE_RAM);
        self.map(base + DATA, DATA_RAM);
        for n in 0..4 {
            self.map(base + STACK - 0x4000 + n * 0x1000, STACK_RAM + n * 0x1000);
        }
    }

    /// Maps a small page for user code to write.
    pub(crate) fn map(&mut self, la: u64, gpa: u64) {
        self.map_with(la, gpa | PAGE, 12);
    }

    /// Writes the entry that maps `la`, with tables for it as needed.
    pub(crate) fn map_with(&mut self, la: u64, entry: u64, shift: u32) {
        for level in [39, 30, 21].into_iter().filter(|&s| s > shift) {
            let at = self.ram.entry(la, level);
            if self.ram.get(at) == 0 {
                assert!(self.next_table < CODE_RAM);
                self.ram.put(at, self.next_table | PAGE);
                self.next_table += 0x1000;
            }
        }
        self.ram.put(self.ram.entry(la, shift), entry);
    }

    pub(crate) fn set_hook(&self, hook: impl FnMut(Event<'_>) + Send + 'static) {
        *self.bus.hook.lock().unwrap() = Some(Box::new(hook));
    }

    pub(crate) fn faults(&self) -> Vec<Fault> {
        std::mem::take(&mut self.bus.faults.lock().unwrap())
    }

    /// Runs the user code from its beginning, with these registers, until it halts.
    pub(crate) fn run(&mut self, registers: &[(Reg, u64)]) -> [u64; 16] {
        let gpr = self.run_at(self.base, registers);
        assert!(!self.expects_windows() || self.counter("window mappings made") > 0, "no page was mapped");
        gpr
    }

    /// The same from another place.
    pub(crate) fn run_at(&mut self, rip: u64, registers: &[(Reg, u64)]) -> [u64; 16] {
        let stack = self.base + STACK;
        let st = self.prepare(rip);
        st.gpr[Reg::Rsp as usize] = stack;
        for &(r, value) in registers {
            st.gpr[r as usize] = value;
        }
        assert_eq!(self.vcpu.run().unwrap(), VcpuExit::Halt);
        assert!(!self.expects_windows() || self.counter("windows given") > 0, "no windows in use");
        self.vcpu.state().gpr
    }

    /// Makes the vCPU ready to run user code at `rip`.
    pub(crate) fn prepare(&mut self, rip: u64) -> &mut paravane_cpu::CpuState {
        let st = self.vcpu.state_mut();
        st.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
        st.cr4 |= cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        st.cr3 = ROOT;
        st.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
        (st.star, st.lstar, st.sfmask) = (0x10 << 48 | 8 << 32, KERNEL + SYSCALL_CODE, 0x700);
        st.gdtr = TableReg { base: KERNEL + GDT, limit: 5 * 8 - 1 };
        st.idtr = TableReg { base: KERNEL + IDT, limit: 32 * 16 - 1 };
        st.tr = Segment { base: KERNEL + TSS, limit: 0x67, attr: 0x8b, selector: 0x28 };
        st.seg = [Segment::flat_data(0x1b, 3); 6];
        st.seg[Seg::Cs as usize] = Segment::flat_code(0x23, 3, true);
        (st.cpl, st.rflags, st.halted, st.rip) = (3, 2, 0, rip);
        st.gpr = [0; 16];
        st
    }

    /// Whether windows must be in use: the policy says so, and user code of the host may change the FS base (AT_HWCAP2 bit 1).
    pub(crate) fn expects_windows(&self) -> bool {
        // SAFETY: takes a number, gives a number.
        self.policy == Windows::Always && unsafe { libc::getauxval(libc::AT_HWCAP2) & 2 != 0 }
    }

    pub(crate) fn counter(&self, name: &str) -> u64 {
        self.vcpu.stats().iter().find(|s| s.0 == name).expect("a counter of that name").1
    }
}

/// Runs a test in both windows, under both policies, and with the windows of one of several vCPUs.
pub(crate) fn everywhere(test: impl Fn(Windows, u64)) {
    for base in [LOW, HIGH] {
        test(Windows::Off, base);
        test(Windows::Always, base);
        for cpus in [2, 4] {
            among(cpus, || test(Windows::Always, base));
        }
    }
}

thread_local! {
    static CPUS: Cell<u32> = const { Cell::new(1) };
}

/// How far below the guest's addresses the high windows of such vCPUs may be.
pub(crate) fn distances() -> &'static [u64] {
    match CPUS.get() {
        1 => &[0x2b00_0000_0000],
        2 => &[0x3f80_0000_0000, 0x0f00_0000_0000],
        _ => &[0x2b00_0000_0000, 0x2f40_0000_0000, 0x3b80_0000_0000, 0x3fc0_0000_0000],
    }
}

/// Guests that are made meanwhile have vCPUs of which a machine has so many.
pub(crate) fn among(cpus: u32, test: impl FnOnce()) {
    CPUS.set(cpus);
    test();
    CPUS.set(1);
}
