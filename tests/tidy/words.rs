//! Restrictions on names: libraries, unsafe code, documents and registries.

use crate::tree::{Source, names};
use std::collections::BTreeSet;

/// Words that only some places may contain.
pub(crate) struct Word {
    /// The words, or paths. All have the same places.
    pub(crate) words: &'static [&'static str],
    /// The places that may contain them.
    pub(crate) only: &'static [&'static str],
    /// The reason, for the error message.
    pub(crate) why: &'static str,
}

/// The restricted words.
pub(crate) const WORDS: &[Word] = &[
    Word {
        words: &["tonic"],
        only: &["src/grpc", "crates/client", "crates/verify", "crates/bench", "crates/reapi/src/status"],
        why: "the gRPC library stays at the edge: only the services and the clients know it",
    },
    Word {
        words: &["actix"],
        only: &["src/actors", "src/server", "src/grpc/ask"],
        why: "only actors, the wiring and the one place that asks an actor for a handler know the actor library",
    },
    Word {
        words: &["reqwest"],
        only: &["src/actors/asset", "src/images/registry", "src/access/jwt/download"],
        why: "only the download of assets, the pull of images and the keys of issuers take contact by HTTP",
    },
    Word {
        words: &["unsafe"],
        only: &[
            "src/actors/worker/launcher/sys",
            "src/actors/worker/launcher/spawn",
            "src/actors/worker/launcher/reap",
            "src/sandbox/sys",
            "src/actors/cas/volume/stamps",
            "src/actors/cas/volume/stored",
            "src/cli/output",
            "src/signals",
            "src/memory",
            "src/supervisor",
        ],
        why: "unsafe code stays in the few files that make system calls which no safe library offers",
    },
    Word {
        words: &["sync_all", "sync_data", "syncfs", "fsync", "fdatasync", "sync_file_range"],
        only: &["src/actors/cas/volume/durable", "src/access/tokens/file", "crates/bench/src/limits"],
        why: "only these wait for the disk: the store, for `cache.durability` and packed files, the list of tokens, so that \
              a revoked token stays revoked, and the benchmark of the disk",
    },
    Word {
        words: &["info!", "warn!", "error!", "debug!", "trace!", "log!"],
        only: &[],
        why: "log lines are made with `Event`, so that each has a name and fields",
    },
    Word {
        words: &["log::logger"],
        only: &["src/logging/event", "src/actors/scheduler/log"],
        why: "log lines are made with `Event`, so that each has a name and fields",
    },
];

/// Words that some places may not contain.
pub(crate) struct Ban {
    /// The words, or paths.
    pub(crate) words: &'static [&'static str],
    /// The places that may not contain them.
    pub(crate) places: &'static [&'static str],
    /// The reason, for the error message.
    pub(crate) why: &'static str,
}

/// The banned words.
pub(crate) const BANS: &[Ban] = &[Ban {
    words: &["Index", "cas::index"],
    places: &["src/grpc", "src/http"],
    why: "handlers ask the store through `Cas`, and only its actor and its modules know the index",
}];

/// Documents of the authors that are not in the repository.
const ELSEWHERE: &[&str] = &[
    concat!("user", "-asks"),
    concat!("reapi", "-rules.md"),
    concat!("DESIGN", ".md"),
    concat!("list of", " asks"),
    concat!("/work", "/"),
];

/// Hosts of package registries. Packages are fetched by their ordinary clients, which know their registry. A machine
/// behind a mirror configures the client, and nothing here overrides that.
const REGISTRIES: &[&str] = &[
    concat!("crates", ".io"),
    concat!("static.rust", "-lang.org"),
    concat!("pypi", ".org"),
    concat!("pythonhosted", ".org"),
    concat!("registry.npm", "js"),
    concat!("proxy.go", "lang.org"),
    concat!("deb.deb", "ian.org"),
    concat!("repo1.mav", "en.org"),
    concat!("repo.mav", "en.apache.org"),
    concat!("plugins.grad", "le.org"),
    concat!("rubygems", ".org"),
    concat!("docker", ".io"),
    concat!("gh", "cr.io"),
    concat!("gc", "r.io"),
    concat!("qu", "ay.io"),
];

/// Restricted words in other places.
pub(crate) fn strays(files: &[Source], words: &[Word]) -> Vec<String> {
    let product = files.iter().filter(|file| file.is_rust() && !file.is_test());
    let coded = product.map(|file| (file, file.code()));
    coded
        .flat_map(|(file, code)| {
            let elsewhere = words.iter().filter(|word| !file.lies_in(word.only));
            let named = elsewhere.flat_map(move |word| {
                let named = word.words.iter().filter(|name| names(code, name));
                named.map(move |name| (name, word.why))
            });
            named.map(|(name, why)| format!("{} names `{name}`: {why}", file.path))
        })
        .collect()
}

/// The section with the table of the restricted words, in the same document as the map.
const SECTION: &str = "## What is absent, on purpose";

/// Differences between the restricted words and their table: ``| `word` | `place`, `place` |``, or `nowhere`.
pub(crate) fn table(document: &str, words: &[Word]) -> Vec<String> {
    let section =
        document.split(SECTION).nth(1).and_then(|rest| rest.split("\n## ").next()).unwrap_or_default();
    let quoted = |cell: &str| -> BTreeSet<String> {
        let quoted = cell.split('`').skip(1).step_by(2);
        quoted.map(|text| text.trim_end_matches('/').trim_end_matches(".rs").to_owned()).collect()
    };
    let rows: BTreeSet<_> = section
        .lines()
        .filter(|line| line.starts_with("| `"))
        .filter_map(|line| line.trim_matches('|').split_once('|'))
        .map(|(words, places)| (quoted(words), quoted(places)))
        .collect();
    let owned = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<BTreeSet<_>>();
    let rules: BTreeSet<_> = words.iter().map(|word| (owned(word.words), owned(word.only))).collect();
    let show = |(words, places): &(BTreeSet<String>, BTreeSet<String>)| format!("{words:?} in {places:?}");
    let missing =
        rules.difference(&rows).map(|rule| format!("the table of {SECTION:?} lacks {}", show(rule)));
    let wrong =
        rows.difference(&rules).map(|row| format!("no rule allows {}, as {SECTION:?} has it", show(row)));
    missing.chain(wrong).collect()
}

/// Banned words in the product.
pub(crate) fn banned(files: &[Source], bans: &[Ban]) -> Vec<String> {
    let mut found = Vec::new();
    for ban in bans {
        for file in files.iter().filter(|file| file.is_rust() && file.lies_in(ban.places)) {
            let named = ban.words.iter().filter(|word| names(file.code(), word));
            found.extend(named.map(|word| format!("{} names `{word}`: {}", file.path, ban.why)));
        }
    }
    found
}

/// Places that may name restricted words and name none of them, or do not exist. They would hide a later mistake.
pub(crate) fn unused(files: &[Source], words: &[Word]) -> Vec<String> {
    let places = words.iter().flat_map(|word| word.only.iter().map(move |place| (word.words, *place)));
    let is_used = |words: &[&str], place: &str| {
        let mut there = files.iter().filter(|file| file.is_rust() && file.lies_in(&[place]));
        there.any(|file| words.iter().any(|word| names(file.code(), word)))
    };
    let unused = places.filter(|(words, place)| !is_used(words, place));
    unused
        .map(|(words, place)| {
            format!("{place} does not name `{}`: take it off the list", words.join("` or `"))
        })
        .collect()
}

/// Places of rules that do not exist.
pub(crate) fn gone<'a>(files: &[Source], places: impl Iterator<Item = &'a str>) -> Vec<String> {
    let is_gone = |place: &&str| !files.iter().any(|file| file.path == *place || file.lies_in(&[place]));
    places.filter(is_gone).map(|place| format!("a rule names {place}, which does not exist")).collect()
}

/// References to documents that are not in the repository, and to fault numbers, whose list is not in the repository.
pub(crate) fn elsewhere(files: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for file in files {
        for (number, line) in file.text.lines().enumerate() {
            let place = format!("{}:{}", file.path, number + 1);
            if let Some(document) = ELSEWHERE.iter().find(|document| line.contains(*document)) {
                found.push(format!("{place} refers to {document}, which is not in the repository"));
            }
            if numbered_fault(line) {
                found.push(format!("{place} cites a fault by its number; say what goes wrong instead"));
            }
        }
    }
    found
}

fn numbered_fault(line: &str) -> bool {
    let line = line.to_ascii_lowercase();
    line.match_indices("fault ").any(|(at, word)| {
        let whole = !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        whole && line[at + word.len()..].starts_with(|c: char| c.is_ascii_digit())
    })
}

/// Hosts of registries in any file but the lock file, which cargo writes.
pub(crate) fn registries(files: &[Source]) -> Vec<String> {
    let ours = files.iter().filter(|file| !file.path.ends_with("Cargo.lock"));
    ours.flat_map(|file| {
        let named = REGISTRIES.iter().filter(|host| file.text.contains(*host));
        named.map(|host| format!("{} names the registry host {host}", file.path))
    })
    .collect()
}

#[test]
fn a_word_outside_its_home_is_found() {
    let word = || Word { words: &["tonic"], only: &["src/grpc"], why: "edge" };
    let bad = Source::new("src/budget.rs", "use tonic::Code;");
    assert_eq!(strays(&[bad], &[word()]), ["src/budget.rs names `tonic`: edge"]);
    let good = [
        Source::new("src/grpc/cas.rs", "use tonic::Code;"),
        Source::new("src/budget.rs", "// tonic\n#[cfg(test)]\nuse tonic::Code;"),
        Source::new("tests/edge/cas.rs", "use tonic::Code;"),
    ];
    assert!(strays(&good, &[word()]).is_empty());
}

#[test]
fn every_call_that_waits_for_the_disk_is_found() {
    for call in ["file.sync_all()?", "file.sync_data()?", "rustix::fs::syncfs(file)", "libc::fsync(file)"] {
        let found = |path: &str| strays(&[Source::new(path, &format!("fn f() {{ {call}; }}"))], WORDS).len();
        assert_eq!(found("src/state_file.rs"), 1, "{call}");
        assert_eq!(found("src/actors/cas/volume/durable.rs"), 0, "{call}");
    }
}

#[test]
fn a_log_line_without_an_event_is_found() {
    for call in
        ["log::info!(\"x\")", "warn!(\"x\")", "log::log!(Level::Info, \"x\")", "log::logger().log(record)"]
    {
        let found = |path: &str| strays(&[Source::new(path, &format!("fn f() {{ {call}; }}"))], WORDS).len();
        assert_eq!(found("src/grpc/cas.rs"), 1, "{call}");
        assert_eq!(found("tests/logs.rs"), 0, "{call}");
    }
    let event = Source::new(
        "src/grpc/cas.rs",
        "use log::{Level, Log}; Event::info(LOG, NAME).log(\"info!\"); a.log != b",
    );
    assert!(strays(&[event], WORDS).is_empty());
}

#[test]
fn the_index_of_the_store_in_a_handler_is_found() {
    let found = |path: &str, code: &str| banned(&[Source::new(path, code)], BANS).len();
    assert_eq!(found("src/grpc/cas.rs", "fn f(index: &Index) {}"), 1);
    assert_eq!(found("src/http/cache/read.rs", "use crate::actors::cas::index::Key;"), 1);
    assert_eq!(found("src/grpc/cas.rs", "fn f(index: usize, error: IndexError) {}"), 0);
    assert_eq!(found("src/actors/cas/upkeep.rs", "fn f(index: &Index) {}"), 0);
}

#[test]
fn the_words_and_their_table_are_compared() {
    let words = [
        Word { words: &["tonic"], only: &["src/grpc", "crates/verify"], why: "" },
        Word { words: &["log!", "info!"], only: &[], why: "" },
    ];
    let found = |tonic: &str, log: &str| {
        let rows = format!("| word | where |\n|---|---|\n{tonic}\n{log}\n");
        table(&format!("{SECTION}\n\n{rows}\n## Next\n\n| `x` | `y` |\n"), &words).len()
    };
    let log = "| `info!`, `log!` | nowhere |";
    assert_eq!(found("| `tonic` | `crates/verify`, `src/grpc.rs` |", log), 0);
    assert_eq!(found("| `tonic` | `src/grpc` |", log), 2);
    assert_eq!(found("| `tonic` | `crates/verify`, `src/grpc` |", "| `log!` | nowhere |"), 2);
    assert_eq!(found("| `tonic` | `crates/verify`, `src/grpc` |", ""), 1);
}

#[test]
fn a_place_that_does_not_name_its_word_is_found() {
    let word = || Word { words: &["tonic"], only: &["src/grpc", "src/server"], why: "edge" };
    let files =
        [Source::new("src/grpc/cas.rs", "use tonic::Code;"), Source::new("src/server.rs", "// tonic")];
    assert_eq!(unused(&files, &[word()]), ["src/server does not name `tonic`: take it off the list"]);
}

#[test]
fn a_place_of_a_rule_that_does_not_exist_is_found() {
    let files = [Source::new("src/grpc/cas.rs", ""), Source::new("docs/rules.md", "")];
    let places = ["src/grpc", "src/grpc/cas", "src/grpc/cas.rs", "docs/rules.md", "src/grp"];
    assert_eq!(gone(&files, places.into_iter()), ["a rule names src/grp, which does not exist"]);
}

#[test]
fn a_document_from_elsewhere_is_found() {
    let named = Source::new("src/a.rs", &format!("//! As {} says.", ELSEWHERE[0]));
    assert_eq!(elsewhere(&[named]).len(), 1);
    let numbered = Source::new("src/a.rs", &format!("/// EXE-43, {} 16: inputs.", "Fault"));
    assert_eq!(elsewhere(&[numbered]).len(), 1);
    assert!(elsewhere(&[Source::new("src/a.rs", "a page fault is default 3")]).is_empty());
}

#[test]
fn a_registry_host_is_found() {
    let text = format!("curl https://{}/x", REGISTRIES[0]);
    assert_eq!(registries(&[Source::new("tests/run", &text)]).len(), 1);
    assert!(registries(&[Source::new("Cargo.lock", &text)]).is_empty());
}
