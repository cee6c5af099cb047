//! String instructions: MOVS, STOS, LODS, SCAS, CMPS, INS and OUTS in every width, address size and REP form (SDM vol. 1,
//! section 7.3.9; vol. 2, REP).
//!
//! There are two ways to carry out an iteration. The *element* path does one through [`crate::mem`], with every check and every
//! kind of memory; whatever it raises is what the guest sees, with the registers at the faulting element. The *run* path
//! does as many elements as fit in the current page (of source and destination) at once on host memory. It never raises
//! anything: where it cannot go, the element path goes.
//!
//! A repeated instruction gives way after about 64 KiB, with RIP still on itself and the progress in the registers, so that
//! interrupts get in.
#![allow(unsafe_code)] // Bulk copies between pieces of guest RAM that may overlap and that other vCPUs may be using.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::mem::{self, Privilege};
use crate::mmu::{Access, AccessKind};
use crate::operand::{mask, read_linear};
use crate::rare::{advance, cmp_flags, set_flags};
use crate::state::rflags;
use crate::{BusOutcome, CpuState, Env, Exception, Reg, Seg, Step, ea, system};

/// Bytes after which a repeated instruction lets interrupts in.
const BUDGET: u64 = 64 << 10;
/// Port accesses after which it does: each may cost microseconds.
const IO_BUDGET: u64 = 1 << 10;
const PAGE: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Movs,
    Stos,
    Lods,
    Scas,
    Cmps,
    Ins,
    Outs,
}

/// A string instruction, taken apart.
#[derive(Clone, Copy)]
struct Op {
    kind: Kind,
    /// Element size in bytes.
    bytes: usize,
    /// Address size in bits.
    bits: u32,
    /// Segment of the source (RSI) side.
    seg: Seg,
    rep: bool,
    /// For SCAS and CMPS: go on while ZF has this value.
    while_zf: bool,
    backward: bool,
}

fn kind_and_size(m: Mnemonic) -> Option<(Kind, usize)> {
    use Mnemonic as M;
    Some(match m {
        M::Movsb => (Kind::Movs, 1),
        M::Movsw => (Kind::Movs, 2),
        M::Movsd => (Kind::Movs, 4),
        M::Movsq => (Kind::Movs, 8),
        M::Stosb => (Kind::Stos, 1),
        M::Stosw => (Kind::Stos, 2),
        M::Stosd => (Kind::Stos, 4),
        M::Stosq => (Kind::Stos, 8),
        M::Lodsb => (Kind::Lods, 1),
        M::Lodsw => (Kind::Lods, 2),
        M::Lodsd => (Kind::Lods, 4),
        M::Lodsq => (Kind::Lods, 8),
        M::Scasb => (Kind::Scas, 1),
        M::Scasw => (Kind::Scas, 2),
        M::Scasd => (Kind::Scas, 4),
        M::Scasq => (Kind::Scas, 8),
        M::Cmpsb => (Kind::Cmps, 1),
        M::Cmpsw => (Kind::Cmps, 2),
        M::Cmpsd => (Kind::Cmps, 4),
        M::Cmpsq => (Kind::Cmps, 8),
        M::Insb => (Kind::Ins, 1),
        M::Insw => (Kind::Ins, 2),
        M::Insd => (Kind::Ins, 4),
        M::Outsb => (Kind::Outs, 1),
        M::Outsw => (Kind::Outs, 2),
        M::Outsd => (Kind::Outs, 4),
        _ => return None,
    })
}

/// Whether `i` is a string instruction (MOVSD and CMPSD are also names of SSE2 instructions).
pub(crate) fn is_string(i: &Instruction) -> bool {
    kind_and_size(i.mnemonic()).is_some() && memory_operand(i).is_some()
}

/// The index of an operand addressed by RSI or RDI.
fn memory_operand(i: &Instruction) -> Option<u32> {
    (0..i.op_count()).find(|&n| {
        use OpKind as K;
        matches!(
            i.op_kind(n),
            K::MemorySegSI | K::MemorySegESI | K::MemorySegRSI | K::MemoryESDI | K::MemoryESEDI | K::MemoryESRDI
        )
    })
}

impl Op {
    fn new(st: &CpuState, i: &Instruction) -> Option<Self> {
        let (kind, bytes) = kind_and_size(i.mnemonic())?;
        let at = memory_operand(i)?;
        let source =
            (0..2).find(|&n| matches!(i.op_kind(n), OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI));
        Some(Self {
            kind,
            bytes,
            bits: ea::address_bits(i, at),
            seg: source.map_or(Seg::Ds, |n| ea::operand_segment(st, i, n)),
            rep: i.has_rep_prefix() || i.has_repne_prefix(),
            while_zf: !i.has_repne_prefix(),
            backward: st.rflags & rflags::DF != 0,
        })
    }

    fn uses_source(&self) -> bool {
        matches!(self.kind, Kind::Movs | Kind::Lods | Kind::Cmps | Kind::Outs)
    }

    fn uses_destination(&self) -> bool {
        matches!(self.kind, Kind::Movs | Kind::Stos | Kind::Scas | Kind::Cmps | Kind::Ins)
    }

    fn compares(&self) -> bool {
        matches!(self.kind, Kind::Scas | Kind::Cmps)
    }

    fn get(&self, st: &CpuState, r: Reg) -> u64 {
        ea::truncate(st.gpr[r as usize], self.bits)
    }

    fn set(&self, st: &mut CpuState, r: Reg, value: u64) {
        let g = &mut st.gpr[r as usize];
        *g = match self.bits {
            16 => (*g & !0xffff) | (value & 0xffff),
            32 => value & 0xffff_ffff,
            _ => value,
        };
    }

    /// Accounts for `n` finished elements.
    fn retire(&self, st: &mut CpuState, n: u64) {
        let step = n * self.bytes as u64;
        let moved = |at: u64| if self.backward { at.wrapping_sub(step) } else { at.wrapping_add(step) };
        if self.uses_source() {
            let at = moved(self.get(st, Reg::Rsi));
            self.set(st, Reg::Rsi, at);
        }
        if self.uses_destination() {
            let at = moved(self.get(st, Reg::Rdi));
            self.set(st, Reg::Rdi, at);
        }
        if self.rep {
            let left = self.get(st, Reg::Rcx).wrapping_sub(n);
            self.set(st, Reg::Rcx, left);
        }
    }

    fn source(&self, st: &CpuState) -> Result<u64, Exception> {
        ea::segmented(st, self.seg, self.get(st, Reg::Rsi), self.bytes, false)
    }

    fn destination(&self, st: &CpuState, write: bool) -> Result<u64, Exception> {
        ea::segmented(st, Seg::Es, self.get(st, Reg::Rdi), self.bytes, write)
    }

    /// Sets the flags of a comparison; whether a repeated one goes on.
    fn compare(&self, st: &mut CpuState, a: u64, b: u64) -> bool {
        set_flags(st, rflags::STATUS, cmp_flags(a, b, self.bytes));
        (st.rflags & rflags::ZF != 0) == self.while_zf
    }
}

/// Carries out the string instruction `i` and moves RIP, unless a repeated one has more to do.
pub(crate) fn emulate<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction) -> Result<Step, Exception> {
    let Some(op) = Op::new(st, i) else { return Err(Exception::InvalidOpcode) };
    if !op.rep {
        let (_, outcome) = element(st, env, &op)?;
        advance(st, i);
        return Ok(if outcome == BusOutcome::Done { Step::Next } else { Step::Resync });
    }
    if matches!(op.kind, Kind::Ins | Kind::Outs) {
        // Permission is checked even when there is nothing to transfer.
        system::check_io(st, env, st.gpr[Reg::Rdx as usize] as u16, op.bytes as u8)?;
    }
    if op.bits == 32 && st.code64() {
        // The count is 32 bits wide, and its upper half is gone even if nothing is transferred. With MOVS and STOS the
        // addresses lose theirs as well (seen on the host; the manuals leave it open).
        st.gpr[Reg::Rcx as usize] &= 0xffff_ffff;
        if matches!(op.kind, Kind::Movs | Kind::Stos) {
            st.gpr[Reg::Rdi as usize] &= 0xffff_ffff;
        }
        if op.kind == Kind::Movs {
            st.gpr[Reg::Rsi as usize] &= 0xffff_ffff;
        }
    }
    let mut budget = match op.kind {
        _ if st.rflags & rflags::TF != 0 => 1, // single-step traps come after every iteration
        Kind::Ins | Kind::Outs => IO_BUDGET,
        _ => BUDGET / op.bytes as u64,
    };
    loop {
        let count = op.get(st, Reg::Rcx);
        if count == 0 {
            break;
        }
        if budget == 0 {
            return Ok(Step::Resync);
        }
        let (done, go_on) = match run(st, env, &op, count.min(budget)) {
            Some(r) => r,
            None => {
                let (go_on, outcome) = element(st, env, &op)?;
                if outcome == BusOutcome::Stopping {
                    budget = 1;
                }
                (1, go_on)
            }
        };
        if !go_on {
            break;
        }
        budget -= done.min(budget);
    }
    advance(st, i);
    Ok(Step::Next)
}

/// One iteration. Gives whether a repeated comparison goes on, and what a bus write came to.
fn element<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, op: &Op) -> Result<(bool, BusOutcome), Exception> {
    let user = Privilege::Current;
    let (mut go_on, mut outcome) = (true, BusOutcome::Done);
    match op.kind {
        Kind::Movs => {
            let from = op.source(st)?;
            let value = read_linear(st, env, from, op.bytes)?;
            let to = op.destination(st, true)?;
            mem::write(st, env, to, &value.to_le_bytes()[..op.bytes], user)?;
        }
        Kind::Stos => {
            let to = op.destination(st, true)?;
            let value = st.gpr[Reg::Rax as usize].to_le_bytes();
            mem::write(st, env, to, &value[..op.bytes], user)?;
        }
        Kind::Lods => {
            let from = op.source(st)?;
            let value = read_linear(st, env, from, op.bytes)?;
            set_accumulator(st, op.bytes, value);
        }
        Kind::Scas => {
            let at = op.destination(st, false)?;
            let value = read_linear(st, env, at, op.bytes)?;
            go_on = op.compare(st, st.gpr[Reg::Rax as usize], value);
        }
        Kind::Cmps => {
            // The destination is read first, which shows when both fault.
            let at = op.destination(st, false)?;
            let b = read_linear(st, env, at, op.bytes)?;
            let from = op.source(st)?;
            let a = read_linear(st, env, from, op.bytes)?;
            go_on = op.compare(st, a, b);
        }
        Kind::Ins => {
            let port = st.gpr[Reg::Rdx as usize] as u16;
            system::check_io(st, env, port, op.bytes as u8)?;
            let to = op.destination(st, true)?;
            mem::probe_write(st, env, to, op.bytes, user)?; // a device must not be read in vain
            let mut data = [0; 4];
            env.bus().pio_read(st.id, port, &mut data[..op.bytes]);
            mem::write(st, env, to, &data[..op.bytes], user)?;
        }
        Kind::Outs => {
            let port = st.gpr[Reg::Rdx as usize] as u16;
            system::check_io(st, env, port, op.bytes as u8)?;
            let from = op.source(st)?;
            let value = read_linear(st, env, from, op.bytes)?;
            outcome = env.bus().pio_write(st.id, port, &value.to_le_bytes()[..op.bytes]);
            env.note_outcome(outcome);
        }
    }
    op.retire(st, 1);
    Ok((go_on, outcome))
}

fn set_accumulator(st: &mut CpuState, bytes: usize, value: u64) {
    let rax = &mut st.gpr[Reg::Rax as usize];
    *rax = if bytes >= 4 { mask(value, bytes) } else { (*rax & !mask(u64::MAX, bytes)) | mask(value, bytes) };
}

/// One side of a run on host memory.
#[derive(Clone, Copy)]
struct Side {
    /// Offset in the segment of the first element.
    offset: u64,
    seg: Seg,
    write: bool,
}

impl Side {
    /// Elements, at most `n`, that lie in the page of the first and before the offset wraps. 0 if the first crosses a page.
    fn room(&self, st: &CpuState, op: &Op, n: u64) -> Option<u64> {
        let la = ea::segmented(st, self.seg, self.offset, op.bytes, self.write).ok()?;
        let (bytes, in_page) = (op.bytes as u64, la % PAGE);
        if in_page + bytes > PAGE {
            return None;
        }
        let room = if op.backward { in_page / bytes + 1 } else { (PAGE - in_page) / bytes };
        let top = mask(u64::MAX, op.bits as usize / 8);
        let before_wrap = if op.backward { self.offset / bytes } else { (top - self.offset) / bytes }.saturating_add(1);
        Some(n.min(room).min(before_wrap))
    }

    /// Guest-physical address of the lowest byte of `n` elements, all in one page.
    fn gpa<E: Env + ?Sized>(&self, st: &CpuState, env: &mut E, op: &Op, n: u64) -> Option<u64> {
        let bytes = op.bytes as u64;
        let low = if op.backward { self.offset - (n - 1) * bytes } else { self.offset };
        let la = ea::segmented(st, self.seg, low, (n * bytes) as usize, self.write).ok()?;
        let kind = if self.write { AccessKind::Write } else { AccessKind::Read };
        env.translate(st, la, Access::current(st, kind)).ok()
    }
}

/// As many of `limit` elements as the current pages allow. Gives how many were done and whether a comparison goes on; `None` when
/// the element path has to look.
fn run<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, op: &Op, limit: u64) -> Option<(u64, bool)> {
    if matches!(op.kind, Kind::Ins | Kind::Outs) {
        return None;
    }
    let from = op.uses_source().then(|| Side { offset: op.get(st, Reg::Rsi), seg: op.seg, write: false });
    let to = op.uses_destination().then(|| Side { offset: op.get(st, Reg::Rdi), seg: Seg::Es, write: !op.compares() });
    let mut n = limit;
    for side in [from, to].into_iter().flatten() {
        n = side.room(st, op, n)?;
    }
    // Both walks come before both pointers, which do not outlive them.
    let mut gpa = [None; 2];
    for (gpa, side) in gpa.iter_mut().zip([from, to]) {
        *gpa = match side {
            Some(side) => Some((side.gpa(st, env, op, n)?, side.write)),
            None => None,
        };
    }
    let mut host = [std::ptr::null_mut(); 2];
    for (host, gpa) in host.iter_mut().zip(gpa) {
        if let Some((gpa, write)) = gpa {
            *host = env.ram_slice(gpa, n as usize * op.bytes, write)?;
        }
    }
    // SAFETY: for each side that `op` uses, `ram_slice` gave `n * bytes` bytes of guest RAM, writable where the operation
    // writes, and no other method of `env` was called since.
    let (done, go_on) = unsafe { bulk(st, op, host[0], host[1], n as usize) };
    op.retire(st, done as u64);
    Some((done as u64, go_on))
}

/// Reads element number `k` (in execution order) of `n` at `base`, the lowest byte.
///
/// # Safety
/// `base` is good for reads of `n` elements of `op`'s size, and `k < n`.
unsafe fn load(op: &Op, base: *const u8, k: usize, n: usize) -> u64 {
    let at = if op.backward { n - 1 - k } else { k } * op.bytes;
    // SAFETY: `at` is the offset of an element within the caller's range. Volatile, because another vCPU may be writing.
    unsafe {
        match op.bytes {
            1 => base.add(at).read_volatile().into(),
            2 => base.add(at).cast::<Unaligned<u16>>().read_volatile().0.into(),
            4 => base.add(at).cast::<Unaligned<u32>>().read_volatile().0.into(),
            _ => base.add(at).cast::<Unaligned<u64>>().read_volatile().0,
        }
    }
}

/// Writes element number `k`; see [`load`].
///
/// # Safety
/// As for [`load`], for writes.
unsafe fn store(op: &Op, base: *mut u8, k: usize, n: usize, value: u64) {
    let at = if op.backward { n - 1 - k } else { k } * op.bytes;
    // SAFETY: as in `load`.
    unsafe {
        match op.bytes {
            1 => base.add(at).write_volatile(value as u8),
            2 => base.add(at).cast::<Unaligned<u16>>().write_volatile(Unaligned(value as u16)),
            4 => base.add(at).cast::<Unaligned<u32>>().write_volatile(Unaligned(value as u32)),
            _ => base.add(at).cast::<Unaligned<u64>>().write_volatile(Unaligned(value)),
        }
    }
}

/// An integer that may lie anywhere, so that its volatile access is defined.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T>(T);

/// Carries out `n` elements on host memory: how many were done, and whether a comparison goes on.
///
/// # Safety
/// `src` and `dst`, where the operation uses them, are good for `n` elements; `dst` for writes if it writes. They may overlap.
unsafe fn bulk(st: &mut CpuState, op: &Op, src: *mut u8, dst: *mut u8, n: usize) -> (usize, bool) {
    let rax = st.gpr[Reg::Rax as usize];
    // SAFETY: every access below is to an element number less than `n` of a side the operation uses, as the caller promises; the
    // copies and fills cover exactly `n` elements.
    unsafe {
        match op.kind {
            Kind::Movs => {
                let (s, d, len) = (src as usize, dst as usize, n * op.bytes);
                // Copying towards the direction of travel within the range repeats a pattern: element by element.
                let propagates = if op.backward { d < s && s - d < len } else { d > s && d - s < len };
                if propagates {
                    for k in 0..n {
                        store(op, dst, k, n, load(op, src, k, n));
                    }
                } else {
                    std::ptr::copy(src, dst, len);
                }
                (n, true)
            }
            Kind::Stos if op.bytes == 1 => {
                std::ptr::write_bytes(dst, rax as u8, n);
                (n, true)
            }
            Kind::Stos => {
                for k in 0..n {
                    store(op, dst, k, n, rax);
                }
                (n, true)
            }
            Kind::Lods => {
                let value = load(op, src, n - 1, n);
                set_accumulator(st, op.bytes, value);
                (n, true)
            }
            Kind::Scas | Kind::Cmps => {
                for k in 0..n {
                    let a = if op.kind == Kind::Scas { mask(rax, op.bytes) } else { load(op, src, k, n) };
                    let b = load(op, dst, k, n);
                    if (a == b) != op.while_zf || k + 1 == n {
                        let go_on = op.compare(st, a, b);
                        return (k + 1, go_on);
                    }
                }
                (0, true)
            }
            Kind::Ins | Kind::Outs => (0, true), // never run in bulk
        }
    }
}

#[cfg(test)]
mod tests;
