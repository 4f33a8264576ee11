//! The binary `gorego`. All code is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    gorego::cli::main()
}
