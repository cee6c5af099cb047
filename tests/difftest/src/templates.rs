//! Small arrangements of instructions: those that need their surroundings, and those that translators get wrong.

use crate::generate::Builder;
use crate::layout::{self, PAGE};
use crate::operand::{MemWish, is_string};
use crate::sequence::Target;
use iced_x86::{Code, FlowControl, Instruction, MemoryOperand, Mnemonic, OpKind, Register};

/// RFLAGS bits that a POPF or IRET image may hold: all that user mode can change but TF and AC.
const POPF_FLAGS: u64 = 0x20_4cd5;
const USER_CS: i32 = 0x33;
const USER_SS: i32 = 0x2b;

fn absolute(address: u64) -> MemoryOperand {
    MemoryOperand::with_displ(address, 8)
}

fn gpr64(n: usize) -> Register {
    Register::RAX + n as u32
}

impl Builder {
    /// Appends form `code`, with whatever it needs around it to be safe to run and comparable.
    pub(crate) fn place(&mut self, code: Code) {
        use Mnemonic as M;
        let info = code.op_code();
        let kinds = info.op_kinds();
        match info.mnemonic() {
            M::Popf | M::Popfq => self.flags_from_stack(code),
            M::Fnstenv | M::Fstenv | M::Fnsave | M::Fsave | M::Fxsave | M::Fxsave64 => self.fpu_store(code),
            M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 => self.xsave(code),
            M::Xrstor | M::Xrstor64 => self.xrstor(code),
            M::Fxrstor | M::Fxrstor64 | M::Fldenv | M::Frstor => self.fpu_load(code),
            M::Ldmxcsr | M::Vldmxcsr => self.load_mxcsr(code),
            M::Xgetbv => {
                if self.rng.percent(90) && self.reserved & 2 == 0 {
                    self.set(1, 0);
                }
                // ECX = 1 reads which components are in use, which is not architectural.
                if self.known[1] == Some(0) {
                    self.generic(code);
                }
            }
            M::Ret => self.near_return(code),
            M::Retf => self.far_return(code),
            M::Iretq => self.interrupt_return(),
            M::Call | M::Jmp if matches!(kinds.first(), Some(iced_x86::OpCodeOperandKind::r64_or_mem)) => {
                self.indirect_branch(code);
            }
            M::Cmpxchg8b | M::Cmpxchg16b if self.rng.percent(60) => self.compare_exchange_wide(code),
            M::Wrfsbase | M::Wrgsbase => self.write_base(code),
            M::Int => {
                let v = self.rng.below(256) as i32;
                if v != 0x80 {
                    self.push(Instruction::with1(code, v).expect("an immediate"));
                }
            }
            M::Enter => {
                let (size, level) =
                    (self.rng.below(0x80) as i32, self.rng.below(if self.rng.clone().percent(50) { 1 } else { 5 }));
                self.push(Instruction::with2(code, size, level as i32).expect("two immediates"));
            }
            M::Leave if self.rng.percent(80) => {
                if self.reserved & 1 << 5 == 0 {
                    let at = layout::stack() + PAGE - 64 + self.rng.below(8) * 8;
                    self.set(5, at);
                    self.generic(code);
                }
            }
            _ if kinds
                .iter()
                .any(|k| matches!(k, iced_x86::OpCodeOperandKind::br64_1 | iced_x86::OpCodeOperandKind::br64_4)) =>
            {
                self.forward_branch(code);
            }
            _ => {
                self.implied(code);
                self.generic(code);
            }
        }
    }

    /// Prepares registers that a form uses without naming them.
    fn implied(&mut self, code: Code) {
        use Mnemonic as M;
        let info = code.op_code();
        let usable = |b: &Self, n: usize| b.reserved & 1 << n == 0;
        if is_string(info.op_kinds()) {
            if self.rng.percent(80) {
                for n in [6, 7] {
                    if usable(self, n) {
                        let at = self.target_address(MemWish { aligned: false, safe: false });
                        self.set(n, at);
                    }
                }
            }
            if self.rng.percent(85) && usable(self, 1) {
                let count = if self.rng.percent(85) { self.rng.below(40) } else { self.rng.below(9000) };
                self.set(1, count);
            }
            return;
        }
        match info.mnemonic() {
            M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu if usable(self, 7) => {
                let at = self.target_address(MemWish::default());
                self.set(7, at);
            }
            M::Xlatb if usable(self, 3) => {
                let at = self.target_address(MemWish::default());
                self.set(3, at);
            }
            M::Div | M::Idiv if self.rng.percent(60) && usable(self, 2) => {
                let high = self.rng.pick(&[0, 0, 1, u64::MAX]);
                self.set(2, high);
            }
            _ => {}
        }
    }

    /// One of the directed arrangements.
    pub(crate) fn template(&mut self) {
        match self.rng.below(10) {
            0 | 1 => self.flags_across_memory(),
            2 => self.stack_traffic(),
            3 => self.high_bytes(),
            4 if self.rng.percent(50) => self.backward_loop(),
            4 => self.plain_loop(),
            5 => {
                let code = self.rng.pick(&[Code::Call_rm64, Code::Jmp_rm64]);
                self.indirect_branch(code);
            }
            6 => self.call_and_return(),
            7 => self.repeated_string(),
            8 => {
                let code =
                    self.rng.pick(&[Code::Div_rm8, Code::Div_rm32, Code::Div_rm64, Code::Idiv_rm16, Code::Idiv_rm64]);
                self.place(code);
            }
            _ => {
                let code = self.rng.pick(&[
                    Code::Bt_rm64_r64,
                    Code::Bts_rm64_r64,
                    Code::Btr_rm32_r32,
                    Code::Btc_rm16_r16,
                    Code::Shld_rm64_r64_CL,
                    Code::Rcl_rm32_CL,
                    Code::Shl_rm64_CL,
                    Code::Sar_rm8_CL,
                ]);
                self.generic(code);
            }
        }
    }

    /// Produce flags, touch memory, use the flags.
    fn flags_across_memory(&mut self) {
        let producer = self.rng.pick(&[
            Code::Add_r64_rm64,
            Code::Sub_rm32_r32,
            Code::Cmp_rm64_imm8,
            Code::Test_rm8_r8,
            Code::Inc_rm64,
            Code::Dec_rm8,
            Code::Shl_rm32_imm8,
            Code::Neg_rm64,
            Code::Imul_r64_rm64,
            Code::Bt_rm32_imm8,
            Code::Popcnt_r64_rm64,
            Code::Xor_r32_rm32,
            Code::Cmc,
        ]);
        self.generic(producer);
        for _ in 0..1 + self.rng.below(3) {
            let access = self.rng.pick(&[
                Code::Mov_r64_rm64,
                Code::Mov_rm64_r64,
                Code::Mov_r8_rm8,
                Code::Mov_rm8_r8,
                Code::Mov_rm32_imm32,
                Code::Movzx_r32_rm16,
                Code::Movsx_r64_rm8,
                Code::Lea_r64_m,
                Code::Push_r64,
                Code::Pop_r64,
                Code::Movups_xmm_xmmm128,
                Code::Movups_xmmm128_xmm,
                Code::Not_rm64,
                Code::Xchg_rm64_r64,
            ]);
            self.generic(access);
        }
        let consumer = self.rng.pick(&[
            Code::Adc_r64_rm64,
            Code::Sbb_rm32_r32,
            Code::Setb_rm8,
            Code::Setle_rm8,
            Code::Cmove_r64_rm64,
            Code::Cmovg_r32_rm32,
            Code::Jb_rel8_64,
            Code::Jle_rel32_64,
            Code::Jp_rel8_64,
            Code::Jo_rel32_64,
            Code::Lahf,
            Code::Pushfq,
            Code::Rcr_rm64_1,
        ]);
        self.place(consumer);
    }

    fn stack_traffic(&mut self) {
        for _ in 0..2 + self.rng.below(4) {
            let code = self.rng.pick(&[
                Code::Push_r64,
                Code::Push_r64,
                Code::Push_r16,
                Code::Push_rm64,
                Code::Pushq_imm8,
                Code::Pushq_imm32,
                Code::Push_imm16,
                Code::Pop_r64,
                Code::Pop_rm64,
                Code::Pop_r16,
                Code::Pushfq,
                Code::Pushw_FS,
                Code::Pushq_GS,
            ]);
            self.generic(code);
        }
    }

    /// AH, CH, DH and BH with memory operands: no REX prefix may appear.
    fn high_bytes(&mut self) {
        for _ in 0..1 + self.rng.below(3) {
            let code = self.rng.pick(&[
                Code::Mov_r8_rm8,
                Code::Mov_rm8_r8,
                Code::Add_r8_rm8,
                Code::Sub_rm8_r8,
                Code::Cmp_r8_rm8,
                Code::Xchg_rm8_r8,
                Code::Xadd_rm8_r8,
                Code::Cmpxchg_rm8_r8,
                Code::Or_rm8_r8,
                Code::Adc_r8_rm8,
                Code::Test_rm8_r8,
            ]);
            let high = Register::AH + self.rng.below(4) as u32;
            for _ in 0..30 {
                let Some(mut i) = self.random_operands(code) else { continue };
                let which = if i.op0_kind() == OpKind::Register { 0 } else { 1 };
                i.set_op_register(which, high);
                if self.acceptable(&i) {
                    self.push(i);
                    break;
                }
            }
        }
    }

    /// A loop that runs a few times. Its body leaves the counter alone.
    fn backward_loop(&mut self) {
        if self.reserved != 0 {
            return;
        }
        let counter = self.rng.pick(&[1usize, 1, 0, 9, 13]);
        let turns = 1 + self.rng.below(6);
        self.set(counter, turns);
        let top = self.sequence.items.len();
        self.reserved = 1 << counter;
        for _ in 0..1 + self.rng.below(4) {
            let code = self.any_code();
            let flow = code.op_code().mnemonic();
            // No branches and nothing that pops code addresses inside.
            if plain_flow(code) && !matches!(flow, Mnemonic::Leave | Mnemonic::Enter) {
                self.place(code);
            }
        }
        self.reserved = 0;
        if counter == 1 && self.rng.percent(50) {
            let code = self.rng.pick(&[Code::Loop_rel8_64_RCX, Code::Loopne_rel8_64_RCX, Code::Loope_rel8_64_RCX]);
            self.push_to(Instruction::with_branch(code, 0).expect("a branch"), Target::Branch(top));
        } else {
            self.push(Instruction::with1(Code::Dec_rm64, gpr64(counter)).expect("a register"));
            self.push_to(Instruction::with_branch(Code::Jne_rel32_64, 0).expect("a branch"), Target::Branch(top));
        }
        self.groups.push((top - 1, self.sequence.items.len() - 1));
        self.known[counter] = None;
    }

    /// A loop over data whose addresses move by constants, or do not, and that may leave early: what a translator makes rounds without checks of.
    /// Its pointers may come to where nothing is mapped.
    fn plain_loop(&mut self) {
        use Code as C;
        if self.reserved != 0 {
            return;
        }
        let mut free: Vec<usize> = (0..16).filter(|&n| n != 4).collect();
        let mut take = |b: &mut Self| free.swap_remove(b.rng.index(free.len()));
        let (counter, base, other, index, value) = (take(self), take(self), take(self), take(self), take(self));
        let turns = 1 + self.rng.below(60);
        self.set(counter, turns);
        for n in [base, other] {
            let at = layout::data() + self.rng.below(2 * PAGE);
            let at = if self.rng.percent(70) { at & !15 } else { at };
            self.set(n, at);
        }
        let small = self.rng.below(256);
        self.set(index, small);
        let top = self.sequence.items.len();
        let mut steps = Vec::new();
        for n in [base, other, index] {
            if self.rng.percent(60) {
                steps.push(n);
            }
        }
        let mut out = Vec::new();
        for _ in 0..1 + self.rng.below(6) {
            let b = self.rng.pick(&[base, base, other]);
            let displacement = self.rng.pick(&[0i64, 0, 8, 16, -32, 100]);
            let m = if self.rng.percent(40) {
                let scale = self.rng.pick(&[1u32, 4, 8]);
                MemoryOperand::with_base_index_scale_displ_size(gpr64(b), gpr64(index), scale, displacement, 1)
            } else {
                MemoryOperand::with_base_displ_size(gpr64(b), displacement, 1)
            };
            let r = self.rng.pick(&[value, value, 0, 2, 9, 11]);
            let r = if [counter, base, other, index].contains(&r) { value } else { r };
            let (x, y) = (Register::XMM0 + self.rng.below(6) as u32, Register::XMM0 + self.rng.below(6) as u32);
            let (narrow, vector) = (Register::EAX + r as u32, Register::YMM0 + self.rng.below(6) as u32);
            let i = match self.rng.below(24) {
                0 => Instruction::with2(C::Mov_r64_rm64, gpr64(r), m),
                1 => Instruction::with2(C::Mov_rm64_r64, m, gpr64(r)),
                2 => Instruction::with2(C::Add_r64_rm64, gpr64(r), m),
                3 => Instruction::with2(C::Add_rm32_r32, m, narrow),
                4 => Instruction::with2(C::Movzx_r32_rm8, narrow, m),
                5 => Instruction::with2(C::Movups_xmm_xmmm128, x, m),
                6 => Instruction::with2(C::Movups_xmmm128_xmm, m, x),
                7 => Instruction::with2(C::Addps_xmm_xmmm128, x, m),
                8 => Instruction::with2(C::Mulps_xmm_xmmm128, x, y),
                9 => Instruction::with2(C::VEX_Vmovdqu_ymm_ymmm256, vector, m),
                10 => Instruction::with3(C::VEX_Vpaddd_ymm_ymm_ymmm256, vector, vector, m),
                11 => Instruction::with2(C::Cmp_rm8_imm8, m, 0),
                12 => Instruction::with2(C::Cmp_r64_rm64, gpr64(r), m),
                13 => Instruction::with2(C::Xor_r32_rm32, narrow, Register::EAX + value as u32),
                14 => Instruction::with2(C::Imul_r64_rm64, gpr64(r), m),
                15 => Instruction::with2(C::Lea_r64_m, gpr64(value), m),
                16 => Instruction::with2(C::Cmove_r64_rm64, gpr64(r), m),
                17 => Instruction::with2(C::Xchg_rm64_r64, m, gpr64(r)),
                18 => Instruction::with2(C::Shl_rm64_imm8, gpr64(r), 3),
                19 => Instruction::with1(C::Div_rm32, m),
                20 => Instruction::with2(C::Adc_rm64_imm8, gpr64(r), 5),
                21 => Instruction::with2(C::Lea_r64_m, gpr64(value), MemoryOperand::with_displ(0x8000_0000, 4)),
                22 => Instruction::with2(C::Mov_r16_imm16, Register::AX + index as u32, 40),
                _ => Instruction::with1(C::Inc_rm8, m),
            };
            let Ok(i) = i else { continue };
            self.push(i);
            if self.rng.percent(15) {
                let code = self.rng.pick(&[C::Je_rel32_64, C::Jb_rel32_64, C::Js_rel32_64, C::Jne_rel32_64]);
                out.push(self.sequence.items.len());
                self.push_to(Instruction::with_branch(code, 0).expect("a branch"), Target::Branch(0));
            }
            if self.rng.percent(10) {
                // An index that may be anything small.
                self.push(Instruction::with2(C::Movzx_r32_rm8, Register::EAX + index as u32, m).expect("an operand"));
            }
            if let Some(&n) = steps.first()
                && self.rng.percent(50)
            {
                steps.remove(0);
                let by = self.rng.pick(&[1i32, 8, 16, 32, 64, -8, 120]);
                let code = self.rng.pick(&[C::Add_rm64_imm8, C::Sub_rm64_imm8, C::Add_rm64_imm32]);
                self.push(Instruction::with2(code, gpr64(n), by).expect("a register and an immediate"));
            }
        }
        let last = self.rng.pick(&[C::Dec_rm64, C::Dec_rm32]);
        let r = if last == C::Dec_rm64 { gpr64(counter) } else { Register::EAX + counter as u32 };
        self.push(Instruction::with1(last, r).expect("a register"));
        self.push_to(Instruction::with_branch(C::Jne_rel32_64, 0).expect("a branch"), Target::Branch(top));
        let end = self.sequence.items.len();
        for n in out {
            if let Some(item) = &mut self.sequence.items[n] {
                item.target = Target::Branch(end);
            }
        }
        self.groups.push((top - 4, end - 1));
    }

    fn forward_branch(&mut self, code: Code) {
        let ahead = 1 + self.rng.index(3);
        let here = self.sequence.items.len();
        if let Ok(i) = Instruction::with_branch(code, 0) {
            self.push_to(i, Target::Branch(here + 1 + ahead));
        }
    }

    /// A register to hold a code address.
    fn scratch(&mut self) -> usize {
        loop {
            let n = self.rng.index(16);
            if n != 4 && self.reserved & 1 << n == 0 {
                return n;
            }
        }
    }

    /// Loads the address of an item ahead into a register.
    fn code_address(&mut self, ahead: usize) -> usize {
        let n = self.scratch();
        let here = self.sequence.items.len();
        let i = Instruction::with2(Code::Mov_r32_imm32, Register::EAX + n as u32, 0u32).expect("a register");
        self.push_to(i, Target::Immediate(here + ahead));
        n
    }

    /// A jump or call through a register or memory, to an instruction ahead; sometimes to where it faults.
    fn indirect_branch(&mut self, code: Code) {
        if self.rng.percent(6) {
            self.generic(code);
            return;
        }
        let slot = layout::data() + self.rng.below(PAGE / 8) * 8;
        if self.rng.percent(50) {
            let ahead = 2 + self.rng.index(3);
            let n = self.code_address(ahead);
            self.push(Instruction::with1(code, gpr64(n)).expect("a register"));
        } else {
            let ahead = 3 + self.rng.index(3);
            let n = self.code_address(ahead);
            self.push(Instruction::with2(Code::Mov_rm64_r64, absolute(slot), gpr64(n)).expect("a store"));
            self.push(Instruction::with1(code, absolute(slot)).expect("memory"));
        }
    }

    /// Push a code address and return to it.
    fn near_return(&mut self, code: Code) {
        let ahead = 3 + self.rng.index(2);
        let n = self.code_address(ahead);
        self.push(Instruction::with1(Code::Push_r64, gpr64(n)).expect("a register"));
        if code.op_code().op_count() == 1 {
            let bytes = self.rng.below(8) as i32 * 8;
            self.push(Instruction::with1(code, bytes).expect("an immediate"));
        } else {
            self.push(Instruction::with(code));
        }
    }

    /// `call` forward over a few instructions; the callee returns or falls through.
    fn call_and_return(&mut self) {
        let here = self.sequence.items.len();
        // call callee; jmp end; callee: ...; ret; end:
        let body = 1 + self.rng.index(3);
        self.push_to(Instruction::with_branch(Code::Call_rel32_64, 0).expect("a branch"), Target::Branch(here + 2));
        self.push_to(
            Instruction::with_branch(Code::Jmp_rel32_64, 0).expect("a branch"),
            Target::Branch(here + 3 + body),
        );
        for _ in 0..body {
            let code = self.rng.pick(&[Code::Add_r64_rm64, Code::Xor_r32_rm32, Code::Lea_r64_m, Code::Cmp_rm32_imm8]);
            let before = self.sequence.items.len();
            self.generic(code);
            if self.sequence.items.len() == before {
                self.push(Instruction::with(Code::Nopd));
            }
        }
        self.push(Instruction::with(Code::Retnq));
    }

    fn repeated_string(&mut self) {
        let code = self.rng.pick(&[
            Code::Movsb_m8_m8,
            Code::Movsq_m64_m64,
            Code::Stosb_m8_AL,
            Code::Stosd_m32_EAX,
            Code::Lodsw_AX_m16,
            Code::Cmpsb_m8_m8,
            Code::Scasb_AL_m8,
            Code::Scasq_RAX_m64,
        ]);
        self.place(code);
    }

    fn flags_from_stack(&mut self, code: Code) {
        let flags = (self.rng.next_u64() & POPF_FLAGS) as i32;
        if code == Code::Popfw {
            self.push(Instruction::with1(Code::Push_imm16, flags & 0x4cd5).expect("an immediate"));
        } else {
            self.push(Instruction::with1(Code::Pushq_imm32, flags).expect("an immediate"));
        }
        self.push(Instruction::with(code));
    }

    /// A far return to this code segment. The selector goes under the address.
    fn far_return(&mut self, code: Code) {
        self.push(Instruction::with1(Code::Pushq_imm32, USER_CS).expect("an immediate"));
        let n = self.code_address(3);
        self.push(Instruction::with1(Code::Push_r64, gpr64(n)).expect("a register"));
        self.push(Instruction::with(code));
    }

    /// IRETQ within user mode, with a fresh stack pointer and flags.
    fn interrupt_return(&mut self) {
        if layout::base() != 0 {
            // The stack's address does not fit an immediate.
            return;
        }
        let flags = (self.rng.next_u64() & POPF_FLAGS & !0x4000) as i32 | 0x202;
        let stack = (layout::stack() + PAGE + self.rng.below(64) * 8) as i32;
        for v in [USER_SS, stack, flags, USER_CS] {
            self.push(Instruction::with1(Code::Pushq_imm32, v).expect("an immediate"));
        }
        let n = self.code_address(3);
        self.push(Instruction::with1(Code::Push_r64, gpr64(n)).expect("a register"));
        self.push(Instruction::with(Code::Iretq));
    }

    /// Stores of x87 images: FNINIT first, so that the instruction pointer in them is zero.
    fn fpu_store(&mut self, code: Code) {
        let start = self.sequence.items.len();
        self.push(Instruction::with(Code::Fninit));
        if self.rng.percent(50) {
            self.generic(Code::Fldcw_m2byte);
        }
        let at = if self.rng.percent(80) {
            layout::data() + self.rng.below(0x1a0) * 16
        } else {
            self.target_address(MemWish::default())
        };
        self.push(Instruction::with1(code, absolute(at)).expect("memory"));
        self.groups.push((start, self.sequence.items.len() - 1));
    }

    /// Loads of x87 images: mostly of one that was stored before.
    fn fpu_load(&mut self, code: Code) {
        let at = layout::data() + self.rng.below(0x100) * 16;
        let store = match code {
            Code::Fxrstor_m512byte => Code::Fxsave_m512byte,
            Code::Fxrstor64_m512byte => Code::Fxsave64_m512byte,
            Code::Fldenv_m14byte => Code::Fnstenv_m14byte,
            Code::Fldenv_m28byte => Code::Fnstenv_m28byte,
            Code::Frstor_m94byte => Code::Fnsave_m94byte,
            _ => Code::Fnsave_m108byte,
        };
        if self.rng.percent(80) {
            let start = self.sequence.items.len();
            self.push(Instruction::with(Code::Fninit));
            self.push(Instruction::with1(store, absolute(at)).expect("memory"));
            self.groups.push((start, start + 1));
            let filler = self.any_code();
            self.generic_plain(filler);
        }
        self.push(Instruction::with1(code, absolute(at)).expect("memory"));
    }

    /// Saves vector state with every component in use, so that no init optimisation shows.
    fn xsave(&mut self, code: Code) {
        let at = layout::data() + self.rng.below(8) * 64;
        let start = self.sequence.items.len();
        self.in_use();
        let mask = self.rng.pick(&[0xe6, 6, 2, 4, 0xe4]) & crate::state::host_components();
        if self.reserved & 5 != 0 {
            return;
        }
        self.set(0, mask);
        self.set(2, 0);
        // XSAVE keeps the bytes of the header that it does not write; both sides start with the same.
        self.push(Instruction::with1(code, absolute(at)).expect("memory"));
        self.groups.push((start, self.sequence.items.len() - 1));
    }

    /// Writes registers of every vector component, so that none is in its initial configuration.
    fn in_use(&mut self) {
        if crate::state::component(7).is_some() {
            for r in [Register::ZMM0, Register::ZMM15, Register::ZMM31] {
                let mut i = Instruction::with4(Code::EVEX_Vpternlogd_zmm_k1z_zmm_zmmm512b32_imm8, r, r, r, 0xff)
                    .expect("registers");
                i.set_op_mask(Register::None);
                self.push(i);
            }
            let k = Register::K1;
            self.push(Instruction::with3(Code::VEX_Kxnorw_kr_kr_kr, k, k, k).expect("registers"));
        } else {
            let x = Register::XMM0;
            self.push(Instruction::with2(Code::Pcmpeqd_xmm_xmmm128, x, x).expect("registers"));
            if crate::state::component(2).is_some() {
                let y = Register::YMM0;
                // Predicate 15: always true.
                let i = Instruction::with4(Code::VEX_Vcmpps_ymm_ymm_ymmm256_imm8, y, y, y, 15);
                self.push(i.expect("registers"));
            }
        }
    }

    /// Saves, changes and restores vector state; sometimes restores what is no image.
    fn xrstor(&mut self, code: Code) {
        if self.reserved & 5 != 0 {
            return;
        }
        let at = layout::data() + self.rng.below(8) * 64;
        let save = if code == Code::Xrstor64_mem { Code::Xsave64_mem } else { Code::Xsave_mem };
        if self.rng.percent(85) {
            // A clean header: XSTATE_BV, XCOMP_BV and the reserved words.
            for word in 0..8 {
                let i = Instruction::with2(Code::Mov_rm64_imm32, absolute(at + 512 + word * 8), 0).expect("a store");
                self.push(i);
            }
            self.in_use();
            self.set(0, 0xe6 & crate::state::host_components());
            self.set(2, 0);
            self.push(Instruction::with1(save, absolute(at)).expect("memory"));
            self.generic_plain(Code::Pxor_xmm_xmmm128);
        }
        let mask = self.rng.pick(&[0xe6, 6, 2, 4, 0xe0, 0xe7]);
        self.set(0, mask);
        self.set(2, 0);
        self.push(Instruction::with1(code, absolute(at)).expect("memory"));
    }

    /// A plain instruction of this form, if it is one.
    fn generic_plain(&mut self, code: Code) {
        if plain_flow(code) {
            self.place(code);
        }
    }

    fn load_mxcsr(&mut self, code: Code) {
        let at = layout::data() + self.rng.below(PAGE / 4) * 4;
        let v = self.rng.next_u64() as i32 & if self.rng.percent(90) { 0xffff } else { 0x3_ffff };
        let v = if self.rng.percent(60) { v | 0x1f80 } else { v };
        self.push(Instruction::with2(Code::Mov_rm32_imm32, absolute(at), v).expect("a store"));
        self.push(Instruction::with1(code, absolute(at)).expect("memory"));
    }

    fn compare_exchange_wide(&mut self, code: Code) {
        let at = layout::data() + self.rng.below(PAGE / 16) * 16;
        if self.reserved & 5 == 0 {
            let (first, a, d, step) = if code == Code::Cmpxchg16b_m128 {
                (Code::Mov_r64_rm64, Register::RAX, Register::RDX, 8)
            } else {
                (Code::Mov_r32_rm32, Register::EAX, Register::EDX, 4)
            };
            self.push(Instruction::with2(first, a, absolute(at)).expect("a load"));
            self.push(Instruction::with2(first, d, absolute(at + step)).expect("a load"));
            let mut i = Instruction::with1(code, absolute(at)).expect("memory");
            i.set_has_lock_prefix(self.rng.percent(50));
            self.push(i);
        }
    }

    /// WRFSBASE and WRGSBASE of a data address, and now and then of anything.
    fn write_base(&mut self, code: Code) {
        let n = self.scratch();
        let value = if self.rng.percent(85) { layout::data() + self.rng.below(PAGE) } else { self.rng.interesting() };
        self.set(n, value);
        let wide = matches!(code, Code::Wrfsbase_r64 | Code::Wrgsbase_r64);
        let r = if wide { gpr64(n) } else { Register::EAX + n as u32 };
        self.push(Instruction::with1(code, r).expect("a register"));
        let new = if wide { value } else { value & 0xffff_ffff };
        if new >> 47 == 0 {
            if matches!(code, Code::Wrfsbase_r64 | Code::Wrfsbase_r32) {
                self.fs_base = new;
            } else {
                self.gs_base = new;
            }
        }
    }
}

/// Whether a form goes on with the next instruction (faults aside).
fn plain_flow(code: Code) -> bool {
    code.flow_control() == FlowControl::Next
}
