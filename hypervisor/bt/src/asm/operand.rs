//! Registers and memory operands in host terms.

use iced_x86::Register;

/// A host register by encoding number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct H(pub(crate) u8);

#[allow(dead_code)]
impl H {
    pub(crate) const RAX: H = H(0);
    pub(crate) const RCX: H = H(1);
    pub(crate) const RDX: H = H(2);
    pub(crate) const RBX: H = H(3);
    pub(crate) const RSP: H = H(4);
    pub(crate) const RBP: H = H(5);
    pub(crate) const RSI: H = H(6);
    pub(crate) const RDI: H = H(7);
    /// Home of the guest's RCX.
    pub(crate) const GUEST_RCX: H = H(9);
    /// Home of the guest's RSP.
    pub(crate) const GUEST_RSP: H = H(10);
    /// The second scratch register.
    pub(crate) const R11: H = H(11);

    pub(super) fn low(self) -> u8 {
        self.0 & 7
    }
    pub(super) fn high(self) -> u8 {
        self.0 >> 3
    }
}

/// A memory operand in host terms.
#[derive(Clone, Copy, Debug)]
pub(crate) struct M {
    pub(crate) base: Option<H>,
    /// Index register and scale as a shift count (0..=3).
    pub(crate) index: Option<(H, u8)>,
    pub(crate) disp: i32,
    pub(crate) seg: Base,
}

/// What an operand's address is relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Base {
    /// Nothing: a host address.
    Host,
    /// The vCPU's state, behind GS. The low window is at a fixed distance from it.
    State,
    /// The high window, behind FS (see [`crate::window`]).
    Window,
}

impl Base {
    /// The segment prefix.
    pub(super) fn prefix(self) -> &'static [u8] {
        match self {
            Self::Host => &[],
            Self::State => &[0x65],
            Self::Window => &[0x64],
        }
    }

    /// iced's name of the segment prefix.
    pub(crate) fn register(self) -> Register {
        match self {
            Self::Host => Register::None,
            Self::State => Register::GS,
            Self::Window => Register::FS,
        }
    }
}

impl M {
    /// `gs:[disp]`.
    pub(crate) fn gs(disp: i32) -> Self {
        Self { base: None, index: None, disp, seg: Base::State }
    }
    /// `gs:[base + disp]`.
    pub(crate) fn gs_base(base: H, disp: i32) -> Self {
        Self { base: Some(base), index: None, disp, seg: Base::State }
    }
    /// `gs:[index << shift + disp]`.
    pub(crate) fn gs_index(index: H, shift: u8, disp: i32) -> Self {
        Self { base: None, index: Some((index, shift)), disp, seg: Base::State }
    }
    /// The offset in the vCPU's state, if the operand is a fixed place there.
    pub(super) fn slot(self) -> Option<i32> {
        (self.seg == Base::State && self.base.is_none() && self.index.is_none()).then_some(self.disp)
    }
    /// Whether the operand names a register.
    pub(crate) fn names(&self, h: H) -> bool {
        self.base == Some(h) || self.index.is_some_and(|(x, _)| x == h)
    }
    /// The same place relative to something else, `by` further.
    pub(crate) fn relative(self, seg: Base, by: i32) -> Self {
        Self { seg, disp: self.disp + by, ..self }
    }
    /// `[base + disp]`.
    pub(crate) fn base(base: H, disp: i32) -> Self {
        Self { base: Some(base), index: None, disp, seg: Base::Host }
    }
    /// `[base + index]`.
    pub(crate) fn base_index(base: H, index: H) -> Self {
        Self { base: Some(base), index: Some((index, 0)), disp: 0, seg: Base::Host }
    }
}
