//! States from damaged or hostile files, loaded into a live vCPU and let go.
//!
//! States that guests were stopped in are damaged where it hurts, in fields of the typed structure, so that most still parse. Each
//! must be refused with one sentence, or run: to whatever end, but without a panic, a host error or a vCPU that cannot be stopped. And
//! where a vCPU has run, the state that it is in must be valid again.
//!
//! `PARAVANE_FUZZ_SECONDS` makes it long (`cargo xtask fuzz state`), `PARAVANE_FUZZ_SEED` repeats one. Only binary
//! translation is tried: a damaged state in KVM would test the host's kernel.

use crate::guest::{BT, Machine};
use paravane::engine::Windows;
use paravane::running::{Driven, RunningVcpu};
use paravane_cpu::snapshot::VcpuSnapshot;
use serde_json::Value;
use std::time::{Duration, Instant};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: usize) -> usize {
        (self.word() % n as u64) as usize
    }
}

/// Values at which something changes.
const EDGES: [u64; 14] = [
    0,
    1,
    2,
    0xfff,
    0x1000,
    0xffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff,
    0x8000_0000_0000,
    0xffff_8000_0000_0000,
    u64::MAX - 1,
    u64::MAX,
];

/// The leaves of a JSON tree.
fn leaves<'a>(v: &'a mut Value, out: &mut Vec<&'a mut Value>) {
    match v {
        Value::Array(list) => list.iter_mut().for_each(|v| leaves(v, out)),
        Value::Object(map) => map.values_mut().for_each(|v| leaves(v, out)),
        leaf => out.push(leaf),
    }
}

/// Damages one leaf; sections are equally likely, whatever their size, for otherwise vector registers would take it all.
fn damage(v: &mut Value, r: &mut Random) {
    let sections: Vec<&mut Value> = v.as_object_mut().unwrap().values_mut().collect();
    let at = r.below(sections.len());
    let mut found = Vec::new();
    leaves(sections.into_iter().nth(at).unwrap(), &mut found);
    if found.is_empty() {
        return;
    }
    let at = r.below(found.len());
    let leaf = found.swap_remove(at);
    let edge = EDGES[r.below(EDGES.len())];
    let new = match (&*leaf, r.below(4)) {
        (Value::Number(n), 0) => Value::from(n.as_u64().unwrap_or(0) ^ 1 << r.below(64)),
        (Value::Number(n), 1) => Value::from(n.as_u64().unwrap_or(0).wrapping_add(edge)),
        (Value::Number(n), 2) => Value::from(n.as_u64().unwrap_or(0) ^ 1 << r.below(16)),
        (Value::Number(_), _) => Value::from(edge),
        (Value::Bool(b), _) => Value::from(!b),
        (Value::String(s), _) => match s.as_str() {
            "running" => "halted".into(),
            "halted" => "running".into(),
            _ => format!("{:02x}{}", r.below(256), &s[s.len().min(2)..]).into(),
        },
        (Value::Null, 0) => serde_json::json!({ "interrupt": { "vector": r.below(256) } }),
        (Value::Null, 1) => serde_json::json!({ "exception": { "vector": r.below(32), "error_code": null } }),
        (Value::Null, 2) => serde_json::json!({ "exception": { "vector": 8 + r.below(9), "error_code": edge as u32 } }),
        (Value::Null, _) => serde_json::json!({ "nmi": {} }),
        _ => Value::Null,
    };
    *leaf = new;
}

/// States in the midst of both guests.
fn seeds() -> Vec<(Machine, VcpuSnapshot)> {
    let stopped = |m: Machine| {
        let mut vcpu = m.vcpu(BT).unwrap();
        vcpu.load(&m.start).unwrap();
        let running = RunningVcpu::start(0, vcpu, m.chipset.clone()).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        let (mut vcpu, how) = running.pause().unwrap();
        assert_eq!(how, Driven::Paused);
        let s = vcpu.save().unwrap();
        (m, s)
    };
    vec![
        stopped(Machine::compute(u64::MAX, Windows::Always, true)),
        stopped(Machine::compute(u64::MAX, Windows::Off, false)),
        stopped(Machine::ticks(u64::MAX, 100_000)),
    ]
}

#[test]
fn damaged_states_are_refused_or_run() {
    let env = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let long = env("PARAVANE_FUZZ_SECONDS");
    let limit = Duration::from_secs(long.unwrap_or(2));
    let seed = env("PARAVANE_FUZZ_SEED").unwrap_or(1);
    let mut r = Random(seed);
    let (mut refused, mut ran, mut ended) = (0_u64, 0_u64, 0_u64);
    let began = Instant::now();
    let mut bases = seeds();
    let mut rounds = 0_u64;
    while began.elapsed() < limit || rounds < 50 {
        let n = r.below(bases.len());
        let (m, base) = &bases[n];
        let mut vcpu = m.vcpu(BT).unwrap();
        // The same vCPU takes state after state, so that one leaves traces for the next if it can.
        loop {
            rounds += 1;
            let mut value = serde_json::to_value(base).unwrap();
            for _ in 0..=r.below(3) {
                damage(&mut value, &mut r);
            }
            let text = value.to_string();
            let told = |what: &str| format!("{what}; seed {seed}, round {rounds}:\n{text}");
            let Ok(state) = VcpuSnapshot::from_json(text.as_bytes()) else {
                refused += 1;
                continue;
            };
            if let Err(e) = vcpu.load(&state) {
                let e = e.to_string();
                assert!(!e.contains('\n') && e.len() < 300, "{}", told(&e));
                refused += 1;
                continue;
            }
            let running = RunningVcpu::start(0, vcpu, m.chipset.clone()).unwrap();
            std::thread::sleep(Duration::from_micros(200));
            let (mut after, how) = running.pause().unwrap_or_else(|e| panic!("{}", told(&e.to_string())));
            let saved = after.save().unwrap();
            after
                .load(&saved)
                .unwrap_or_else(|e| panic!("it cannot load what it saved, {saved:?}: {}", told(&e.to_string())));
            ran += 1;
            vcpu = after;
            if how == Driven::Stopped {
                // A triple fault or another end stops the machine for good.
                ended += 1;
                drop(vcpu);
                bases = seeds();
                break;
            }
            if r.below(16) == 0 || (began.elapsed() > limit && rounds >= 50) {
                break;
            }
        }
    }
    println!(
        "seed {seed}: {refused} states refused, {ran} run, {ended} of them to the machine's end, in {:?}",
        began.elapsed()
    );
    assert!(refused > 5 && ran > 5, "{refused} refused, {ran} run");
}
