/* The paravirtual ABI of Paravane, for C11 and later, freestanding. SPDX-License-Identifier: Apache-2.0
 * Generated from pv-abi by `cargo xtask abi`; what the numbers mean is said in specs/. Do not edit. */
#ifndef PARAVANE_H
#define PARAVANE_H

#include <stddef.h>
#include <stdint.h>

/* Numbers that belong to no list. */
#define PARAVANE_VERSION                   UINT64_C(0x10000) /* version of the ABI, major in bits 16-31, minor in bits 0-15 */
#define PARAVANE_CPUID_FIRST               UINT64_C(0x40000000) /* first leaf to be searched for the signature */
#define PARAVANE_CPUID_STEP                UINT64_C(0x100) /* distance between leaves to be searched */
#define PARAVANE_CPUID_END                 UINT64_C(0x40010000) /* first leaf not to be searched */
#define PARAVANE_SIGNATURE_EBX             UINT64_C(0x61726150) /* signature, bytes 0-3 */
#define PARAVANE_SIGNATURE_ECX             UINT64_C(0x656e6176) /* signature, bytes 4-7 */
#define PARAVANE_SIGNATURE_EDX             UINT64_C(0x204d4d56) /* signature, bytes 8-11 */
#define PARAVANE_CPUID_FEATURES            UINT64_C(0x1) /* offset of the leaf with version and features */
#define PARAVANE_CPUID_ENTRY               UINT64_C(0x2) /* offset of the leaf with the entry sequence */
#define PARAVANE_CPUID_LIMITS              UINT64_C(0x3) /* offset of the leaf with limits */
#define PARAVANE_CPUID_TIMING              UINT64_C(0x10) /* offset of the leaf with frequencies */
#define PARAVANE_ENTRY_BYTES               UINT64_C(0xc) /* most bytes of an entry sequence */
#define PARAVANE_CALL_FIRST                UINT64_C(0x50560000) /* number of the first hypercall */
#define PARAVANE_ALL_ONES                  UINT64_C(0xffffffffffffffff) /* anyone, all of the address space, or all doorbell bits */
#define PARAVANE_SHUTDOWN_POWER_OFF        UINT64_C(0x0) /* argument of SHUTDOWN: power off */
#define PARAVANE_SHUTDOWN_RESET            UINT64_C(0x1) /* argument of SHUTDOWN: start anew */
#define PARAVANE_OPERATION_MASK            UINT64_C(0x7) /* bits of an update's target that hold its operation */
#define PARAVANE_LEAST_LIMIT               UINT64_C(0x200) /* array elements that every hypervisor takes in one call */
#define PARAVANE_EOI_SKIP                  UINT64_C(0x1) /* bit of the shared page's eoi */
#define PARAVANE_SHARED_PAGE_BYTES         UINT64_C(0x1000) /* bytes of the shared page, and its alignment */
#define PARAVANE_VIRTIO_MAX_DEVICES        UINT64_C(0x40) /* most virtio devices */
#define PARAVANE_VIRTIO_CONFIG             UINT64_C(0x100) /* offset of a virtio device's configuration space */
#define PARAVANE_VIRTIO_REGISTERS_END      UINT64_C(0x1000) /* first offset behind a virtio device's registers */

/* Feature bits. */
#define PARAVANE_FEATURE_PAGE_TABLES       UINT64_C(0x1) /* page-table updates and invalidations in batches */
#define PARAVANE_FEATURE_VIRTUAL_IF        UINT64_C(0x2) /* interrupts masked by a byte of the shared page */
#define PARAVANE_FEATURE_CLOCK             UINT64_C(0x4) /* nanoseconds and wall-clock time in the shared page */
#define PARAVANE_FEATURE_TIMER             UINT64_C(0x8) /* one-shot timer in nanoseconds */
#define PARAVANE_FEATURE_IPI               UINT64_C(0x10) /* interrupts to many vCPUs in one call */
#define PARAVANE_FEATURE_TLB_FLUSH         UINT64_C(0x20) /* TLB invalidation on many vCPUs in one call */
#define PARAVANE_FEATURE_LAZY_EOI          UINT64_C(0x40) /* ends of interrupts without access to the local APIC */
#define PARAVANE_FEATURE_SCHEDULE          UINT64_C(0x80) /* halt, kick and yield */
#define PARAVANE_FEATURE_STOLEN_TIME       UINT64_C(0x100) /* time that the vCPU wanted to run and did not */
#define PARAVANE_FEATURE_CONSOLE           UINT64_C(0x200) /* text from and to the machine's console */
#define PARAVANE_FEATURE_FREE_PAGES        UINT64_C(0x400) /* hints about pages whose contents are not needed */
#define PARAVANE_FEATURE_POWER             UINT64_C(0x800) /* power-off, reset and panic reports */
#define PARAVANE_FEATURE_VIRTIO            UINT64_C(0x1000) /* virtio devices with doorbell and event bits */

/* Hypercall numbers. */
#define PARAVANE_CALL_NEGOTIATE            UINT64_C(0x50560000) /* 2 arguments */
#define PARAVANE_CALL_SHARE_PAGE           UINT64_C(0x50560001) /* 1 arguments */
#define PARAVANE_CALL_UPDATE_PAGES         UINT64_C(0x50560002) /* 2 arguments */
#define PARAVANE_CALL_UNMASK               UINT64_C(0x50560003) /* 0 arguments */
#define PARAVANE_CALL_SET_TIMER            UINT64_C(0x50560004) /* 2 arguments */
#define PARAVANE_CALL_SEND_IPI             UINT64_C(0x50560005) /* 3 arguments */
#define PARAVANE_CALL_FLUSH_TLB            UINT64_C(0x50560006) /* 4 arguments */
#define PARAVANE_CALL_HALT                 UINT64_C(0x50560007) /* 0 arguments */
#define PARAVANE_CALL_KICK                 UINT64_C(0x50560008) /* 1 arguments */
#define PARAVANE_CALL_YIELD                UINT64_C(0x50560009) /* 1 arguments */
#define PARAVANE_CALL_CONSOLE_WRITE        UINT64_C(0x5056000a) /* 2 arguments */
#define PARAVANE_CALL_CONSOLE_READ         UINT64_C(0x5056000b) /* 2 arguments */
#define PARAVANE_CALL_FREE_PAGES           UINT64_C(0x5056000c) /* 2 arguments */
#define PARAVANE_CALL_SHUTDOWN             UINT64_C(0x5056000d) /* 1 arguments */
#define PARAVANE_CALL_PANIC                UINT64_C(0x5056000e) /* 2 arguments */
#define PARAVANE_CALL_VIRTIO_READ          UINT64_C(0x5056000f) /* 3 arguments */
#define PARAVANE_CALL_VIRTIO_WRITE         UINT64_C(0x50560010) /* 4 arguments */
#define PARAVANE_CALL_NOTIFY               UINT64_C(0x50560011) /* 1 arguments */
#define PARAVANE_CALL_EVENT_VECTOR         UINT64_C(0x50560012) /* 1 arguments */

/* Errors, as they are before RAX negates them. */
#define PARAVANE_ERROR_NOT_SUPPORTED       UINT64_C(0x1) /* no such call, or its feature is not on offer */
#define PARAVANE_ERROR_NOT_NEGOTIATED      UINT64_C(0x2) /* the call's feature is not in force */
#define PARAVANE_ERROR_NOT_PERMITTED       UINT64_C(0x3) /* the caller is not in 64-bit mode at CPL 0 */
#define PARAVANE_ERROR_INVALID_ARGUMENT    UINT64_C(0x4) /* out of range, a reserved bit, or an unused argument that is not 0 */
#define PARAVANE_ERROR_BAD_ADDRESS         UINT64_C(0x5) /* misaligned, or not RAM in its whole length */
#define PARAVANE_ERROR_TOO_MANY            UINT64_C(0x6) /* above the limit that CPUID gives */
#define PARAVANE_ERROR_NO_SUCH_TARGET      UINT64_C(0x7) /* no such vCPU or device */
#define PARAVANE_ERROR_BAD_VERSION         UINT64_C(0x8) /* not a version that the hypervisor speaks */
#define PARAVANE_ERROR_BAD_FEATURES        UINT64_C(0x9) /* a feature that is not on offer */
#define PARAVANE_ERROR_NO_SHARED_PAGE      UINT64_C(0xa) /* the call needs a shared page */

/* Operations of an update, bits 0-2 of its target. */
#define PARAVANE_UPDATE_SET_ENTRY          UINT64_C(0x1) /* store value into the page-table entry at target */
#define PARAVANE_UPDATE_INVALIDATE_PAGE    UINT64_C(0x2) /* invalidate the page at target and value pages behind it */
#define PARAVANE_UPDATE_INVALIDATE_SPACE   UINT64_C(0x3) /* invalidate the address space but for global pages */
#define PARAVANE_UPDATE_INVALIDATE_ALL     UINT64_C(0x4) /* invalidate everything */
#define PARAVANE_UPDATE_SET_ROOT           UINT64_C(0x5) /* load value into CR3 */

/* nanoseconds as a function of the TSC: 40 bytes. */
struct paravane_clock {
    uint32_t sequence;             /* odd while the hypervisor writes */
    uint32_t mult;                 /* fraction of 2^32 ns per shifted tick */
    uint64_t tsc_base;             /* guest TSC at ns_base */
    uint64_t ns_base;              /* ns since the machine started, at tsc_base */
    uint64_t wall_ns;              /* ns from 1970-01-01 UTC to the machine's start */
    int8_t shift;                  /* shift of the TSC difference, to the left if positive */
    uint8_t reserved[7];           /* 0 */
};
_Static_assert(sizeof(struct paravane_clock) == 40, "size");
_Static_assert(offsetof(struct paravane_clock, sequence) == 0, "offset");
_Static_assert(offsetof(struct paravane_clock, mult) == 4, "offset");
_Static_assert(offsetof(struct paravane_clock, tsc_base) == 8, "offset");
_Static_assert(offsetof(struct paravane_clock, ns_base) == 16, "offset");
_Static_assert(offsetof(struct paravane_clock, wall_ns) == 24, "offset");
_Static_assert(offsetof(struct paravane_clock, shift) == 32, "offset");
_Static_assert(offsetof(struct paravane_clock, reserved) == 33, "offset");

/* time that the vCPU wanted to run and did not: 16 bytes. */
struct paravane_stolen {
    uint32_t sequence;             /* odd while the hypervisor writes */
    uint32_t preempted;            /* 1 while the vCPU could run and does not */
    uint64_t ns;                   /* ns since the page was shared */
};
_Static_assert(sizeof(struct paravane_stolen) == 16, "size");
_Static_assert(offsetof(struct paravane_stolen, sequence) == 0, "offset");
_Static_assert(offsetof(struct paravane_stolen, preempted) == 4, "offset");
_Static_assert(offsetof(struct paravane_stolen, ns) == 8, "offset");

/* what a vCPU shares with the hypervisor: 4096 bytes. */
struct paravane_shared_page {
    uint32_t version;              /* version in force; by the hypervisor */
    uint32_t eoi;                  /* bit 0: no EOI needed; by both */
    uint8_t irq_enabled;           /* virtual IF; by the guest */
    uint8_t irq_pending;           /* an interrupt waits; by the hypervisor */
    uint8_t reserved0[6];          /* 0 */
    uint64_t events;               /* devices with events; by both */
    uint64_t doorbells;            /* devices with new buffers; by both */
    struct paravane_clock clock;   /* the clock */
    struct paravane_stolen stolen; /* stolen time */
    uint8_t reserved1[4008];       /* 0 */
};
_Static_assert(sizeof(struct paravane_shared_page) == 4096, "size");
_Static_assert(offsetof(struct paravane_shared_page, version) == 0, "offset");
_Static_assert(offsetof(struct paravane_shared_page, eoi) == 4, "offset");
_Static_assert(offsetof(struct paravane_shared_page, irq_enabled) == 8, "offset");
_Static_assert(offsetof(struct paravane_shared_page, irq_pending) == 9, "offset");
_Static_assert(offsetof(struct paravane_shared_page, reserved0) == 10, "offset");
_Static_assert(offsetof(struct paravane_shared_page, events) == 16, "offset");
_Static_assert(offsetof(struct paravane_shared_page, doorbells) == 24, "offset");
_Static_assert(offsetof(struct paravane_shared_page, clock) == 32, "offset");
_Static_assert(offsetof(struct paravane_shared_page, stolen) == 72, "offset");
_Static_assert(offsetof(struct paravane_shared_page, reserved1) == 88, "offset");

/* one page-table update: 16 bytes. */
struct paravane_update {
    uint64_t target;               /* address, and the operation in bits 0-2 */
    uint64_t value;                /* as the operation says */
};
_Static_assert(sizeof(struct paravane_update) == 16, "size");
_Static_assert(offsetof(struct paravane_update, target) == 0, "offset");
_Static_assert(offsetof(struct paravane_update, value) == 8, "offset");

/* pages whose contents are not needed: 16 bytes. */
struct paravane_free_range {
    uint64_t gpa;                  /* first page */
    uint64_t pages;                /* number of 4 KiB pages */
};
_Static_assert(sizeof(struct paravane_free_range) == 16, "size");
_Static_assert(offsetof(struct paravane_free_range, gpa) == 0, "offset");
_Static_assert(offsetof(struct paravane_free_range, pages) == 8, "offset");

/* Calls the entry sequence at `entry`, a copy of the bytes in CPUID leaf base + PARAVANE_CPUID_ENTRY in executable memory.
 * Unused arguments must be 0. Gives RAX: 0, or an error negated. The call's value goes to *value unless that is NULL.
 * The caller must not keep data below its stack pointer: compile with -mno-red-zone, as kernels are. */
#if defined(__x86_64__) && defined(__GNUC__)
static inline int64_t paravane_call(const void *entry, uint64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                                    uint64_t *value)
{
    int64_t result = (int64_t)number;
    __asm__ volatile("call *%[entry]"
                     : "+a"(result), "+d"(c)
                     : [entry] "r"(entry), "D"(a), "S"(b), "c"(d)
                     : "memory", "cc");
    if (value)
        *value = c;
    return result;
}
#endif

#endif
