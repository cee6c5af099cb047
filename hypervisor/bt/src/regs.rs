//! Where guest registers live while translated code runs.
//!
//! | guest | host |
//! |---|---|
//! | RAX RDX RBX RBP RSI RDI R8 R12-R15 | the same register |
//! | RCX | R9 |
//! | RSP | R10 |
//! | R9 R10 R11 | memory, `gs:[cpu.gpr]` |
//!
//! Host RCX and R11 are scratch (RCX because JRCXZ is the one conditional jump that needs no flags), host RSP is the host's
//! stack. R9, R10 and R11 are what compilers use least: in cc1 a third as often as R13, R14 and R15 (see docs/decisions).

use crate::asm::H;
use iced_x86::Register;

/// Where a guest register lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Home {
    Host(H),
    /// Guest register number, in memory.
    Spilled(usize),
}

/// The home of guest register `n`.
pub(crate) fn home(n: usize) -> Home {
    match n {
        1 => Home::Host(H::GUEST_RCX),
        4 => Home::Host(H::GUEST_RSP),
        9..=11 => Home::Spilled(n),
        _ => Home::Host(H(n as u8)),
    }
}

/// Width class of a general-purpose register name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    High8,
    B8,
    B16,
    B32,
    B64,
}

/// Number and width of a general-purpose register; `None` for all other registers.
pub(crate) fn gpr_of(r: Register) -> Option<(usize, Width)> {
    if !r.is_gpr() {
        return None;
    }
    let w = match r {
        Register::AH | Register::CH | Register::DH | Register::BH => Width::High8,
        _ if r.is_gpr8() => Width::B8,
        _ if r.is_gpr16() => Width::B16,
        _ if r.is_gpr32() => Width::B32,
        _ => Width::B64,
    };
    let n = match r {
        Register::AH => 0,
        Register::CH => 1,
        Register::DH => 2,
        Register::BH => 3,
        _ => r.full_register().number(),
    };
    Some((n, w))
}

/// iced's name for host register `h` at width `w`.
pub(crate) fn host_name(h: H, w: Width) -> Register {
    const B8: [Register; 16] = [
        Register::AL,
        Register::CL,
        Register::DL,
        Register::BL,
        Register::SPL,
        Register::BPL,
        Register::SIL,
        Register::DIL,
        Register::R8L,
        Register::R9L,
        Register::R10L,
        Register::R11L,
        Register::R12L,
        Register::R13L,
        Register::R14L,
        Register::R15L,
    ];
    const H8: [Register; 4] = [Register::AH, Register::CH, Register::DH, Register::BH];
    let n = h.0 as usize;
    match w {
        Width::High8 => H8[n & 3],
        Width::B8 => B8[n],
        Width::B16 => Register::AX + n as u32,
        Width::B32 => Register::EAX + n as u32,
        Width::B64 => Register::RAX + n as u32,
    }
}
