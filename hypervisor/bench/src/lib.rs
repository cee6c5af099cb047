//! `paravane bench`: what each way of virtualizing costs, and what paravirtualization saves, measured on this machine.
//!
//! Two suites fill one [`model::Report`]: [`micro`] times single operations in a bare-metal guest, [`linux`] runs a stock
//! Linux kernel and programs under it. Both measure this very program, started as a child for each run, beside the host
//! and QEMU's emulator where there is one. Sides alternate within each round, so that the drift of a shared machine meets
//! all of them; a figure is the median of the rounds.
//!
//! The report goes to the terminal ([`table`]), to a JSON file and to one page for a browser ([`html`]); [`compare`] sets two
//! of them side by side. [`cli`] is the command line.
//! The binary passes in what it knows about the host, because this crate stands below it.

pub mod child;
pub mod cli;
pub mod compare;
pub mod html;
pub mod linux;
pub mod micro;
pub mod model;
pub mod progress;
pub mod table;

mod exact;
mod surroundings;
#[cfg(test)]
mod testing;

use std::fmt;

/// Why the benchmark stopped: a sentence for people and what it means for the exit status.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The command line or a file named there is wrong; status 2.
    #[error("{0}")]
    Usage(String),
    /// The host lacks something or failed; status 3.
    #[error("{0}")]
    Host(String),
}

impl Failure {
    /// Something about the command line.
    pub fn usage(sentence: impl fmt::Display) -> Self {
        Self::Usage(sentence.to_string())
    }

    /// Something about the host.
    pub fn host(sentence: impl fmt::Display) -> Self {
        Self::Host(sentence.to_string())
    }

    /// The exit status.
    pub fn status(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Host(_) => 3,
        }
    }
}

/// What everything here returns.
pub type Result<T> = std::result::Result<T, Failure>;
