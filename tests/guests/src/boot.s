.section .note.pvh, "a", @note
.long 4, 4, 18
.asciz "Xen"
.long pvh_start
.text
.code32
.global pvh_start
pvh_start:
    cld
    mov esp, offset stack_top
    mov dword ptr [start_info], ebx
    mov eax, offset pdpt + 3
    mov dword ptr [pml4], eax
    xor ecx, ecx
2:  mov eax, ecx
    shl eax, 12
    add eax, offset pd + 3
    mov dword ptr [pdpt + ecx * 8], eax
    inc ecx
    cmp ecx, 4
    jb 2b
    xor ecx, ecx
3:  mov eax, ecx
    shl eax, 21
    or eax, 0x83
    mov dword ptr [pd + ecx * 8], eax
    inc ecx
    cmp ecx, 2048
    jb 3b
    mov eax, cr4
    or eax, 0x620
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x901
    wrmsr
    mov eax, cr0
    and eax, 0xfffffffb
    or eax, 0x80010022
    mov cr0, eax
    lgdt [gdt_ptr]
    .byte 0xea
    .long long_start
    .short 8
.code64
long_start:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    lea rsp, [rip + stack_top]
    call guest_main
4:  cli
    hlt
    jmp 4b
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
trap_common:
    push rax
    push rcx
    lea rcx, [rip + TRAP]
    .irp off, 0, 1, 2, 3, 4, 5, 6
    mov rax, [rsp + 16 + \off * 8]
    mov [rcx + \off * 8], rax
    .endr
    mov rax, cr2
    mov [rcx + 56], rax
    inc qword ptr [rcx + 64]
    test byte ptr [rsp + 40], 3
    jnz 6f
    mov rax, [rcx + 72]
    test rax, rax
    jz 5f
    mov qword ptr [rcx + 72], 0
    mov [rsp + 32], rax
    pop rcx
    pop rax
    add rsp, 16
    iretq
5:  cld
    lea rsp, [rip + stack_top]
    call unexpected_trap
6:  mov rsp, [rcx + 80]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret
// enter_user(rdi = rip, rsi = rsp, rdx = rflags, rcx = cs): returns when ring 3 traps.
.global enter_user
enter_user:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [rip + TRAP + 80], rsp
    push 0x23
    push rsi
    push rdx
    push rcx
    push rdi
    iretq
.section .rodata
.global stub_table
stub_table:
.set i, 0
.macro entry n
    .quad stub_\n
.endm
.rept 256
    entry %i
    .set i, i + 1
.endr
.noaltmacro
gdt_ptr:
    .short 63
    .quad GDT
.data
.balign 16
.global GDT
GDT: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cffb000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff, 0, 0
.global start_info
start_info: .quad 0
.bss
.balign 4096
.global pml4
pml4: .skip 4096
pdpt: .skip 4096
pd: .skip 16384
    .skip 65536
stack_top: .skip 4096
