//! Linear-address memory access for emulated instructions: translate, check, read or write, split at page boundaries.

use crate::{CpuState, Env, Exception};

/// On whose behalf an access is made (SDM vol. 3, section 4.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// With the current privilege level; supervisor accesses to user pages obey SMAP and EFLAGS.AC.
    Current,
    /// An implicit supervisor access (descriptor tables, TSS, exception frames): supervisor whatever the CPL, and AC does not lift SMAP.
    Supervisor,
}

/// Reads `data.len()` bytes at linear address `la`; nothing is consumed when it faults.
pub fn read<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    la: u64,
    data: &mut [u8],
    p: Privilege,
) -> Result<(), Exception> {
    let _ = (st, env, la, data, p);
    unimplemented!()
}

/// Writes `data` at linear address `la`; both pages of a crossing write are checked before the first byte is stored.
pub fn write<E: Env + ?Sized>(
    st: &mut CpuState,
    env: &mut E,
    la: u64,
    data: &[u8],
    p: Privilege,
) -> Result<(), Exception> {
    let _ = (st, env, la, data, p);
    unimplemented!()
}
