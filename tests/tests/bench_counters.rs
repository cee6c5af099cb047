//! How often single operations leave guest code, against the file that is kept with the source.

use paravane_tests::counters;

#[test]
fn no_operation_leaves_guest_code_more_often_than_before() {
    let differences = counters::differences(&counters::count()).unwrap_or_else(|wrong| panic!("{wrong}"));
    assert!(
        differences.is_empty(),
        "if this is meant, `cargo xtask bench --bless` writes it down:\n{}",
        differences.join("\n")
    );
}
