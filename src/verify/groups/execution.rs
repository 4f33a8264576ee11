//! EXE: Execute and WaitExecution.

use super::Beyond;
use crate::verify::check::Check;

/// What this file checks.
pub const CHECKS: &[Check] = &[];

/// What cannot be checked over the wire.
pub const BEYOND: &[Beyond] = &[];
