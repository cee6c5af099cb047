//! What a kernel does first, and a proof that each of it works: page tables, exceptions, user mode, interrupts.

use core::ptr::{read_volatile, write_volatile};
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
use guest_rt::paging::{PRESENT_WRITABLE, Tables, USER, Window};
use guest_rt::trap::{self, Frame};
use guest_rt::{Page, apic::Apic, cpu, fault, println};

static mut TABLES: Tables = Tables::EMPTY;
static mut DATA: Page = Page::ZERO;
static mut USER_STACK: Page = Page::ZERO;
static ARRIVED: AtomicU32 = AtomicU32::new(0);

/// User code: adds 1 to what RDI points to, then traps with UD2, for INT n in user mode is beyond some KVMs.
const USER_CODE: [u8; 5] = [0x48, 0xff, 0x07, 0x0f, 0x0b];

/// Vector of the first interrupt.
const VECTOR: u8 = 0x40;

/// Brings the machine up and checks each step. Gives the window of 4 KiB pages and the local APIC.
///
/// # Panics
/// Something does not work.
pub(crate) fn bring_up() -> (Window, Apic) {
    let tables = &raw mut TABLES;
    // SAFETY: called once, the only place that takes this reference.
    let window = Window::install(1, unsafe { &mut *tables });
    page_tables(&window);
    user_mode(&window);
    let apic = Apic::enable();
    interrupts(apic);
    println!("boot page tables, exceptions, user mode and interrupts work ({apic:?} APIC)");
    (window, apic)
}

fn page_tables(window: &Window) {
    let data = &raw mut DATA as u64;
    let at = window.address(0);
    // SAFETY: the line loads from an address that maps nothing, and faults.
    let (trap, faulted) = unsafe { fault!("mov rax, [{}]", in(reg) at, out("rax") _) };
    assert!(faulted && trap.frame.vector == 14 && trap.cr2 == at, "an absent page faults: {trap:x?}");
    window.map(0, data | PRESENT_WRITABLE);
    // SAFETY: both addresses are the same page, which nothing else uses.
    unsafe {
        write_volatile(at as *mut u64, 0x1234_5678_9abc_def0);
        assert_eq!(read_volatile(data as *const u64), 0x1234_5678_9abc_def0, "the window shows the page");
    }
}

fn user_mode(window: &Window) {
    let code = &raw mut DATA as u64;
    let stack = &raw mut USER_STACK as u64;
    window.map(0, code | PRESENT_WRITABLE | USER);
    window.map(1, stack | PRESENT_WRITABLE | USER);
    // SAFETY: the pages are the user program's; it writes to its stack page only and ends with UD2.
    unsafe {
        core::ptr::copy_nonoverlapping(USER_CODE.as_ptr(), code as *mut u8, USER_CODE.len());
        write_volatile(stack as *mut u64, 41);
        trap::enter_user(window.address(0), window.address(2), 2, trap::USER_CODE, window.address(1));
        let end = trap::last().frame;
        assert_eq!((end.vector, end.cs), (6, trap::USER_CODE), "user mode ended with UD2");
        assert_eq!(read_volatile(stack as *const u64), 42, "user code ran");
    }
}

fn interrupts(apic: Apic) {
    trap::handle(
        VECTOR,
        Some(|frame: &mut Frame| {
            assert_eq!(frame.vector, u64::from(VECTOR));
            ARRIVED.fetch_add(1, Relaxed);
        }),
    );
    apic.send_self(VECTOR);
    assert_eq!(ARRIVED.load(Relaxed), 0, "interrupts are masked");
    // SAFETY: the handler is in place.
    unsafe { cpu::sti() };
    while ARRIVED.load(Relaxed) == 0 {
        core::hint::spin_loop();
    }
    // SAFETY: CPL 0.
    unsafe { cpu::cli() };
    apic.eoi();
    trap::handle(VECTOR, None);
}
