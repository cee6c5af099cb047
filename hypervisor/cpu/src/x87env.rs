//! The x87 instructions that move the environment or the whole x87 state to and from memory: FNSTENV, FLDENV, FNSAVE, FRSTOR
//! (SDM vol. 1, section 8.1.10), and FNINIT.
//!
//! Everything else of the x87 runs natively. These four have memory formats of 14, 28, 94 and 108 bytes that depend on mode
//! and operand size, and translating between them and the FXSAVE layout is plain bookkeeping. Instruction and data
//! selectors are not kept: CPUID says that they read as zero (leaf 7, EBX bit 13).

use iced_x86::{Code, Instruction};

use crate::mem::{self, Privilege};
use crate::simd::{self, get64};
use crate::state::cr0;
use crate::{CpuState, Env, Exception, Step, ea};

/// The x87 environment (SDM vol. 1, section 8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Environment {
    fcw: u16,
    fsw: u16,
    /// Full tag word, two bits per physical register.
    ftw: u16,
    fop: u16,
    fip: u64,
    fdp: u64,
}

/// Carries out `i` if it is one of these.
pub(crate) fn emulate<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    i: &Instruction,
) -> Option<Result<Step, Exception>> {
    let done = match i.code() {
        Code::Fnstenv_m14byte => store(st, env, i, 2, false),
        Code::Fnstenv_m28byte => store(st, env, i, 4, false),
        Code::Fnsave_m94byte => store(st, env, i, 2, true),
        Code::Fnsave_m108byte => store(st, env, i, 4, true),
        Code::Fldenv_m14byte => load(st, env, i, 2, false),
        Code::Fldenv_m28byte => load(st, env, i, 4, false),
        Code::Frstor_m94byte => load(st, env, i, 2, true),
        Code::Frstor_m108byte => load(st, env, i, 4, true),
        Code::Fninit => available(st).map(|()| initialise(st)),
        _ => return None,
    };
    Some(done.map(|()| Step::Next))
}

fn available(st: &CpuState) -> Result<(), Exception> {
    if st.cr0 & (cr0::TS | cr0::EM) != 0 { Err(Exception::DeviceNotAvailable) } else { Ok(()) }
}

/// Offset of ST(`n`) in the image.
fn st_at(n: usize) -> usize {
    32 + 16 * n
}

/// The physical register that is ST(0).
fn top(st: &CpuState) -> usize {
    usize::from(st.xsave.0[3] >> 3 & 7)
}

/// Tag of an 80-bit value in a register that is not empty: 0 valid, 1 zero, 2 special.
fn tag_of(value: &[u8]) -> u16 {
    let mantissa = get64(value, 0);
    let exponent = u16::from_le_bytes([value[8], value[9]]) & 0x7fff;
    match (exponent, mantissa) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        (_, m) if m >> 63 == 0 => 2, // unnormal
        _ => 0,
    }
}

fn environment(st: &CpuState) -> Environment {
    let b = &st.xsave.0;
    let word = |at: usize| u16::from_le_bytes([b[at], b[at + 1]]);
    let fsw = word(2);
    let top = top(st);
    let mut ftw = 0;
    for physical in 0..8 {
        let at = st_at((physical + 8 - top) & 7);
        let tag = if b[4] >> physical & 1 == 0 { 3 } else { tag_of(&b[at..at + 10]) };
        ftw |= tag << (2 * physical);
    }
    Environment { fcw: word(0), fsw, ftw, fop: word(6) & 0x7ff, fip: get64(b, 8), fdp: get64(b, 16) }
}

fn set_environment(st: &mut CpuState, e: &Environment) {
    // ES and B summarise the unmasked exceptions; they are not loaded but follow from the rest.
    let pending = e.fsw & !e.fcw & 0x3f != 0;
    let fsw = (e.fsw & 0x7f7f) | if pending { 0x8080 } else { 0 };
    let mut abridged = 0;
    for physical in 0..8 {
        if e.ftw >> (2 * physical) & 3 != 3 {
            abridged |= 1 << physical;
        }
    }
    let b = &mut st.xsave.0;
    b[0..2].copy_from_slice(&(e.fcw & 0x1f7f | 0x40).to_le_bytes());
    b[2..4].copy_from_slice(&fsw.to_le_bytes());
    b[4] = abridged;
    b[5] = 0;
    b[6..8].copy_from_slice(&(e.fop & 0x7ff).to_le_bytes());
    b[8..16].copy_from_slice(&e.fip.to_le_bytes());
    b[16..24].copy_from_slice(&e.fdp.to_le_bytes());
}

/// Moves the register contents after TOP has changed: it renames the registers, and the image keeps them in ST order.
fn follow_top(st: &mut CpuState, old_top: usize) {
    let turn = (top(st) + 8 - old_top) & 7;
    st.xsave.0[st_at(0)..st_at(8)].rotate_left(16 * turn);
}

/// FNINIT: all registers become empty but keep their contents, which FNSAVE and FXSAVE still show.
fn initialise(st: &mut CpuState) {
    if simd::in_use(st) & 1 != 0 {
        let old_top = top(st);
        set_environment(st, &Environment { fcw: 0x037f, fsw: 0, ftw: 0xffff, fop: 0, fip: 0, fdp: 0 });
        follow_top(st, old_top);
    }
}

/// Whether the real-address and virtual-8086 layout applies, where pointers are 20- or 32-bit linear addresses.
fn real_layout(st: &CpuState) -> bool {
    !st.protected() || st.v8086()
}

/// Lays out an environment with fields of `unit` (2 or 4) bytes (SDM vol. 1, figures 8-9 to 8-12).
fn encode(e: &Environment, unit: usize, real: bool) -> [u8; 28] {
    let (fip, fdp, fop) = (e.fip as u32, e.fdp as u32, u32::from(e.fop));
    let fields: [u32; 7] = match (unit, real) {
        (2, false) => [e.fcw.into(), e.fsw.into(), e.ftw.into(), fip, 0, fdp, 0],
        (2, true) => {
            let high = |p: u32| (p >> 16 & 0xf) << 12;
            [e.fcw.into(), e.fsw.into(), e.ftw.into(), fip, high(fip) | fop, fdp, high(fdp)]
        }
        _ => {
            let control = |w: u16| 0xffff_0000 | u32::from(w);
            let (a, b, c) = (control(e.fcw), control(e.fsw), control(e.ftw));
            if real {
                let high = |p: u32| (p >> 16) << 12;
                [a, b, c, 0xffff_0000 | (fip & 0xffff), high(fip) | fop, 0xffff_0000 | (fdp & 0xffff), high(fdp)]
            } else {
                [a, b, c, fip, fop << 16, fdp, 0xffff_0000]
            }
        }
    };
    let mut out = [0; 28];
    for (k, f) in fields.into_iter().enumerate() {
        out[k * unit..(k + 1) * unit].copy_from_slice(&f.to_le_bytes()[..unit]);
    }
    out
}

fn decode(b: &[u8], unit: usize, real: bool) -> Environment {
    let field = |k: usize| (0..unit).rev().fold(0_u32, |v, n| v << 8 | u32::from(b[k * unit + n]));
    let (fcw, fsw, ftw) = (field(0) as u16, field(1) as u16, field(2) as u16);
    let (fip, fop, fdp) = match (unit, real) {
        (2, false) => (field(3), 0, field(5)),
        (2, true) => (field(3) | (field(4) >> 12) << 16, field(4), field(5) | (field(6) >> 12) << 16),
        (_, true) => {
            let join = |low: u32, high: u32| (low & 0xffff) | (high >> 12 & 0xffff) << 16;
            (join(field(3), field(4)), field(4), join(field(5), field(6)))
        }
        _ => (field(3), field(4) >> 16, field(5)),
    };
    Environment { fcw, fsw, ftw, fop: fop as u16 & 0x7ff, fip: fip.into(), fdp: fdp.into() }
}

/// FNSTENV and, with `whole`, FNSAVE.
fn store<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    i: &Instruction,
    unit: usize,
    whole: bool,
) -> Result<(), Exception> {
    available(st)?;
    let head = 7 * unit;
    let len = if whole { head + 80 } else { head };
    let la = ea::linear(st, i, 0, len, true)?;
    mem::probe_write(st, env, la, len, Privilege::Current)?;
    if simd::in_use(st) & 1 == 0 {
        simd::initialise(st, 0); // same meaning, exact bytes
    }
    let e = environment(st);
    let mut out = [0; 108];
    out[..28].copy_from_slice(&encode(&e, unit, real_layout(st)));
    for n in 0..8 {
        let to = head + 10 * n;
        if whole {
            out[to..to + 10].copy_from_slice(&st.xsave.0[st_at(n)..st_at(n) + 10]);
        }
    }
    mem::write(st, env, la, &out[..len], Privilege::Current)?;
    if whole {
        initialise(st);
    } else {
        simd::materialise(st, 0);
        set_environment(st, &Environment { fcw: e.fcw | 0x3f, ..e }); // FNSTENV masks all exceptions
    }
    Ok(())
}

/// FLDENV and, with `whole`, FRSTOR.
fn load<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    i: &Instruction,
    unit: usize,
    whole: bool,
) -> Result<(), Exception> {
    available(st)?;
    if simd::in_use(st) & 1 != 0 && st.xsave.0[2] & 0x80 != 0 {
        return Err(Exception::FpuError); // unlike the stores, these wait for an unmasked exception
    }
    let head = 7 * unit;
    let len = if whole { head + 80 } else { head };
    let la = ea::linear(st, i, 0, len, false)?;
    let mut b = [0; 108];
    mem::read(st, env, la, &mut b[..len], Privilege::Current)?;
    simd::materialise(st, 0);
    let old_top = top(st);
    set_environment(st, &decode(&b, unit, real_layout(st)));
    if !whole {
        follow_top(st, old_top);
    } else {
        for n in 0..8 {
            let from = head + 10 * n;
            st.xsave.0[st_at(n)..st_at(n) + 10].copy_from_slice(&b[from..from + 10]);
            st.xsave.0[st_at(n) + 10..st_at(n) + 16].fill(0);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
