//! What the shim has to know of the kernel and of the machine to do things natively.

/// The kernel author's knowledge. [`Platform::PC`] is right for a PC with identity-mapped memory; change what differs.
#[derive(Clone, Copy, Debug)]
pub struct Platform {
    /// Guest-physical address of a linear address that is mapped.
    pub to_gpa: fn(u64) -> u64,
    /// Linear address of a guest-physical address in RAM, at least for page tables.
    pub to_linear: fn(u64) -> u64,
    /// Local APIC ID of a CPU index.
    pub apic_id: fn(u32) -> u32,
    /// Linear address of the xAPIC's register page, for CPUs that are not in x2APIC mode.
    pub xapic: u64,
    /// First I/O port of a 16550 UART.
    pub serial: u16,
    /// I/O port of PM1a_CNT (the FADT says), and SLP_TYP of S5 (the DSDT's \_S5 says).
    pub power_off: Option<(u16, u8)>,
    /// TSC frequency in kHz, where the kernel knows better than CPUID and needs no calibration.
    pub tsc_khz: Option<u32>,
}

fn same(address: u64) -> u64 {
    address
}

fn same_id(index: u32) -> u32 {
    index
}

impl Platform {
    /// Identity-mapped memory, APIC IDs equal to CPU indices, COM1, PM1a_CNT at 0x604 with S5 as type 0 as on QEMU's PC.
    pub const PC: Self = Self {
        to_gpa: same,
        to_linear: same,
        apic_id: same_id,
        xapic: 0xfee0_0000,
        serial: 0x3f8,
        power_off: Some((0x604, 0)),
        tsc_khz: None,
    };
}
