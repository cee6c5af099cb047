//! SMBIOS: the name and maker of the machine, where programs in the guest look for them (SMBIOS 3.0, chapters 5 to 7).
//!
//! Three structures are enough: the firmware (type 0, which also says that this is a virtual machine), the system (type 1)
//! and the end (type 127). Nothing in them tells one machine from another.

use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestRam;

/// Guest-physical address of the entry point, in the range that a guest without EFI searches.
const ENTRY: u64 = 0xf_0000;
const TABLE: u64 = ENTRY + 0x20;

const MAKER: &str = "Paravane";
const PRODUCT: &str = "Paravane virtual machine";
/// SMBIOS wants a date of the firmware (mm/dd/yyyy); it says nothing here and stays the same.
const DATE: &str = "01/01/2026";

/// Why the tables cannot be placed.
#[derive(Debug, thiserror::Error)]
#[error("the SMBIOS tables do not fit into guest memory; give the guest at least 2 MiB with --memory")]
pub struct SmbiosError;

/// Writes the entry point and the structures.
///
/// # Errors
/// When guest memory ends below 1 MiB.
pub fn write(mem: &GuestRam) -> Result<(), SmbiosError> {
    let table = table();
    mem.write_slice(&table, GuestAddress(TABLE)).map_err(|_| SmbiosError)?;
    mem.write_slice(&entry_point(table.len() as u32), GuestAddress(ENTRY)).map_err(|_| SmbiosError)
}

/// The 64-bit entry point (section 5.2.2).
fn entry_point(table_len: u32) -> [u8; 24] {
    let mut e = [0; 24];
    e[..5].copy_from_slice(b"_SM3_");
    e[6] = 24;
    // Version 3.0; revision 1 of the entry point.
    (e[7], e[10]) = (3, 1);
    e[12..16].copy_from_slice(&table_len.to_le_bytes());
    e[16..24].copy_from_slice(&TABLE.to_le_bytes());
    e[5] = e.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b));
    e
}

fn table() -> Vec<u8> {
    let version = env!("CARGO_PKG_VERSION");
    let mut out = Vec::new();
    // Vendor, version, start segment, date, ROM size; "characteristics not supported"; "is a virtual machine"; releases unknown.
    let bios = [1, 2, 0, 0, 3, 0, 1 << 3, 0, 0, 0, 0, 0, 0, 0, 0, 1 << 4, 0xff, 0xff, 0xff, 0xff];
    structure(&mut out, 0, 0, &bios, &[MAKER, version, DATE]);
    // Manufacturer, product, version; no serial number, UUID (zero: not set), SKU or family; woken by the power switch.
    let mut system = [0; 23];
    (system[0], system[1], system[2], system[20]) = (1, 2, 3, 6);
    structure(&mut out, 1, 1, &system, &[MAKER, PRODUCT, version]);
    structure(&mut out, 127, 2, &[], &[]);
    out
}

/// Header, formatted area, and the strings that the area refers to by number (sections 6.1.2 and 6.1.3).
fn structure(out: &mut Vec<u8>, kind: u8, handle: u16, area: &[u8], strings: &[&str]) {
    out.extend([kind, 4 + area.len() as u8]);
    out.extend(handle.to_le_bytes());
    out.extend(area);
    for s in strings {
        out.extend(s.bytes().chain([0]));
    }
    if strings.is_empty() {
        out.push(0);
    }
    out.push(0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn the_entry_point_leads_to_all_structures() {
        let mem = memory::create(4 << 20).unwrap();
        write(&mem).unwrap();
        let mut entry = [0; 24];
        mem.read_slice(&mut entry, GuestAddress(ENTRY)).unwrap();
        assert_eq!((&entry[..5], entry.iter().fold(0u8, |n, b| n.wrapping_add(*b))), (&b"_SM3_"[..], 0));
        let len = u32::from_le_bytes(entry[12..16].try_into().unwrap()) as usize;
        let mut table = vec![0; len];
        let at = u64::from_le_bytes(entry[16..24].try_into().unwrap());
        mem.read_slice(&mut table, GuestAddress(at)).unwrap();

        // Each structure ends with a double NUL after its formatted area.
        let (mut rest, mut found) = (&table[..], Vec::new());
        while !rest.is_empty() {
            let area = usize::from(rest[1]);
            let strings = rest[area..].windows(2).position(|w| w == [0, 0]).unwrap();
            found.push((rest[0], area, String::from_utf8(rest[area..area + strings].to_vec()).unwrap()));
            rest = &rest[area + strings + 2..];
        }
        let kinds: Vec<_> = found.iter().map(|f| (f.0, f.1)).collect();
        assert_eq!(kinds, [(0, 0x18), (1, 0x1b), (127, 4)]);
        assert_eq!(found[1].2, format!("{MAKER}\0{PRODUCT}\0{}", env!("CARGO_PKG_VERSION")));
    }
}
