//! The binary-translation engine: runs guest code of every privilege level in user space, without /dev/kvm.
pub mod stub;
pub use stub::*;
