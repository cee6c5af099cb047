//! Every paging mode, every right and every bit of the error code.

use super::*;
use crate::flat_env::FlatEnv;

const ROOT: u64 = 0x1000;
const L3: u64 = 0x2000;
const L2: u64 = 0x3000;
const L1: u64 = 0x4000;

const READ: Access = Access { kind: AccessKind::Read, user: false, implicit: false };
const WRITE: Access = Access { kind: AccessKind::Write, ..READ };
const EXEC: Access = Access { kind: AccessKind::Execute, ..READ };

fn user(a: Access) -> Access {
    Access { user: true, ..a }
}

fn put32(env: &mut FlatEnv, at: u64, value: u32) {
    env.mem[at as usize..at as usize + 4].copy_from_slice(&value.to_le_bytes());
}

fn get(env: &mut FlatEnv, at: u64, bytes: u8) -> u64 {
    env.read_pte(at, bytes).unwrap()
}

/// Long mode; linear 0x7000_1234 reaches the entry at `L1 + 8`, whose value is `leaf`.
fn long(leaf: u64) -> (CpuState, FlatEnv) {
    let mut st = CpuState::reset(0);
    st.cr0 = cr0::PE | cr0::PG | cr0::WP;
    st.cr3 = ROOT;
    st.cr4 = cr4::PAE | cr4::PGE;
    st.efer = efer::LME | efer::LMA | efer::NXE;
    let mut env = FlatEnv::new(0x10_0000);
    env.put64(ROOT, L3 | 7);
    env.put64(L3 + 8, L2 | 7);
    env.put64(L2 + 0x180 * 8, L1 | 7);
    env.put64(L1 + 8, leaf);
    (st, env)
}

const LA: u64 = 0x7000_1234;

fn code(r: Result<Translation, Exception>) -> u32 {
    match r {
        Err(Exception::PageFault { addr, code }) => {
            assert_eq!(addr, LA);
            code
        }
        other => panic!("no page fault: {other:?}"),
    }
}

#[test]
fn long_mode_page_sets_accessed_and_dirty() {
    let (st, mut env) = long(0xabc_d000 | 0x107);
    let t = walk(&st, &mut env, LA, READ).unwrap();
    assert_eq!(
        t,
        Translation {
            gpa: 0xabc_d234,
            page_shift: 12,
            user: true,
            readable: true,
            writable: true,
            executable: true,
            global: true,
            dirty: false
        }
    );
    for (at, want) in [(ROOT, L3 | 0x27), (L3 + 8, L2 | 0x27), (L1 + 8, 0xabc_d127)] {
        assert_eq!(get(&mut env, at, 8), want);
    }
    let t = walk(&st, &mut env, LA, WRITE).unwrap();
    assert!(t.dirty);
    assert_eq!(get(&mut env, L1 + 8, 8), 0xabc_d167);
    assert_eq!(get(&mut env, L2 + 0x180 * 8, 8), L1 | 0x27, "D belongs to the leaf alone");
    assert!(walk(&st, &mut env, LA, READ).unwrap().dirty);
}

#[test]
fn long_mode_error_codes() {
    let (st, mut env) = long(0);
    assert_eq!(code(walk(&st, &mut env, LA, READ)), 0);
    assert_eq!(code(walk(&st, &mut env, LA, WRITE)), pf::W);
    assert_eq!(code(walk(&st, &mut env, LA, user(READ))), pf::U);
    assert_eq!(code(walk(&st, &mut env, LA, user(EXEC))), pf::U | pf::I);
    let (st, mut env) = long(0x5005); // user, read-only
    assert_eq!(code(walk(&st, &mut env, LA, user(WRITE))), pf::P | pf::W | pf::U);
    assert_eq!(code(walk(&st, &mut env, LA, WRITE)), pf::P | pf::W);
    assert_eq!(get(&mut env, L1 + 8, 8) & 0x40, 0, "a refused write leaves D clear");
    let (st, mut env) = long(0x5003); // supervisor
    assert_eq!(code(walk(&st, &mut env, LA, user(READ))), pf::P | pf::U);
    let (st, mut env) = long(0x5007 | 1 << 63); // NX
    assert_eq!(code(walk(&st, &mut env, LA, EXEC)), pf::P | pf::I);
    assert!(!walk(&st, &mut env, LA, READ).unwrap().executable);
}

#[test]
fn rights_of_all_levels_are_combined() {
    for (at, table) in [(ROOT, L3), (L3 + 8, L2), (L2 + 0x180 * 8, L1)] {
        let (st, mut env) = long(0x5007);
        env.put64(at, table | 5);
        assert_eq!(code(walk(&st, &mut env, LA, WRITE)), pf::P | pf::W);
        env.put64(at, table | 3);
        assert_eq!(code(walk(&st, &mut env, LA, user(READ))), pf::P | pf::U);
        env.put64(at, table | 7 | 1 << 63);
        assert_eq!(code(walk(&st, &mut env, LA, EXEC)), pf::P | pf::I);
    }
}

#[test]
fn reserved_bits_fault_whatever_the_rights() {
    for bit in PHYS_BITS..52 {
        let (st, mut env) = long(0x5007 | 1 << bit);
        assert_eq!(code(walk(&st, &mut env, LA, READ)), pf::P | pf::RSVD, "bit {bit}");
    }
    let (mut st, mut env) = long(0x5007 | 1 << 63);
    st.efer &= !efer::NXE;
    assert_eq!(code(walk(&st, &mut env, LA, user(WRITE))), pf::P | pf::RSVD | pf::W | pf::U);
    assert_eq!(code(walk(&st, &mut env, LA, EXEC)), pf::P | pf::RSVD, "no I without NXE and SMEP");
    let (st, mut env) = long(0x5007);
    env.put64(ROOT, L3 | 0x87); // PS at the top level
    assert_eq!(code(walk(&st, &mut env, LA, READ)), pf::P | pf::RSVD);
    let (st, mut env) = long(0x5007 | 0x7ff << 52);
    assert!(walk(&st, &mut env, LA, READ).is_ok(), "bits 62..52 are ignored in long mode");
}

#[test]
fn large_pages_and_their_reserved_bits() {
    let (st, mut env) = long(0);
    env.put64(L2 + 0x180 * 8, 0x4060_0000 | 0x1087); // 2 MiB, PAT bit
    let t = walk(&st, &mut env, LA, WRITE).unwrap();
    assert_eq!((t.gpa, t.page_shift, t.dirty), (0x4060_1234, 21, true));
    env.put64(L2 + 0x180 * 8, 0x4060_2000 | 0x87);
    assert_eq!(code(walk(&st, &mut env, LA, READ)), pf::P | pf::RSVD);
    env.put64(L3 + 8, 0x1_4000_0000 | 0x87); // 1 GiB
    let t = walk(&st, &mut env, LA, READ).unwrap();
    assert_eq!((t.gpa, t.page_shift), (0x1_7000_1234, 30));
    env.put64(L3 + 8, 0x1_4020_0000 | 0x87);
    assert_eq!(code(walk(&st, &mut env, LA, READ)), pf::P | pf::RSVD);
}

#[test]
fn write_protection_off_lets_the_supervisor_write() {
    let (mut st, mut env) = long(0x5005);
    st.cr0 &= !cr0::WP;
    let t = walk(&st, &mut env, LA, WRITE).unwrap();
    assert!(t.writable && t.dirty);
    assert!(!walk(&st, &mut env, LA, user(READ)).unwrap().writable);
}

#[test]
fn smep_and_smap() {
    let (mut st, mut env) = long(0x5007);
    st.cr4 |= cr4::SMEP;
    assert_eq!(code(walk(&st, &mut env, LA, EXEC)), pf::P | pf::I);
    assert!(walk(&st, &mut env, LA, user(EXEC)).is_ok());
    let t = walk(&st, &mut env, LA, READ).unwrap();
    assert!(t.readable && !t.executable);
    st.cr4 = cr4::PAE | cr4::SMAP;
    assert_eq!(code(walk(&st, &mut env, LA, READ)), pf::P);
    assert_eq!(code(walk(&st, &mut env, LA, WRITE)), pf::P | pf::W);
    let t = walk(&st, &mut env, LA, EXEC).unwrap();
    assert!(!t.readable && !t.writable && t.executable);
    st.rflags |= rflags::AC;
    assert!(walk(&st, &mut env, LA, WRITE).is_ok());
    assert_eq!(code(walk(&st, &mut env, LA, Access { implicit: true, ..READ })), pf::P);
    assert!(walk(&st, &mut env, LA, user(READ)).is_ok());
}

#[test]
fn fetch_bit_needs_nx_or_smep() {
    let (mut st, mut env) = long(0);
    st.efer &= !efer::NXE;
    assert_eq!(code(walk(&st, &mut env, LA, EXEC)), 0);
    st.cr4 |= cr4::SMEP;
    assert_eq!(code(walk(&st, &mut env, LA, EXEC)), pf::I);
}

#[test]
fn a_table_outside_ram_is_all_ones() {
    let (st, mut env) = long(0x5007);
    env.put64(L2 + 0x180 * 8, 0x4000_0000 | 7);
    assert_eq!(code(walk(&st, &mut env, LA, READ)), pf::P | pf::RSVD);
}

/// Linear 0x0040_5678 in 32-bit paging: directory entry 1, table entry 5.
const LA32: u64 = 0x0040_5678;

fn two_level() -> (CpuState, FlatEnv) {
    let mut st = CpuState::reset(0);
    st.cr0 = cr0::PE | cr0::PG | cr0::WP;
    st.cr3 = ROOT;
    let mut env = FlatEnv::new(0x10_0000);
    put32(&mut env, ROOT + 4, L1 as u32 | 7);
    put32(&mut env, L1 + 20, 0xfee0_0007);
    (st, env)
}

#[test]
fn two_level_paging() {
    let (mut st, mut env) = two_level();
    let t = walk(&st, &mut env, LA32, WRITE).unwrap();
    assert_eq!((t.gpa, t.page_shift, t.dirty, t.executable), (0xfee0_0678, 12, true, true));
    assert_eq!((get(&mut env, ROOT + 4, 4), get(&mut env, L1 + 20, 4)), (L1 | 0x27, 0xfee0_0067));
    put32(&mut env, L1 + 20, 0xfee0_0001);
    assert!(matches!(walk(&st, &mut env, LA32, user(WRITE)), Err(Exception::PageFault { addr: LA32, code: 7 })));
    assert!(matches!(walk(&st, &mut env, LA32 + 0x1000, user(EXEC)), Err(Exception::PageFault { code: pf::U, .. })));
    // Without PSE the page-size bit means nothing.
    put32(&mut env, ROOT + 4, L1 as u32 | 0x87);
    assert_eq!(walk(&st, &mut env, LA32, READ).unwrap().page_shift, 12);
    st.cr4 = cr4::PSE;
    // 4 MiB page at 0x12_0080_0000 (PSE-36).
    put32(&mut env, ROOT + 4, 0x0080_0000 | 0x12 << 13 | 0x87);
    let t = walk(&st, &mut env, LA32, WRITE).unwrap();
    assert_eq!((t.gpa, t.page_shift), (0x12_0080_5678, 22));
    put32(&mut env, ROOT + 4, 0x00a0_0087);
    assert!(matches!(
        walk(&st, &mut env, LA32, READ),
        Err(Exception::PageFault { code, .. }) if code == pf::P | pf::RSVD
    ));
}

#[test]
fn pae_paging() {
    let mut st = CpuState::reset(0);
    st.cr0 = cr0::PE | cr0::PG;
    st.cr3 = ROOT + 0x20; // 32-byte aligned
    st.cr4 = cr4::PAE;
    st.efer = efer::NXE;
    let mut env = FlatEnv::new(0x10_0000);
    env.put64(ROOT + 0x20 + 8, L2 | 1);
    env.put64(L2 + 0x180 * 8, L1 | 7);
    env.put64(L1 + 8, 0x3_0000_5007);
    let t = walk(&st, &mut env, LA, user(WRITE)).unwrap();
    assert_eq!((t.gpa, t.user, t.writable), (0x3_0000_5234, true, true));
    assert_eq!(get(&mut env, ROOT + 0x28, 8), L2 | 1, "no accessed bit in the pointers");
    env.put64(L1 + 8, 0x5007 | 1 << 52);
    assert_eq!(code(walk(&st, &mut env, LA, READ)), pf::P | pf::RSVD);
    env.put64(L1 + 8, 0x5007 | 1 << 63);
    assert_eq!(code(walk(&st, &mut env, LA, EXEC)), pf::P | pf::I);
    env.put64(L2 + 0x180 * 8, 0x60_0087);
    let t = walk(&st, &mut env, LA, READ).unwrap();
    assert_eq!((t.gpa, t.page_shift), (0x60_1234, 21));
    env.put64(ROOT + 0x28, L2 | 3);
    assert_eq!(code(walk(&st, &mut env, LA, READ)), pf::P | pf::RSVD);
    env.put64(ROOT + 0x28, 0);
    assert_eq!(code(walk(&st, &mut env, LA, READ)), 0);
}

#[test]
fn no_paging_is_identity() {
    let st = CpuState::reset(0);
    let mut env = FlatEnv::new(0x1000);
    let t = walk(&st, &mut env, 0xffff_fff0, WRITE).unwrap();
    assert_eq!((t.gpa, t.dirty, t.writable), (0xffff_fff0, true, true));
}

#[test]
fn canonical_addresses() {
    for (la, yes) in [
        (0, true),
        (0x7fff_ffff_ffff, true),
        (0x8000_0000_0000, false),
        (0xffff_7fff_ffff_ffff, false),
        (0xffff_8000_0000_0000, true),
    ] {
        assert_eq!(is_canonical(la), yes, "{la:#x}");
    }
}
