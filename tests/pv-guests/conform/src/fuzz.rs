//! Random and mutated calls, as many as the command line says: the hypervisor must neither end nor hang (SAFE-4).
//!
//! Numbers, arguments and memory come from a seed that the command line gives. Arguments are taken from what matters (addresses at edges, limits,
//! masks, values a bit off) and from noise, arrays and the shared page are filled with elements that are nearly right. The guest's own memory has to survive: whatever
//! writes to guest memory is sent to the last pages of RAM, behind which nothing is, or to what must be refused. The guest ends with status 0.

use crate::abi::{Abi, NOT_RAM, Outcome, PAGES, get, put, ram_end};
use crate::irq;
use guest_rt::{console, cpu, info};
use pv_abi::call::{Call, FIRST};
use pv_abi::feature::Features;

struct Random(u64);

/// A page that the hypervisor may write to: one of the last of RAM. Page 0 is the shared one.
fn page(n: usize) -> u64 {
    ram_end() - 4096 * (PAGES - n) as u64
}

/// An address, unless it is one that the guest itself needs.
fn harmless(at: u64) -> u64 {
    if (0x1000..page(0)).contains(&at) { at | page(0) | 1 << 40 } else { at }
}

/// These features in force, and the page shared.
fn begin(abi: Abi, features: Features) -> Outcome {
    abi.negotiate(features).gives("NEGOTIATE", features.0)?;
    abi.call(Call::SharePage, &[page(0)]).gives("SHARE_PAGE", 0)
}

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one(&mut self, of: &[u64]) -> u64 {
        of[self.below(of.len() as u64) as usize]
    }

    /// A scratch page but the one whose contents the guest's loop needs: none.
    fn scratch(&mut self) -> u64 {
        page(self.below(PAGES as u64) as usize)
    }

    /// An address that is one of a scratch page's, or no RAM: nothing that the guest needs.
    fn address(&mut self) -> u64 {
        let at = match self.below(8) {
            0 => self.one(&NOT_RAM),
            1 => ram_end() + self.below(3) * 8,
            2 => ((1 << 40) | self.next()) >> self.below(20),
            3 => self.scratch() + self.below(4096),
            4 => self.scratch() + 4096 - 16,
            _ => self.scratch(),
        };
        harmless(at)
    }

    fn number(&mut self) -> u64 {
        let edges =
            [0, 1, 2, 3, 4, 15, 16, 31, 32, 63, 64, 128, 255, 256, 512, 4095, 4096, 4097, u64::MAX, u64::MAX - 1];
        match self.below(8) {
            0 => self.next(),
            1 => 1 << self.below(64),
            2 => (1_u64 << self.below(64)).wrapping_sub(1),
            _ => self.one(&edges),
        }
    }

    /// An element of an array, mostly sensible.
    fn element(&mut self) -> (u64, u64) {
        let operation = if self.below(8) == 0 { self.below(8) } else { 1 + self.below(4) };
        let address = match operation {
            1 => self.address() & !7,
            2 => harmless(self.next() & !0xfff),
            _ if self.below(8) == 0 => harmless(self.number() & !7),
            _ => 0,
        };
        // A root is only ever refused, for another one would end the guest.
        let value = match (operation, self.below(2)) {
            (5, _) => 1 << (52 + self.below(10)),
            (3 | 4, 0) => 0,
            // A device may take it for an address.
            _ => harmless(self.number()),
        };
        (address | operation, value)
    }
}

/// Takes from an array of page-table updates what would end the guest although each element was harmless when it was written: calls, devices and
/// the hypervisor, by way of the shared page, write to scratch pages too, and an array may begin in the middle of an element.
fn tame(array: u64, count: u64) {
    let end = array.saturating_add(count.min(4096) * 16).min(ram_end());
    let within = array..end;
    if array < page(0) || !array.is_multiple_of(8) {
        return;
    }
    for at in (array..end).step_by(16).filter(|at| at + 16 <= end) {
        let (element, value) = (get(at), get(at + 8));
        match element & 7 {
            // It would write to elements that are still to come.
            1 if within.contains(&((element & !7) + 7)) || within.contains(&(element & !7)) => put(at, 3),
            1 => put(at, harmless(element & !7) | 1),
            // Refused for bits above the 52 that an address may have, or not at all.
            5 if (value >> 52) & 0x3ff == 0 => put(at, 3),
            _ => {}
        }
    }
}

/// Makes the calls and ends the machine.
pub(crate) fn run(abi: Abi, seed: &str) -> ! {
    let calls = info::option("calls").and_then(|c| c.parse().ok()).unwrap_or(100_000_u64);
    let mut r = Random(
        seed.bytes().fold(0x9e37_79b9_7f4a_7c15, |h: u64, b| h.rotate_left(7).wrapping_mul(31) ^ u64::from(b)) | 1,
    );
    let _ = begin(abi, abi.offered);
    for _ in 0..calls {
        match r.below(64) {
            0 => {
                let features = if r.below(2) == 0 { abi.offered } else { Features(r.next() & abi.offered.0) };
                let _ = begin(abi, features);
            }
            // Interrupts of all kinds arrive, ended by the EOI register or by nobody for a while.
            1 => irq::open(),
            2 => {
                put(page(0) + 8, r.next());
                irq::apic().send_self(32 + r.below(223) as u8);
            }
            3..=12 => {
                // Noise or elements in a scratch page, and a field of the shared page.
                let at = r.scratch();
                for n in 0..r.below(64) {
                    let (a, b) = r.element();
                    put(at + 16 * n, a);
                    put(at + 16 * n + 8, b);
                }
                let free = r.scratch();
                put(free, r.address());
                put(free + 8, 1 + r.below(4));
                put(page(0) + 8 * r.below(512), r.next());
            }
            _ => one(abi, &mut r),
        }
    }
    console::exit(0)
}

fn one(abi: Abi, r: &mut Random) {
    let call = Call::ALL[r.below(Call::ALL.len() as u64) as usize];
    let mut a: [u64; 4] = core::array::from_fn(|_| r.number());
    match call {
        Call::Negotiate => {
            a[0] = if r.below(4) == 0 { a[0] } else { 0x1_0000 };
            a[1] = if r.below(2) == 0 { a[1] } else { a[1] & abi.offered.0 };
        }
        Call::SharePage => a[0] = if r.below(4) == 0 { 0 } else { r.address() },
        Call::UpdatePages | Call::ConsoleWrite | Call::ConsoleRead => {
            a[0] = r.address();
            // Inside of the scratch pages, if it is there at all.
            a[1] = if r.below(4) == 0 { a[1] } else { r.below(65) };
            if call == Call::UpdatePages {
                tame(a[0], a[1]);
            }
        }
        // Ranges in memory that the guest needs would be lost: arrays of them are made by hand.
        Call::FreePages => {
            let at = r.scratch();
            put(at, r.scratch());
            put(at + 8, if r.below(4) == 0 { r.one(&[0, 1 << 18, 1 << 30, u64::MAX]) | 1 << 20 } else { 1 });
            a[0] = if r.below(4) == 0 { r.one(&NOT_RAM) } else { at };
            a[1] = u64::from(a[0] == at);
        }
        Call::FlushTlb if r.below(2) == 0 => a = [1, 0, r.next() & !0xfff, 1 + r.below(600)],
        Call::SendIpi if r.below(2) == 0 => a = [1, 0, 32 + r.below(223), 0],
        Call::SetTimer if r.below(2) == 0 => a = [r.below(1 << 40), 32 + r.below(223), 0, 0],
        // A halt needs somebody to end it.
        Call::Halt => {
            let _ = abi.call(Call::Kick, &[0]);
            irq::apic().send_self(0x60);
        }
        Call::VirtioRead | Call::VirtioWrite => {
            a[0] = if r.below(4) == 0 { a[0] } else { 0 };
            a[1] = if r.below(4) == 0 { a[1] } else { r.below(0x120) & !3 };
            a[2] = if r.below(4) == 0 { a[2] } else { 4 };
            // Queues of a device lie in scratch pages or where nothing is, but not where the guest is.
            let small = a[1] < 0x80 || a[1] >= 0xb0;
            a[3] = if small { a[3] & 0xffff_ffff } else { r.scratch() + r.below(256) * 16 };
            if a[1] & 4 != 0 && !small {
                a[3] = r.one(&[0, 0, 1, 0xffff_ffff]);
            }
        }
        Call::Notify => a[0] = if r.below(2) == 0 { a[0] } else { r.below(3) },
        // These end the machine when they succeed.
        Call::Shutdown => a[0] |= 2,
        Call::Panic => a = [r.one(&NOT_RAM), a[1] | 1, a[2], a[3]],
        _ => {}
    }
    for (n, value) in a.iter_mut().enumerate() {
        if n >= call.arguments() && r.below(16) != 0 {
            *value = 0;
        }
    }
    let number = match r.below(64) {
        0 => r.next(),
        1 => call.number() ^ 1 << r.below(64),
        _ => call.number(),
    };
    // A mutated number may be one that ends the machine or halts, or has other rules.
    if number != call.number() && (FIRST..FIRST + 32).contains(&number) {
        return;
    }
    if call == Call::ConsoleWrite && a[1] > 2 && r.below(8) != 0 {
        return;
    }
    if call == Call::FreePages && a[1] > 1 {
        return;
    }
    let answer = abi.raw(number, a);
    assert!(answer.rax == 0 || answer.rax > 0xffff_ffff_ffff_f000, "RAX is {:#x} after {number:#x} {a:x?}", answer.rax);
    if call == Call::Halt {
        // SAFETY: HALT enables interrupts.
        unsafe { cpu::cli() };
    }
}
