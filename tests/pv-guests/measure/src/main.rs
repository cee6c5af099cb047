//! A kernel that knows the paravirtual ABI and runs anywhere: it boots, says which path it takes for each feature, and measures.
#![no_std]
#![no_main]

mod boot;

use guest_rt::{console, entry};

entry!(main);

fn main() -> ! {
    boot::bring_up();
    console::exit(0)
}
