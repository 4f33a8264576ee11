//! Reads and writes the files of a group. Each is a short text that is read and written as a whole.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::Path,
};

/// Maximum length of the text of a file that is kept open.
const MAX_TEXT: usize = 4096;

/// Writes a value into a file of the group, which must exist.
pub(super) fn write(directory: &Path, name: &str, value: impl ToString) -> io::Result<()> {
    // Opening must not create a file, because a group has a fixed set of files.
    File::options()
        .write(true)
        .open(directory.join(name))
        .and_then(|file| file.write_all_at(value.to_string().as_bytes(), 0))
}

/// Reads a number from a file; `None` if the file is missing or has another text, such as `max`.
pub(super) fn number(directory: &Path, name: &str) -> Option<u64> {
    fs::read_to_string(directory.join(name)).ok()?.trim().parse().ok()
}

/// The number after a word at the start of a line, as in `oom_kill 3`.
pub(super) fn field(text: &str, word: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(name, _)| *name == word)?.1.trim().parse().ok()
}

/// The current text of a file that is kept open.
pub(super) fn text(file: &File) -> io::Result<String> {
    let mut bytes = [0; MAX_TEXT];
    let length = file.read_at(&mut bytes, 0)?;
    Ok(String::from_utf8_lossy(bytes.get(..length).unwrap_or_default()).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "oom 1\noom_kill 3\noom_group_kill 5\n";
        assert_eq!(
            (field(text, "oom_kill"), field(text, "oom"), field(text, "kill")),
            (Some(3), Some(1), None)
        );
    }
}
