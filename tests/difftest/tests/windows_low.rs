//! Operands reached through the low window; in a process of its own, for there is one pair of windows in each.

mod common;

use paravane_bt::Windows;

#[test]
fn translated_code_does_what_the_host_does() {
    common::translated_code_does_what_the_host_does(Windows::Always, 4);
}
