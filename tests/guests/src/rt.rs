//! Runtime: serial TAP output, interrupt table, trap records and the way out.
use core::arch::asm;

/// What the last exception left behind; the layout is shared with `boot.s`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Trap {
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub cr2: u64,
    pub count: u64,
    pub resume: u64,
    pub kernel_rsp: u64,
}
#[unsafe(no_mangle)]
pub static mut TRAP: Trap =
    Trap { vector: 0, error: 0, rip: 0, cs: 0, rflags: 0, rsp: 0, ss: 0, cr2: 0, count: 0, resume: 0, kernel_rsp: 0 };
static mut IDT: [[u64; 2]; 256] = [[0; 2]; 256];
static mut TSS: [u32; 26] = [0; 26];
#[repr(align(16))]
#[allow(dead_code, reason = "reached through its address")]
struct Stack([u8; 16384]);
static mut IST: Stack = Stack([0; 16384]);
static mut TESTS: u32 = 0;
static mut FAILED: u32 = 0;

unsafe extern "C" {
    static stub_table: [u64; 256];
    static mut GDT: [u64; 8];
    static start_info: u64;
    pub fn enter_user(rip: u64, rsp: u64, rflags: u64, cs: u64);
}

fn put(byte: u8) {
    // SAFETY: polls and writes COM1, which nothing else in the guest uses.
    unsafe {
        let mut status = 0u8;
        while status & 0x20 == 0 {
            asm!("in al, dx", in("dx") 0x3fdu16, out("al") status);
        }
        asm!("out dx, al", in("dx") 0x3f8u16, in("al") byte);
    }
}

/// Prints text.
pub fn text(t: &str) {
    t.bytes().for_each(put);
}

/// Prints a number in decimal.
pub fn decimal(n: u32) {
    if n >= 10 {
        decimal(n / 10);
    }
    put(b'0' + (n % 10) as u8);
}

fn hex(n: u64) {
    if n >= 16 {
        hex(n >> 4);
    }
    put(b"0123456789abcdef"[n as usize & 15]);
}

/// What a case can be about. The `core` library's formatting is not used: it was built with SSE.
pub trait Show {
    fn show(&self);
}
macro_rules! number { ($($t:ty)*) => { $(impl Show for $t { fn show(&self) { hex(*self as u64) } })* } }
number!(u8 u16 u32 u64 usize bool);
impl<T: Show, const N: usize> Show for [T; N] {
    fn show(&self) {
        put(b'[');
        for item in self {
            item.show();
            put(b' ');
        }
        put(b']');
    }
}
macro_rules! tuple {
    ($($n:ident)*) => {
        impl<$($n: Show),*> Show for ($($n,)*) {
            #[allow(non_snake_case, reason = "names of types and values at once")]
            fn show(&self) {
                let ($($n,)*) = self;
                put(b'(');
                $($n.show(); put(b' ');)*
                put(b')');
            }
        }
    };
}
tuple!(A B);
tuple!(A B C);
tuple!(A B C D);
tuple!(A B C D E);
tuple!(A B C D E F);
tuple!(A B C D E F G);

/// The last trap, read after the asm block that caused it.
pub fn trap() -> Trap {
    // SAFETY: one CPU, and traps only happen inside the asm blocks of tests.
    unsafe { core::ptr::read_volatile(&raw const TRAP) }
}

/// Prints one TAP line; a failure shows what was found and what was wanted.
pub fn check<T: PartialEq + Show>(name: &str, got: T, want: T) {
    // SAFETY: one CPU, never called from a trap.
    let number = unsafe {
        TESTS += 1;
        TESTS
    };
    let passed = got == want;
    text(if passed { "ok " } else { "not ok " });
    decimal(number);
    text(" - ");
    text(name);
    if !passed {
        // SAFETY: as above.
        unsafe { FAILED += 1 }
        text(" # got ");
        got.show();
        text(" want ");
        want.show();
    }
    put(b'\n');
}

/// The kernel command line, from the PVH start info.
fn command_line() -> &'static [u8] {
    // SAFETY: `boot.s` stored the structure's address; its field at 24 is the line's, and memory below 4 GiB is mapped one to one.
    unsafe {
        let info = core::ptr::read_volatile(&raw const start_info);
        if info == 0 {
            return &[];
        }
        let line = core::ptr::read_volatile((info + 24) as *const u64);
        if line == 0 {
            return &[];
        }
        let mut len = 0;
        while len < 4096 && core::ptr::read_volatile((line + len) as *const u8) != 0 {
            len += 1;
        }
        core::slice::from_raw_parts(line as *const u8, len as usize)
    }
}

/// Byte by byte: comparing slices would call into a library that is not there.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(x, y)| x == y)
}

/// Whether a case is to run: `skip=a,b` on the command line names those that are not, because they would end the machine.
pub fn wanted(name: &str) -> bool {
    let words = command_line().split(|&b| b == b' ').filter(|w| w.len() > 5 && same(&w[..5], b"skip="));
    !words.flat_map(|w| w[5..].split(|&b| b == b',')).any(|w| same(w, name.as_bytes()))
}

pub fn exit(value: u32) -> ! {
    loop {
        // SAFETY: the debug-exit port ends the machine; hlt covers a machine without it.
        unsafe { asm!("out dx, eax", "cli", "hlt", in("dx") 0xf4u16, in("eax") value) }
    }
}

/// Prints the plan and leaves with 0 only when every test passed.
pub fn finish() -> ! {
    // SAFETY: one CPU.
    let (tests, failed) = unsafe { (TESTS, FAILED) };
    text("1..");
    decimal(tests);
    put(b'\n');
    exit((failed != 0 || tests == 0) as u32)
}

#[unsafe(no_mangle)]
extern "C" fn unexpected_trap() -> ! {
    let t = trap();
    for (name, value) in [("Bail out! vector ", t.vector), (" error ", t.error), (" rip ", t.rip), (" cr2 ", t.cr2)] {
        text(name);
        hex(value);
    }
    put(b'\n');
    exit(2)
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo) -> ! {
    text("Bail out! panic");
    if let Some(at) = info.location() {
        text(" at ");
        text(at.file());
        put(b':');
        decimal(at.line());
    }
    put(b'\n');
    exit(2)
}

/// Installs the TSS (RSP0 and IST1) and an IDT whose every gate uses IST1; gates 3 and 0x80 open to ring 3.
pub fn init() {
    // SAFETY: runs once, before any trap can happen; the tables are static.
    unsafe {
        let top = &raw const IST as u64 + 16384;
        for slot in [1, 9] {
            TSS[slot] = top as u32;
            TSS[slot + 1] = (top >> 32) as u32;
        }
        TSS[25] = 104 << 16;
        let base = &raw const TSS as u64;
        GDT[6] = 103 | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
        GDT[7] = base >> 32;
        for vector in 0..256 {
            let at = stub_table[vector];
            let dpl = if vector == 3 || vector == 0x80 { 3 } else { 0 };
            IDT[vector] =
                [at & 0xffff | 8 << 16 | 1 << 32 | (0x8e | dpl << 5) << 40 | (at >> 16 & 0xffff) << 48, at >> 32];
        }
        let pointer: [u16; 5] = {
            let b = &raw const IDT as u64;
            [4095, b as u16, (b >> 16) as u16, (b >> 32) as u16, (b >> 48) as u16]
        };
        asm!("lidt [{}]", "ltr {:x}", in(reg) &pointer, in(reg) 0x30u64);
    }
}

/// Points an interrupt gate at `handler` (0: not present); gives the handler it had.
pub fn set_gate(vector: usize, handler: u64) -> u64 {
    // SAFETY: one CPU; the caller's handler ends with IRETQ.
    unsafe {
        let gate = &raw mut IDT[vector];
        let [low, high] = core::ptr::read_volatile(gate);
        let old = if low >> 47 & 1 == 0 { 0 } else { low & 0xffff | low >> 32 & 0xffff_0000 | high << 32 };
        let present = if handler == 0 { 0 } else { 0x8e << 40 };
        let new = handler & 0xffff | 8 << 16 | 1 << 32 | present | (handler >> 16 & 0xffff) << 48;
        core::ptr::write_volatile(gate, [new, handler >> 32]);
        old
    }
}

/// Runs asm that must fault; yields (the trap, the address of the faulting line, whether a trap happened).
#[macro_export]
macro_rules! fault {
    ($body:literal $(, $($operand:tt)*)?) => {{
        let before = $crate::rt::trap().count;
        let at: u64;
        core::arch::asm!(
            "lea r11, [rip + 3f]", "mov [rip + TRAP + 72], r11", "lea r11, [rip + 2f]",
            "2:", $body, "3:", "mov qword ptr [rip + TRAP + 72], 0",
            $($($operand)*,)? out("r11") at
        );
        let trap = $crate::rt::trap();
        (trap, at, trap.count - before)
    }};
}
