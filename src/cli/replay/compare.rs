//! Compares the outcomes of two runs of one action. Pure, except for [`first_difference`], which reads two files.

use crate::cli::live::log_digest;
use gorego_client::Listing;
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::Result,
    proto::reapi,
};
use std::{
    collections::BTreeMap,
    fmt,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

/// Number of bytes of two files that are compared at once.
const PIECE_BYTES: usize = 64 * 1024;
/// Maximum length of shown lines in bytes.
const SHOWN_BYTES: usize = 160;

/// The compared parts of a run.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RunOutcome {
    pub exit_code: i32,
    pub stdout: Digest,
    pub stderr: Digest,
    /// All nodes in the outputs, by their path in the input root.
    pub entries: BTreeMap<String, ListedNode>,
}

/// One file, directory or symbolic link.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ListedNode {
    File { digest: Digest, executable: bool },
    Link(String),
    Directory,
}

/// A difference between two runs. The recorded value comes first, followed by the value of the local run.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum RunDifference {
    ExitCode(i32, i32),
    /// The log `stdout` or `stderr`, by the digests of both contents.
    Log(&'static str, Digest, Digest),
    /// The output at this path.
    Output(String, Option<ListedNode>, Option<ListedNode>),
}

/// The position of the first difference between two files.
#[derive(Debug, PartialEq)]
pub(super) enum FirstDifference {
    /// The first different line, counted from 1, if it is text in both files, with its text in each file.
    Line(u64, String, String),
    /// The first different byte, counted from 1.
    Byte(u64),
}

impl RunOutcome {
    /// The outcome in a result. `listing` has its outputs.
    pub(super) fn new(
        result: &reapi::ActionResult,
        function: DigestFunction,
        listing: &Listing,
    ) -> Result<Self> {
        let mut entries = BTreeMap::new();
        for directory in &listing.directories {
            entries.insert(directory.to_string(), ListedNode::Directory);
        }
        for file in &listing.files {
            let entry = ListedNode::File { digest: file.digest, executable: file.executable };
            entries.insert(file.path.to_string(), entry);
        }
        for (path, target) in &listing.symlinks {
            entries.insert(path.to_string(), ListedNode::Link(target.clone()));
        }
        Ok(Self {
            exit_code: result.exit_code,
            stdout: log_digest(function, &result.stdout_raw, result.stdout_digest.as_ref())?,
            stderr: log_digest(function, &result.stderr_raw, result.stderr_digest.as_ref())?,
            entries,
        })
    }
}

/// All differences between the local run and the recorded one.
pub(super) fn differences(recorded: &RunOutcome, here: &RunOutcome) -> Vec<RunDifference> {
    let mut found = Vec::new();
    if recorded.exit_code != here.exit_code {
        found.push(RunDifference::ExitCode(recorded.exit_code, here.exit_code));
    }
    for (name, recorded, here) in
        [("stdout", recorded.stdout, here.stdout), ("stderr", recorded.stderr, here.stderr)]
    {
        if recorded != here {
            found.push(RunDifference::Log(name, recorded, here));
        }
    }
    let mut paths: Vec<_> = recorded.entries.keys().chain(here.entries.keys()).collect();
    paths.sort_unstable();
    paths.dedup();
    for path in paths {
        let (before, now) = (recorded.entries.get(path), here.entries.get(path));
        if before != now {
            found.push(RunDifference::Output(path.clone(), before.cloned(), now.cloned()));
        }
    }
    found
}

impl fmt::Display for ListedNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { digest, executable } => {
                let kind = if *executable { "executable file" } else { "file" };
                write!(f, "{kind}, {}", size_and_digest(digest))
            }
            Self::Link(target) => write!(f, "symbolic link to {}", target.escape_debug()),
            Self::Directory => f.write_str("directory"),
        }
    }
}

/// The description of a log or file.
pub(super) fn size_and_digest(digest: &Digest) -> String {
    match digest.size() {
        0 => "empty".into(),
        1 => format!("1 byte, {digest}"),
        size => format!("{size} bytes, {digest}"),
    }
}

/// Finds the first difference between two files; `None` if they are equal.
pub(super) fn first_difference(recorded: &Path, here: &Path) -> io::Result<Option<FirstDifference>> {
    let (mut recorded, mut here) = (std::fs::File::open(recorded)?, std::fs::File::open(here)?);
    let (mut at, mut line, mut line_start) = (0u64, 1u64, 0u64);
    loop {
        let (before, now) = (piece(&mut recorded)?, piece(&mut here)?);
        let same = before.iter().zip(&now).take_while(|(one, other)| one == other).count();
        for (place, _) in before.iter().take(same).enumerate().filter(|(_, byte)| **byte == b'\n') {
            (line, line_start) = (line + 1, at + place as u64 + 1);
        }
        if same < before.len().max(now.len()) {
            let lines = (shown_line(&mut recorded, line_start)?, shown_line(&mut here, line_start)?);
            return Ok(Some(match lines {
                (Some(before), Some(now)) if before != now => FirstDifference::Line(line, before, now),
                _ => FirstDifference::Byte(at + same as u64 + 1),
            }));
        }
        if before.is_empty() {
            return Ok(None);
        }
        at += same as u64;
    }
}

/// The next bytes of a file, fewer only at its end.
fn piece(file: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(PIECE_BYTES);
    file.take(PIECE_BYTES as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The beginning of the line that starts at this offset; `None` if it is not text.
fn shown_line(file: &mut (impl Read + Seek), start: u64) -> io::Result<Option<String>> {
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(SHOWN_BYTES as u64).read_to_end(&mut bytes)?;
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let text = String::from_utf8_lossy(line).into_owned();
    let is_text = !text.contains(|c: char| (c.is_control() && c != '\t') || c == char::REPLACEMENT_CHARACTER);
    Ok(is_text.then_some(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const SHA256: DigestFunction = DigestFunction::Sha256;

    fn outcome(exit_code: i32, entries: &[(&str, ListedNode)]) -> RunOutcome {
        let entries = entries.iter().map(|(path, entry)| ((*path).to_owned(), entry.clone())).collect();
        let empty = Digest::empty(SHA256);
        RunOutcome { exit_code, stdout: empty, stderr: empty, entries }
    }

    fn file(content: &str, executable: bool) -> ListedNode {
        ListedNode::File { digest: SHA256.digest(content.as_bytes()), executable }
    }

    #[test]
    fn each_difference_is_reported_once_and_nothing_else() {
        let before = outcome(
            0,
            &[
                ("a", file("a", false)),
                ("b", file("b", false)),
                ("c", file("c", false)),
                ("gone", ListedNode::Directory),
                ("l", ListedNode::Link("x".into())),
            ],
        );
        assert!(differences(&before, &before).is_empty());
        let mut now = outcome(
            1,
            &[
                ("a", file("a", false)),
                ("b", file("b2", false)),
                ("c", file("c", true)),
                ("l", ListedNode::Link("y".into())),
                ("new", ListedNode::Directory),
            ],
        );
        now.stderr = SHA256.digest(b"oh");
        let found = differences(&before, &now);
        let names: Vec<String> = found
            .iter()
            .map(|difference| match difference {
                RunDifference::ExitCode(before, now) => format!("{before}>{now}"),
                RunDifference::Log(name, ..) => (*name).to_owned(),
                RunDifference::Output(path, before, now) => {
                    format!("{path}{}{}", u8::from(before.is_some()), u8::from(now.is_some()))
                }
            })
            .collect();
        assert_eq!(names, ["0>1", "stderr", "b11", "c11", "gone10", "l11", "new01"]);
    }

    #[test]
    fn two_texts_differ_in_a_line_and_other_files_at_a_byte() {
        let directory = tempfile::tempdir().unwrap();
        let spot = |before: &[u8], now: &[u8]| {
            let (one, other) = (directory.path().join("1"), directory.path().join("2"));
            fs::write(&one, before).unwrap();
            fs::write(&other, now).unwrap();
            first_difference(&one, &other).unwrap()
        };
        assert_eq!(spot(b"", b""), None);
        assert_eq!(spot(b"a\nb\nc", b"a\nb\nc"), None);
        assert_eq!(spot(b"a\nb1\nc", b"a\nb2\nc"), Some(FirstDifference::Line(2, "b1".into(), "b2".into())));
        assert_eq!(spot(b"", b"x\n"), Some(FirstDifference::Line(1, "".into(), "x".into())));
        assert_eq!(spot(b"a", b"a\n"), Some(FirstDifference::Byte(2)));
        assert_eq!(spot(b"\x7fELF\0a", b"\x7fELF\0b"), Some(FirstDifference::Byte(6)));
        let long = [vec![b'\n'; PIECE_BYTES - 1], b"same\none".to_vec()].concat();
        let other = [vec![b'\n'; PIECE_BYTES - 1], b"same\nother".to_vec()].concat();
        let line = PIECE_BYTES as u64 + 1;
        assert_eq!(spot(&long, &other), Some(FirstDifference::Line(line, "one".into(), "other".into())));
        assert_eq!(
            spot(&[b'x'; 1000], &[[b'x'; 999], [b'y'; 999]].concat()[..1000]),
            Some(FirstDifference::Byte(1000))
        );
    }
}
