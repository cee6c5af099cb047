//! Where high windows are: which guest addresses belong to one, and where its pages are mapped in this process.
//!
//! Emitted code tells by a few address bits, all of which must be set, whether an address belongs to its vCPU's high window
//! ([`High::mask`]). That leaves chunks of the guest's address space with holes between them, and in the holes' images on the host lie
//! the chunks of other vCPUs' windows. Linux puts position-independent programs and their heaps around 0x5555_5555_4000 plus up to 2^40, and
//! grows libraries, mappings and stacks downwards from at most 2^47, less up to 2^40 and a gap. Bits 46, 44 and 42 are set in all of these.
//!
//! **No vCPU reaches what another has mapped.** A window maps less than its chunks ([`High::mapped`]), so that from what passes a check, with
//! anything that a block may add to it ([`REACH`]), it is not possible to reach a page that another window maps. The compiler verifies that
//! below, chunk by chunk.

use super::UNMAPPED;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// An address of a high window has this bit, and none above.
pub(crate) const HIGH_SHIFT: u8 = 46;

const TIB: u64 = 1 << 40;

/// How far from what it has checked a block may reach: by constants, and by an index below 2^32 that is scaled by at most 8.
const REACH: u64 = super::REACH + (8 << 32);

/// Host addresses reserved for high windows, all of which they may touch.
const RESERVED: Range<u64> = 0x1400_0000_0000..0x5540_0000_0000;

/// A vCPU's high window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct High {
    /// The bits by which its addresses are told.
    pub(crate) mask: u64,
    /// How far below the guest's addresses its host addresses are.
    pub(crate) distance: u64,
    /// Guest addresses that may be mapped: start and end.
    pub(super) mapped: [(u64, u64); 2],
}

/// The only window of a process.
pub(super) const WHOLE: High = High {
    mask: 1 << HIGH_SHIFT,
    distance: 0x2b00_0000_0000,
    mapped: [(1 << 46, 1 << 46 | 1 << 45), (1 << 46 | 1 << 45, 1 << 47)],
};

/// Windows that there may be beside each other.
pub(super) const PARTS: [High; 4] = [part(0), part(17), part(66), part(83)];

/// A window that is lower by so many quarters of a TiB.
const fn part(quarters: u64) -> High {
    High {
        mask: 1 << 46 | 1 << 44 | 1 << 42,
        distance: WHOLE.distance + quarters * (TIB / 4),
        mapped: [(0x5480_0000_0000, 0x5780_0000_0000), (0x7c80_0000_0000, 0x8000_0000_0000)],
    }
}

impl High {
    /// Whether emitted code takes an address to be in the window.
    pub(crate) const fn contains(&self, la: u64) -> bool {
        la & self.mask == self.mask && la >> (HIGH_SHIFT + 1) == 0
    }

    /// Whether a page may be mapped in the window.
    pub(super) const fn covers(&self, la: u64) -> bool {
        let [a, b] = self.mapped;
        (a.0 <= la && la < a.1) || (b.0 <= la && la < b.1)
    }

    /// The window of a machine's only vCPU, for tests.
    #[cfg(test)]
    pub(crate) fn only() -> Self {
        WHOLE
    }

    /// The window of one of several vCPUs, for tests.
    #[cfg(test)]
    pub(crate) fn one_of_several() -> Self {
        PARTS[1]
    }

    /// Whether all that emitted code may touch by this window lies in what is reserved, and outside of what `other` maps.
    const fn apart(&self, other: Option<&Self>) -> bool {
        let size = self.mask & self.mask.wrapping_neg();
        let mut chunk = 0;
        while chunk < 1 << (HIGH_SHIFT + 1) {
            if self.contains(chunk) {
                if chunk < self.distance + REACH {
                    return false;
                }
                let (start, end) = (chunk - self.distance - REACH, chunk + size - self.distance + REACH);
                if start < RESERVED.start || end > RESERVED.end {
                    return false;
                }
                let mut n = 0;
                while let Some(other) = other
                    && n < 2
                {
                    let (a, b) = other.mapped[n];
                    if a - other.distance < end && start < b - other.distance {
                        return false;
                    }
                    n += 1;
                }
            }
            chunk += size;
        }
        true
    }
}

const _: () = {
    assert!(WHOLE.apart(None));
    let mut a = 0;
    while a < PARTS.len() {
        assert!(PARTS[a].apart(None));
        let mut b = 0;
        while b < PARTS.len() {
            assert!(a == b || PARTS[a].apart(Some(&PARTS[b])));
            b += 1;
        }
        let mut n = 0;
        while n < 2 {
            let (start, end) = PARTS[a].mapped[n];
            assert!(PARTS[a].contains(start) && PARTS[a].contains(end - 1));
            n += 1;
        }
        a += 1;
    }
};

/// Which windows of this process are taken: bit n for [`PARTS`], and one more for [`WHOLE`].
static TAKEN: Mutex<u8> = Mutex::new(0);
const WHOLE_BIT: u8 = 1 << PARTS.len();

/// A window that is taken, until dropped. Nothing may be mapped in it then.
pub(super) struct Held {
    bit: u8,
    window: High,
}

impl Held {
    /// Takes a window that goes with those of other vCPUs, or else the only one; `None` when there is none left, or the host's
    /// addresses cannot be had.
    pub(super) fn new(several: bool) -> Option<Self> {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let (bit, window) = if several {
            let n = (0..PARTS.len()).find(|n| *taken & (WHOLE_BIT | 1 << n) == 0)?;
            // Emitted code checks several bits with ANDN.
            std::arch::is_x86_feature_detected!("bmi1").then_some((1 << n, PARTS[n]))?
        } else {
            (*taken == 0).then_some((WHOLE_BIT, WHOLE))?
        };
        if *taken == 0 && !reserve() {
            return None;
        }
        *taken |= bit;
        Some(Self { bit, window })
    }

    pub(super) fn window(&self) -> High {
        self.window
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        *taken &= !self.bit;
        if *taken == 0 {
            release();
        }
    }
}

const LEN: usize = (RESERVED.end - RESERVED.start) as usize;

/// Reserves the addresses of high windows; false when anything is there already.
fn reserve() -> bool {
    reserve_at(RESERVED.start, LEN)
}

/// Reserves host addresses, at which nothing is mapped then; false when anything is there already.
pub(crate) fn reserve_at(start: u64, len: usize) -> bool {
    let flags = UNMAPPED | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: a fresh reservation that replaces nothing.
    let at = unsafe { libc::mmap(start as *mut libc::c_void, len, libc::PROT_NONE, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return false;
    }
    if at as u64 != start {
        // Kernels before 4.17 take the address as a hint.
        // SAFETY: what was just mapped.
        unsafe { libc::munmap(at, len) };
        return false;
    }
    true
}

/// Takes [`reserve`] back.
fn release() {
    // SAFETY: our own reservation, and nobody has a window in it.
    unsafe { libc::munmap(RESERVED.start as *mut libc::c_void, LEN) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_hold_what_linux_puts_where() {
        // Programs with and without randomization, libraries, stacks, and the lowest and highest of each.
        for la in [0x5555_5555_4000, 0x5655_5555_4000, 0x7eff_0000_0000, 0x7fff_f7fc_0000, 0x7fff_ffff_e000] {
            assert!(WHOLE.contains(la) && WHOLE.covers(la));
            for w in PARTS {
                assert!(w.contains(la) && w.covers(la), "{la:#x}");
            }
        }
        for la in [0, 0x40_0000, 0xc000_0000_0000, 0x8000_0000_0000, 0xffff_fc00_0000_0000, 1 << 45] {
            assert!(!WHOLE.contains(la) && !PARTS.iter().any(|w| w.contains(la)), "{la:#x}");
        }
    }
}
