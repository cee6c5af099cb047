//! Golden files: the code emitted for a few representative blocks, so that a change in code generation is seen in review.
//!
//! Run with `PARAVANE_BLESS=1` to write them anew.

use super::{Decoded, Hint, Translator, decode};
use crate::asm::Asm;
use crate::block::{Mode, Tables};
use crate::engine::WordMap;
use crate::window::High;
use iced_x86::{Decoder, DecoderOptions, FastFormatter, Instruction, InstructionInfoFactory};
use paravane_cpu::state::{cr0, cr4, efer};
use paravane_cpu::{CpuState, Seg, Segment};
use std::fmt::Write;
use std::path::PathBuf;

/// 64-bit mode as Linux sets it up, at a privilege level.
pub(crate) fn mode(cpl: u8) -> Mode {
    let mut st = CpuState::reset(0);
    st.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    st.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::SMAP | cr4::SMEP | cr4::FSGSBASE;
    st.efer = efer::LME | efer::LMA | efer::SCE;
    st.seg = [Segment::flat_data(0x18, cpl); 6];
    st.seg[Seg::Cs as usize] = Segment::flat_code(0x10, cpl, true);
    st.cpl = cpl;
    st.rflags = 0x202;
    Mode::of(&st)
}

fn listing(out: &mut String, code: &[u8], at: u64) {
    let mut f = FastFormatter::new();
    let mut text = String::new();
    for i in Decoder::with_ip(64, code, at, DecoderOptions::NONE) {
        text.clear();
        f.format(&i, &mut text);
        let _ = writeln!(out, "  {:04x}  {text}", i.ip());
    }
}

fn check(name: &str, cpl: u8, guest: &[u8]) {
    check_at(name, mode(cpl), 0x40_0000, guest);
}

fn check_at(name: &str, mode: Mode, rip: u64, guest: &[u8]) {
    check_with(name, mode, rip, guest, High::one_of(1), false);
}

fn check_with(name: &str, mode: Mode, rip: u64, guest: &[u8], high: High, door: bool) {
    let mut code: Vec<Instruction> = Vec::new();
    assert_eq!(decode(guest, rip, mode, &mut code), Decoded::Ok);
    let (mut asm, mut info, mut tables) = (Asm::new(), InstructionInfoFactory::new(), Tables::default());
    let hint = Hint { gpr: &[rip; 16], low: false, high, kept: &WordMap::default() };
    Translator::new(&mut asm, &mut info, &mut tables, mode, 0, (rip, guest), hint).translate(&code, None, door);
    asm.resolve(0);
    let mut out = String::from("guest:\n");
    listing(&mut out, guest, rip);
    let (hot, cold) = asm.parts();
    out.push_str("hot:\n");
    listing(&mut out, hot, 0);
    out.push_str("cold:\n");
    listing(&mut out, cold, hot.len() as u64);
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.txt"));
    if std::env::var_os("PARAVANE_BLESS").is_some() {
        std::fs::write(&path, &out).unwrap();
    }
    let want = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(want == out, "emitted code differs from golden/{name}.txt; bless it if that is meant:\n{out}");
}

#[test]
fn load_with_dead_flags() {
    // mov rax, [rbx+8]; add rax, rcx; jmp .
    check("load-dead-flags", 3, &[0x48, 0x8b, 0x43, 8, 0x48, 1, 0xc8, 0xeb, 0xfe]);
}

#[test]
fn load_with_live_flags() {
    // cmp rax, rdx; mov rsi, [rsp]; je +2; (fall through)
    check("load-live-flags", 3, &[0x48, 0x39, 0xd0, 0x48, 0x8b, 0x34, 0x24, 0x74, 2]);
}

#[test]
fn spilled_registers_and_shift_by_cl() {
    // shl r13, cl; mov [r14+r15*8], r13; ret
    check("spilled-shift", 3, &[0x49, 0xd3, 0xe5, 0x4f, 0x89, 0x2c, 0xfe, 0xc3]);
}

#[test]
fn calls_and_returns() {
    // push rbp; call +0x1000
    check("push-call", 3, &[0x55, 0xe8, 0, 0x10, 0, 0]);
}

#[test]
fn interrupt_flag_in_the_kernel() {
    // cli; sti; nop
    check("cli-sti", 0, &[0xfa, 0xfb, 0x90]);
}

#[test]
fn vector_code() {
    // movaps xmm0, [rdi]; addps xmm0, xmm1; ret
    check("vector", 3, &[0x0f, 0x28, 0x07, 0x0f, 0x58, 0xc1, 0xc3]);
}

#[test]
fn windows_for_position_independent_code() {
    // mov rax, [rbx+8]; add rax, [rbx+16]; push rax; cmp [rsi+rcx*4], edx; je +2; mov rdi, fs:[0x28]; ret
    let code = [
        0x48, 0x8b, 0x43, 8, 0x48, 3, 0x43, 16, 0x50, 0x39, 0x14, 0x8e, 0x74, 2, 0x64, 0x48, 0x8b, 0x3c, 0x25, 0x28, 0,
        0, 0, 0xc3,
    ];
    check_at("window-high", Mode(mode(3).0 | Mode::WINDOW), 0x5555_5555_5000, &code);
}

#[test]
fn windows_of_one_of_several_vcpus() {
    // mov rax, [rbx+8]; cmp rax, rdx; mov rcx, [rsi]; je +2; mov [rdi+rcx*8], rax; ret
    let code = [0x48, 0x8b, 0x43, 8, 0x48, 0x39, 0xd0, 0x48, 0x8b, 0x0e, 0x74, 2, 0x48, 0x89, 4, 0xcf, 0xc3];
    let mode = Mode(mode(3).0 | Mode::WINDOW | Mode::STACKED);
    check_with("window-part", mode, 0x5555_5555_5000, &code, High::one_of(4), false);
    check_with("window-pair", mode, 0x5555_5555_5000, &code, High::one_of(2), false);
}

#[test]
fn rounds_of_a_loop() {
    // 2: movups xmm2, [r10]; mulps xmm2, xmm1; addps xmm2, [r9]; movups [r9], xmm2; add r10, 16; add r9, 16; cmp r11, r9; jne 2b
    let code = [
        0x41, 0x0f, 0x10, 0x12, 0x0f, 0x59, 0xd1, 0x41, 0x0f, 0x58, 0x11, 0x41, 0x0f, 0x11, 0x11, 0x49, 0x83, 0xc2, 16,
        0x49, 0x83, 0xc1, 16, 0x4d, 0x39, 0xcb, 0x75, 0xe4,
    ];
    check_at("window-rounds", Mode(mode(3).0 | Mode::WINDOW), 0x5555_5555_5000, &code);
}

#[test]
fn windows_with_the_stack_in_the_high_one() {
    // push rbx; sub rsp, 32; mov rax, [rsp+8]; add [rdi], rax; mov rsp, rbx; mov rcx, [rsp]; add rsp, 40; pop rbx; ret
    let code = [
        0x53, 0x48, 0x83, 0xec, 32, 0x48, 0x8b, 0x44, 0x24, 8, 0x48, 1, 7, 0x48, 0x89, 0xdc, 0x48, 0x8b, 0x0c, 0x24,
        0x48, 0x83, 0xc4, 40, 0x5b, 0xc3,
    ];
    check_at("window-stacked", Mode(mode(3).0 | Mode::WINDOW | Mode::STACKED), 0x5555_5555_5000, &code);
}

#[test]
fn doors_and_indirect_branches() {
    // addps xmm0, xmm1; call rax
    let window = Mode(mode(3).0 | Mode::WINDOW | Mode::STACKED);
    check_with("door-call", window, 0x5555_5555_5000, &[0x0f, 0x58, 0xc1, 0xff, 0xd0], High::one_of(1), true);
    // jmp [rbx]
    check_with("door-jump", mode(0), 0xffff_ffff_8100_0000, &[0xff, 0x23], High::one_of(1), true);
}

#[test]
fn windows_and_runs_of_the_stack() {
    // push rbp; push r9; push rcx; pop rdx; pop r10; ret
    let code = [0x55, 0x41, 0x51, 0x51, 0x5a, 0x41, 0x5a, 0xc3];
    check_at("window-run", Mode(mode(3).0 | Mode::WINDOW | Mode::STACKED), 0x5555_5555_5000, &code);
}

#[test]
fn windows_where_a_check_has_failed() {
    // mov rdx, [rax+16]; mov rax, [rdx+32]; test rax, rax; je +9; mov r9, [rdx+8]; sub dword [rdx], 1; ret
    let code = [
        0x48, 0x8b, 0x50, 16, 0x48, 0x8b, 0x42, 32, 0x48, 0x85, 0xc0, 0x74, 9, 0x4c, 0x8b, 0x4a, 8, 0x83, 0x2a, 1, 0xc3,
    ];
    let mode = Mode(mode(3).0 | Mode::WINDOW | Mode::STACKED | Mode::MIXED);
    check_at("window-mixed", mode, 0x5555_5555_5000, &code);
}

#[test]
fn windows_and_indexes() {
    // mov r8, [r9+rbx*4]; mov rdx, [r9+rbx*4+16]; movzx eax, sil; mov rdi, [rax*8+0x73bf40]; mov r8d, ecx; mov rdx, [rsp+r8*8+8];
    // andn r9, r10, [r11+r9*2]; andn r9, r10, [r11+r9*2]; jmp [rdi+rax*8]
    let code = [
        0x4d, 0x8b, 4, 0x99, 0x49, 0x8b, 0x54, 0x99, 16, 0x40, 0x0f, 0xb6, 0xc6, 0x48, 0x8b, 0x3c, 0xc5, 0x40, 0xbf,
        0x73, 0, 0x41, 0x89, 0xc8, 0x4a, 0x8b, 0x54, 0xc4, 8, 0xc4, 2, 0xa8, 0xf2, 0x0c, 0x4b, 0xc4, 2, 0xa8, 0xf2,
        0x0c, 0x4b, 0xff, 0x24, 0xc7,
    ];
    check_at("window-index", Mode(mode(3).0 | Mode::WINDOW | Mode::STACKED), 0x5555_5555_5000, &code);
}

#[test]
fn windows_for_code_at_fixed_addresses() {
    // mov eax, [0x600000]; mov rcx, [rax*8+0x601000]; add [rcx], r13; ret
    let code = [0x8b, 4, 0x25, 0, 0, 0x60, 0, 0x48, 0x8b, 0x0c, 0xc5, 0, 0x10, 0x60, 0, 0x4c, 1, 0x29, 0xc3];
    check_at("window-low", Mode(mode(3).0 | Mode::WINDOW), 0x40_0000, &code);
}
