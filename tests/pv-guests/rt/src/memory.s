// The functions that compiled Rust expects of a C library, which a bare-metal guest has none of.
.text
.global memcpy
memcpy:
    // Words, then bytes: most copies are short, and REP is slow for those everywhere.
    mov rax, rdi
    mov rcx, rdx
    shr rcx, 3
    jz 7f
6:  mov r8, [rsi]
    mov [rdi], r8
    add rsi, 8
    add rdi, 8
    dec rcx
    jnz 6b
7:  and edx, 7
    jz 9f
8:  mov r8b, [rsi]
    mov [rdi], r8b
    inc rsi
    inc rdi
    dec edx
    jnz 8b
9:  ret
.global memmove
memmove:
    mov rax, rdi
    mov rcx, rdi
    sub rcx, rsi
    cmp rcx, rdx
    mov rcx, rdx
    jb 2f
    rep movsb
    ret
2:  // The destination starts inside the source: copy from the end.
    lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    std
    rep movsb
    cld
    ret
.global memset
memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret
.global bcmp
bcmp:
.global memcmp
memcmp:
    mov rcx, rdx
    xor eax, eax
    test rcx, rcx
    jz 3f
    repe cmpsb
    movzx eax, byte ptr [rdi - 1]
    movzx ecx, byte ptr [rsi - 1]
    sub eax, ecx
3:  ret
.global strlen
strlen:
    xor eax, eax
4:  cmp byte ptr [rdi + rax], 0
    je 5f
    inc rax
    jmp 4b
5:  ret
