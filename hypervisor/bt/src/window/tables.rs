//! What the guest's page tables say about a page that user code reaches through a window.

use super::ADDRESS;
use crate::engine::Engine;
use paravane_cpu::Env;
use paravane_cpu::state::efer;

/// A page table: the address bits it serves, where it is, and what all above it permit.
#[derive(Clone, Copy)]
pub(super) struct Table {
    place: u64,
    at: u64,
    writable: bool,
    executable: bool,
}

/// What the guest's page tables say about a page.
#[derive(Clone, Copy)]
pub(super) struct Leaf {
    pub(super) gpa: u64,
    pub(super) writable: bool,
    pub(super) executable: bool,
    pub(super) large: bool,
}

impl Engine {
    /// What the current page tables let user code do with a page it has used before. Changes nothing. `cached` is the last
    /// page table, with the address bits it serves.
    pub(super) fn leaf(&mut self, la: u64, cached: &mut Option<Table>) -> Option<Leaf> {
        use paravane_cpu::mmu::pte::{A, D, NX, P, PS, RW, US};
        let st = self.cpu();
        if st.efer & efer::LMA == 0 {
            return None;
        }
        let nx = |e: u64| e & NX != 0;
        let reserved = |e: u64| nx(e) && st.efer & efer::NXE == 0;
        let table = match *cached {
            Some(t) if t.place == la >> 21 => t,
            _ => {
                let mut t = Table { place: la >> 21, at: st.cr3 & ADDRESS, writable: true, executable: true };
                for shift in [39, 30, 21] {
                    let e = self.read_pte(t.at + ((la >> shift) & 0x1ff) * 8, 8)?;
                    if e & (P | US | A) != P | US | A || reserved(e) {
                        return None;
                    }
                    t.writable &= e & RW != 0;
                    t.executable &= !nx(e);
                    if e & PS != 0 {
                        let gpa = (e & ADDRESS & !0x1f_ffff) | (la & 0x1f_f000);
                        let leaf =
                            Leaf { gpa, writable: t.writable && e & D != 0, executable: t.executable, large: true };
                        return (shift == 21).then_some(leaf);
                    }
                    t.at = e & ADDRESS;
                }
                *cached.insert(t)
            }
        };
        let e = self.read_pte(table.at + ((la >> 12) & 0x1ff) * 8, 8)?;
        if e & (P | US | A) != P | US | A || reserved(e) {
            return None;
        }
        Some(Leaf {
            gpa: e & ADDRESS,
            writable: table.writable && e & (RW | D) == RW | D,
            executable: table.executable && !nx(e),
            large: false,
        })
    }
}
