//! End-to-end tests: the real `paravane` program with real guests, seen from outside as a user sees it.
//!
//! The tests themselves are in `tests/`; this library holds what they share: where programs and guests are, how a
//! hypervisor is started without privileges and always ended, a terminal that a test can look into, and what the standard
//! guest must print. `cargo xtask test` builds and fetches everything first; a test run by hand builds what it needs.

pub mod archive;
pub mod conform;
pub mod counters;
pub mod exercise;
pub mod guest;
pub mod host;
pub mod process;
pub mod terminal;
