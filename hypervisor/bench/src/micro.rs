//! The micro suite: single operations in a bare-metal guest, on each side.

use crate::Result;
use crate::model::{Plan, Row};
use crate::progress::Progress;

/// Measures what the plan asks for and returns its rows, by group.
///
/// # Errors
/// The guest is missing, or a program cannot be started.
pub fn run(_plan: &Plan, _progress: &mut dyn Progress) -> Result<Vec<Row>> {
    Ok(Vec::new())
}
