//! The files of the repository, and their Rust code without comments, strings and tests.

use std::{fs, ops::Range, path::Path, sync::OnceLock};

/// Files and directories that are not part of the source.
const SKIPPED: &[&str] = &[".git", "target", "artifacts", "corpus", "node_modules"];

/// One text file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    /// Path relative to the root of the repository, with slashes.
    pub(crate) path: String,
    pub(crate) text: String,
    /// Whether it belongs to a module that its parent declares under `#[cfg(test)]`.
    in_test_module: bool,
    /// The result of [`Self::code`], which many rules ask for.
    code: OnceLock<String>,
}

impl Source {
    /// Creates a file with this content.
    pub(crate) fn new(path: &str, text: &str) -> Self {
        Self { path: path.into(), text: text.into(), in_test_module: false, code: OnceLock::new() }
    }

    /// Whether it is Rust code.
    pub(crate) fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Whether it is in one of these places: `src/grpc` is `src/grpc.rs` and everything below `src/grpc/`.
    pub(crate) fn lies_in<T: AsRef<str>>(&self, places: &[T]) -> bool {
        places.iter().any(|place| {
            self.path
                .strip_prefix(place.as_ref())
                .is_some_and(|rest| matches!(rest, "" | ".rs") || rest.starts_with('/'))
        })
    }

    /// Whether it contains only test code.
    pub(crate) fn is_test(&self) -> bool {
        self.in_test_module
            || self.path.starts_with("tests/")
            || self.path.contains("/tests/")
            || self.path.ends_with("/tests.rs")
            || self.lies_in(&["benches", "fuzz"])
    }

    /// The part that is compiled into the product, with comments. What is compiled only for tests is blank, so each
    /// line keeps its number.
    pub(crate) fn product(&self) -> String {
        if self.is_test() { String::new() } else { without(&self.text, &test_items(&self.text)) }
    }

    /// The part that is compiled only for tests, with comments.
    pub(crate) fn tests(&self) -> String {
        if self.is_test() {
            return self.text.clone();
        }
        test_items(&self.text).into_iter().map(|item| &self.text[item]).collect::<Vec<_>>().join("\n")
    }

    /// [`Self::product`], without comments and strings.
    pub(crate) fn code(&self) -> &str {
        self.code.get_or_init(|| code(&self.product()))
    }
}

/// All text files of the source below `root`, ordered by path.
pub(crate) fn read(root: &Path) -> Vec<Source> {
    let mut found = Vec::new();
    collect(root, "", &mut found);
    found.sort_by(|a, b| a.path.cmp(&b.path));
    mark_test_modules(&mut found);
    found
}

/// Marks the files of modules that are declared under `#[cfg(test)]` in another file.
fn mark_test_modules(files: &mut [Source]) {
    let modules: Vec<_> = files.iter().filter(|file| file.is_rust()).flat_map(test_modules).collect();
    for file in files {
        file.in_test_module = file.lies_in(&modules);
    }
}

/// The places of the modules that a file declares under `#[cfg(test)]` and that are files of their own.
fn test_modules(file: &Source) -> Vec<String> {
    let (above, name) = file.path.rsplit_once('/').unwrap_or(("", &file.path));
    let directory = match name {
        "lib.rs" | "main.rs" => above,
        _ => file.path.trim_end_matches(".rs"),
    };
    let items = test_items(&file.text);
    let declared = items.iter().filter_map(|item| {
        let item = code(&file.text[item.clone()]);
        let (_, declaration) = item.trim_end().strip_suffix(';')?.rsplit_once(']')?;
        let (_, name) = declaration.split_once("mod ")?;
        Some(format!("{directory}/{}", name.trim()))
    });
    declared.collect()
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
            found.push(Source::new(&path, &text));
        }
    }
}

/// A text with blanks in these places. Lines stay where they are.
fn without(text: &str, places: &[Range<usize>]) -> String {
    let (mut out, mut done) = (String::with_capacity(text.len()), 0);
    for place in places {
        out.push_str(&text[done..place.start]);
        out.extend(text[place.clone()].bytes().map(blank));
        done = place.end;
    }
    out.push_str(&text[done..]);
    out
}

/// What takes the place of a byte that is left out.
fn blank(byte: u8) -> char {
    if byte == b'\n' { '\n' } else { ' ' }
}

/// Rust code with blanks in place of comments, strings and characters. Each byte of the code keeps its position.
pub(crate) fn code(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut blanks, mut at) = (Vec::new(), 0);
    while let Some(&byte) = bytes.get(at) {
        let next = bytes.get(at + 1).copied().unwrap_or_default();
        let in_word = at > 0 && is_part_of_word(bytes[at - 1]);
        let end = match (byte, next) {
            (b'/', b'/') => Some(find(bytes, at, |rest| rest[0] == b'\n')),
            (b'/', b'*') => Some(end_of_comment(bytes, at)),
            (b'"', _) => Some(end_of_string(bytes, at)),
            (b'r', b'"' | b'#') if !in_word || bytes[at - 1] == b'b' => end_of_raw_string(bytes, at),
            (b'\'', b'\\') => Some(find(bytes, at + 3, |rest| rest[0] == b'\'') + 1),
            (b'\'', _) => end_of_character(text, at),
            _ => None,
        };
        if let Some(end) = end {
            let end = end.min(bytes.len());
            blanks.push(at..end);
            at = end;
        } else {
            at += 1;
        }
    }
    without(text, &blanks)
}

fn is_part_of_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii()
}

/// The end of a character without an escape, such as `'x'`; `None` for a lifetime.
fn end_of_character(text: &str, from: usize) -> Option<usize> {
    let close = from + 1 + text[from + 1..].chars().next()?.len_utf8();
    text[close..].starts_with('\'').then_some(close + 1)
}

/// The first position from `from` on that satisfies the condition, or the end.
fn find(bytes: &[u8], from: usize, holds: impl Fn(&[u8]) -> bool) -> usize {
    (from..bytes.len()).find(|&at| holds(&bytes[at..])).unwrap_or(bytes.len())
}

fn end_of_comment(bytes: &[u8], from: usize) -> usize {
    let (mut depth, mut at) = (0, from);
    while at < bytes.len() {
        match (bytes[at], bytes.get(at + 1)) {
            (b'/', Some(b'*')) => depth += 1,
            (b'*', Some(b'/')) => depth -= 1,
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

fn end_of_string(bytes: &[u8], from: usize) -> usize {
    let mut at = from + 1;
    while at < bytes.len() && bytes[at] != b'"' {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    at + 1
}

/// The end of `r"..."` or `r#"..."#`; `None` for a raw identifier.
fn end_of_raw_string(bytes: &[u8], from: usize) -> Option<usize> {
    let hashes = bytes[from + 1..].iter().take_while(|byte| **byte == b'#').count();
    let open = from + 1 + hashes;
    (bytes.get(open) == Some(&b'"')).then(|| {
        let closes = |rest: &[u8]| {
            rest[0] == b'"' && rest.len() > hashes && rest[1..=hashes].iter().all(|byte| *byte == b'#')
        };
        find(bytes, open + 1, closes) + 1 + hashes
    })
}

/// Whether a word occurs in code as a whole word.
pub(crate) fn names(code: &str, word: &str) -> bool {
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        !code[..at].ends_with(part_of_word) && !code[at + word.len()..].starts_with(part_of_word)
    })
}

/// The items that are compiled only for tests, with their attributes and documentation. `#[cfg(test)]` stands before a
/// module, a function, an import, a field, a statement or anything else. The items are in order and do not overlap.
fn test_items(text: &str) -> Vec<Range<usize>> {
    let code = code(text);
    let (mut items, mut done) = (Vec::new(), 0);
    if code.contains("#![cfg(test)]") {
        let all = 0..text.len();
        return Vec::from([all]);
    }
    for (at, _) in code.match_indices("#[cfg(") {
        if at >= done && is_for_tests(&code[at..]) {
            let start = start_of_item(text, at).max(done);
            done = end_of_item(code.as_bytes(), at);
            items.push(start..done);
        }
    }
    items
}

/// Whether an attribute says `test`, or `all` of several conditions with `test` first.
fn is_for_tests(attribute: &str) -> bool {
    let condition = attribute.strip_prefix("#[cfg(").unwrap_or_default();
    condition.starts_with("test)") || condition.starts_with("all(test,")
}

/// Code without all functions of this name; `None` if there is none.
pub(crate) fn without_functions(code: &str, name: &str) -> Option<String> {
    let heads = [format!("fn {name}("), format!("fn {name}<")];
    let starts = heads.iter().flat_map(|head| code.match_indices(head)).map(|(at, _)| at);
    let mut functions: Vec<_> = starts.map(|at| at..end_of_item(code.as_bytes(), at)).collect();
    functions.sort_by_key(|function| function.start);
    (!functions.is_empty()).then(|| without(code, &functions))
}

/// The start of the item that has an attribute, with what stands above the attribute.
fn start_of_item(text: &str, attribute: usize) -> usize {
    let mut start = attribute;
    while let Some((above, _)) = text[..start].rsplit_once('\n') {
        let line = above.rfind('\n').map_or(0, |newline| newline + 1);
        let belongs = ["///", "#["].iter().any(|mark| text[line..start].trim_start().starts_with(mark));
        if !belongs || line == start {
            break;
        }
        start = line;
    }
    start
}

/// The end of the item that has an attribute. A declaration ends with its body or a `;`. A field, an arm, an expression
/// or a statement ends with a `,` or a `;`, or before the bracket that closes what it is in.
fn end_of_item(code: &[u8], attribute: usize) -> usize {
    let mut start = skip_blanks(code, attribute);
    while code.get(start) == Some(&b'#') {
        start = skip_blanks(code, end_of_group(code, find(code, start, |rest| rest[0] == b'[')));
    }
    let kind = kind(code, start);
    let (mut at, mut angles) = (start, 0_usize);
    while let Some(&byte) = code.get(at) {
        let next = code.get(at + 1).copied().unwrap_or_default();
        match byte {
            b';' => return at + 1,
            b',' if kind == Kind::Part && angles == 0 => return at + 1,
            b')' | b']' | b'}' => return at,
            b'(' | b'[' => at = end_of_group(code, at) - 1,
            b'{' => {
                at = end_of_group(code, at) - 1;
                let after = skip_blanks(code, at + 1);
                let goes_on = matches!(code.get(after), Some(b',' | b';' | b'.' | b'?'))
                    || code[after.min(code.len())..].starts_with(b"else");
                match kind {
                    Kind::WithBody => return at + 1,
                    Kind::Part if !goes_on => return at + 1,
                    Kind::Part | Kind::Statement => {}
                }
            }
            // Generic arguments. An operator has a blank after it, since rustfmt puts it there.
            b'<' if !next.is_ascii_whitespace() && !matches!(next, b'<' | b'=') => angles += 1,
            b'>' if !matches!(code[at - 1], b'-' | b'=') => angles = angles.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    code.len()
}

/// How an item ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// With its body in braces, or with a `;` if it has none.
    WithBody,
    /// With a `;`.
    Statement,
    /// With a `,`, or as a statement.
    Part,
}

fn kind(code: &[u8], start: usize) -> Kind {
    let text = String::from_utf8_lossy(&code[start.min(code.len())..]);
    let text = text.strip_prefix("pub").map_or(&*text, |rest| {
        let rest = rest.trim_start();
        rest.strip_prefix('(').and_then(|rest| rest.split_once(')')).map_or(rest, |(_, rest)| rest)
    });
    let mut words = text.split_whitespace();
    let (first, second) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    match first {
        "fn" | "mod" | "struct" | "enum" | "union" | "trait" | "unsafe" | "async" | "extern"
        | "macro_rules!" => Kind::WithBody,
        "const" if matches!(second, "fn" | "unsafe" | "async" | "extern") => Kind::WithBody,
        "use" | "const" | "static" | "type" | "let" => Kind::Statement,
        word if word == "impl" || word.starts_with("impl<") => Kind::WithBody,
        _ => Kind::Part,
    }
}

fn skip_blanks(code: &[u8], from: usize) -> usize {
    find(code, from, |rest| !rest[0].is_ascii_whitespace())
}

/// The end of what is in brackets, which begins with the bracket at `from`.
fn end_of_group(code: &[u8], from: usize) -> usize {
    let (mut depth, mut at) = (0_usize, from);
    while let Some(byte) = code.get(at) {
        at += 1;
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    at
}

#[test]
fn code_is_what_is_left_without_comments_and_strings() {
    let words = |text: &str| code(text).split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
    assert_eq!(words("a // tonic\nb /* tonic /* x */ y */ c"), "a b c");
    assert_eq!(words(r##"a("to\"nic", r#"to"nic"#, r"tonic", br"x") b"##), "a( , , , b ) b");
    assert_eq!(words(r"f('\'', 'x', '\u{1F}', 'ä') <'a>"), "f( , , , ) <'a>");
    assert_eq!(words("for r in r#type {}"), "for r in r#type {}");
    assert_eq!(code("é\"ä\n\";"), "é   \n ;");
}

#[test]
fn a_word_is_a_whole_word() {
    assert!(names("use tonic::Code;", "tonic"));
    assert!(!names("mod tonics; my_tonic", "tonic"));
}

#[test]
fn tests_are_told_from_the_product() {
    let file = Source::new("src/a.rs", "one\n#[cfg(test)]\nmod tests { two }");
    assert!(file.product().contains("one") && !file.product().contains("two"));
    assert!(file.tests().contains("two") && !file.tests().contains("one"));
    assert_eq!(Source::new("src/a/tests.rs", "x").product(), "");
    assert!(Source::new("src/grpc.rs", "").lies_in(&["src/grpc"]));
    assert!(!Source::new("src/grpcs.rs", "").lies_in(&["src/grpc"]));
}

#[test]
fn only_the_item_under_the_attribute_is_left_out() {
    for item in [
        "mod two { fn two() { \"}\" } }",
        "mod two;",
        "pub(crate) use two::{two, Two};",
        "pub(super) fn two<A, B>(a: [A; 2], b: B) -> [B; 2] where A: Two<B> { if a { two } else { two } }",
        "impl<T, U> Two for T { const TWO: u64 = 2; }",
        "const fn two() { two }",
        "const TWO: Map<A, Two> = Two { two };",
        "let two: Map<A, Two> = if a { two } else { two };",
        "struct Two(A, B);",
        "fn two(&self) -> Two;",
        "#[path = \"]\"]\n/// Two, two.\npub mod two;",
        "pub(crate) two: Map<A, Vec<Two>>,",
        "Two { two: A, b: B },",
        "two: a < two && b > two,",
        "Two::Two(two) => { two(2, 2) }",
        "two => a.two(2, 2),",
        "two.two(2, 2)?.two();",
        "if a { two } else if b { two } else { two }",
        "two += Two { two }.two;",
    ] {
        for attribute in ["#[cfg(test)]", "#[cfg(all(test, target_env = \"gnu\"))]"] {
            let text =
                format!("{{ one: 1,\n{attribute}\n{item} one {{}}\n{attribute}\nmod tests {{ two }}\none }}");
            let file = Source::new("src/a.rs", &text);
            let product = file.product();
            assert_eq!(product.split_whitespace().collect::<String>(), "{one:1,one{}one}", "{item}");
            assert_eq!(product.lines().count(), text.lines().count());
            assert!(!file.tests().contains("one"), "{item}");
        }
    }
    let last = Source::new("src/a.rs", "f(A { one,\n#[cfg(test)]\ntwo: Two { two } }, one)");
    assert_eq!(last.product().split_whitespace().collect::<String>(), "f(A{one,},one)");
    assert_eq!(Source::new("src/a.rs", "#![cfg(test)]\none").product().trim(), "");
    let described = "//! one\n\n/// two\n#[two]\n#[cfg(test)]\n#[two]\nfn two() {}\none";
    assert_eq!(
        Source::new("src/a.rs", described).product().split_whitespace().collect::<String>(),
        "//!oneone"
    );
    assert!(Source::new("src/a.rs", "#[cfg(not(test))]\nfn one() {}").product().contains("one"));
}

#[test]
fn a_file_of_a_module_for_tests_is_a_test() {
    let mut files = [
        Source::new(
            "src/a.rs",
            "#[cfg(test)]\npub(crate) mod model;\nmod b;\n#[cfg(test)]\nmod tests { mod c; }",
        ),
        Source::new("src/a/b.rs", ""),
        Source::new("src/a/model.rs", ""),
        Source::new("src/a/model/x.rs", ""),
        Source::new("src/lib.rs", "#[cfg(test)]\n#[allow(dead_code)]\nmod help;"),
        Source::new("src/help.rs", ""),
    ];
    mark_test_modules(&mut files);
    let tests: Vec<_> = files.iter().filter(|file| file.is_test()).map(|file| &*file.path).collect();
    assert_eq!(tests, ["src/a/model.rs", "src/a/model/x.rs", "src/help.rs"]);
}
