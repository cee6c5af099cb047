//! Page-crossing accesses, wrapping, and instruction fetch.

use super::*;
use crate::flat_env::FlatEnv;
use crate::mmu::pf;

const P: Privilege = Privilege::Current;

#[test]
fn crossing_write_is_all_or_nothing() {
    let (mut st, mut env) = FlatEnv::long_mode();
    env.mem[0x8ff8..0x9008].fill(0xaa);
    env.protect(0x9000);
    let e = write_u64(&mut st, &mut env, 0x8ffc, u64::MAX, P);
    assert_eq!(e, Err(Exception::PageFault { addr: 0x9000, code: pf::P | pf::W | pf::U }));
    assert_eq!(env.mem[0x8ff8..0x9008], [0xaa; 16]);
    assert_eq!(probe_write(&mut st, &mut env, 0x8ffc, 8, P), e);
    assert_eq!(probe_write(&mut st, &mut env, 0x8ffc, 4, P), Ok(()));
    assert_eq!(read_u64(&mut st, &mut env, 0x8ffc, P), Ok(0xaaaa_aaaa_aaaa_aaaa));
}

#[test]
fn long_accesses_reach_every_page_once() {
    let (mut st, mut env) = FlatEnv::long_mode();
    let data: Vec<u8> = (0..20_000_u32).map(|n| (n % 251) as u8).collect();
    write(&mut st, &mut env, 0x1_0ff0, &data, P).unwrap();
    assert_eq!(env.mem[0x1_0ff0..0x1_0ff0 + data.len()], data);
    let mut back = vec![0; data.len()];
    read(&mut st, &mut env, 0x1_0ff0, &mut back, P).unwrap();
    assert_eq!(back, data);
}

#[test]
fn sized_accesses_are_little_endian() {
    let (mut st, mut env) = FlatEnv::long_mode();
    write_u32(&mut st, &mut env, 0x8000, 0x1234_5678, P).unwrap();
    assert_eq!(read_u16(&mut st, &mut env, 0x8001, P), Ok(0x3456));
    write_u8(&mut st, &mut env, 0x8003, 0xff, P).unwrap();
    assert_eq!(read_u32(&mut st, &mut env, 0x8000, P), Ok(0xff34_5678));
}

#[test]
fn bad_addresses_do_not_reach_the_walk() {
    let (mut st, mut env) = FlatEnv::long_mode();
    assert_eq!(read_u8(&mut st, &mut env, 0x8000_0000_0000, P), Err(Exception::GeneralProtection(0)));
    assert_eq!(read_u16(&mut st, &mut env, 0x7fff_ffff_ffff, P).unwrap_err().vector(), 14);
    let (mut st, mut env) = FlatEnv::legacy(32);
    env.mem[0] = 0x77;
    // The byte after the last one is the first one, outside 64-bit code.
    assert_eq!(read_u16(&mut st, &mut env, 0xffff_ffff, P), Ok(0x77ff));
}

#[test]
fn fetch_stops_at_the_first_absent_page() {
    let (st, mut env) = FlatEnv::long_mode();
    let mut buf = [0; 15];
    assert_eq!(fetch(&st, &mut env, 0x8ffa, &mut buf), Ok(15));
    env.unmap(0x9000);
    assert_eq!(fetch(&st, &mut env, 0x8ffa, &mut buf), Ok(6));
    let e = fetch(&st, &mut env, 0x9000, &mut buf);
    assert_eq!(e, Err(Exception::PageFault { addr: 0x9000, code: pf::U | pf::I }));
}

#[test]
fn supervisor_accesses_ignore_the_current_level() {
    let (mut st, mut env) = FlatEnv::long_mode();
    let entry = 0x8003_u64;
    env.put64(crate::flat_env::TABLES + 0x3000 + 8 * 8, entry);
    assert_eq!(read_u8(&mut st, &mut env, 0x8000, Privilege::Supervisor), Ok(0));
    let e = read_u8(&mut st, &mut env, 0x8000, P);
    assert_eq!(e, Err(Exception::PageFault { addr: 0x8000, code: pf::P | pf::U }));
}
