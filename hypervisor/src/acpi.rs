//! The ACPI tables: what the machine consists of, for the guest to read (ACPI 6.4, chapter 5).
//!
//! Everything lies from 0xe0000 up, where a guest without EFI looks for the RSDP; SMBIOS follows at 0xf0000.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package,
    ResourceTemplate,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress};

use crate::chipset::{self, MmioSlot, PVPANIC};
use crate::devices::acpi_pm::{PM_TMR, PM1A_CNT, PM1A_EVT, SLP_TYP_S5};
use crate::devices::{ioapic, lapic};
use crate::memory::{self, GuestRam, PCI_MMIO32};

/// Guest-physical address of the RSDP.
pub const RSDP: u64 = 0xe_0000;
const TABLES: u64 = 0xe_0040;
const END: u64 = 0xf_0000;

const OEM: [u8; 6] = *b"PARAVN";
const OEM_TABLE: [u8; 8] = *b"PARAVANE";
const SCI: u8 = 9;
const RESET_PORT: u64 = 0xcf9;
const RESET_VALUE: u8 = 6;

/// Why the tables cannot be placed.
#[derive(Debug, thiserror::Error)]
#[error("the ACPI tables do not fit into guest memory; give the guest at least 2 MiB with --memory")]
pub struct AcpiError;

/// Writes all tables for a machine of `cpus` vCPUs and these memory-mapped devices; gives the RSDP's address.
///
/// # Errors
/// When guest memory ends below 1 MiB.
pub fn write(mem: &GuestRam, cpus: u32, mmio: &[MmioSlot]) -> Result<u64, AcpiError> {
    let mut at = TABLES;
    let mut place = |bytes: &[u8]| {
        let here = at;
        at = (at + bytes.len() as u64).next_multiple_of(64);
        if at > END {
            return Err(AcpiError);
        }
        mem.write_slice(bytes, GuestAddress(here)).map_err(|_| AcpiError)?;
        Ok(here)
    };
    let dsdt = place(sdt(dsdt(high_window(mem), mmio)).as_slice())?;
    let facs = place(&facs())?;
    let fadt = place(fadt(dsdt, facs).as_slice())?;
    let madt = place(madt(cpus).as_slice())?;
    let mut xsdt = Sdt::new(*b"XSDT", 36, 1, OEM, OEM_TABLE, 1);
    xsdt.append(fadt);
    xsdt.append(madt);
    let xsdt = place(xsdt.as_slice())?;
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    mem.write_slice(&rsdp, GuestAddress(RSDP)).map_err(|_| AcpiError)?;
    Ok(RSDP)
}

fn sdt(aml: Vec<u8>) -> Sdt {
    let mut t = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, 1);
    t.append_slice(&aml);
    t
}

/// Bytes of the window for PCI BARs above all RAM.
const HIGH_WINDOW: u64 = 64 << 30;

/// The window for PCI BARs above all RAM: first and last address.
fn high_window(mem: &GuestRam) -> (u64, u64) {
    let ram_end = memory::ranges(mem).iter().map(|(start, len)| start + len).max().unwrap_or(0);
    let start = ram_end.max(memory::HIGH_RAM_START).next_multiple_of(1 << 30);
    (start, start + HIGH_WINDOW - 1)
}

/// The interrupts of all PCI slots: INTA# of each on its I/O APIC pin (ACPI 6.4, section 6.2.13).
fn interrupt_routes(out: &mut dyn AmlSink) {
    let rows: Vec<_> = (1..32u32).map(|slot| (slot << 16 | 0xffff, chipset::pci_pin(slot as usize) as u32)).collect();
    let zero = 0u8;
    let packages: Vec<_> = rows.iter().map(|(slot, pin)| Package::new(vec![slot, &zero, &zero, pin])).collect();
    let all = Package::new(packages.iter().map(|p| p as &dyn Aml).collect());
    Name::new("_PRT".into(), &all).to_aml_bytes(out);
}

/// Aml made by a function.
struct With(fn(&mut dyn AmlSink));

impl Aml for With {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        (self.0)(sink);
    }
}

/// Memory-mapped virtio devices, as Linux's virtio_mmio driver knows them.
fn virtio_mmio(slots: &[MmioSlot], out: &mut Vec<u8>) {
    for (n, slot) in slots.iter().enumerate() {
        let registers = Memory32Fixed::new(true, slot.base as u32, 0x1000);
        let irq = Interrupt::new(true, false, false, true, slot.gsi);
        let (hid, uid) = ("LNRO0005", n as u32);
        let path = format!("_SB_.V{n:03X}");
        Device::new(
            path.as_str().into(),
            vec![
                &Name::new("_HID".into(), &hid),
                &Name::new("_UID".into(), &uid),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers, &irq])),
            ],
        )
        .to_aml_bytes(out);
    }
}

/// The devices that a guest cannot find by itself.
fn dsdt(high: (u64, u64), mmio: &[MmioSlot]) -> Vec<u8> {
    let mut out = Vec::new();
    let zero = 0u8;
    let s5 = SLP_TYP_S5;
    Name::new("_S5_".into(), &Package::new(vec![&s5, &s5, &zero, &zero])).to_aml_bytes(&mut out);

    let buses = AddressSpace::new_bus_number(0u16, 255);
    let config = IO::new(0xcf8, 0xcf8, 1, 8);
    let (low_io, high_io) = (AddressSpace::new_io(0u16, 0xcf7, None), AddressSpace::new_io(0xd00u16, 0xffff, None));
    let (start, end) = (PCI_MMIO32.0 as u32, PCI_MMIO32.1 as u32 - 1);
    let window = AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, start, end, None);
    let window64 = AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, high.0, high.1, None);
    let crs = ResourceTemplate::new(vec![&buses, &config, &low_io, &high_io, &window, &window64]);
    let (hid, uid) = (EISAName::new("PNP0A03"), 0u8);
    Device::new(
        "_SB_.PCI0".into(),
        vec![
            &Name::new("_HID".into(), &hid),
            &Name::new("_UID".into(), &uid),
            &Name::new("_CRS".into(), &crs),
            &With(interrupt_routes),
        ],
    )
    .to_aml_bytes(&mut out);
    virtio_mmio(mmio, &mut out);

    // Ports that belong to no other device here, so that nobody gives them to a PCI card: PM block, debug exit.
    let pm_io = IO::new(PM1A_EVT, PM1A_EVT, 1, 0x10);
    let debug_io = IO::new(0xf4, 0xf4, 1, 1);
    Device::new(
        "_SB_.MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &uid),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&pm_io, &debug_io])),
        ],
    )
    .to_aml_bytes(&mut out);

    let com_irq = Interrupt::new(true, true, false, false, 4);
    let com_io = IO::new(0x3f8, 0x3f8, 1, 8);
    Device::new(
        "_SB_.COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &uid),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&com_irq, &com_io])),
        ],
    )
    .to_aml_bytes(&mut out);

    let rtc_irq = Interrupt::new(true, true, false, false, 8);
    let rtc_io = IO::new(0x70, 0x70, 1, 2);
    Device::new(
        "_SB_.RTC_".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&rtc_io, &rtc_irq])),
        ],
    )
    .to_aml_bytes(&mut out);

    let panic_io = IO::new(PVPANIC, PVPANIC, 1, 1);
    let (present, panic_hid) = (0xfu8, "QEMU0001");
    Device::new(
        "_SB_.PEVT".into(),
        vec![
            &Name::new("_HID".into(), &panic_hid),
            &Name::new("_STA".into(), &present),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&panic_io])),
        ],
    )
    .to_aml_bytes(&mut out);
    out
}

/// The FACS, which a guest with ACPI fixed hardware expects (section 5.2.10).
fn facs() -> [u8; 64] {
    let mut t = [0; 64];
    t[..4].copy_from_slice(b"FACS");
    t[4] = 64;
    t[32] = 2;
    t
}

/// The FADT (section 5.2.9), by offset.
fn fadt(dsdt: u64, facs: u64) -> Sdt {
    let mut t = Sdt::new(*b"FACP", 276, 6, OEM, OEM_TABLE, 1);
    t.write_u32(36, facs as u32);
    t.write_u32(40, dsdt as u32);
    t.write_u16(46, u16::from(SCI));
    t.write_u32(56, u32::from(PM1A_EVT));
    t.write_u32(64, u32::from(PM1A_CNT));
    t.write_u32(76, u32::from(PM_TMR));
    t.write_u8(88, 4);
    t.write_u8(89, 2);
    t.write_u8(91, 4);
    // C2 and C3 are not there.
    t.write_u16(96, 0xfff);
    t.write_u16(98, 0xfff);
    t.write_u8(108, 0x32);
    // Legacy devices, no VGA, no keyboard controller to probe.
    t.write_u16(109, 1 | 1 << 2);
    // WBINVD, C1, no power or sleep button, RTC wake not fixed, reset register.
    t.write_u32(112, 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 10);
    let mut gas = |at: usize, port: u64, bits: u8, size: u8| {
        t.write_bytes(at, &[1, bits, 0, size]);
        t.write_u64(at + 4, port);
    };
    gas(116, RESET_PORT, 8, 1);
    gas(148, u64::from(PM1A_EVT), 32, 2);
    gas(172, u64::from(PM1A_CNT), 16, 2);
    gas(208, u64::from(PM_TMR), 32, 3);
    t.write_u8(128, RESET_VALUE);
    t.write_u8(131, 4);
    t.write_u64(140, dsdt);
    t.write_bytes(268, b"Paravane");
    t.update_checksum();
    t
}

/// The MADT (section 5.2.12): local APICs, the I/O APIC, and how ISA interrupts reach it.
fn madt(cpus: u32) -> Sdt {
    let mut t = Sdt::new(*b"APIC", 44, 5, OEM, OEM_TABLE, 1);
    t.write_u32(36, lapic::BASE as u32);
    t.write_u32(40, 1);
    for n in 0..cpus {
        t.append_slice(&[0, 8, n as u8, n as u8, 1, 0, 0, 0]);
    }
    let mut io = [1, 12, cpus as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    io[4..8].copy_from_slice(&(ioapic::BASE as u32).to_le_bytes());
    t.append_slice(&io);
    // ISA IRQ 0 is pin 2; the SCI is level-triggered, active high.
    t.append_slice(&[2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    t.append_slice(&[2, 10, 0, SCI, SCI, 0, 0, 0, 0x0d, 0]);
    // NMI on LINT1 of every CPU.
    t.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    t
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |n, b| n.wrapping_add(*b))
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let mem = memory::create(4 << 20).unwrap();
        let rsdp = write(&mem, 3, &[MmioSlot { base: 0xf000_0000, gsi: 16 }]).unwrap();
        let get = |at: u64, n: usize| {
            let mut b = vec![0; n];
            mem.read_slice(&mut b, GuestAddress(at)).unwrap();
            b
        };
        let table = |at: u64| {
            let len = u32::from_le_bytes(get(at + 4, 4).try_into().unwrap());
            get(at, len as usize)
        };
        let head = get(rsdp, 36);
        assert_eq!(&head[..8], b"RSD PTR ");
        assert_eq!((sum(&head[..20]), sum(&head)), (0, 0));
        let xsdt = table(u64::from_le_bytes(head[24..32].try_into().unwrap()));
        assert_eq!(sum(&xsdt), 0);
        let entries: Vec<_> = xsdt[36..].chunks(8).map(|c| table(u64::from_le_bytes(c.try_into().unwrap()))).collect();
        assert_eq!(entries.iter().map(|t| &t[..4]).collect::<Vec<_>>(), [b"FACP", b"APIC"]);
        assert!(entries.iter().all(|t| sum(t) == 0));
        assert_eq!(entries[1][44..].chunks(8).take_while(|c| c[0] == 0 && c[1] == 8).count(), 3);
        let dsdt = table(u64::from_le_bytes(entries[0][140..148].try_into().unwrap()));
        assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
    }
}
