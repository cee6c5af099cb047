//! Operands reached through the high window; in a process of its own, for there is one pair of windows in each.

mod common;

use paravane_bt::Windows;

#[test]
fn translated_code_does_what_the_host_does() {
    difftest::layout::move_high();
    common::translated_code_does_what_the_host_does(Windows::Always, 5);
}
