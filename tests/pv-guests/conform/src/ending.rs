//! PWR-1 and PWR-3: what ends the machine. Its exit status says whether it did.

use crate::abi::{Abi, page, put8};
use guest_rt::{console, println};
use pv_abi::call::{Call, Shutdown};

/// Ends the machine in one of three ways. Comes back by the debug-exit port, with status 2, if that fails.
pub(crate) fn end(abi: Abi, how: &str) -> ! {
    if abi.begin().is_err() {
        println!("Bail out! NEGOTIATE fails");
        console::exit(2);
    }
    const TEXT: &[u8] = b"conform: the last words";
    for (at, b) in (page(1)..).zip(TEXT) {
        put8(at, *b);
    }
    let answer = match how {
        "poweroff" => abi.call(Call::Shutdown, &[Shutdown::PowerOff as u64]),
        "reset" => abi.call(Call::Shutdown, &[Shutdown::Reset as u64]),
        _ => abi.call(Call::Panic, &[page(1), TEXT.len() as u64]),
    };
    println!("Bail out! {how} came back with {answer:x?}");
    console::exit(2)
}
