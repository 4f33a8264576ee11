//! Rules for each file: its start, its length, and the targets of its links.

use crate::{ids, tree::Source};
use std::collections::BTreeSet;

/// Most lines in a file of the product.
const LINES: usize = 600;
/// Most lines in a file of tests.
const TEST_LINES: usize = 1_000;

/// Most characters in a line of a comment. Code is formatted by rustfmt.
const COMMENT_COLUMNS: usize = 120;

/// Fewest words of the documentation of an item.
const DOCUMENTATION_WORDS: usize = 4;

/// Files that may be longer, each with the reason. Empty today.
pub(crate) const LONGER: &[(&str, &str)] = &[];

/// Rust files that do not start with `//!`.
pub(crate) fn silent(files: &[Source]) -> Vec<String> {
    let silent = files.iter().filter(|file| file.is_rust() && !file.text.starts_with("//!"));
    silent
        .map(|file| format!("{} does not begin with `//!`: say what it is and what it owns", file.path))
        .collect()
}

/// Rust files that are too long, and exceptions that are not needed.
pub(crate) fn long(files: &[Source], exceptions: &[(&str, &str)]) -> Vec<String> {
    let too_long = |file: &Source| {
        let limit = if file.is_test() { TEST_LINES } else { LINES };
        file.is_rust() && file.text.lines().count() > limit
    };
    let excepted = |path: &str| exceptions.iter().any(|(except, _)| *except == path);
    let long = files.iter().filter(|file| too_long(file) && !excepted(&file.path));
    let long = long.map(|file| format!("{} has {} lines: split it", file.path, file.text.lines().count()));
    let is_stale = |path: &str| !files.iter().any(|file| file.path == path && too_long(file));
    let stale = exceptions.iter().filter(|(path, _)| is_stale(path));
    long.chain(stale.map(|(path, _)| format!("{path} is no exception any more: take it off the list")))
        .collect()
}

/// Lines of comments that are too wide. Tables in code blocks may be wider.
pub(crate) fn wide(files: &[Source]) -> Vec<String> {
    let mut wide = Vec::new();
    for file in files.iter().filter(|file| file.is_rust()) {
        let mut is_block = false;
        for (at, line) in file.text.lines().enumerate() {
            let Some(comment) = line.trim_start().strip_prefix("//") else {
                is_block = false;
                continue;
            };
            is_block ^= comment.trim_start_matches(['/', '!', ' ']).starts_with("```");
            if !is_block && line.chars().count() > COMMENT_COLUMNS {
                wide.push(format!("{}:{} is wider than {COMMENT_COLUMNS} columns", file.path, at + 1));
            }
        }
    }
    wide
}

/// Documentation of items of the product that has too few words to say more than the name. It may consist of ids of
/// rules, or lead to other documentation. That of the command line is the text of its help.
pub(crate) fn terse(files: &[Source]) -> Vec<String> {
    let is_product = |file: &&Source| {
        let is_home = file.path.starts_with("src/")
            || (file.path.starts_with("crates/") && file.path.split('/').nth(2) == Some("src"));
        file.is_rust() && is_home && !file.is_test() && !file.lies_in(&["src/cli"])
    };
    let mut terse = Vec::new();
    for file in files.iter().filter(is_product) {
        let product = file.product();
        let mut lines = product.lines().enumerate().peekable();
        while let Some((at, line)) = lines.next() {
            let Some(first) = documentation(line) else { continue };
            let mut text = first.to_owned();
            while let Some((_, line)) = lines.next_if(|(_, line)| documentation(line).is_some()) {
                text.push(' ');
                text.push_str(documentation(line).unwrap_or_default());
            }
            let words: Vec<_> = text.split_whitespace().collect();
            let is_citation =
                words.iter().all(|word| !ids::cited(word).is_empty() || matches!(*word, "and" | "to"));
            let is_lead = matches!(*words, ["See" | "Implements", link] if link.starts_with("[`"));
            if words.len() < DOCUMENTATION_WORDS && !is_citation && !is_lead {
                let text = words.join(" ");
                terse.push(format!(
                    "{}:{} says only {text:?}: say more than the name, or nothing",
                    file.path,
                    at + 1
                ));
            }
        }
    }
    terse
}

/// The text of a line of documentation of an item.
fn documentation(line: &str) -> Option<&str> {
    line.trim_start().strip_prefix("///").filter(|text| !text.starts_with('/'))
}

/// Links in documents whose targets do not exist in the repository.
pub(crate) fn dead_links(files: &[Source]) -> Vec<String> {
    let documents = files.iter().filter(|file| file.path.ends_with(".md"));
    documents
        .flat_map(|document| {
            let links = document.text.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0));
            let dead = links.filter(|link| !leads_somewhere(files, &document.path, link));
            dead.map(|link| format!("{} links to {link}, which does not exist", document.path))
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Paths in backquotes in documents, such as `src/grpc.rs`, that do not exist in the repository.
pub(crate) fn dead_paths(files: &[Source]) -> Vec<String> {
    let tops: BTreeSet<_> = files.iter().filter_map(|file| Some(file.path.split_once('/')?.0)).collect();
    let is_path = |text: &str| {
        let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || "_-./".contains(c));
        plain && text.split_once('/').is_some_and(|(top, _)| tops.contains(top))
    };
    let exists = |path: &str| {
        let inside = format!("{}/", path.trim_end_matches('/'));
        files.iter().any(|file| file.path == path || file.path.starts_with(&inside))
    };
    let documents = files.iter().filter(|file| file.path.ends_with(".md"));
    documents
        .flat_map(|document| {
            let quoted = document.text.split('`').skip(1).step_by(2);
            let dead = quoted.filter(|text| is_path(text) && !exists(text));
            dead.map(|path| format!("{} names {path}, which does not exist", document.path))
                .collect::<Vec<_>>()
        })
        .collect()
}

/// The document that quotes messages of the program in its headings.
pub(crate) const MESSAGES: &str = "docs/troubleshooting.md";

/// Messages in the headings of a document that no file of the product contains. `...` in a heading stands for what
/// differs.
pub(crate) fn dead_messages(files: &[Source], document: &str) -> Vec<String> {
    let product = files.iter().filter(|file| file.is_rust() && !file.is_test());
    let texts: Vec<_> = product.map(|file| joined_lines(&file.text)).collect();
    let headings = document.lines().filter_map(|line| line.strip_prefix("### `"));
    let quoted = headings.filter_map(|heading| Some(heading.split_once('`')?.0));
    let parts = quoted.flat_map(|message| message.split("...")).map(|part| part.trim_matches(['"', ' ']));
    let is_dead = |part: &&str| !part.is_empty() && !texts.iter().any(|text| text.contains(part));
    parts.filter(is_dead).map(|part| format!("no message of the program contains: {part}")).collect()
}

/// A source text in which strings that go on in the next line are one line, without their escapes.
fn joined_lines(text: &str) -> String {
    let mut joined = String::with_capacity(text.len());
    let mut is_continued = false;
    for line in text.lines() {
        let line = if is_continued { line.trim_start() } else { line };
        is_continued = line.ends_with('\\');
        joined.push_str(line.strip_suffix('\\').unwrap_or(line));
        if !is_continued {
            joined.push('\n');
        }
    }
    joined.replace("\\\"", "\"")
}

fn leads_somewhere(files: &[Source], document: &str, link: &str) -> bool {
    let path = link.split('#').next().unwrap_or_default();
    if path.is_empty() || path.contains("://") || path.contains(char::is_whitespace) {
        return true;
    }
    let mut segments: Vec<_> = document.split('/').collect();
    segments.pop();
    for segment in path.trim_end_matches('/').split('/') {
        match segment {
            "." => {}
            ".." => _ = segments.pop(),
            name => segments.push(name),
        }
    }
    let (wanted, inside) = (segments.join("/"), format!("{}/", segments.join("/")));
    files.iter().any(|file| file.path == wanted || file.path.starts_with(&inside))
}

#[test]
fn a_file_that_does_not_say_what_it_is_is_found() {
    let files =
        [Source::new("src/a.rs", "use b;"), Source::new("src/b.rs", "//! B."), Source::new("x.md", "x")];
    assert_eq!(silent(&files).len(), 1);
}

#[test]
fn a_long_file_is_found_unless_it_is_an_exception() {
    let lines = |path: &str, count: usize| Source::new(path, &"x\n".repeat(count));
    assert!(long(&[lines("src/a.rs", LINES), lines("tests/a.rs", TEST_LINES)], &[]).is_empty());
    assert_eq!(long(&[lines("src/a.rs", LINES + 1), lines("src/a/tests.rs", TEST_LINES + 1)], &[]).len(), 2);
    assert!(long(&[lines("src/a.rs", LINES + 1)], &[("src/a.rs", "a table")]).is_empty());
    assert_eq!(long(&[lines("src/a.rs", LINES)], &[("src/a.rs", "a table")]).len(), 1);
}

#[test]
fn a_wide_comment_is_found_outside_of_code_blocks() {
    let at = |start: &str, width: usize| format!("{start}{}\n", "x".repeat(width - start.len()));
    let of = |text: &str| wide(&[Source::new("src/a.rs", text)]);
    assert_eq!(of(&at("    // ", COMMENT_COLUMNS + 1)), ["src/a.rs:1 is wider than 120 columns"]);
    assert_eq!(of(&format!("/// a\n{}", at("/// ", COMMENT_COLUMNS + 1))).len(), 1);
    assert!(of(&(at("//! ", COMMENT_COLUMNS) + &at("let a = ", 200))).is_empty());
    assert!(of(&format!("/// ```text\n{}/// ```\n", at("/// ", 200))).is_empty());
}

#[test]
fn documentation_of_a_few_words_is_found() {
    let found = |path: &str, text: &str| terse(&[Source::new(path, text)]);
    for text in ["/// The size.", "    /// The last\n    /// use.", "///\n/// Bytes.", "/// EXE-31: sizes."] {
        assert_eq!(found("src/a.rs", &format!("{text}\nsize: u64,")).len(), 1, "{text}");
        assert_eq!(found("crates/a/src/a.rs", &format!("{text}\nsize: u64,")).len(), 1, "{text}");
        assert_eq!(found("tests/a.rs", &format!("{text}\nsize: u64,")).len(), 0, "{text}");
        assert_eq!(
            found("src/a.rs", &format!("#[cfg(test)]\nmod tests {{\n{text}\nfn x() {{}}\n}}")).len(),
            0
        );
    }
    assert_eq!(found("src/a.rs", "fn f() {}\n/// The size.\na")[0].split(' ').next(), Some("src/a.rs:2"));
    for text in [
        "/// Its size in bytes.",
        "/// The size,\n/// in bytes.",
        "/// EXE-31.",
        "/// EXE-55 to EXE-57.",
        "// The size.",
    ] {
        assert_eq!(found("src/a.rs", &format!("{text}\nsize: u64,")), [""; 0]);
    }
}

#[test]
fn a_dead_link_is_found() {
    let link = |text: &str| [Source::new("docs/a.md", text), Source::new("src/b.rs", "")];
    assert!(dead_links(&link("[b](../src/b.rs) [s](../src/) [c](#c) [d](https://d) f[x](y z)")).is_empty());
    assert_eq!(dead_links(&link("[b](../src/c.rs#x) [b](src/b.rs)")).len(), 2);
}

#[test]
fn a_dead_path_is_found() {
    let named = |text: &str| [Source::new("docs/a.md", text), Source::new("src/b/c.rs", "")];
    assert!(
        dead_paths(&named("`src/b/c.rs` `src/b/` `docs` `blobs/x` `src/*.rs`\n```\nsrc/gone.rs\n```\n"))
            .is_empty()
    );
    assert_eq!(dead_paths(&named("```sh\nx\n```\n`src/b.rs` and `src/gone/`")).len(), 2);
}

#[test]
fn a_heading_with_a_message_that_the_program_does_not_have_is_found() {
    let files = [Source::new("src/a.rs", "format!(\"no \\\"{x}\\\" is \\\n     here\")")];
    assert!(dead_messages(&files, "### `no \"...\" is here` or so\n## `gone`\n### Slow").is_empty());
    assert_eq!(dead_messages(&files, "### `no ... was here`").len(), 1);
}
