//! A hypercall, from registers to registers.
//!
//! What all calls have in common is checked first, in the order that the specification gives: who calls, whether there is such a call,
//! whether its feature is on offer and in force, and whether unused arguments are zero. Then there is one function for each call.

use std::sync::atomic::Ordering::SeqCst;

use paravane_cpu::state::rflags;
use paravane_cpu::{CpuState, Env, HypercallOutcome, Reg};
use pv_abi::Version;
use pv_abi::call::{ALL_ONES, Call, Error, Shutdown};
use pv_abi::feature::{Feature, Features};
use vm_memory::{Bytes, GuestAddress};

use super::{MAX_TEXT, Pv, page, pages};
use crate::chipset::Chipset;
use crate::devices::control::StopCause;
use crate::tsc;

/// What a call gives: its value, and how the vCPU goes on.
type Answer = Result<(u64, HypercallOutcome), Error>;

/// A call that is done.
pub(super) const fn done(value: u64) -> Answer {
    Ok((value, HypercallOutcome::Done))
}

/// Carries out the hypercall in the registers of `st`.
pub(crate) fn hypercall(pv: &Pv, chipset: &Chipset, st: &mut CpuState, env: &mut dyn Env) -> HypercallOutcome {
    if let Some(outcome) = pv.kvm_hypercall(chipset, st) {
        return outcome;
    }
    let (rax, rdx, outcome) = match checked(pv, st).and_then(|call| carry_out(pv, chipset, call, st, env)) {
        Ok((value, outcome)) => (0, value, outcome),
        Err(Stopped { error, value }) => (error.to_rax(), value, HypercallOutcome::Done),
    };
    st.gpr[Reg::Rax as usize] = rax;
    st.gpr[Reg::Rdx as usize] = rdx;
    outcome
}

/// Why a call stopped, and how far it got.
pub(super) struct Stopped {
    pub(super) error: Error,
    pub(super) value: u64,
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self { error, value: 0 }
    }
}

/// The arguments, in the order of their registers.
fn arguments(st: &CpuState) -> [u64; 4] {
    [Reg::Rdi, Reg::Rsi, Reg::Rdx, Reg::Rcx].map(|r| st.gpr[r as usize])
}

fn checked(pv: &Pv, st: &CpuState) -> Result<Call, Stopped> {
    if st.cpl != 0 || !st.code64() {
        return Err(Error::NotPermitted.into());
    }
    let call = Call::from_number(st.gpr[Reg::Rax as usize]).ok_or(Error::NotSupported)?;
    if pv.offered == Features::NONE {
        return Err(Error::NotSupported.into());
    }
    if let Some(feature) = call.feature() {
        if !pv.offered.has(feature) {
            return Err(Error::NotSupported.into());
        }
        if !pv.has(feature) {
            return Err(Error::NotNegotiated.into());
        }
    }
    if call == Call::SharePage && pv.version.load(SeqCst) == 0 {
        return Err(Error::NotNegotiated.into());
    }
    if arguments(st)[call.arguments()..].iter().any(|&a| a != 0) {
        return Err(Error::InvalidArgument.into());
    }
    Ok(call)
}

fn carry_out(
    pv: &Pv,
    chipset: &Chipset,
    call: Call,
    st: &mut CpuState,
    env: &mut dyn Env,
) -> Result<(u64, HypercallOutcome), Stopped> {
    let [a, b, c, d] = arguments(st);
    let vcpu = st.id;
    Ok(match call {
        Call::Negotiate => negotiate(pv, chipset, vcpu, a, b)?,
        Call::SharePage => share_page(pv, chipset, vcpu, a, env)?,
        Call::UpdatePages => return pages::update(pv, chipset, st, env, a, b),
        // The vCPU looks at its interrupts as it goes on.
        Call::Unmask => (0, HypercallOutcome::Resync),
        Call::SetTimer => set_timer(pv, vcpu, a, b)?,
        Call::SendIpi => send_ipi(pv, chipset, a, b, c)?,
        Call::FlushTlb => flush_tlb(pv, chipset, vcpu, env, [a, b, c, d])?,
        Call::Halt => {
            st.rflags |= rflags::IF;
            pv.enable_irqs(vcpu);
            (0, HypercallOutcome::Halt)
        }
        Call::Kick => kick(pv, chipset, a)?,
        Call::Yield => {
            if a != ALL_ONES {
                target(pv, a)?;
            }
            std::thread::yield_now();
            done(0)?
        }
        Call::ConsoleWrite => console_write(pv, chipset, a, b)?,
        Call::ConsoleRead => console_read(pv, chipset, a, b, env)?,
        Call::FreePages => return pages::free(pv, chipset, st, env, a, b),
        Call::Shutdown => {
            chipset.stop(match Shutdown::from_number(a).ok_or(Error::InvalidArgument)? {
                Shutdown::PowerOff => StopCause::PowerOff,
                Shutdown::Reset => StopCause::Reset,
            });
            (0, HypercallOutcome::Stopping)
        }
        Call::Panic => {
            let text = text(pv, a, b)?;
            chipset.guest_panicked(&text);
            (0, HypercallOutcome::Stopping)
        }
        Call::VirtioRead => done(pv.device_read(a, b, c)?)?,
        Call::VirtioWrite => done(pv.device_write(a, b, c, d)?)?,
        Call::Notify => done(pv.notify(vcpu, a)?)?,
        Call::EventVector => {
            pv.event_vector.store(if a == 0 { 0 } else { vector(a)? }, SeqCst);
            done(0)?
        }
    })
}

/// A new agreement ends the old one with all that was set up under it, so that a kernel can start another one.
fn negotiate(pv: &Pv, chipset: &Chipset, vcpu: u32, version: u64, features: u64) -> Answer {
    let version = u32::try_from(version).map_err(|_| Error::BadVersion)?;
    if !Version::from_bits(version).works_with(Version::CURRENT) {
        return Err(Error::BadVersion);
    }
    let wanted = Features(features);
    if !wanted.within(pv.offered) {
        return Err(Error::BadFeatures);
    }
    for n in 0..pv.vcpus.len() as u32 {
        chipset.settle_eoi(n);
        pv.unshare_page(n);
        arm(pv, n, None);
        if let Some(v) = pv.vcpu(n) {
            v.kicked.store(false, SeqCst);
        }
    }
    pv.event_vector.store(0, SeqCst);
    pv.reset_devices();
    pv.version.store(version, SeqCst);
    pv.in_force.store(wanted.0, SeqCst);
    chipset.look_again(vcpu);
    Ok((wanted.0, HypercallOutcome::Resync))
}

fn share_page(pv: &Pv, chipset: &Chipset, vcpu: u32, gpa: u64, env: &mut dyn Env) -> Answer {
    if gpa != 0 && (!gpa.is_multiple_of(pv_abi::shared::BYTES as u64) || !pv.is_ram(gpa, pv_abi::shared::BYTES as u64))
    {
        return Err(Error::BadAddress);
    }
    chipset.settle_eoi(vcpu);
    pv.unshare_page(vcpu);
    if gpa != 0 {
        pv.share_page(vcpu, gpa, env);
    }
    Ok((0, HypercallOutcome::Resync))
}

fn arm(pv: &Pv, vcpu: u32, deadline: Option<u64>) {
    if let Some(timer) = pv.vcpu(vcpu).and_then(|v| v.timer.get()) {
        timer.set(deadline);
    }
}

/// A vector that an interrupt may have: not one of the CPU's exceptions.
fn vector(v: u64) -> Result<u8, Error> {
    u8::try_from(v).ok().filter(|&v| v >= 32).ok_or(Error::InvalidArgument)
}

fn set_timer(pv: &Pv, vcpu: u32, deadline: u64, v: u64) -> Answer {
    let v = vector(v)?;
    if let Some(state) = pv.vcpu(vcpu) {
        state.timer_vector.store(v, SeqCst);
    }
    arm(pv, vcpu, (deadline != 0).then(|| pv.host_ns(deadline)));
    done(0)
}

impl Pv {
    /// The time on the host's clock at which the guest's shows `ns`: both count the same seconds, but the guest's follows the TSC alone.
    fn host_ns(&self, ns: u64) -> u64 {
        let (tsc, began) = self.origin;
        let ticks = u128::from(ns.saturating_sub(began)) * u128::from(tsc::tsc_khz()) / 1_000_000;
        self.clock.ns_of_tsc(tsc.saturating_add(u64::try_from(ticks).unwrap_or(u64::MAX)))
    }
}

/// The vCPU with this index.
fn target(pv: &Pv, n: u64) -> Result<u32, Error> {
    u32::try_from(n).ok().filter(|&n| pv.vcpu(n).is_some()).ok_or(Error::NoSuchTarget)
}

/// The vCPUs of a mask whose bit 0 is vCPU `first`.
fn targets(pv: &Pv, mask: u64, first: u64) -> Result<Vec<u32>, Error> {
    (0..64)
        .filter(|n| mask >> n & 1 != 0)
        .map(|n| target(pv, first.checked_add(n).ok_or(Error::NoSuchTarget)?))
        .collect()
}

fn send_ipi(pv: &Pv, chipset: &Chipset, mask: u64, first: u64, v: u64) -> Answer {
    let v = vector(v)?;
    let to = targets(pv, mask, first)?;
    for &n in &to {
        chipset.inject(n, v);
    }
    done(to.len() as u64)
}

/// Pages that are invalidated one by one; above, all of the address space is.
pub(super) const FEW_PAGES: u64 = 64;

fn flush_tlb(
    pv: &Pv,
    chipset: &Chipset,
    vcpu: u32,
    env: &mut dyn Env,
    [mask, first, address, count]: [u64; 4],
) -> Answer {
    let whole = address == ALL_ONES;
    if (whole && count != 0) || (!whole && (count == 0 || !address.is_multiple_of(4096))) {
        return Err(Error::InvalidArgument);
    }
    let to = targets(pv, mask, first)?;
    let what = if whole { None } else { Some((address, count)) };
    pv.flush_others(chipset, vcpu, &to, what, env);
    if to.contains(&vcpu) {
        pages::invalidate(env, what, FEW_PAGES);
    }
    Ok((to.len() as u64, HypercallOutcome::Resync))
}

pub(super) fn kick(pv: &Pv, chipset: &Chipset, to: u64) -> Answer {
    let to = target(pv, to)?;
    if let Some(v) = pv.vcpu(to) {
        v.kicked.store(true, SeqCst);
    }
    chipset.wake(to);
    done(0)
}

/// Checks a text's place and length.
fn text_range(pv: &Pv, gpa: u64, len: u64) -> Result<usize, Error> {
    if len > u64::from(MAX_TEXT) {
        return Err(Error::TooMany);
    }
    if !pv.is_ram(gpa, len) {
        return Err(Error::BadAddress);
    }
    Ok(len as usize)
}

fn text(pv: &Pv, gpa: u64, len: u64) -> Result<Vec<u8>, Error> {
    let mut text = vec![0; text_range(pv, gpa, len)?];
    pv.ram.read_slice(&mut text, GuestAddress(gpa)).map_err(|_| Error::BadAddress)?;
    Ok(text)
}

fn console_write(pv: &Pv, chipset: &Chipset, gpa: u64, len: u64) -> Answer {
    let text = text(pv, gpa, len)?;
    chipset.console_write(&text);
    done(text.len() as u64)
}

fn console_read(pv: &Pv, chipset: &Chipset, gpa: u64, len: u64, env: &mut dyn Env) -> Answer {
    let mut buffer = vec![0; text_range(pv, gpa, len)?];
    let n = chipset.console_read(&mut buffer);
    for (at, part) in page::parts(gpa, &buffer[..n]) {
        env.write_phys(at, part);
    }
    done(n as u64)
}

/// What no guest may see as an unknown feature: all calls belong to a feature of [`Feature::ALL`], or set the interface up.
const _: () = assert!(Feature::ALL.len() <= 64);
