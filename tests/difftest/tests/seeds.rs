//! A fixed set of sequences on every test run. Soak runs: `cargo run --release -p difftest -- --sequences 2000000 --jobs 2`.

use difftest::catalog::catalog;
use difftest::guest::Guest;
use difftest::native::Native;
use difftest::{Config, Tester};

/// Every covered form is used at least once, and translated code does what the host does.
#[test]
fn translated_code_does_what_the_host_does() {
    let mut native = Native::new().expect("a native process");
    let mut guest = Guest::new().expect("an engine");
    // The translator does not keep status flags that the next instructions of the block overwrite across a fault.
    let relaxed_fault_flags = true;
    let config = Config { seed: 2, count: 30_000, max_differences: 5, relaxed_fault_flags, ..Config::default() };
    let report = Tester::new(&mut native, &mut guest, config).run().expect("both sides run");
    let texts: Vec<&str> = report.differences.iter().map(|d| d.reproducer.as_str()).collect();
    assert!(texts.is_empty(), "{}", texts.join("\n"));
    assert!(report.compared * 100 >= config.count * 99, "{report:?}");
    let unused: Vec<_> = catalog().covered.iter().filter(|c| !report.uses.contains_key(c)).collect();
    assert!(unused.is_empty(), "never generated: {unused:?}");
    for vector in [0, 3, 6, 13, 14, 16, 19] {
        assert!(report.vectors.contains_key(&vector), "no sequence ended with vector {vector}: {:?}", report.vectors);
    }
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
