//! KVM: the leaves beside the ABI that stock Linux knows.

use crate::abi::{Abi, NOT_RAM, Outcome, Why, check, fill, get, holds, leaf, page, ram_end};
use crate::{Kind, Test};
use guest_rt::{cpu, fault};
use pv_abi::shared::Clock;

pub(crate) const TESTS: &[Test] = &[
    ("KVM-1", "leaves", Kind::Ready(kvm_1)),
    ("KVM-2", "MSRs that are not offered", Kind::Ready(kvm_2)),
    ("KVM-3", "addresses that are not RAM", Kind::Ready(kvm_3)),
    ("KVM-4", "system time", Kind::Ready(kvm_4)),
    ("KVM-5", "wall clock", Kind::Ready(kvm_5)),
];

const BASE: u32 = 0x4000_0100;
const WALL: u32 = 0x4b56_4d00;
const TIME: u32 = 0x4b56_4d01;
const STEAL: u32 = 0x4b56_4d03;
const EOI: u32 = 0x4b56_4d04;

/// EAX of the feature leaf.
fn features() -> Result<u32, Why> {
    let [_, b, c, d] = leaf(BASE);
    if [b, c, d] != [0x4b4d_564b, 0x564b_4d56, 0x4d] {
        return Err(Why::Absent("the KVM leaves at 0x40000100"));
    }
    Ok(leaf(BASE + 1)[0])
}

/// Whether a WRMSR raises #GP.
fn refused(msr: u32, value: u64) -> bool {
    // SAFETY: the MSRs take addresses of scratch pages, or what must be refused.
    let (trap, faulted) =
        unsafe { fault!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32) };
    faulted && trap.frame.vector == 13
}

/// Whether a RDMSR raises #GP.
fn unreadable(msr: u32) -> bool {
    // SAFETY: reading these has no effect.
    let (trap, faulted) = unsafe { fault!("rdmsr", in("ecx") msr, out("eax") _, out("edx") _) };
    faulted && trap.frame.vector == 13
}

fn kvm_1(_: Abi) -> Outcome {
    let offered = features()?;
    check("highest leaf", leaf(BASE)[0].into(), u64::from(BASE) + 1)?;
    check("bits", u64::from(offered & !(1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 24)), 0)
}

fn kvm_2(_: Abi) -> Outcome {
    let offered = features()?;
    let there = |msr| match msr {
        WALL | TIME => offered >> 3 & 1 != 0,
        STEAL => offered >> 5 & 1 != 0,
        EOI => offered >> 6 & 1 != 0,
        _ => false,
    };
    for msr in 0x4b56_4d00..=0x4b56_4dff {
        if !there(msr) {
            holds("RDMSR", unreadable(msr))?;
            holds("WRMSR", refused(msr, 0))?;
        }
    }
    Ok(())
}

fn kvm_3(_: Abi) -> Outcome {
    let offered = features()?;
    for (msr, bit) in [(TIME, 3), (STEAL, 5), (EOI, 6)] {
        if offered >> bit & 1 == 0 {
            continue;
        }
        for bad in NOT_RAM.into_iter().chain([ram_end()]) {
            holds("no RAM", refused(msr, bad | 1))?;
        }
        holds("a reserved bit", refused(msr, page(1) | 3))?;
        holds("it can be disabled", !refused(msr, 0))?;
    }
    if offered >> 3 & 1 != 0 {
        holds("across the end of RAM", refused(TIME, ram_end() - 16 + 1))?;
    }
    Ok(())
}

fn kvm_4(_: Abi) -> Outcome {
    if features()? >> 3 & 1 == 0 {
        return Err(Why::Absent("CLOCKSOURCE2"));
    }
    fill(page(1), 0);
    holds("WRMSR", !refused(TIME, page(1) + 64 + 1))?;
    let at = page(1) + 64;
    let mut last = 0;
    for _ in 0..1000 {
        let word = get(at + 24);
        let clock = Clock {
            tsc_base: get(at + 8),
            ns_base: get(at + 16),
            mult: word as u32,
            shift: (word >> 32) as i8,
            ..Default::default()
        };
        check("version", get(at) & 1, 0)?;
        let now = clock.ns(cpu::tsc_ordered());
        holds("it does not decrease", now >= last && now > 0)?;
        last = now;
    }
    holds("it can be disabled", !refused(TIME, 0))
}

fn kvm_5(_: Abi) -> Outcome {
    if features()? >> 3 & 1 == 0 {
        return Err(Why::Absent("CLOCKSOURCE2"));
    }
    fill(page(1), 0);
    holds("WRMSR", !refused(WALL, page(1) + 128))?;
    let seconds = get(page(1) + 128) >> 32;
    check("version", get(page(1) + 128) & 1, 0)?;
    holds("it is after 2020 and before 2100", (1_577_836_800..4_102_444_800).contains(&seconds))?;
    holds("nanoseconds", get(page(1) + 136) & 0xffff_ffff < 1_000_000_000)
}
