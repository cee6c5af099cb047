// The functions that compiled Rust expects of a C library, which a bare-metal guest has none of.
.text
.global memcpy
memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret
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
