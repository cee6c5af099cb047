//! A fixed set of sequences on every test run. Soak runs: `cargo run --release -p difftest -- --sequences 2000000 --jobs 2`.

mod common;

use difftest::native::Native;
use difftest::{Config, Tester};
use paravane_bt::Windows;

/// Operands reached through the soft TLB.
#[test]
fn translated_code_does_what_the_host_does() {
    common::translated_code_does_what_the_host_does(Windows::Off, 2);
}

/// The tester itself: two native runs agree, so differences are not made by the harness.
#[test]
fn the_host_agrees_with_itself() {
    let mut a = Native::new().expect("a native process");
    let mut b = Native::new().expect("a native process");
    let config = Config { seed: 3, count: 10_000, max_differences: 5, ..Config::default() };
    let report = Tester::new(&mut a, &mut b, config).run().expect("both sides run");
    let texts: Vec<&str> = report.differences.iter().map(|d| d.reproducer.as_str()).collect();
    assert!(texts.is_empty(), "{}", texts.join("\n"));
    assert!(report.unsteady < 10, "{} sequences are unsteady", report.unsteady);
}
