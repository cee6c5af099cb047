// PVH entry (Xen, docs/misc/pvh.pandoc): 32-bit protected mode without paging, EBX = address of hvm_start_info.
.section .note.pvh, "a", @note
.long 4, 4, 18
.asciz "Xen"
.long pvh_start

.text
.code32
.global pvh_start
pvh_start:
    cld
    mov esp, offset boot_stack_top
    mov dword ptr [rt_start_info], ebx
    // Identity map of 4 GiB with pages of 2 MiB.
    mov eax, offset rt_pdpt + 3
    mov dword ptr [rt_pml4], eax
    xor ecx, ecx
2:  mov eax, ecx
    shl eax, 12
    add eax, offset rt_pd + 3
    mov dword ptr [rt_pdpt + ecx * 8], eax
    inc ecx
    cmp ecx, 4
    jb 2b
    xor ecx, ecx
3:  mov eax, ecx
    shl eax, 21
    or eax, 0x83
    // The last GiB holds device registers: no caching (PCD).
    cmp ecx, 1536
    jb 4f
    or eax, 0x10
4:  mov dword ptr [rt_pd + ecx * 8], eax
    inc ecx
    cmp ecx, 2048
    jb 3b
    // CR4: PAE, OSFXSR, OSXMMEXCPT. EFER: LME, NXE, SCE. CR0: PG, NE, MP, not EM.
    mov eax, cr4
    or eax, 0x620
    mov cr4, eax
    mov eax, offset rt_pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x901
    wrmsr
    mov eax, cr0
    and eax, 0xfffffffb
    or eax, 0x80010022
    mov cr0, eax
    lgdt [gdt_pointer]
    .byte 0xea
    .long long_start
    .short 8
.code64
long_start:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    lea rsp, [rip + boot_stack_top]
    xor ebp, ebp
    call rt_main
5:  cli
    hlt
    jmp 5b

// One stub per vector: makes the stack look the same with and without an error code.
.altmacro
.macro stub n
stub_\n:
    .if (\n == 8) || (\n >= 10 && \n <= 14) || (\n == 17) || (\n == 21)
    .else
    push 0
    .endif
    push \n
    jmp trap_common
.endm
.set i, 0
.rept 256
    stub %i
    .set i, i + 1
.endr

// Saves what a Rust function may change and calls rt_trap(&mut Frame). True from it: leave user mode for good.
trap_common:
    push rax
    push rcx
    push rdx
    push rbx
    push rbp
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    cld
    mov rdi, rsp
    mov rbx, rsp
    sub rsp, 512
    and rsp, -16
    fxsave64 [rsp]
    call rt_trap
    test al, al
    jnz 6f
    fxrstor64 [rsp]
    mov rsp, rbx
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rbp
    pop rbx
    pop rdx
    pop rcx
    pop rax
    add rsp, 16
    iretq
6:  fxrstor64 [rsp]
    mov eax, 0x10
    mov ss, eax
    mov rsp, [rip + rt_user_return]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

// rt_enter_user(rdi = rip, rsi = rsp, rdx = rflags, rcx = cs, r8 = rdi in user mode): returns when ring 3 traps and nobody handles it.
.global rt_enter_user
rt_enter_user:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [rip + rt_user_return], rsp
    push 0x23
    push rsi
    push rdx
    push rcx
    push rdi
    mov rdi, r8
    iretq

.section .rodata
.global rt_stubs
rt_stubs:
.set i, 0
.macro entry n
    .quad stub_\n
.endm
.rept 256
    entry %i
    .set i, i + 1
.endr
.noaltmacro
gdt_pointer:
    .short 63
    .quad rt_gdt

.data
.balign 16
// Null, code 64, data, user code 32, user data, user code 64, TSS (filled in later).
.global rt_gdt
rt_gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cffb000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff, 0, 0
.global rt_start_info
rt_start_info: .quad 0
rt_user_return: .quad 0

.bss
.balign 4096
.global rt_pml4
rt_pml4: .skip 4096
rt_pdpt: .skip 4096
rt_pd: .skip 16384
    .skip 65536
boot_stack_top: .skip 4096
