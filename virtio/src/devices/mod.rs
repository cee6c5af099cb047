//! The devices.

pub mod balloon;
pub mod block;
pub mod console;
pub mod entropy;
pub mod fs;
pub mod net;
pub mod vsock;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, whatever happened to a thread that held the lock before: device state is plain data and stays usable.
pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}
