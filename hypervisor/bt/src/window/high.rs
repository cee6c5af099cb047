//! Where high windows are: which guest addresses belong to one, and where its pages are mapped in this process.
//!
//! Emitted code tells by one or a few address bits, all of which must be set, whether an address belongs to its vCPU's high window
//! ([`High::mask`]). That leaves chunks of the guest's address space with holes between them, and in the holes' images on the host lie
//! the chunks of other vCPUs' windows. Linux puts position-independent programs and their heaps around 0x5555_5555_4000 plus up to 2^40, and
//! grows libraries, mappings and stacks downwards from at most 2^47, less up to 2^40 and a gap. Bits 46, 44 and 42 are set in all of these.
//!
//! One bit is told by an instruction that reads no memory, so machines with one or two vCPUs do with one; more need several.
//!
//! **No vCPU reaches what another has mapped.** A window maps less than its chunks ([`High::mapped`]), so that from what passes a check, with
//! anything that a block may add to it ([`REACH`]), it is not possible to reach a page that another window maps. The compiler verifies that
//! below, chunk by chunk.

use super::UNMAPPED;
use std::sync::{Mutex, PoisonError};

/// An address of a high window has this bit, and none above.
pub(crate) const HIGH_SHIFT: u8 = 46;

const TIB: u64 = 1 << 40;

/// How far from what it has checked a block may reach: by constants, and by an index below 2^32 that is scaled by at most 8.
const REACH: u64 = super::REACH + (8 << 32);

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

/// The window of a machine's only vCPU: everything from 2^46 to 2^47.
pub(super) const WHOLE: High = High {
    mask: 1 << HIGH_SHIFT,
    distance: 0x2b00_0000_0000,
    mapped: [(1 << 46, 1 << 46 | 1 << 45), (1 << 46 | 1 << 45, 1 << 47)],
};

/// Where Linux puts programs, and libraries and stacks.
const PLACES: [(u64, u64); 2] = [(0x5480_0000_0000, 0x5780_0000_0000), (0x7c80_0000_0000, 0x8000_0000_0000)];

/// The windows of two vCPUs. What the first can reach is the lowest half of the host's addresses; the second reaches 16 TiB of every 32,
/// in between pages of the first, below and above this program, and below its libraries and stacks.
const PAIR: [High; 2] = [
    High { mask: 1 << 46, distance: 0x3f80_0000_0000, mapped: PLACES },
    High { mask: 1 << 44, distance: 0x0f00_0000_0000, mapped: PLACES },
];

/// The windows of three vCPUs or four.
const PARTS: [High; 4] = [part(0), part(17), part(66), part(83)];

/// A window that is lower by so many quarters of a TiB.
const fn part(quarters: u64) -> High {
    High { mask: 1 << 46 | 1 << 44 | 1 << 42, distance: WHOLE.distance + quarters * (TIB / 4), mapped: PLACES }
}

/// Where [`WHOLE`] and [`PARTS`] are.
const BELOW: &[(u64, u64)] = &[(0x1400_0000_0000, 0x5540_0000_0000)];

/// Windows that there may be beside each other, and the host addresses reserved for them: all that they may touch.
struct Layout {
    windows: &'static [High],
    reserved: &'static [(u64, u64)],
}

const LAYOUTS: [Layout; 3] = [
    Layout { windows: &[WHOLE], reserved: BELOW },
    Layout { windows: &PAIR, reserved: &[(0x0040_0000_0000, 0x5540_0000_0000), (0x6080_0000_0000, 0x7180_0000_0000)] },
    Layout { windows: &PARTS, reserved: BELOW },
];

/// The layouts for a machine with so many vCPUs, the best one first.
const fn layouts(cpus: u32) -> &'static [usize] {
    match cpus {
        0 | 1 => &[0],
        2 => &[1, 2],
        _ => &[2],
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

    /// The bit by which addresses are told, if there is but one.
    pub(crate) const fn bit(&self) -> Option<u8> {
        if self.mask.is_power_of_two() { Some(self.mask.trailing_zeros() as u8) } else { None }
    }

    /// The window of one of so many vCPUs, for tests.
    #[cfg(test)]
    pub(crate) fn one_of(cpus: u32) -> Self {
        LAYOUTS[layouts(cpus)[0]].windows[usize::from(cpus > 1)]
    }

    /// Whether all that emitted code may touch by this window lies in what is reserved, and outside of what `other` maps.
    ///
    /// An address that passes the check may have any bits beside those of the mask. With bits from 48 on it is none of the host's lower
    /// half, whatever is subtracted, so addresses below 2^48 are looked at.
    const fn apart(&self, reserved: &[(u64, u64)], other: Option<&Self>) -> bool {
        let size = self.mask & self.mask.wrapping_neg();
        let mut chunk = 0;
        while chunk < 1 << 48 {
            if chunk & self.mask == self.mask {
                if chunk < self.distance + REACH {
                    return false;
                }
                let (start, end) = (chunk - self.distance - REACH, chunk + size - self.distance + REACH);
                if start < 1 << 47 {
                    let (mut n, mut inside) = (0, false);
                    while n < reserved.len() {
                        inside |= reserved[n].0 <= start && end <= reserved[n].1;
                        n += 1;
                    }
                    if !inside {
                        return false;
                    }
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
    let mut n = 0;
    while n < LAYOUTS.len() {
        let Layout { windows, reserved } = LAYOUTS[n];
        let mut a = 0;
        while a < windows.len() {
            assert!(windows[a].apart(reserved, None));
            let mut b = 0;
            while b < windows.len() {
                assert!(a == b || windows[a].apart(reserved, Some(&windows[b])));
                b += 1;
            }
            let mut n = 0;
            while n < 2 {
                let (start, end) = windows[a].mapped[n];
                assert!(windows[a].contains(start) && windows[a].contains(end - 1));
                n += 1;
            }
            a += 1;
        }
        n += 1;
    }
};

/// The layout in use, and which of its windows are taken, bit by bit. No layout is in use while none is taken.
static TAKEN: Mutex<(usize, u8)> = Mutex::new((0, 0));

/// A window that is taken, until dropped. Nothing may be mapped in it then.
pub(super) struct Held {
    bit: u8,
    window: High,
}

impl Held {
    /// Takes a window for one of so many vCPUs; `None` when there is none left beside those that are taken, or the host's addresses
    /// cannot be had.
    pub(super) fn new(cpus: u32) -> Option<Self> {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        // Emitted code checks several bits with ANDN, and stack pointers for other bits than 46.
        if cpus > 1 && !std::arch::is_x86_feature_detected!("bmi1") {
            return None;
        }
        let mut good = layouts(cpus).iter().copied();
        if taken.1 == 0 {
            taken.0 = good.find(|&l| reserve(&LAYOUTS[l]))?;
        } else if !good.any(|l| l == taken.0) {
            return None;
        }
        let windows = LAYOUTS[taken.0].windows;
        let n = (0..windows.len()).find(|n| taken.1 >> n & 1 == 0)?;
        taken.1 |= 1 << n;
        Some(Self { bit: 1 << n, window: windows[n] })
    }

    pub(super) fn window(&self) -> High {
        self.window
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        taken.1 &= !self.bit;
        if taken.1 == 0 {
            LAYOUTS[taken.0].reserved.iter().for_each(release);
        }
    }
}

/// Reserves the addresses of a layout's windows; false when anything is there already, and nothing is reserved then.
fn reserve(layout: &Layout) -> bool {
    for (n, &(start, end)) in layout.reserved.iter().enumerate() {
        if !reserve_at(start, (end - start) as usize) {
            layout.reserved[..n].iter().for_each(release);
            return false;
        }
    }
    true
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

/// Gives back what [`reserve`] has reserved.
fn release(&(start, end): &(u64, u64)) {
    // SAFETY: our own reservation, and nobody has a window in it.
    unsafe { libc::munmap(start as *mut libc::c_void, (end - start) as usize) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_hold_what_linux_puts_where() {
        // Programs with and without randomization, libraries, stacks, and the lowest and highest of each.
        for w in LAYOUTS.iter().flat_map(|l| l.windows) {
            for la in [0x5555_5555_4000, 0x5655_5555_4000, 0x7eff_0000_0000, 0x7fff_f7fc_0000, 0x7fff_ffff_e000] {
                assert!(w.contains(la) && w.covers(la), "{la:#x}");
            }
            for la in [0, 0x40_0000, 0xc000_0000_0000, 0x8000_0000_0000, 0xffff_fc00_0000_0000, 1 << 45] {
                assert!(!w.contains(la), "{la:#x}");
            }
        }
    }
}
