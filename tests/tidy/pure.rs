//! Pure modules: their results depend only on their arguments. A module claims this at the start of its file, and the
//! claim is held against its code and against the map of `ARCHITECTURE.md`.
//!
//! The claim is the sentence `Pure.` in the text at the start of the file. It covers the module with all modules
//! below it. `Pure, except for [a] and [b].`, with the names in backquotes, leaves out functions of the file and
//! modules below it.

use crate::{
    modules::{Entry, entries},
    tree::{self, Source, names},
};

/// Names that pure code does not use: a clock, a disk, a network, the environment, an actor or a thread.
const IMPURE: &[&str] = &[
    "Instant::now",
    "SystemTime::now",
    "Moment::now",
    "ClockReading::now",
    "fs",
    "env",
    "thread",
    "spawn",
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "UnixStream",
    "actix",
];

/// The claim of a module to be pure.
#[derive(Debug)]
pub(crate) struct Claim {
    /// The module, as a place: `src/budget/accounts`.
    module: String,
    /// The functions and the modules below it that are not pure.
    except: Vec<String>,
}

impl Claim {
    /// The claim of a file, if it makes one.
    fn of(file: &Source) -> Option<Self> {
        let text = head(file);
        let (at, mark) = text.match_indices("Pure").find(|(at, mark)| is_claim(&text, *at, mark))?;
        let sentence = text[at + mark.len()..].split(". ").next().unwrap_or_default();
        let quoted = sentence.split('`').skip(1).step_by(2);
        let except = quoted.map(|name| name.rsplit("::").next().unwrap_or(name).to_owned()).collect();
        let module = file.path.trim_end_matches("/lib.rs").trim_end_matches(".rs").to_owned();
        Some(Self { module, except })
    }

    /// Whether it covers a file.
    fn covers(&self, file: &Source) -> bool {
        let excepted: Vec<_> = self.except.iter().map(|name| format!("{}/{name}", self.module)).collect();
        file.is_rust() && !file.is_test() && file.lies_in(&[&self.module]) && !file.lies_in(&excepted)
    }

    /// Whether the whole module is covered.
    fn is_whole(&self) -> bool {
        self.except.is_empty()
    }
}

/// The claims of all modules.
pub(crate) fn claims(files: &[Source]) -> Vec<Claim> {
    product(files).filter_map(Claim::of).collect()
}

fn product(files: &[Source]) -> impl Iterator<Item = &Source> {
    files.iter().filter(|file| file.is_rust() && !file.is_test())
}

/// The text at the start of a file that says what it is, on one line.
fn head(file: &Source) -> String {
    let lines = file.text.lines().map_while(|line| line.strip_prefix("//!"));
    lines.map(str::trim).collect::<Vec<_>>().join(" ")
}

/// Whether the word at a position of a text is a claim in one of the two forms.
fn is_claim(text: &str, at: usize, word: &str) -> bool {
    let rest = &text[at + word.len()..];
    word == "Pure" && (rest == "." || rest.starts_with(". ") || rest.starts_with(", except for [`"))
}

/// Files that call something pure in another form than that of a claim, so that nothing would check it.
pub(crate) fn unclear(files: &[Source]) -> Vec<String> {
    let is_unclear = |file: &&Source| {
        let text = head(file);
        let words = text.to_ascii_lowercase();
        words.match_indices("pure").any(|(at, word)| {
            let is_word = names(&words[at.saturating_sub(1)..(at + 5).min(words.len())], word);
            is_word && !is_claim(&text, at, &text[at..at + word.len()])
        })
    };
    let unclear = product(files).filter(is_unclear);
    unclear
        .map(|file| {
            format!(
                "{}: say `Pure.` or `Pure, except for [`name`].`, which is checked, or say it in other words",
                file.path
            )
        })
        .collect()
}

/// Uses of a clock, a disk and the like in pure modules, and exceptions that do not exist.
pub(crate) fn impure(files: &[Source]) -> Vec<String> {
    let claims = claims(files);
    let mut problems = Vec::new();
    for file in files {
        if !claims.iter().any(|claim| claim.covers(file)) {
            continue;
        }
        // Neither the results of build scripts nor constants are the environment of the process.
        let mut code = file.code().replace("env!", "").replace("env::consts", "");
        let own = Claim::of(file);
        for name in own.iter().flat_map(|own| &own.except) {
            let module = format!("{}/{name}", file.path.trim_end_matches(".rs"));
            match tree::without_functions(&code, name) {
                Some(rest) => code = rest,
                None if files.iter().any(|file| file.lies_in(&[&module])) => {}
                None => problems.push(format!("{} has no `{name}`, which it calls not pure", file.path)),
            }
        }
        let used = IMPURE.iter().filter(|word| names(&code, word));
        problems.extend(used.map(|word| format!("{} is pure, but names `{word}`", file.path)));
    }
    problems
}

/// Differences between the map and the claims. On the map, a pure module is `name (pure)` or `name (pure: what it
/// does)`, and the text of an entry begins with `pure: ` if everything in it is pure. A module that claims exceptions
/// is not called pure there.
pub(crate) fn map(files: &[Source], document: &str) -> Vec<String> {
    let claims: Vec<_> = claims(files).into_iter().filter(Claim::is_whole).collect();
    let is_pure = |file: &Source| claims.iter().any(|claim| claim.covers(file));
    let is_below_another =
        |claim: &Claim| claims.iter().any(|other| claim.module.starts_with(&format!("{}/", other.module)));
    let mut problems = Vec::new();
    for Entry { places, text } in entries(document, files) {
        let inside = || product(files).filter(|file| file.lies_in(&places));
        let words: Vec<_> = text.split_whitespace().collect();
        let is_named_pure =
            |name: &str| words.windows(2).any(|pair| plain(pair[0]) == name && pair[1].starts_with("(pure"));
        let is_all_pure = text.starts_with("pure: ");
        if is_all_pure {
            let is_build_script = |file: &Source| file.path.ends_with("/build.rs");
            let others = inside().filter(|file| !is_pure(file) && !is_build_script(file));
            problems.extend(
                others.map(|file| format!("the map calls {} pure, which it does not claim", file.path)),
            );
        }
        for (at, word) in words.iter().enumerate().filter(|(_, word)| names(word, "pure")) {
            let name = plain(words[at.saturating_sub(1)]);
            match word.strip_prefix("(pure") {
                Some(rest) if at > 0 && rest.starts_with([')', ':']) => {
                    let mut named = inside().filter(|file| stem(&file.path) == name);
                    if !named.any(is_pure) {
                        problems.push(format!(
                            "the map calls `{name}` of {} pure, which it does not claim",
                            places[0]
                        ));
                    }
                }
                _ if is_all_pure && at == 0 => {}
                _ => problems.push(format!("the map: say `name (pure)` instead of \"{name} {word}\"")),
            }
        }
        for claim in claims.iter().filter(|claim| !is_all_pure && !is_below_another(claim)) {
            let name = stem(&claim.module);
            let is_inside = places.iter().any(|place| claim.module.starts_with(&format!("{place}/")));
            let is_named = words.iter().any(|word| plain(word) == name);
            let is_place = places.contains(&claim.module);
            if is_place || (is_inside && is_named && !is_named_pure(name)) {
                problems.push(format!("{} claims to be pure, and the map does not say so", claim.module));
            }
        }
    }
    problems
}

/// The name of a module in its path.
fn stem(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or_default().trim_end_matches(".rs")
}

/// A word of the map without what stands around it.
fn plain(word: &str) -> &str {
    word.trim_matches(|c: char| !c.is_alphanumeric() && c != '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_in_a_pure_module_is_found() {
        let head = "//! [`Queue`]: an order. Pure. It owns\n//! nothing.\n";
        let bad = [
            Source::new("src/queue.rs", &format!("{head}let now = Instant::now();")),
            Source::new("src/queue/ranks.rs", "//! Ranks.\nuse std::fs;"),
        ];
        assert_eq!(
            impure(&bad),
            ["src/queue.rs is pure, but names `Instant::now`", "src/queue/ranks.rs is pure, but names `fs`"]
        );
        let good = [
            Source::new(
                "src/queue.rs",
                &format!("{head}fn f(at: Instant) {{}}\n#[cfg(test)]\nmod tests {{ Instant::now() }}"),
            ),
            Source::new("src/queues.rs", "//! Queues.\nuse std::fs;"),
            Source::new("src/queue/tests.rs", "use std::fs;"),
        ];
        assert_eq!(impure(&good), [""; 0]);
    }

    #[test]
    fn an_exception_is_left_out_and_has_to_exist() {
        let file = |except: &str| {
            let code = "fn pure() {}\nimpl A {\n    pub fn of<T>() { std::fs::read() }\n}";
            Source::new("src/a.rs", &format!("//! A. Pure, except for {except}. More `text`.\n{code}"))
        };
        let below = Source::new("src/a/file.rs", "use std::fs;");
        let found = |except: &str| impure(&[file(except), below.clone()]);
        assert_eq!(found("[`A::of`] and [`file`](mod@file)"), [""; 0]);
        assert_eq!(found("[`A::of`]"), ["src/a/file.rs is pure, but names `fs`"]);
        assert_eq!(found("[`file`]"), ["src/a.rs is pure, but names `fs`"]);
        assert_eq!(
            found("[`of`], [`file`] and [`gone`]"),
            ["src/a.rs has no `gone`, which it calls not pure"]
        );
    }

    #[test]
    fn a_claim_that_is_not_checked_is_found() {
        let unclear = |text: &str| unclear(&[Source::new("src/a.rs", text)]).len();
        for text in [
            "It is pure.",
            "Pure: times are arguments.",
            "Pure, mostly.",
            "A pure struct.",
            "Pure until it is installed.",
        ] {
            assert_eq!(unclear(&format!("//! A. {text}")), 1, "{text}");
        }
        for text in ["Pure.", "Pure. More.", "Pure, except for [`x`].", "Purely. Impure. `pure_x`."] {
            assert_eq!(unclear(&format!("//! A. {text}\n\n// A pure function.")), 0, "{text}");
        }
    }

    #[test]
    fn the_map_and_the_claims_are_compared() {
        let files = [
            Source::new("src/a.rs", "//! A."),
            Source::new("src/a/order.rs", "//! Pure."),
            Source::new("src/a/order/ranks.rs", "//! Pure."),
            Source::new("src/a/disk.rs", "//! D."),
            Source::new("src/a/mixed.rs", "//! Pure, except for [`x`]."),
            Source::new("src/rate.rs", "//! Pure."),
        ];
        let found = |a: &str, rate: &str| {
            map(
                &files,
                &format!(
                    "## Map\n\n```\nsrc/a.rs, a/   {a}\n               more\nsrc/rate.rs    {rate}\n```\n"
                ),
            )
        };
        assert_eq!(found("order (pure: of what, ranks), disk, mixed", "pure: buckets"), [""; 0]);
        assert_eq!(found("the rest", "pure: buckets"), [""; 0]);
        assert_eq!(
            found("order, disk", "pure: buckets"),
            ["src/a/order claims to be pure, and the map does not say so"]
        );
        assert_eq!(found("disk (pure)", "pure: buckets").len(), 1);
        assert_eq!(found("mixed (pure)", "pure: buckets").len(), 1);
        assert_eq!(found("gone (pure)", "pure: buckets").len(), 1);
        assert_eq!(found("disk, order (both pure)", "pure: buckets").len(), 2);
        assert_eq!(found("disk", "buckets (pure)").len(), 2);
        assert_eq!(found("disk", "buckets").len(), 1);
        assert_eq!(found("pure: everything", "pure: buckets").len(), 3);
    }
}
