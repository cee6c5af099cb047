//! Small loops, each with one thing on its critical path: a branch, a load, a multiplication, a call.
//!
//! A kernel is prepared once (memory allocated, inputs filled) and then repeated; only the repetitions are timed
//! and the shortest one counts, since everything that disturbs a loop makes it longer. A repetition always does the same
//! work and returns what it computed. The amounts take some 30 to 100 ms on a current desktop processor.

use crate::report::{self, Choice, Numbers, SEED, fold};
use crate::sys::Mapping;
use std::hint::black_box;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The prepared work of a kernel: each call does the same and returns its checksum.
type Work = Box<dyn FnMut() -> u64>;

/// A row: its name, its full amount of work, and what prepares that amount.
struct Kernel(&'static str, u64, fn(u64) -> io::Result<Work>);

const KERNELS: &[Kernel] = &[
    Kernel("quicksort", 500_000, quicksort),
    // Not whole rounds through the memory, so that the place reached tells something.
    Kernel("chase-l1", 40_000_100, |steps| chase(16 << 10, steps)),
    Kernel("chase-l2", 12_000_000, |steps| chase(512 << 10, steps)),
    Kernel("chase-dram", 500_000, |steps| chase(128 << 20, steps)),
    Kernel("int-matmul", 16, int_matmul),
    Kernel("hash-table", 6, hash_table),
    Kernel("byte-loop", 32, byte_loop),
    Kernel("sin-sqrt", 8_000_000, sin_sqrt),
    Kernel("simd-saxpy", 60_000, simd_saxpy),
    Kernel("memcpy-64", 16_000_000, |times| copies(64, times)),
    Kernel("memcpy-4k", 1_000_000, |times| copies(4 << 10, times)),
    Kernel("memcpy-1m", 1_000, |times| copies(1 << 20, times)),
    Kernel("memset-64", 16_000_000, |times| fills(64, times)),
    Kernel("memset-4k", 1_000_000, |times| fills(4 << 10, times)),
    Kernel("memset-1m", 1_500, |times| fills(1 << 20, times)),
    Kernel("indirect-call", 12_000_000, indirect_call),
    Kernel("recursion", 20_000, recursion),
    Kernel("atomic-add", 8_000_000, atomic_add),
    Kernel("atomic-cmpxchg", 8_000_000, atomic_cmpxchg),
];

/// Repetitions that always happen.
const MIN_REPETITIONS: u32 = 3;
/// More follow until this much time is spent, which steadies short repetitions.
const MIN_TIME: Duration = Duration::from_millis(200);

/// Runs the chosen kernels and prints a row for each.
///
/// # Errors
/// Memory is missing, or repetitions of a kernel differ in what they computed.
pub(crate) fn run(choice: &Choice) -> io::Result<()> {
    for Kernel(name, full, prepare) in KERNELS {
        if choice.takes(name) {
            let (time, checksum) = measure(name, prepare(choice.amount(*full))?)?;
            report::row(name, report::nanoseconds(time), checksum)?;
        }
    }
    Ok(())
}

/// The names of all kernels.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    KERNELS.iter().map(|kernel| kernel.0)
}

fn measure(name: &str, mut work: Work) -> io::Result<(Duration, u64)> {
    let (mut best, mut total, mut count, mut checksum) = (Duration::MAX, Duration::ZERO, 0, None);
    while count < MIN_REPETITIONS || total < MIN_TIME {
        let start = Instant::now();
        let sum = work();
        let time = start.elapsed();
        if *checksum.get_or_insert(sum) != sum {
            return Err(io::Error::other(format!("repetitions of {name} computed different results")));
        }
        (best, total, count) = (best.min(time), total + time, count + 1);
    }
    Ok((best, checksum.unwrap_or_default()))
}

/// Sorts numbers: data-dependent branches, comparisons, swaps.
fn quicksort(length: u64) -> io::Result<Work> {
    let mut numbers = Numbers::new(1);
    let original: Vec<u32> = (0..length).map(|_| numbers.next() as u32).collect();
    let mut list = original.clone();
    Ok(Box::new(move || {
        list.copy_from_slice(&original);
        sort(&mut list);
        list.iter().step_by(97).fold(SEED, |sum, &value| fold(sum, u64::from(value)))
    }))
}

/// Hoare's quicksort with insertion sort for short ranges.
fn sort(mut list: &mut [u32]) {
    while list.len() > 12 {
        let pivot = list[list.len() / 2];
        let (mut low, mut high) = (0, list.len() - 1);
        loop {
            while list[low] < pivot {
                low += 1;
            }
            while list[high] > pivot {
                high -= 1;
            }
            if low >= high {
                break;
            }
            list.swap(low, high);
            low += 1;
            high -= 1;
        }
        let (left, right) = list.split_at_mut(low);
        // The shorter part by recursion, so that the stack stays small.
        if left.len() < right.len() {
            sort(left);
            list = right;
        } else {
            sort(right);
            list = left;
        }
    }
    for end in 1..list.len() {
        let mut at = end;
        while at > 0 && list[at - 1] > list[at] {
            list.swap(at - 1, at);
            at -= 1;
        }
    }
}

/// Follows a chain through `bytes` of memory, one cache line per step in random order: the latency of a load.
fn chase(bytes: usize, steps: u64) -> io::Result<Work> {
    const WORDS_PER_LINE: usize = 8;
    let mut memory = Mapping::new(bytes)?;
    let lines = bytes / 64;
    // Sattolo's shuffle gives one cycle through all lines.
    let mut order: Vec<u32> = (0..lines as u32).collect();
    let mut numbers = Numbers::new(2);
    for last in (1..lines).rev() {
        order.swap(last, numbers.below(last as u64) as usize);
    }
    let words = memory.words();
    for (line, &next) in order.iter().enumerate() {
        words[line * WORDS_PER_LINE] = u64::from(next) * WORDS_PER_LINE as u64;
    }
    Ok(Box::new(move || {
        let words = memory.words();
        let mut at = 0;
        for _ in 0..steps {
            at = words[at as usize];
        }
        at
    }))
}

/// Multiplies matrices of 64-bit integers by rows and columns: multiplications, strided loads.
fn int_matmul(times: u64) -> io::Result<Work> {
    const SIZE: usize = 160;
    let mut numbers = Numbers::new(3);
    let mut matrix = || -> Vec<u64> { (0..SIZE * SIZE).map(|_| numbers.next()).collect() };
    let (left, right) = (matrix(), matrix());
    Ok(Box::new(move || {
        let mut sum = SEED;
        for _ in 0..times {
            let (left, right) = (black_box(&left), black_box(&right));
            for row in left.chunks_exact(SIZE) {
                for column in 0..SIZE {
                    let cells = row.iter().zip(right[column..].iter().step_by(SIZE));
                    let cell = cells.fold(0u64, |cell, (&a, &b)| cell.wrapping_add(a.wrapping_mul(b)));
                    sum ^= cell.rotate_left(column as u32);
                }
            }
            sum = fold(sum, times);
        }
        sum
    }))
}

/// Fills and probes an open-addressing table: hashing, loads that depend on it, short probe loops.
fn hash_table(times: u64) -> io::Result<Work> {
    const SLOTS: usize = 1 << 18;
    let mut numbers = Numbers::new(4);
    let keys: Vec<u64> = (0..SLOTS * 5 / 8).map(|_| numbers.next() | 1).collect();
    let slot = |key: u64| (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 46) as usize;
    let mut table = vec![(0u64, 0u64); SLOTS];
    Ok(Box::new(move || {
        let mut sum = SEED;
        for _ in 0..times {
            table.fill((0, 0));
            for (value, &key) in keys.iter().enumerate() {
                let mut at = slot(key);
                while table[at].0 != 0 && table[at].0 != key {
                    at = (at + 1) % SLOTS;
                }
                table[at] = (key, value as u64);
            }
            for &key in &keys {
                // Half of the probes are for keys that are not there.
                for key in [key, key ^ 2] {
                    let mut at = slot(key);
                    while table[at].0 != 0 && table[at].0 != key {
                        at = (at + 1) % SLOTS;
                    }
                    sum = sum.wrapping_add(table[at].1.wrapping_add(1).wrapping_mul(table[at].0 | 1));
                }
            }
        }
        sum
    }))
}

/// Counts words and computes a CRC-32 byte by byte: byte loads, a table, a branch on data.
fn byte_loop(times: u64) -> io::Result<Work> {
    let mut numbers = Numbers::new(5);
    let text: Vec<u8> = (0..256 << 10).map(|_| b"etaoin shrdlu\ncmf"[numbers.below(17) as usize]).collect();
    let table: Vec<u32> = (0..256u32)
        .map(|byte| (0..8).fold(byte, |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 }))
        .collect();
    Ok(Box::new(move || {
        let (mut words, mut crc) = (0u64, !0u32);
        for _ in 0..times {
            let mut in_word = false;
            for &byte in black_box(&text) {
                crc = table[usize::from(byte ^ crc as u8)] ^ crc >> 8;
                let blank = byte == b' ' || byte == b'\n';
                if in_word && blank {
                    words += 1;
                }
                in_word = !blank;
            }
        }
        words << 32 | u64::from(!crc)
    }))
}

/// The sine on [0, pi/2] by its Taylor series to x^15, and square roots: double-precision chains. The own series keeps
/// the result the same where a C library would choose between code with and without fused multiplication.
fn sin_sqrt(times: u64) -> io::Result<Work> {
    const TERMS: [f64; 7] =
        [-1.0 / 6.0, 1.0 / 120.0, -1.0 / 5040.0, 1.0 / 362_880.0, -1.0 / 39_916_800.0, 1.0 / 6_227_020_800.0, 0.0];
    Ok(Box::new(move || {
        let (mut sum, mut x) = (0.0f64, 0.0f64);
        for _ in 0..times {
            x += 0.001_3;
            if x > std::f64::consts::FRAC_PI_2 {
                x -= std::f64::consts::FRAC_PI_2;
            }
            let square = x * x;
            let series = TERMS.iter().rev().fold(-1.0 / 1_307_674_368_000.0, |series, term| series * square + term);
            sum += x + x * square * series + (sum + x).sqrt();
            sum *= 0.5;
        }
        sum.to_bits()
    }))
}

/// y = a * x + y on 16 KiB vectors of single precision, which the compiler turns into SSE.
fn simd_saxpy(times: u64) -> io::Result<Work> {
    const LENGTH: usize = 4096;
    let x: Vec<f32> = (0..LENGTH).map(|i| (i % 97) as f32 * 0.01).collect();
    let mut y = vec![0.0f32; LENGTH];
    Ok(Box::new(move || {
        y.fill(0.5);
        for turn in 0..times {
            let a = black_box(if turn % 2 == 0 { 0.75f32 } else { -0.75 });
            for (y, x) in y.iter_mut().zip(&x) {
                *y += a * *x;
            }
            black_box(&mut y);
        }
        y.iter().fold(SEED, |sum, value| fold(sum, u64::from(value.to_bits())))
    }))
}

/// Blocks of `size` bytes copied by the C library's memcpy, within a buffer that moves on where blocks are small.
fn copies(size: usize, times: u64) -> io::Result<Work> {
    let span = size.max(8 << 10);
    let mut numbers = Numbers::new(6);
    let source: Vec<u8> = (0..span).map(|_| numbers.next() as u8).collect();
    let mut target = vec![0u8; span];
    Ok(Box::new(move || {
        let mut at = 0;
        for _ in 0..times {
            let size = black_box(size);
            target[at..at + size].copy_from_slice(&source[at..at + size]);
            black_box(&mut target);
            at = (at + size) % span;
        }
        report::of_bytes(&target)
    }))
}

/// Blocks of `size` bytes filled by the C library's memset.
fn fills(size: usize, times: u64) -> io::Result<Work> {
    let span = size.max(8 << 10);
    let mut target = vec![0u8; span];
    Ok(Box::new(move || {
        let mut at = 0;
        for turn in 0..times {
            let size = black_box(size);
            target[at..at + size].fill(turn as u8);
            black_box(&mut target);
            at = (at + size) % span;
        }
        report::of_bytes(&target)
    }))
}

/// Calls through a table of functions in a fixed random order of 256 steps: indirect branches with a pattern.
fn indirect_call(calls: u64) -> io::Result<Work> {
    const TARGETS: [fn(u64) -> u64; 8] = [
        |x| x.wrapping_add(0x1234_5678_9abc_def1),
        |x| x.rotate_left(7),
        |x| x ^ x >> 17,
        |x| x.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        |x| !x,
        |x| x.swap_bytes(),
        |x| x ^ x << 13,
        |x| x.wrapping_sub(0x0fed_cba9_8765_4321),
    ];
    let mut numbers = Numbers::new(7);
    let order: Vec<fn(u64) -> u64> = (0..256).map(|_| TARGETS[numbers.below(8) as usize]).collect();
    Ok(Box::new(move || {
        let mut value = SEED;
        for _ in 0..calls / 256 {
            for target in black_box(&order) {
                value = target(value);
            }
        }
        value
    }))
}

/// Goes 500 calls deep and returns, again and again: calls, returns, stack traffic, more than a return predictor holds.
fn recursion(times: u64) -> io::Result<Work> {
    Ok(Box::new(move || (0..times).fold(SEED, |sum, turn| fold(sum, descend(500, turn)))))
}

#[inline(never)]
fn descend(depth: u64, value: u64) -> u64 {
    if black_box(depth) == 0 {
        return value;
    }
    // Work after the call keeps it from becoming a jump.
    descend(depth - 1, value + depth).wrapping_mul(3) ^ depth
}

/// LOCK XADD on one word.
fn atomic_add(times: u64) -> io::Result<Work> {
    let word = AtomicU64::new(0);
    Ok(Box::new(move || {
        word.store(0, Ordering::SeqCst);
        (0..times).fold(0u64, |sum, turn| sum ^ word.fetch_add(turn, Ordering::SeqCst))
    }))
}

/// LOCK CMPXCHG on one word, every eighth with a wrong expectation.
fn atomic_cmpxchg(times: u64) -> io::Result<Work> {
    let word = AtomicU64::new(0);
    Ok(Box::new(move || {
        word.store(1, Ordering::SeqCst);
        let (mut value, mut failures) = (1u64, 0u64);
        for turn in 0..times {
            let expected = if turn % 8 == 7 { !value } else { value };
            match word.compare_exchange(expected, value + turn, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => value += turn,
                Err(found) => failures += u64::from(found == value),
            }
        }
        fold(value, failures)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sort_sorts() {
        let mut numbers = Numbers::new(9);
        for length in [0, 1, 2, 12, 13, 14, 100, 5000] {
            let mut list: Vec<u32> = (0..length).map(|_| numbers.below(1 + length / 2) as u32).collect();
            let mut expected = list.clone();
            expected.sort_unstable();
            sort(&mut list);
            assert_eq!(list, expected);
        }
    }

    #[test]
    fn every_kernel_repeats_its_result_and_depends_on_its_amount() {
        // chase-dram is the code of the other chases with 128 MiB to fill.
        for Kernel(name, full, prepare) in KERNELS.iter().filter(|kernel| kernel.0 != "chase-dram") {
            let small = (full / 2048).max(2);
            let mut work = prepare(small).expect("memory for a kernel");
            assert_eq!(work(), work(), "{name}");
            if !name.starts_with("mem") && *name != "simd-saxpy" {
                // Calls through the table come in rounds of 256, and a chase comes round after some power of two.
                let larger = if small > 2 { small + 300 } else { small + 1 };
                let other = prepare(larger).expect("memory for a kernel")();
                assert_ne!(other, work(), "{name}");
            }
        }
    }

    #[test]
    fn a_chase_visits_every_line() {
        // After as many steps as there are lines, and no earlier, the chain is back at its start.
        let lines = (64 << 10) / 64;
        assert_eq!(chase(64 << 10, lines).expect("memory")(), 0);
        assert!((1..lines).all(|steps| chase(64 << 10, steps).expect("memory")() != 0));
    }
}
