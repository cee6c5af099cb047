//! Names of translated blocks for perf.
//!
//! Linux's perf knows nothing of code that was made at run time. For code in memory without a file it looks into
//! `/tmp/perf-PID.map`: one line per function, `start size name`, the numbers in hexadecimal. Here a block is a function,
//! `guest_<rip>_<cpl>`, and so is its cold part, with `_cold` behind the name. A line is written when its block is made, and the file starts
//! anew when the translation cache is emptied, for addresses mean other blocks then.
//!
//! perf reads the file when it reports, which may be long after the process has ended; then the file must be kept.

use crate::BtError;
use crate::block::{BlockId, Mode};
use crate::cache::CodeMemory;
use crate::engine::Engine;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// The file, until dropped.
pub(crate) struct PerfMap {
    file: File,
    path: PathBuf,
    keep: bool,
}

impl PerfMap {
    /// Makes this process's file.
    fn new(keep: bool) -> Result<Self, BtError> {
        let path = PathBuf::from(format!("/tmp/perf-{}.map", std::process::id()));
        // An earlier process with this number may have left one. Whoever else owns a file of this name, ours is a new one.
        let _ = std::fs::remove_file(&path);
        let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(|e| BtError::Host(format!("{} cannot be made for perf: {e}", path.display())))?;
        Ok(Self { file, path, keep })
    }

    /// Writes lines. A full disk costs names, not the guest.
    fn write(&mut self, text: &str) {
        let _ = self.file.write_all(text.as_bytes());
    }
}

impl Drop for PerfMap {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// One block's lines: its address and privilege, `w` if it reaches memory through windows. Parts are start and length in bytes.
fn lines(rip: u64, mode: Mode, hot: (u64, usize), cold: (u64, usize)) -> String {
    let cpl = if mode.has(Mode::USER) { 3 } else { 0 };
    let window = if mode.has(Mode::WINDOW) { "w" } else { "" };
    let mut text = format!("{:x} {:x} guest_{rip:x}_{cpl}{window}\n", hot.0, hot.1);
    if cold.1 > 0 {
        text += &format!("{:x} {:x} guest_{rip:x}_{cpl}{window}_cold\n", cold.0, cold.1);
    }
    text
}

impl Engine {
    /// See [`crate::BtVcpu::write_perf_map`].
    pub(crate) fn write_perf_map(&mut self, keep: bool) -> Result<(), BtError> {
        if !self.tables.blocks.is_empty() {
            return Err(BtError::Host("names for perf must be asked for before the vCPU runs".into()));
        }
        self.code = CodeMemory::anonymous(self.code.size())?;
        self.perf_map = Some(PerfMap::new(keep)?);
        Ok(())
    }

    /// The block was just made, and the assembler still holds it.
    pub(crate) fn name_block(&mut self, id: BlockId) {
        let Some(map) = &mut self.perf_map else { return };
        let b = &self.tables.blocks[id as usize];
        let (hot, cold) = self.asm.parts();
        let hot = (self.code.address(b.placed.hot), hot.len());
        let cold = (self.code.address(b.placed.cold), cold.len());
        map.write(&lines(b.key.rip, b.key.mode, hot, cold));
    }

    /// All blocks are gone.
    pub(crate) fn forget_names(&mut self) {
        if let Some(map) = &self.perf_map {
            let _ = map.file.set_len(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::asm::Asm;

    #[test]
    fn a_block_has_a_line_for_each_part() {
        let (hot, cold) = ((0x7f00_0000_1000, 0x2a), (0x7f00_1000_0000, 0x13));
        let rip = 0xffff_ffff_8100_0000;
        let both = "7f0000001000 2a guest_ffffffff81000000_0\n7f0010000000 13 guest_ffffffff81000000_0_cold\n";
        assert_eq!(lines(rip, Mode(0), hot, cold), both);
        assert_eq!(lines(0x40_1000, Mode(Mode::USER), hot, (0x7f00_1000_0000, 0)), "7f0000001000 2a guest_401000_3\n");
        let windowed = Mode(Mode::USER | Mode::WINDOW);
        assert_eq!(lines(0x40_1000, windowed, hot, (0x7f00_1000_0000, 0)), "7f0000001000 2a guest_401000_3w\n");
    }

    #[test]
    fn memory_without_a_file_has_two_views_too() {
        let mut code = CodeMemory::anonymous(4 << 20).unwrap();
        let mut asm = Asm::new();
        asm.buf.extend_from_slice(&[0xb8, 42, 0, 0, 0, 0xc3]);
        let placed = code.place(&mut asm).unwrap();
        let address = code.address(placed.hot);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps.lines().find(|l| {
            let range = l.split(' ').next().unwrap();
            let (start, end) = range.split_once('-').unwrap();
            (u64::from_str_radix(start, 16).unwrap()..u64::from_str_radix(end, 16).unwrap()).contains(&address)
        });
        let line = line.expect("the code is mapped");
        // As perf tells memory without a file: by these names.
        assert!(line.contains(" r-xs ") && line.contains("/dev/zero"), "{line}");
    }
}
