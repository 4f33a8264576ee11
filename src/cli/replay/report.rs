//! The messages of `gorego replay`: the action and the sandbox at the beginning, and the differences at the end.

use super::{
    Conclusion, EXIT_DIFFERS, EXIT_TROUBLE,
    compare::{
        FirstDifference, ListedNode, RunDifference, RunOutcome, differences, first_difference,
        size_and_digest,
    },
    fetch::{FetchedAction, Recorded},
    run::{LocalRun, ReplayPlace},
    scratch::Scratch,
};
use crate::{
    action::Action,
    cli::{EXIT_OK, progress::ProgressLine},
    platform::wanted_image,
};
use gorego_client::{Listing, Progress, blocking, decode_tree};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    escape::escaped,
    path::RootPath,
    proto::reapi,
};
use std::{
    collections::{HashMap, HashSet},
    fmt::Write as _,
    fs,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

/// Maximum number of differing outputs that are described.
const DESCRIBED: usize = 50;
/// Maximum number of characters of a command line that are shown, unless the user may want to paste it.
const COMMAND_CHARS: usize = 400;
/// Maximum size of a recorded file that is downloaded to show its first difference.
const DOWNLOADED_BYTES: u64 = 64 * 1024 * 1024;
/// Number of lines that are shown from the end of the standard error of a command that failed in the local run.
const LAST_LINES: usize = 10;
/// Number of bytes that are read from the end for that.
const TAIL_BYTES: u64 = 16 * 1024;
/// The directory of recorded outputs, next to the recorded logs.
const OUTPUTS: &str = "outputs";

/// Prints to standard error what is about to be run, and in which sandbox.
pub(super) fn introduce(fetched: &FetchedAction, stage: &ReplayPlace, shell: bool) {
    let action = &fetched.action;
    let mut text = format!("action   {}\n", action.digest);
    let command = command_line(&action.command.arguments);
    let (shown, cut) = match command.char_indices().nth(COMMAND_CHARS) {
        Some((end, _)) if !shell => (command.get(..end).unwrap_or(&command), " ..."),
        _ => (&*command, ""),
    };
    // Writing to a String cannot fail.
    let _ = writeln!(text, "command  {shown}{cut}");
    if !action.command.working_directory.is_root() {
        let _ = writeln!(text, "in       {}", escaped(action.command.working_directory.as_str()));
    }
    if !action.platform.is_empty() {
        let properties = action.platform.iter().map(|(name, value)| format!("{name}={value}"));
        let properties = properties.collect::<Vec<_>>().join(", ");
        let _ = writeln!(text, "platform {}", escaped(&properties));
    }
    match &*stage.protections() {
        [] => {
            text.push_str("sandbox  none: the action sees this machine and can change what you can change\n")
        }
        on => {
            let _ = writeln!(text, "sandbox  {}", on.join(", "));
            let _ = writeln!(text, "         {}", escaped(&origin_of_programs(action, stage)));
        }
    }
    for missing in stage.missing() {
        let _ = writeln!(text, "         {missing}");
    }
    let _ = writeln!(text, "limits   {}", stage.limits());
    if shell {
        text.push_str(
            "The shell is where the command would run, with its environment. Leave it with exit.\n",
        );
    }
    let _ = io::stderr().write_all(text.as_bytes());
}

/// The origin of the programs and libraries of the action.
fn origin_of_programs(action: &Action, stage: &ReplayPlace) -> String {
    match wanted_image(&action.platform) {
        Ok(Some(name)) if stage.has_images() => {
            format!("programs and libraries come from the image {name}")
        }
        Ok(Some(name)) => format!(
            "programs and libraries come from this machine, not from the image {name}: the configuration has no \
             [execution.images]"
        ),
        Ok(None) | Err(_) => "programs and libraries come from this machine".into(),
    }
}

/// The arguments in the notation of a shell.
fn command_line(arguments: &[String]) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-+=./,:@%".contains(c);
    let quote = |argument: &String| {
        if !argument.is_empty() && argument.chars().all(is_plain) {
            argument.clone()
        } else if argument.contains(char::is_control) {
            format!("$'{}'", escaped(&argument.replace('\\', "\\\\").replace('\'', "\\'")))
        } else {
            format!("'{}'", argument.replace('\'', "'\\''"))
        }
    };
    arguments.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// Compares the outcome with the recorded one.
///
/// # Errors
/// The errors of the server from which recorded outputs are read.
pub(super) async fn conclude(
    fetched: &FetchedAction,
    here: &LocalRun,
    scratch: &Scratch,
    keep: bool,
    line: &ProgressLine,
) -> Result<Conclusion> {
    let result = match &here.outcome {
        Ok(result) => result,
        Err(error) => {
            let code = if fetched.recorded.is_ok() { EXIT_DIFFERS } else { EXIT_TROUBLE };
            let text = format!("{}different: the action failed here: {error}\n", last_lines(scratch));
            return Ok((text, code));
        }
    };
    let base = &fetched.action.command.working_directory;
    let function = fetched.client.digest_function();
    let found = RunOutcome::new(result, function, &own_listing(result, &here.trees, function, base)?)?;
    let recorded = match &fetched.recorded {
        Ok(recorded) => recorded,
        Err(why) => {
            let _ = writeln!(io::stderr(), "gorego: there is nothing to compare with: {why}");
            return Ok((describe(&found, scratch), EXIT_TROUBLE));
        }
    };
    line.say("comparing");
    let listing = fetched.client.listing(&recorded.result, base).await?;
    let expected = RunOutcome::new(&recorded.result, function, &listing)?;
    let differences = differences(&expected, &found);
    let outputs = expected.entries.len().max(found.entries.len());
    if differences.is_empty() {
        let text = format!(
            "same as {}: exit code {}, stdout, stderr, {}\n",
            recorded.source,
            found.exit_code,
            count(outputs, "output")
        );
        return Ok((text, EXIT_OK));
    }
    download(fetched, recorded, &listing, &differences, scratch, line).await?;
    let mut text = String::new();
    for difference in differences.iter().take(DESCRIBED) {
        tell(&mut text, difference, scratch);
    }
    if differences.len() > DESCRIBED {
        let _ = writeln!(text, "and {} more", differences.len() - DESCRIBED);
    }
    if found.exit_code != expected.exit_code && found.exit_code != 0 {
        text.push_str(&last_lines(scratch));
    }
    let _ = writeln!(text, "different from {}: {}", recorded.source, summary(&differences, outputs));
    if !keep {
        let _ = writeln!(
            io::stderr(),
            "gorego: with --keep, both sides stay on disk; with --shell, you can look around in the sandbox"
        );
    }
    Ok((text, EXIT_DIFFERS))
}

/// Lists the outputs of the local run.
fn own_listing(
    result: &reapi::ActionResult,
    trees: &HashMap<Digest, Vec<u8>>,
    function: DigestFunction,
    base: &RootPath,
) -> Result<Listing> {
    let mut listing = Listing::new(result, function, base)?;
    for output in &result.output_directories {
        let digest = Digest::from_wire(function, output.tree_digest.as_ref(), "tree_digest")?;
        let bytes = trees.get(&digest).ok_or_else(|| Error::internal("an output directory has no Tree"))?;
        listing.add_directory(&output.path, base, &decode_tree(bytes, function)?)?;
    }
    Ok(listing)
}

/// Downloads the recorded side of files that differ. Files that cannot be downloaded are left out, because the digests
/// show the difference.
async fn download(
    fetched: &FetchedAction,
    recorded: &Recorded,
    listing: &Listing,
    differences: &[RunDifference],
    scratch: &Scratch,
    line: &ProgressLine,
) -> Result<()> {
    let differing: HashSet<&str> = differences.iter().filter_map(differing_output).collect();
    let mut wanted = Listing::default();
    let files = listing.files.iter().filter(|file| differing.contains(file.path.as_str()));
    wanted.files = files.filter(|file| file.digest.size() <= DOWNLOADED_BYTES).cloned().collect();
    let (client, progress) = (&fetched.client, Arc::new(Progress::default()));
    let directory = scratch.recorded();
    if !wanted.files.is_empty() {
        let digests = wanted.files.iter().map(|file| file.digest);
        let missing: HashSet<_> = client.find_missing(digests).await?.into_iter().collect();
        wanted.files.retain(|file| !missing.contains(&file.digest));
        let outputs = directory.join(OUTPUTS);
        line.during("downloading", &progress, client.download_listing(wanted, &outputs, &progress)).await?;
    }
    for difference in differences {
        let RunDifference::Log(name, digest, _) = difference else { continue };
        let raw = match *name {
            "stdout" => &recorded.result.stdout_raw,
            _ => &recorded.result.stderr_raw,
        };
        let bytes = match digest.size() {
            0 => Vec::new(),
            _ if !raw.is_empty() => raw.to_vec(),
            _ => match client.read_bytes(*digest, DOWNLOADED_BYTES, &progress).await {
                Ok(bytes) => bytes,
                Err(_) => continue,
            },
        };
        let path = directory.join(name);
        blocking(move || {
            let written = fs::create_dir_all(directory_of(&path)).and_then(|()| fs::write(&path, bytes));
            written.map_err(|error| Error::io("keep a recorded log", &error))
        })
        .await?;
    }
    Ok(())
}

fn directory_of(path: &Path) -> PathBuf {
    path.parent().unwrap_or(path).to_owned()
}

/// The path of an output that is a file on both sides with different content.
fn differing_output(difference: &RunDifference) -> Option<&str> {
    match difference {
        RunDifference::Output(path, Some(ListedNode::File { digest: before, .. }), now) => match now {
            Some(ListedNode::File { digest: now, .. }) if now == before => None,
            _ => Some(path),
        },
        _ => None,
    }
}

fn tell(text: &mut String, difference: &RunDifference, scratch: &Scratch) {
    let recorded = scratch.recorded();
    // Writing to a String cannot fail.
    let _ = match difference {
        RunDifference::ExitCode(before, now) => {
            writeln!(text, "exit code\n  recorded  {before}\n  here      {now}")
        }
        RunDifference::Log(name, before, now) => {
            let (before, now) = (size_and_digest(before), size_and_digest(now));
            let _ = writeln!(text, "{name}\n  recorded  {before}\n  here      {now}");
            describe_first_difference(text, &recorded.join(name), &scratch.path().join(name));
            Ok(())
        }
        RunDifference::Output(path, before, now) => {
            let path = RootPath::root().join(path).unwrap_or_default();
            let side = |entry: &Option<ListedNode>| match entry {
                Some(entry) => entry.to_string(),
                None => "nothing".into(),
            };
            let (before, now) = (side(before), side(now));
            let _ = writeln!(text, "{}\n  recorded  {before}\n  here      {now}", escaped(path.as_str()));
            describe_first_difference(
                text,
                &recorded.join(OUTPUTS).join(path.as_path()),
                &scratch.root().join(path.as_path()),
            );
            Ok(())
        }
    };
}

/// Describes the first difference between two files, if both exist.
fn describe_first_difference(text: &mut String, recorded: &Path, here: &Path) {
    let is_file = |path: &Path| path.symlink_metadata().is_ok_and(|metadata| metadata.is_file());
    if !is_file(recorded) || !is_file(here) {
        return;
    }
    let _ = match first_difference(recorded, here) {
        Ok(Some(FirstDifference::Line(number, before, now))) => {
            writeln!(text, "  from line {number} on:\n    recorded  {before}\n    here      {now}")
        }
        Ok(Some(FirstDifference::Byte(number))) => writeln!(text, "  from byte {number} on"),
        Ok(None) | Err(_) => Ok(()),
    };
}

/// A short description of the differences.
fn summary(differences: &[RunDifference], outputs: usize) -> String {
    let mut parts = Vec::new();
    let mut differing = 0;
    for difference in differences {
        match difference {
            RunDifference::ExitCode(..) => parts.push("exit code".to_owned()),
            RunDifference::Log(name, ..) => parts.push((*name).to_owned()),
            RunDifference::Output(..) => differing += 1,
        }
    }
    if differing > 0 {
        parts.push(format!("{differing} of {}", count(outputs.max(differing), "output")));
    }
    parts.join(", ")
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// Describes the outcome of the local run, if there is nothing to compare it with.
fn describe(found: &RunOutcome, scratch: &Scratch) -> String {
    let mut text = format!(
        "exit code  {}\nstdout     {}\nstderr     {}\n",
        found.exit_code,
        size_and_digest(&found.stdout),
        size_and_digest(&found.stderr)
    );
    for (path, entry) in found.entries.iter().take(DESCRIBED) {
        let _ = writeln!(text, "{}: {entry}", escaped(path));
    }
    if found.entries.len() > DESCRIBED {
        let _ = writeln!(text, "and {} more", count(found.entries.len() - DESCRIBED, "output"));
    }
    if found.exit_code != 0 {
        text.push_str(&last_lines(scratch));
    }
    text
}

/// The last lines that the command of the local run printed to standard error.
fn last_lines(scratch: &Scratch) -> String {
    let tail = || -> io::Result<Vec<u8>> {
        let mut file = fs::File::open(scratch.stderr())?;
        let end = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(end.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = tail().unwrap_or_default();
    let printed = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = printed.lines().collect();
    let mut text = String::new();
    let last = lines.get(lines.len().saturating_sub(LAST_LINES)..).unwrap_or_default();
    if !last.is_empty() {
        text.push_str("stderr here ends with\n");
    }
    for line in last {
        let _ = writeln!(text, "  {}", escaped(line));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_can_be_pasted_into_a_shell() {
        let arguments = ["gcc", "-DX=\"a b\"", "it's", "", "a$b", "two\nlines", "x\\y\n'"];
        let line = command_line(&arguments.map(str::to_owned));
        let printed =
            std::process::Command::new("bash").arg("-c").arg(format!("printf '%s|' {line}")).output();
        assert_eq!(
            String::from_utf8(printed.unwrap().stdout).unwrap(),
            arguments.map(|a| format!("{a}|")).concat()
        );
    }
}
