//! `fuzz TARGET --seconds N [--seed S]`: runs mutated programs against a device for a while (see `virtio::fuzz`).
//!
//! Deterministic: program number n of a seed is always the same, so a failure is repeated with `--seed S --only n`. A panic on any thread,
//! or a program that takes longer than ten seconds, ends the run with the number of the program.
#![allow(missing_docs)]

use std::process::exit;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

static PROGRAM: AtomicU64 = AtomicU64::new(0);

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

/// Program `n`: a random one of a few lengths, in which some parts repeat, as programs do.
fn program(seed: u64, n: u64) -> Vec<u8> {
    let mut r = Random(seed ^ n.wrapping_mul(0xd6e8_feb8_6659_fd93));
    let len = 32 << (r.next() % 6);
    let mut bytes: Vec<u8> = (0..len).map(|_| (r.next() >> 16) as u8).collect();
    for _ in 0..r.next() % 8 {
        let (from, to) = (r.next() as usize % len, r.next() as usize % len);
        let n = (len - from.max(to)).min(r.next() as usize % 64);
        bytes.copy_within(from..from + n, to);
    }
    bytes
}

fn usage() -> ! {
    eprintln!("usage: fuzz TARGET --seconds N [--seed S] [--only N]; targets: {}", virtio::fuzz::TARGETS.join(", "));
    exit(2)
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let option = |name: &str| -> Option<u64> {
        let at = args.iter().position(|a| a == name)?;
        Some(args.get(at + 1).and_then(|v| v.parse().ok()).unwrap_or_else(|| usage()))
    };
    let Some(target) = args.first().filter(|t| virtio::fuzz::TARGETS.contains(&t.as_str())) else { usage() };
    let (seed, seconds) = (option("--seed").unwrap_or(1), option("--seconds").unwrap_or(10));
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        hook(info);
        eprintln!("program {} of seed {seed} panics", PROGRAM.load(SeqCst));
        exit(1)
    }));
    if let Some(only) = option("--only") {
        virtio::fuzz::run(target, &program(seed, only));
        return;
    }
    std::thread::spawn(move || {
        let mut last = (u64::MAX, Instant::now());
        loop {
            std::thread::sleep(Duration::from_millis(500));
            let now = PROGRAM.load(SeqCst);
            if now != last.0 {
                last = (now, Instant::now());
            } else if last.1.elapsed() > Duration::from_secs(10) {
                eprintln!("program {now} of seed {seed} hangs");
                exit(1)
            }
        }
    });
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(seconds) {
        let n = PROGRAM.load(SeqCst);
        virtio::fuzz::run(target, &program(seed, n));
        PROGRAM.store(n + 1, SeqCst);
    }
    println!("{target}: {} programs in {seconds} s, nothing found", PROGRAM.load(SeqCst));
}
