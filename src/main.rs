//! The `gorego` binary.

fn main() -> std::process::ExitCode {
    // Before anything else: a runner stays small and single threaded.
    if std::env::args_os()
        .nth(1)
        .is_some_and(|argument| argument == gorego::actors::worker::RUNNER_SUBCOMMAND)
    {
        return u8::try_from(gorego::actors::worker::runner_main()).unwrap_or(1).into();
    }
    std::process::ExitCode::FAILURE
}
