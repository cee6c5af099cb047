//! Arrays in guest RAM that one call works off: page-table updates and free pages.
//!
//! Elements are applied in order. A call stops at the first element that is wrong, and says how many came before it; it may also stop
//! without an error when an interrupt is due, so that a long array does not hold it up.

use paravane_cpu::{CpuState, Env, HypercallOutcome, TlbFlush, control};
use pv_abi::call::Error;
use pv_abi::memory::{FreeRange, Operation, Update};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::calls::Stopped;
use super::{MAX_ELEMENTS, Pv};
use crate::chipset::Chipset;
use crate::memory;

type Answer = Result<(u64, HypercallOutcome), Stopped>;

/// Elements that are read at a time, and worked off between two looks at interrupts.
const CHUNK: usize = 128;

/// Pages that one element invalidates one by one; above, all of the address space goes, global pages too.
const FEW_PAGES: u64 = 512;

/// Most pages of a free range: 1 GiB.
const MOST_FREE: u64 = 1 << 18;

/// Works off `count` elements at `gpa`, in chunks.
fn each<T: FromBytes + FromZeros + IntoBytes + Immutable + Copy>(
    pv: &Pv,
    chipset: &Chipset,
    vcpu: u32,
    (gpa, count): (u64, u64),
    mut apply: impl FnMut(&T) -> Result<(), Error>,
) -> Answer {
    if count > u64::from(MAX_ELEMENTS) {
        return Err(Error::TooMany.into());
    }
    let size = size_of::<T>() as u64;
    if !gpa.is_multiple_of(size) || !pv.is_ram(gpa, count * size) {
        return Err(Error::BadAddress.into());
    }
    let mut finished = 0;
    let mut chunk = [T::new_zeroed(); CHUNK];
    while finished < count {
        let part = &mut chunk[..(count - finished).min(CHUNK as u64) as usize];
        let at = GuestAddress(gpa + finished * size);
        pv.ram
            .read_slice(part.as_mut_bytes(), at)
            .map_err(|_| Stopped { error: Error::BadAddress, value: finished })?;
        for element in &*part {
            apply(element).map_err(|error| Stopped { error, value: finished })?;
            finished += 1;
        }
        if chipset.attention(vcpu) {
            break;
        }
    }
    Ok((finished, HypercallOutcome::Resync))
}

/// UPDATE_PAGES.
pub(super) fn update(pv: &Pv, chipset: &Chipset, st: &mut CpuState, env: &mut dyn Env, gpa: u64, count: u64) -> Answer {
    each(pv, chipset, st.id, (gpa, count), |u: &Update| {
        let (operation, target) = u.parts().ok_or(Error::InvalidArgument)?;
        let zero = |v: u64| if v == 0 { Ok(()) } else { Err(Error::InvalidArgument) };
        match operation {
            Operation::SetEntry => {
                if !env.write_pte(target, u.value) {
                    return Err(Error::BadAddress);
                }
            }
            Operation::InvalidatePage => {
                if !target.is_multiple_of(4096) {
                    return Err(Error::InvalidArgument);
                }
                let pages = u.value.checked_add(1).ok_or(Error::InvalidArgument)?;
                invalidate(env, Some((target, pages)), FEW_PAGES);
            }
            Operation::InvalidateSpace => {
                zero(target | u.value)?;
                env.flush_tlb(TlbFlush::NonGlobal);
            }
            Operation::InvalidateAll => {
                zero(target | u.value)?;
                env.flush_tlb(TlbFlush::All);
            }
            Operation::SetRoot => {
                zero(target)?;
                control::write_cr3(st, env, u.value).map_err(|_| Error::InvalidArgument)?;
            }
        }
        Ok(())
    })
}

/// Invalidates so many pages from an address on, or the address space.
pub(super) fn invalidate(env: &mut dyn Env, pages: Option<(u64, u64)>, few: u64) {
    match pages {
        Some((address, count)) if count <= few => {
            for n in 0..count {
                env.flush_tlb(TlbFlush::Page(address.wrapping_add(n * 4096)));
            }
        }
        Some(_) => env.flush_tlb(TlbFlush::All),
        None => env.flush_tlb(TlbFlush::NonGlobal),
    }
}

/// FREE_PAGES. Pages that hold translated code keep their contents: that is always allowed.
pub(super) fn free(pv: &Pv, chipset: &Chipset, st: &CpuState, env: &mut dyn Env, gpa: u64, count: u64) -> Answer {
    each(pv, chipset, st.id, (gpa, count), |r: &FreeRange| {
        if !r.gpa.is_multiple_of(4096) || !(1..=MOST_FREE).contains(&r.pages) {
            return Err(Error::InvalidArgument);
        }
        if !pv.is_ram(r.gpa, r.pages * 4096) {
            return Err(Error::BadAddress);
        }
        let mut run = 0;
        for n in 0..=r.pages {
            let page = r.gpa + n * 4096;
            if n < r.pages && env.ram_slice(page, 4096, true).is_some() {
                run += 1;
            } else if run != 0 {
                memory::discard(&pv.ram, page - run * 4096, run * 4096);
                run = 0;
            }
        }
        Ok(())
    })
}
