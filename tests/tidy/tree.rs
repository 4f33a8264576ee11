//! The files of the repository, and their Rust code without comments, strings and tests.

use std::{fs, path::Path};

/// Files and directories that are not part of the source.
const SKIPPED: &[&str] = &[".git", "target", "artifacts", "corpus", "node_modules"];

/// One text file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    /// Path relative to the root of the repository, with slashes.
    pub(crate) path: String,
    pub(crate) text: String,
}

impl Source {
    /// Creates a file with this content.
    pub(crate) fn new(path: &str, text: &str) -> Self {
        Self { path: path.into(), text: text.into() }
    }

    /// Whether it is Rust code.
    pub(crate) fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Whether it is in one of these places: `src/grpc` is `src/grpc.rs` and everything below `src/grpc/`.
    pub(crate) fn lies_in(&self, places: &[&str]) -> bool {
        places.iter().any(|place| {
            self.path
                .strip_prefix(place)
                .is_some_and(|rest| matches!(rest, "" | ".rs") || rest.starts_with('/'))
        })
    }

    /// Whether it contains only test code.
    pub(crate) fn is_test(&self) -> bool {
        let in_tests = self.path.starts_with("tests/") || self.path.contains("/tests/");
        let name = self.path.rsplit('/').next().unwrap_or_default();
        in_tests
            || matches!(name, "tests.rs" | "fixtures.rs" | "simulation.rs" | "model.rs")
            || self.lies_in(&["benches", "fuzz"])
            || self.path.contains("/simulation/")
    }

    /// The part that is compiled into the product, with comments.
    pub(crate) fn product(&self) -> String {
        if self.is_test() { String::new() } else { split(&self.text).0 }
    }

    /// The part that is compiled only for tests, with comments.
    pub(crate) fn tests(&self) -> String {
        if self.is_test() { self.text.clone() } else { split(&self.text).1 }
    }

    /// [`Self::product`], without comments and the contents of strings.
    pub(crate) fn code(&self) -> String {
        code(&self.product())
    }
}

/// Splits formatted Rust code into the product, and the items, fields and statements below `#[cfg(test)]`.
fn split(text: &str) -> (String, String) {
    let (mut product, mut tests) = (String::new(), String::new());
    let mut lines = text.split_inclusive('\n').peekable();
    while let Some(line) = lines.next() {
        if line.trim_end().trim_start() != "#[cfg(test)]" {
            product.push_str(line);
            continue;
        }
        let indent = line.len() - line.trim_start().len();
        let mut is_first = true;
        for line in lines.by_ref() {
            tests.push_str(line);
            let words = line.trim();
            let is_there = line.len() - line.trim_start().len() == indent;
            if !is_there || (is_first && (words.starts_with("#[") || words.starts_with("//"))) {
                continue;
            }
            let ends = words.ends_with([';', ',', '}']) && (is_first || words.starts_with([')', ']', '}']));
            is_first = false;
            if ends {
                break;
            }
        }
    }
    (product, tests)
}

/// All text files of the source below `root`, ordered by path.
pub(crate) fn read(root: &Path) -> Vec<Source> {
    let mut found = Vec::new();
    collect(root, "", &mut found);
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn collect(root: &Path, below: &str, found: &mut Vec<Source>) {
    let entries = fs::read_dir(root.join(below)).unwrap_or_else(|e| panic!("{below}: {e}"));
    for entry in entries {
        let entry = entry.unwrap_or_else(|e| panic!("{below}: {e}"));
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if below.is_empty() { name.clone() } else { format!("{below}/{name}") };
        let kind = entry.file_type().unwrap_or_else(|e| panic!("{path}: {e}"));
        if SKIPPED.contains(&name.as_str()) {
            continue;
        }
        if kind.is_dir() {
            collect(root, &path, found);
        } else if kind.is_file()
            && let Ok(text) = fs::read_to_string(root.join(&path))
        {
            found.push(Source { path, text });
        }
    }
}

/// Rust code without comments and with empty string and character literals.
pub(crate) fn code(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let (mut out, mut at) = (String::with_capacity(text.len()), 0);
    while let Some(&c) = chars.get(at) {
        let next = chars.get(at + 1).copied().unwrap_or_default();
        match (c, next) {
            ('/', '/') => at = find(&chars, at, |rest| rest[0] == '\n'),
            ('/', '*') => at = end_of_comment(&chars, at),
            ('"', _) => {
                out.push_str("\"\"");
                at = end_of_string(&chars, at);
            }
            ('r', '"' | '#') if !out.ends_with(|c: char| c.is_alphanumeric() || c == '_') => {
                match end_of_raw_string(&chars, at) {
                    Some(end) => {
                        out.push_str("\"\"");
                        at = end;
                    }
                    None => {
                        out.push(c);
                        at += 1;
                    }
                }
            }
            ('\'', '\\') => at = find(&chars, at + 3, |rest| rest[0] == '\'') + 1,
            ('\'', _) if chars.get(at + 2) == Some(&'\'') => at += 3,
            _ => {
                out.push(c);
                at += 1;
            }
        }
    }
    out
}

/// The first position from `from` on that satisfies the condition, or the end.
fn find(chars: &[char], from: usize, holds: impl Fn(&[char]) -> bool) -> usize {
    (from..chars.len()).find(|&at| holds(&chars[at..])).unwrap_or(chars.len())
}

fn end_of_comment(chars: &[char], from: usize) -> usize {
    let (mut depth, mut at) = (0, from);
    while at < chars.len() {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => depth += 1,
            ('*', Some('/')) => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            break;
        }
    }
    at
}

fn end_of_string(chars: &[char], from: usize) -> usize {
    let mut at = from + 1;
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

/// The end of `r"..."` or `r#"..."#`; `None` for a raw identifier.
fn end_of_raw_string(chars: &[char], from: usize) -> Option<usize> {
    let hashes = chars[from + 1..].iter().take_while(|c| **c == '#').count();
    let open = from + 1 + hashes;
    (chars.get(open) == Some(&'"')).then(|| {
        let closes = |rest: &[char]| {
            rest[0] == '"' && rest.len() > hashes && rest[1..=hashes].iter().all(|c| *c == '#')
        };
        find(chars, open + 1, closes) + 1 + hashes
    })
}

/// Whether a word occurs in code as a whole word.
pub(crate) fn names(code: &str, word: &str) -> bool {
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        !code[..at].ends_with(part_of_word) && !code[at + word.len()..].starts_with(part_of_word)
    })
}

#[test]
fn code_is_what_is_left_without_comments_and_strings() {
    assert_eq!(code("a // tonic\nb /* tonic /* x */ y */ c"), "a \nb  c");
    assert_eq!(code(r##"a("to\"nic", r#"to"nic"#, r"tonic") b"##), r#"a("", "", "") b"#);
    assert_eq!(code(r"f('\'', 'x', '\u{1F}') <'a>"), "f(, , ) <'a>");
    assert_eq!(code("for r in r#type {}"), "for r in r#type {}");
}

#[test]
fn a_word_is_a_whole_word() {
    assert!(names("use tonic::Code;", "tonic"));
    assert!(!names("mod tonics; my_tonic", "tonic"));
}

#[test]
fn tests_are_told_from_the_product() {
    let text = "one\n#[cfg(test)]\nmod tests;\nthree {\n    #[cfg(test)]\n    two: u8,\n    four\n}\n\
                #[cfg(test)]\n#[path = \"x\"]\nfn two(\n    two: u8,\n) -> u8 {\n    two\n}\nfive\n\
                #[cfg(test)]\nmod tests {\n    two {\n    }\n    two\n}\n";
    let file = Source::new("src/a.rs", text);
    let (product, tests) = (file.product(), file.tests());
    for word in ["one", "three", "four", "five"] {
        assert!(product.contains(word) && !tests.contains(word), "{word}: {product}");
    }
    assert!(!product.contains("two") && tests.matches("two").count() == 6, "{product}");
    assert_eq!(Source::new("src/a/tests.rs", "x").product(), "");
    assert!(Source::new("src/grpc.rs", "").lies_in(&["src/grpc"]));
    assert!(!Source::new("src/grpcs.rs", "").lies_in(&["src/grpc"]));
}
