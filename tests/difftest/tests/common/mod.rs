//! The comparison that every way of running the guest must pass.

use difftest::catalog::catalog;
use difftest::guest::Guest;
use difftest::native::Native;
use difftest::{Config, Tester};
use paravane_bt::Windows;

/// Every covered form is used at least once, and translated code does what the host does.
pub(crate) fn translated_code_does_what_the_host_does(windows: Windows, seed: u64) {
    let mut native = Native::new().expect("a native process");
    let mut guest = Guest::new(windows).expect("an engine");
    // The translator does not keep status flags that the next instructions of the block overwrite across a fault.
    let relaxed_fault_flags = true;
    let config = Config { seed, count: 30_000, max_differences: 5, relaxed_fault_flags, ..Config::default() };
    let report = Tester::new(&mut native, &mut guest, config).run().expect("both sides run");
    let texts: Vec<&str> = report.differences.iter().map(|d| d.reproducer.as_str()).collect();
    assert!(texts.is_empty(), "{}", texts.join("\n"));
    assert!(report.compared * 100 >= config.count * 99, "{report:?}");
    let unused: Vec<_> = catalog().covered.iter().filter(|c| !report.uses.contains_key(c)).collect();
    // Up there nothing can be addressed with 32 bits.
    let unused: Vec<_> = unused.into_iter().filter(|_| difftest::layout::base() == 0).collect();
    assert!(unused.is_empty(), "never generated: {unused:?}");
    for vector in [0, 3, 6, 13, 14, 16, 19] {
        assert!(report.vectors.contains_key(&vector), "no sequence ended with vector {vector}: {:?}", report.vectors);
    }
    let given = guest.stats().iter().find(|(name, _)| name == "windows given").map_or(0, |(_, n)| *n);
    assert_eq!(given != 0, windows == Windows::Always, "whether windows were in use");
}
