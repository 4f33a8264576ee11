//! `gorego completions`: a script that completes the command line in a shell.

use super::{Cli, EXIT_FAILURE, EXIT_OK, complain, output::print};
use clap::CommandFactory as _;
use clap_complete::{Shell, generate};

/// Prints the script and returns the exit code.
pub(super) fn run(shell: Shell) -> u8 {
    match print(&script(shell)) {
        Ok(()) => EXIT_OK,
        Err(error) => {
            complain(&error);
            EXIT_FAILURE
        }
    }
}

fn script(shell: Shell) -> String {
    let mut text = Vec::new();
    generate(shell, &mut Cli::command(), "gorego", &mut text);
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::Write as _,
        process::{Command, Stdio},
    };

    /// Runs a shell with this text as its input; `None` if the shell is not installed.
    fn read_by(shell: &[&str], text: &str) -> Option<std::process::Output> {
        let mut command = Command::new(shell[0]);
        command.args(&shell[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let Ok(mut child) = command.spawn() else {
            eprintln!("not tried: {} is not installed", shell[0]);
            return None;
        };
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        Some(child.wait_with_output().unwrap())
    }

    #[test]
    fn each_shell_can_read_its_script() {
        for (shell, check) in [
            (Shell::Bash, &["bash", "-n"][..]),
            (Shell::Zsh, &["zsh", "-n"]),
            (Shell::Fish, &["fish", "--no-execute"]),
        ] {
            let text = script(shell);
            assert!(text.contains("completions") && text.contains("endpoint"), "{text}");
            if let Some(output) = read_by(check, &text) {
                assert!(output.status.success() && output.stderr.is_empty(), "{shell}: {output:?}");
            }
        }
    }

    #[test]
    fn bash_completes_subcommands_and_flags_and_not_what_is_hidden() {
        let completed = |words: &str, at: usize, word: &str| {
            let ask = format!(
                "COMP_WORDS=({words})\nCOMP_CWORD={at}\n_gorego gorego '{word}' ''\nprintf '%s\\n' \"${{COMPREPLY[@]}}\"\n"
            );
            let output = read_by(&["bash", "--norc"], &format!("{}\n{ask}", script(Shell::Bash))).unwrap();
            String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(completed("gorego exec --end", 2, "--end"), ["--endpoint"]);
        assert_eq!(completed("gorego comp", 1, "comp"), ["completions"]);
        let all = completed("gorego ''", 1, "");
        assert!(all.contains(&"replay".to_owned()) && !all.contains(&"runner".to_owned()), "{all:?}");
    }
}
