//! Devices at guest-physical addresses outside RAM, beside the interrupt controllers.
//!
//! [`MmioMap`] is a sorted table of windows. Every access looks it up by binary search under a shared lock, which nobody holds
//! exclusively but a guest that moves a PCI device's BAR.

use std::sync::{Arc, PoisonError, RwLock};

/// What answers in a window.
pub trait MmioTarget: Send + Sync {
    /// Reads `data.len()` bytes at an offset of the window.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes at an offset of the window.
    fn write(&self, offset: u64, data: &[u8]);
}

/// One window.
#[derive(Clone)]
pub struct Window {
    /// Guest-physical address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Who answers.
    pub target: Arc<dyn MmioTarget>,
}

/// All windows.
#[derive(Default)]
pub struct MmioMap(RwLock<Vec<Window>>);

impl MmioMap {
    /// Replaces all windows. Where two overlap, the one with the higher start wins.
    pub fn set(&self, mut windows: Vec<Window>) {
        windows.sort_by_key(|w| w.start);
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = windows;
    }

    /// The window that holds all `len` bytes at `gpa`, and the offset there.
    fn find(&self, gpa: u64, len: usize) -> Option<(Arc<dyn MmioTarget>, u64)> {
        let windows = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let n = windows.partition_point(|w| w.start <= gpa).checked_sub(1)?;
        let w = &windows[n];
        let offset = gpa - w.start;
        (offset < w.len && len as u64 <= w.len - offset).then(|| (w.target.clone(), offset))
    }

    /// Carries out a load; false when nobody answers.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let Some((target, offset)) = self.find(gpa, data.len()) else { return false };
        target.read(offset, data);
        true
    }

    /// Carries out a store; false when nobody answers.
    pub fn write(&self, gpa: u64, data: &[u8]) -> bool {
        let Some((target, offset)) = self.find(gpa, data.len()) else { return false };
        target.write(offset, data);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    struct Log(u8, Mutex<Vec<u64>>);
    impl MmioTarget for Log {
        fn read(&self, _offset: u64, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write(&self, offset: u64, _data: &[u8]) {
            self.1.lock().unwrap().push(offset);
        }
    }

    #[test]
    fn accesses_reach_the_window_that_holds_all_of_them() {
        let map = MmioMap::default();
        let mut b = [0; 4];
        assert!(!map.read(0xd000_0000, &mut b));
        let logs: Vec<_> = (1..4).map(|n| Arc::new(Log(n, Mutex::default()))).collect();
        let window = |n: usize, start, len| Window { start, len, target: logs[n].clone() };
        map.set(vec![
            window(1, 0xd000_2000, 0x1000),
            window(0, 0xd000_0000, 0x1000),
            window(2, u64::MAX - 0xfff, 0x1000),
        ]);
        for (gpa, who) in [
            (0xcfff_ffff, None),
            (0xd000_0000, Some(1)),
            (0xd000_0ffc, Some(1)),
            (0xd000_0ffd, None),
            (0xd000_1000, None),
            (0xd000_2ffc, Some(2)),
            (u64::MAX - 3, Some(3)),
            (u64::MAX - 2, None),
        ] {
            b = [0; 4];
            assert_eq!(map.read(gpa, &mut b).then_some(b[3]), who, "{gpa:#x}");
        }
        assert!(map.write(0xd000_2010, &[0; 8]) && !map.write(0xd000_3000, &[0]));
        assert_eq!(*logs[1].1.lock().unwrap(), [0x10]);
    }
}
