//! As much of ELF as kernels need: program headers, segments to load, notes (System V ABI, chapters 4 and 5).

use super::{LoadError, enough_memory, put, u16_at, u32_at, u64_at};
use crate::memory::GuestRam;

/// Program headers at most; real kernels have a handful.
const MAX_SEGMENTS: usize = 64;

pub(super) struct Segment {
    pub(super) kind: u32,
    pub(super) offset: usize,
    pub(super) paddr: u64,
    pub(super) filesz: usize,
    pub(super) memsz: u64,
}

pub(super) struct Elf<'a> {
    file: &'a [u8],
    pub(super) wide: bool,
    pub(super) entry: u64,
    pub(super) segments: Vec<Segment>,
}

const CUT: LoadError = LoadError::Damaged("it ends inside its ELF headers");

impl<'a> Elf<'a> {
    /// Reads the headers of a little-endian x86 ELF. `None`: it is no such file.
    pub(super) fn parse(file: &'a [u8]) -> Option<Result<Self, LoadError>> {
        let wide = match file.get(..6)? {
            [0x7f, b'E', b'L', b'F', 1, 1] => false,
            [0x7f, b'E', b'L', b'F', 2, 1] => true,
            _ => return None,
        };
        Some(Self::headers(file, wide))
    }

    fn headers(file: &'a [u8], wide: bool) -> Result<Self, LoadError> {
        let machine = u16_at(file, 18).ok_or(CUT)?;
        if machine != if wide { 62 } else { 3 } {
            return Err(LoadError::Damaged("it is an ELF for another machine"));
        }
        let (entry, table, size_at) = if wide {
            (u64_at(file, 24), u64_at(file, 32), 54)
        } else {
            (u32_at(file, 24).map(u64::from), u32_at(file, 28).map(u64::from), 42)
        };
        let (entry, table) = (entry.ok_or(CUT)?, table.ok_or(CUT)?);
        let size = usize::from(u16_at(file, size_at).ok_or(CUT)?);
        let count = usize::from(u16_at(file, size_at + 2).ok_or(CUT)?);
        if size < if wide { 56 } else { 32 } || count > MAX_SEGMENTS {
            return Err(LoadError::Damaged("its program header table makes no sense"));
        }
        let table = usize::try_from(table).map_err(|_| CUT)?;
        let mut segments = Vec::with_capacity(count);
        for n in 0..count {
            let at = table.checked_add(n * size).ok_or(CUT)?;
            let end = at.checked_add(size).ok_or(CUT)?;
            let h = file.get(at..end).ok_or(CUT)?;
            let word = |at: usize| u32_at(h, at).map(u64::from).ok_or(CUT);
            let long = |at: usize| u64_at(h, at).ok_or(CUT);
            let (offset, paddr, filesz, memsz) = if wide {
                (long(8)?, long(24)?, long(32)?, long(40)?)
            } else {
                (word(4)?, word(12)?, word(16)?, word(20)?)
            };
            let kind = u32_at(h, 0).ok_or(CUT)?;
            let (Ok(offset), Ok(filesz)) = (usize::try_from(offset), usize::try_from(filesz)) else { return Err(CUT) };
            segments.push(Segment { kind, offset, paddr, filesz, memsz });
        }
        Ok(Self { file, wide, entry, segments })
    }

    fn bytes(&self, s: &Segment) -> Result<&'a [u8], LoadError> {
        let end = s.offset.checked_add(s.filesz);
        end.and_then(|e| self.file.get(s.offset..e)).ok_or(LoadError::Damaged("a segment lies beyond its end"))
    }

    /// Loads all PT_LOAD segments; gives the end of the highest.
    pub(super) fn load(&self, mem: &GuestRam) -> Result<u64, LoadError> {
        let mut top = 0;
        for s in self.segments.iter().filter(|s| s.kind == 1 && s.memsz > 0) {
            let bytes = self.bytes(s)?;
            let end = s.paddr.checked_add(s.memsz.max(bytes.len() as u64));
            let end = end.ok_or(LoadError::Damaged("the addresses of its segments make no sense"))?;
            enough_memory(mem, end)?;
            if s.paddr < 0x10_0000 {
                return Err(LoadError::Damaged("a segment lies below 1 MiB, where boot data goes"));
            }
            // RAM is zero until it is written, so the rest of the segment is too.
            put(mem, s.paddr, bytes, "segment")?;
            top = end.max(top);
        }
        if top == 0 {
            return Err(LoadError::Damaged("it has nothing to load"));
        }
        Ok(top)
    }

    /// The descriptor of the first note with this owner and type.
    pub(super) fn note(&self, owner: &[u8], kind: u32) -> Option<&'a [u8]> {
        for s in self.segments.iter().filter(|s| s.kind == 4) {
            let mut rest = self.bytes(s).ok()?;
            while let (Some(namesz), Some(descsz), Some(t)) = (u32_at(rest, 0), u32_at(rest, 4), u32_at(rest, 8)) {
                let (namesz, descsz) = (namesz as usize, descsz as usize);
                let desc_at = 12usize.checked_add(namesz.checked_next_multiple_of(4)?)?;
                let name = rest.get(12..12usize.checked_add(namesz)?)?;
                let desc = rest.get(desc_at..desc_at.checked_add(descsz)?)?;
                if name == owner && t == kind {
                    return Some(desc);
                }
                rest = rest.get(desc_at.checked_add(descsz.checked_next_multiple_of(4)?)?..)?;
            }
        }
        None
    }
}
