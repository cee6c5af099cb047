//! What R11 still holds: the assembler's account of it.

use super::{Asm, H, Label, M};

/// The guest register that lives at this offset of the state.
pub(super) fn spilled_at(disp: i32) -> Option<u8> {
    [9, 10, 11].into_iter().find(|&g| disp == crate::state::off::gpr(usize::from(g)))
}

impl Asm {
    /// The guest register that lives in memory and that R11 holds as well, all 64 bits of it: it was stored from there or loaded to there, and neither has
    /// changed since. Loads of it cost nothing or a move. It is forgotten at every label and call, where other code may come in.
    pub(crate) fn shadow(&self) -> Option<u8> {
        self.shadow
    }

    /// R11 still holds what it held: an instruction only read it, or whoever else comes in here brings it along.
    pub(crate) fn set_shadow(&mut self, g: Option<u8>) {
        self.shadow = g;
    }

    /// Binds a label where all who come in have R11 as it is here.
    pub(crate) fn bind_with_shadow(&mut self, l: Label) {
        let shadow = self.shadow;
        self.bind(l);
        self.shadow = shadow;
    }

    /// A host register is written.
    pub(super) fn writes(&mut self, d: H) {
        if d == H::R11 {
            self.shadow = None;
        }
    }

    /// Part of an operand may be written.
    pub(super) fn writes_memory(&mut self, m: M) {
        if m.slot().and_then(spilled_at) == self.shadow {
            self.shadow = None;
        }
    }
}
