//! XSAVE, XSAVEOPT, XSAVEC, XRSTOR, FXSAVE, FXRSTOR, XGETBV and XSETBV (SDM vol. 1, chapter 13; vol. 2).
//!
//! The guest's registers are already in memory when this code runs: in [`CpuState::xsave`], standard format. Saving is a copy of the
//! chosen components to where the guest's own format wants them; restoring is the reverse, after the checks that the
//! manual lists. A save probes its whole destination before the first byte is stored, and a restore has read and
//! checked everything before the first register changes.

use iced_x86::{Instruction, Mnemonic};

use crate::host_fpu::{self, EXTENDED, LEGACY_AND_HEADER, component};
use crate::mem::{self, Privilege};
use crate::rare::{edx_eax, set_edx_eax};
use crate::simd::{self, MXCSR_INIT, XSTATE_BV, get64};
use crate::state::{XSAVE_BYTES, cr0, cr4};
use crate::{CpuState, Env, Exception, Reg, Step, ea};

const GP: Exception = Exception::GeneralProtection(0);
/// XCOMP_BV bit that says "compacted".
const COMPACTED: u64 = 1 << 63;

/// How a save lays out and prunes its image.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// XSAVE: everything asked for, standard format.
    Plain,
    /// XSAVEOPT: leaves out components in their initial configuration.
    Optimised,
    /// XSAVEC: the same, compacted format.
    Compacted,
}

/// Carries out `i` if it is one of this family.
pub(crate) fn emulate<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    i: &Instruction,
) -> Option<Result<Step, Exception>> {
    use Mnemonic as M;
    let wide =
        matches!(i.mnemonic(), M::Xsave64 | M::Xsaveopt64 | M::Xsavec64 | M::Xrstor64 | M::Fxsave64 | M::Fxrstor64);
    Some(match i.mnemonic() {
        M::Xsave | M::Xsave64 => save(st, env, i, Form::Plain, wide),
        M::Xsaveopt | M::Xsaveopt64 => save(st, env, i, Form::Optimised, wide),
        M::Xsavec | M::Xsavec64 => save(st, env, i, Form::Compacted, wide),
        M::Xrstor | M::Xrstor64 => restore(st, env, i, wide),
        M::Fxsave | M::Fxsave64 => fxsave(st, env, i, wide),
        M::Fxrstor | M::Fxrstor64 => fxrstor(st, env, i, wide),
        M::Xgetbv => xgetbv(st),
        M::Xsetbv => xsetbv(st),
        M::Xsaves | M::Xsaves64 | M::Xrstors | M::Xrstors64 => Err(Exception::InvalidOpcode),
        _ => return None,
    })
}

/// #UD unless CR4.OSXSAVE, #NM if CR0.TS; then RFBM, the components that EDX:EAX asks for out of those enabled.
fn requested(st: &CpuState) -> Result<u64, Exception> {
    if st.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::InvalidOpcode);
    }
    if st.cr0 & cr0::TS != 0 {
        return Err(Exception::DeviceNotAvailable);
    }
    Ok(edx_eax(st) & st.xcr0)
}

/// The linear address of operand 0, which must be a multiple of `align`.
fn area(st: &CpuState, i: &Instruction, size: usize, align: u64, write: bool) -> Result<u64, Exception> {
    let la = ea::linear(st, i, 0, size, write)?;
    if la % align != 0 { Err(GP) } else { Ok(la) }
}

/// Bytes of component `i` that the current mode can see: outside 64-bit mode only the first eight registers.
fn visible(st: &CpuState, i: u32) -> usize {
    let size = if i == 1 { 256 } else { component(i).size };
    match i {
        1 | 2 | 6 if !st.code64() => size / 2,
        7 if !st.code64() => 0,
        _ => size,
    }
}

/// An image under construction: bytes, and which of them are to be stored.
struct Draft {
    bytes: [u8; XSAVE_BYTES],
    ranges: Vec<(usize, usize)>,
}

impl Draft {
    fn new() -> Self {
        Self { bytes: [0; XSAVE_BYTES], ranges: Vec::with_capacity(8) }
    }

    fn put(&mut self, at: usize, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        self.bytes[at..at + data.len()].copy_from_slice(data);
        match self.ranges.last_mut() {
            Some((_, end)) if *end == at => *end = at + data.len(),
            _ => self.ranges.push((at, at + data.len())),
        }
    }

    /// Stores the ranges at `la`, all or nothing.
    fn store<E: Env + ?Sized>(&self, st: &mut CpuState, env: &mut E, la: u64) -> Result<(), Exception> {
        let end = self.ranges.iter().map(|r| r.1).max().unwrap_or(0);
        mem::probe_write(st, env, la, end, Privilege::Current)?;
        for &(from, to) in &self.ranges {
            mem::write(st, env, la.wrapping_add(from as u64), &self.bytes[from..to], Privilege::Current)?;
        }
        Ok(())
    }
}

/// The 24 bytes of x87 control state. Selectors are not kept (CPUID leaf 7, EBX bit 13), so the 32-bit form has zeros there.
fn x87_control(image: &[u8], wide: bool) -> [u8; 24] {
    let mut c = [0; 24];
    c.copy_from_slice(&image[..24]);
    c[5] = 0;
    if !wide {
        c[12..16].fill(0);
        c[20..24].fill(0);
    }
    c
}

/// The image with every component of `mask` that is not in use written out as its initial configuration.
fn exact(st: &CpuState, mask: u64) -> CpuState {
    let mut copy = st.clone();
    for i in (0..8).filter(|i| mask & !simd::in_use(st) & (1 << i) != 0) {
        simd::initialise(&mut copy, i);
    }
    copy
}

fn save<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    i: &Instruction,
    form: Form,
    wide: bool,
) -> Result<Step, Exception> {
    let rfbm = requested(st)?;
    let compacted = form == Form::Compacted;
    let size = if compacted { host_fpu::compacted_size(rfbm) } else { host_fpu::standard_size(rfbm) };
    let la = area(st, i, size, 64, true)?;
    let mut used = simd::in_use(st) & rfbm;
    if compacted && rfbm & 2 != 0 && simd::mxcsr(st) != MXCSR_INIT {
        used |= 2;
    }
    let wanted = if form == Form::Plain { rfbm } else { used };
    let exact_state = if wanted & !simd::in_use(st) != 0 { Some(exact(st, wanted)) } else { None };
    let image = &exact_state.as_ref().unwrap_or(st).xsave.0;

    let mut d = Draft::new();
    if wanted & 1 != 0 {
        d.put(0, &x87_control(image, wide));
    }
    // MXCSR goes with SSE; in the standard format also with AVX, used or not.
    if (compacted && wanted & 2 != 0) || (!compacted && rfbm & 6 != 0) {
        d.put(24, &image[24..28]);
        d.put(28, &host_fpu::mxcsr_mask().to_le_bytes());
    }
    if wanted & 1 != 0 {
        d.put(32, &image[32..160]);
    }
    if wanted & 2 != 0 {
        d.put(160, &image[160..160 + visible(st, 1)]);
    }
    if compacted {
        d.put(512, &used.to_le_bytes());
        d.put(520, &(rfbm | COMPACTED).to_le_bytes());
    } else {
        // The bits of components that were not asked for stay as memory has them.
        let old = mem::read_u64(st, env, la.wrapping_add(512), Privilege::Current)?;
        d.put(512, &((old & !rfbm) | used).to_le_bytes());
    }
    let image = &exact_state.as_ref().unwrap_or(st).xsave.0;
    for c in EXTENDED.into_iter().filter(|c| wanted & (1 << c) != 0) {
        let at = if compacted { host_fpu::compacted_offset(rfbm, c) } else { component(c).offset };
        let from = component(c).offset;
        d.put(at, &image[from..from + visible(st, c)]);
    }
    d.store(st, env, la)?;
    Ok(Step::Next)
}

/// What a restore does about MXCSR.
enum NewMxcsr {
    Keep,
    Set(u32),
}

fn restore<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction, wide: bool) -> Result<Step, Exception> {
    let rfbm = requested(st)?;
    let la = area(st, i, LEGACY_AND_HEADER, 64, false)?;
    let mut b = [0; XSAVE_BYTES];
    mem::read(st, env, la, &mut b[..LEGACY_AND_HEADER], Privilege::Current)?;
    let (bv, comp) = (get64(&b, 512), get64(&b, 520));
    let compacted = comp & COMPACTED != 0;
    let layout = if compacted {
        let named = comp & !COMPACTED;
        if b[528..576].iter().any(|&x| x != 0) || named & !st.xcr0 != 0 || bv & !named != 0 {
            return Err(GP);
        }
        named
    } else {
        if b[520..536].iter().any(|&x| x != 0) || bv & !st.xcr0 != 0 {
            return Err(GP);
        }
        0
    };
    let loaded = u32::from_le_bytes([b[24], b[25], b[26], b[27]]);
    let mxcsr = match (compacted, rfbm & 6 != 0, rfbm & 2 != 0) {
        (false, true, _) => NewMxcsr::Set(loaded),
        (true, _, true) if bv & 2 != 0 => NewMxcsr::Set(loaded),
        (true, _, true) => NewMxcsr::Set(MXCSR_INIT),
        _ => NewMxcsr::Keep,
    };
    if let NewMxcsr::Set(v) = mxcsr
        && v & !host_fpu::mxcsr_mask() != 0
    {
        return Err(GP);
    }
    // Everything is read, to its place in the standard format, before anything changes.
    for c in EXTENDED.into_iter().filter(|c| rfbm & bv & (1 << c) != 0) {
        let from = if compacted { host_fpu::compacted_offset(layout, c) } else { component(c).offset };
        let (to, len) = (component(c).offset, visible(st, c));
        mem::read(st, env, la.wrapping_add(from as u64), &mut b[to..to + len], Privilege::Current)?;
    }
    if let NewMxcsr::Set(v) = mxcsr {
        simd::set_mxcsr(st, v);
    }
    for c in (0..8).filter(|c| rfbm & (1 << c) != 0) {
        load_component(st, c, bv & (1 << c) != 0, &b, wide);
    }
    Ok(Step::Next)
}

/// Takes component `c` from standard-format bytes `b`, or initialises it.
fn load_component(st: &mut CpuState, c: u32, present: bool, b: &[u8; XSAVE_BYTES], wide: bool) {
    let whole = c == 0 || visible(st, c) == simd::ranges(c)[0].len();
    if !present && whole {
        return simd::initialise(st, c);
    }
    simd::materialise(st, c);
    if c == 0 {
        st.xsave.0[..24].copy_from_slice(&x87_control(b, wide));
        // Reserved bits of the control word do not keep what is loaded: bit 6 reads as one, the others as zero.
        let fcw = (u16::from_le_bytes([st.xsave.0[0], st.xsave.0[1]]) & 0x1f3f) | 0x40;
        st.xsave.0[..2].copy_from_slice(&fcw.to_le_bytes());
        // ES and B follow from the exceptions that are flagged and not masked.
        let pending = u8::from(st.xsave.0[2] & !st.xsave.0[0] & 0x3f != 0) << 7;
        st.xsave.0[2] = (st.xsave.0[2] & 0x7f) | pending;
        st.xsave.0[3] = (st.xsave.0[3] & 0x7f) | pending;
        st.xsave.0[32..160].copy_from_slice(&b[32..160]);
        return;
    }
    let at = simd::ranges(c)[0].start;
    let len = visible(st, c);
    if present {
        st.xsave.0[at..at + len].copy_from_slice(&b[at..at + len]);
    } else {
        st.xsave.0[at..at + len].fill(0);
    }
}

fn fx_allowed(st: &CpuState) -> Result<(), Exception> {
    if st.cr0 & (cr0::TS | cr0::EM) != 0 { Err(Exception::DeviceNotAvailable) } else { Ok(()) }
}

fn fxsave<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction, wide: bool) -> Result<Step, Exception> {
    fx_allowed(st)?;
    let la = area(st, i, 512, 16, true)?;
    let exact_state = if simd::in_use(st) & 3 != 3 { Some(exact(st, 3)) } else { None };
    let image = &exact_state.as_ref().unwrap_or(st).xsave.0;
    let mut d = Draft::new();
    d.put(0, &x87_control(image, wide));
    d.put(24, &image[24..28]);
    d.put(28, &host_fpu::mxcsr_mask().to_le_bytes());
    d.put(32, &image[32..160 + visible(st, 1)]);
    d.store(st, env, la)?;
    Ok(Step::Next)
}

fn fxrstor<E: Env + ?Sized>(st: &mut CpuState, env: &mut E, i: &Instruction, wide: bool) -> Result<Step, Exception> {
    fx_allowed(st)?;
    let la = area(st, i, 512, 16, false)?;
    let mut b = [0; XSAVE_BYTES];
    mem::read(st, env, la, &mut b[..512], Privilege::Current)?;
    let mxcsr = u32::from_le_bytes([b[24], b[25], b[26], b[27]]);
    if mxcsr & !host_fpu::mxcsr_mask() != 0 {
        return Err(GP);
    }
    simd::set_mxcsr(st, mxcsr);
    load_component(st, 0, true, &b, wide);
    load_component(st, 1, true, &b, wide);
    Ok(Step::Next)
}

fn xgetbv(st: &mut CpuState) -> Result<Step, Exception> {
    if st.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::InvalidOpcode);
    }
    let value = match st.gpr[Reg::Rcx as usize] as u32 {
        0 => st.xcr0,
        1 => {
            let sse = if simd::mxcsr(st) == MXCSR_INIT { 0 } else { 2 };
            (get64(&st.xsave.0, XSTATE_BV) | sse) & st.xcr0
        }
        _ => return Err(GP),
    };
    set_edx_eax(st, value);
    Ok(Step::Next)
}

/// x87 always; AVX only with SSE; AVX-512's three only together and with AVX (SDM vol. 1, section 13.3).
pub(crate) fn xcr0_consistent(value: u64) -> bool {
    value & 1 != 0 && value & 6 != 4 && matches!(value & 0xe0, 0 | 0xe0) && value & 0xe4 != 0xe0
}

fn xsetbv(st: &mut CpuState) -> Result<Step, Exception> {
    if st.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::InvalidOpcode);
    }
    let value = edx_eax(st);
    let allowed = value & !host_fpu::offered_xcr0() == 0 && xcr0_consistent(value);
    if st.cpl != 0 || st.gpr[Reg::Rcx as usize] as u32 != 0 || !allowed {
        return Err(GP);
    }
    st.xcr0 = value;
    Ok(Step::Resync) // which instructions exist depends on it
}

#[cfg(test)]
mod tests;
