/* A guest in C that knows nothing but paravane.h: it finds the ABI, agrees on features, shares a page and makes one batched update.
 *
 * Where there is no ABI it says so and updates its page table natively. The start (boot.s) is the Rust runtime's; everything else is
 * here. Ends with status 0 by the debug-exit port when all is well. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "paravane.h"

#define PRESENT_WRITABLE 3u
#define FEATURES (PARAVANE_FEATURE_PAGE_TABLES | PARAVANE_FEATURE_CLOCK)

extern uint64_t rt_pml4[512];

static _Alignas(4096) uint64_t pdpt[512], pd[512], pt[512];
static _Alignas(4096) volatile uint64_t page_a[512], page_b[512];
static _Alignas(4096) struct paravane_shared_page shared;
static _Alignas(16) struct paravane_update updates[4];
/* The boot page tables let everything be executed. */
static _Alignas(16) uint8_t entry[PARAVANE_ENTRY_BYTES];

/* What compiled C may call. */
void *memcpy(void *to, const void *from, size_t n)
{
    for (size_t i = 0; i < n; i++)
        ((volatile uint8_t *)to)[i] = ((const uint8_t *)from)[i];
    return to;
}

static void out8(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static uint8_t in8(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static void print(const char *text)
{
    for (; *text; text++) {
        while (!(in8(0x3fd) & 0x20))
            ;
        out8(0x3f8, (uint8_t)*text);
    }
}

_Noreturn static void leave(uint32_t status)
{
    for (;;)
        __asm__ volatile("outl %0, %1\n\tcli\n\thlt" : : "a"(status), "Nd"((uint16_t)0xf4));
}

static void check(bool good, const char *what)
{
    print(good ? "ok - " : "not ok - ");
    print(what);
    print("\n");
    if (!good)
        leave(1);
}

static void cpuid(uint32_t leaf, uint32_t regs[4])
{
    __asm__ volatile("cpuid"
                     : "=a"(regs[0]), "=b"(regs[1]), "=c"(regs[2]), "=d"(regs[3])
                     : "a"(leaf), "c"(0));
}

/* The ABI's base leaf; 0 if there is none. */
static uint32_t discover(void)
{
    uint32_t regs[4];
    cpuid(1, regs);
    if (!(regs[2] >> 31))
        return 0;
    for (uint32_t leaf = PARAVANE_CPUID_FIRST; leaf < PARAVANE_CPUID_END; leaf += PARAVANE_CPUID_STEP) {
        cpuid(leaf, regs);
        if (regs[1] == PARAVANE_SIGNATURE_EBX && regs[2] == PARAVANE_SIGNATURE_ECX &&
            regs[3] == PARAVANE_SIGNATURE_EDX && regs[0] >= leaf + PARAVANE_CPUID_LIMITS)
            return leaf;
    }
    return 0;
}

static uint64_t address(const volatile void *at)
{
    return (uint64_t)(uintptr_t)at;
}

/* PML4 slot 1, first page. */
static volatile uint64_t *const window = (volatile uint64_t *)(UINT64_C(1) << 39);

static void by_abi(uint32_t base)
{
    uint32_t regs[4];
    uint64_t value;

    cpuid(base + PARAVANE_CPUID_FEATURES, regs);
    check(regs[0] >> 16 == PARAVANE_VERSION >> 16 && regs[0] >= PARAVANE_VERSION, "version");
    check((regs[1] & FEATURES) == FEATURES, "features on offer");
    cpuid(base + PARAVANE_CPUID_ENTRY, regs);
    check(regs[0] >= 1 && regs[0] <= PARAVANE_ENTRY_BYTES, "entry sequence");
    for (uint32_t i = 0; i < regs[0]; i++)
        entry[i] = (uint8_t)(regs[1 + i / 4] >> i % 4 * 8);

    check(paravane_call(entry, PARAVANE_CALL_NEGOTIATE, PARAVANE_VERSION, FEATURES, 0, 0, &value) == 0 && value == FEATURES,
          "NEGOTIATE");
    check(paravane_call(entry, PARAVANE_CALL_SHARE_PAGE, address(&shared), 0, 0, 0, NULL) == 0, "SHARE_PAGE");
    check(shared.version == PARAVANE_VERSION, "version in the shared page");
    check(*(volatile uint32_t *)&shared.clock.sequence % 2 == 0 && shared.clock.mult != 0, "clock in the shared page");

    updates[0] = (struct paravane_update){ address(&pt[0]) | PARAVANE_UPDATE_SET_ENTRY, address(page_b) | PRESENT_WRITABLE };
    updates[1] = (struct paravane_update){ address(&pt[1]) | PARAVANE_UPDATE_SET_ENTRY, address(page_a) | PRESENT_WRITABLE };
    updates[2] = (struct paravane_update){ address(window) | PARAVANE_UPDATE_INVALIDATE_PAGE, 1 };
    updates[3] = (struct paravane_update){ PARAVANE_UPDATE_INVALIDATE_SPACE, 0 };
    for (uint64_t done = 0; done < 4; done += value)
        check(paravane_call(entry, PARAVANE_CALL_UPDATE_PAGES, address(&updates[done]), 4 - done, 0, 0, &value) == 0 && value > 0,
              "UPDATE_PAGES");
    check(paravane_call(entry, PARAVANE_CALL_UPDATE_PAGES, address(updates) + 8, 1, 0, 0, NULL) ==
              -(int64_t)PARAVANE_ERROR_BAD_ADDRESS,
          "a misaligned array is refused");
    print("way: abi\n");
}

static void natively(void)
{
    pt[0] = address(page_b) | PRESENT_WRITABLE;
    pt[1] = address(page_a) | PRESENT_WRITABLE;
    __asm__ volatile("invlpg (%0)\n\tinvlpg 4096(%0)" : : "r"(window) : "memory");
    print("way: native, there is no ABI\n");
}

/* Called by boot.s in 64-bit mode with 4 GiB mapped one to one. */
_Noreturn void rt_main(void)
{
    uint32_t base = discover();

    rt_pml4[1] = address(pdpt) | PRESENT_WRITABLE;
    pdpt[0] = address(pd) | PRESENT_WRITABLE;
    pd[0] = address(pt) | PRESENT_WRITABLE;
    pt[0] = address(page_a) | PRESENT_WRITABLE;
    page_a[0] = 0xa;
    page_b[0] = 0xb;
    check(window[0] == 0xa, "first mapping");
    if (base)
        by_abi(base);
    else
        natively();
    check(window[0] == 0xb && window[512] == 0xa, "new mappings");
    leave(0);
}

/* Called by boot.s for exceptions; without an IDT none comes so far. */
bool rt_trap(void *frame)
{
    (void)frame;
    print("not ok - exception\n");
    leave(2);
}
