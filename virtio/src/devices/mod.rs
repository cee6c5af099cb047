//! The devices.

pub mod entropy;
