//! The rules that are verified: the ids, levels and short titles of all 220.
//!
//! `docs/rules.md` states each rule in full; `tests/tidy` keeps its ids and levels equal to these. The titles are short
//! reminders for the readers of reports. The groups decide how a rule is tested.

use std::fmt;

/// The strength of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// The behaviour is optional.
    May,
    /// Good servers follow the rule. A failure is a warning.
    Should,
    /// A client breaks otherwise.
    Must,
}

/// A requirement on servers of the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// The id, such as `CAS-12`.
    pub id: &'static str,
    /// The strength of the rule.
    pub level: Level,
    /// The requirement in a few words.
    pub title: &'static str,
    /// The clients that are known to break if it is violated.
    pub breaks: &'static str,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::May => "may",
            Self::Should => "should",
            Self::Must => "must",
        })
    }
}

/// The rule with this id, if it exists.
pub fn find(id: &str) -> Option<&'static Rule> {
    ALL.iter().flat_map(|(_, rules)| rules.iter()).find(|rule| rule.id == id)
}

const fn must(id: &'static str, title: &'static str, breaks: &'static str) -> Rule {
    Rule { id, level: Level::Must, title, breaks }
}

const fn should(id: &'static str, title: &'static str, breaks: &'static str) -> Rule {
    Rule { id, level: Level::Should, title, breaks }
}

const fn may(id: &'static str, title: &'static str, breaks: &'static str) -> Rule {
    Rule { id, level: Level::May, title, breaks }
}

/// All rules, by group.
pub const ALL: &[(&str, &[Rule])] = &[
    ("GEN", GEN),
    ("CAP", CAP),
    ("CAS", CAS),
    ("BS", BS),
    ("AC", AC),
    ("EXE", EXE),
    ("OPS", OPS),
    ("AST", AST),
    ("LOG", LOG),
];

/// The rules that apply to all services.
pub const GEN: &[Rule] = &[
    must("GEN-01", "a hash is lower-case hex and never folded", "Bazel"),
    must("GEN-02", "a hash of another length or alphabet is refused", ""),
    must("GEN-03", "a negative or overflowing size is refused", ""),
    must("GEN-04", "hash and size together are the key", ""),
    must("GEN-05", "an absent required digest is an argument error", ""),
    must("GEN-06", "the empty blob exists everywhere", "Bazel, buck2, Go SDK, Please"),
    should("GEN-07", "size 0 with another hash is not the empty blob", ""),
    should(
        "GEN-08",
        "an unset digest function is inferred from the hash",
        "buck2, Go SDK, Pants, Please, justbuild",
    ),
    must("GEN-09", "an unsupported digest function is refused", "Bazel"),
    must("GEN-10", "one request uses one digest function", ""),
    must("GEN-11", "presence is per digest function", ""),
    must("GEN-12", "instance names of none or several segments work", "Bazel, buck2"),
    must("GEN-13", "a malformed instance name is refused", ""),
    should("GEN-14", "an unknown instance is no cache miss", "all"),
    must("GEN-15", "instances do not see each other's data", ""),
    must("GEN-16", "what is absent is UNIMPLEMENTED", "Bazel"),
    must("GEN-17", "error details repeat the code and message", "Bazel, Go SDK"),
    must("GEN-18", "packed messages have the usual type URL", "Pants, Bazel, Go SDK, justbuild"),
    should("GEN-19", "trailers stay below 8 KiB", ""),
    must("GEN-20", "permanent errors have no code that is retried", "Bazel, Pants, buck2"),
    should("GEN-21", "overload comes with RetryInfo, nothing else does", "Bazel"),
    must("GEN-22", "inline status codes are within 0 to 16", "Bazel"),
    should("GEN-23", "credentials missing and forbidden are told apart", "Bazel"),
    must("GEN-24", "a message holds a whole batch and its framing", "Siso, buck2"),
    must("GEN-25", "no answer is larger than 4 MiB", ""),
    should("GEN-26", "keepalive pings are tolerated", "buck2, Bazel"),
    should("GEN-27", "a hundred streams share a connection", "Bazel, buck2"),
    must("GEN-28", "RequestMetadata is optional and never fatal", "Bazel, buck2, Please, Pants"),
    should("GEN-29", "unknown fields are ignored", "Bazel"),
    must("GEN-30", "messages made by the server are canonical", "Bazel, Go SDK"),
];

/// The rules about Capabilities.
pub const CAP: &[Rule] = &[
    must("CAP-01", "the sub-messages say what the endpoint is", "Bazel, Please"),
    must("CAP-02", "the API versions are set and overlap 2.x", "Bazel, Please, justbuild"),
    should("CAP-03", "the deprecated version is below the low one", "Bazel, justbuild"),
    must("CAP-04", "the high version is kept", "Bazel, Go SDK"),
    must("CAP-05", "the listed digest functions are those that work", "Bazel, Go SDK, Please"),
    must("CAP-06", "the single digest function field is set", "Go SDK, reclient, Please"),
    must("CAP-07", "the two digest function fields agree", "Bazel"),
    must("CAP-08", "exec_enabled is what Execute does", "Bazel, Please, buck2, Pants"),
    must("CAP-09", "update_enabled is what UpdateActionResult does", "Bazel"),
    must("CAP-10", "the batch limit is truthful", "buck2, Please, Go SDK"),
    should("CAP-11", "the batch limit fits in a 4 MiB message", "Go SDK, Siso"),
    must("CAP-12", "a listed compressor reads and writes every blob", "buck2, Bazel"),
    must("CAP-13", "the batch compressors listed are those accepted", "Go SDK"),
    must("CAP-14", "the absolute symlink strategy is known and kept", "Bazel"),
    should("CAP-15", "the largest blob size is kept", ""),
    must("CAP-16", "split and splice are offered as claimed", "Bazel, justbuild"),
    must("CAP-17", "chunking parameters are present and in range", "Bazel"),
    should("CAP-18", "priorities are listed; priority 0 works", "Bazel"),
    must("CAP-19", "all connections see the same, quickly", "Bazel"),
];

/// The rules about ContentAddressableStorage.
pub const CAS: &[Rule] = &[
    must("CAS-01", "FindMissing answers exactly what is not stored", "Bazel, justbuild"),
    must("CAS-02", "FindMissing takes empty lists and duplicates", ""),
    must("CAS-03", "what is not missing can be read at once", "all"),
    should("CAS-04", "a lookup extends the life of a blob", "Bazel, buck2"),
    must("CAS-05", "a blob in upload is missing", ""),
    must("CAS-06", "one malformed digest fails FindMissing", ""),
    should("CAS-07", "FindMissing takes 15,000 digests", "Bazel, Go SDK, buck2, justbuild"),
    should("CAS-08", "FindMissing fails when the index cannot answer", ""),
    must("CAS-09", "BatchUpdate answers every item", "justbuild, Go SDK"),
    must("CAS-10", "BatchUpdate items fail independently", ""),
    must("CAS-11", "data that is not the digest's is refused", ""),
    must("CAS-12", "uploading again is OK", "buck2, Go SDK, justbuild"),
    must("CAS-13", "an accepted blob is visible everywhere", ""),
    must("CAS-14", "batch uploads are decompressed and checked", "Go SDK"),
    must("CAS-15", "the batch limit counts data as sent", "Go SDK, Siso"),
    should("CAS-16", "no room is an error of the item", ""),
    must("CAS-17", "BatchRead answers every digest", "buck2"),
    must("CAS-18", "BatchRead answers only what was asked", "Pants, buck2"),
    must("CAS-19", "BatchRead entries always carry a status", "Pants"),
    must("CAS-20", "BatchRead compresses only on request", "buck2, Pants, Go SDK"),
    must("CAS-21", "BatchRead beyond the limit is refused", "justbuild, buck2, Go SDK, Pants"),
    must("CAS-22", "BatchRead data is whole and right", ""),
    should("CAS-23", "a malformed digest fails its own entry", ""),
    must("CAS-24", "GetTree sends every directory, once", "Go SDK"),
    should("CAS-25", "GetTree sends parents before children", ""),
    must("CAS-26", "GetTree skips absent descendants, not roots", "Bazel"),
    must("CAS-27", "GetTree streams the whole tree in one call", "Go SDK, reclient, Please"),
    must("CAS-28", "GetTree resumes from its page tokens", "Go SDK"),
    must("CAS-29", "GetTree refuses a root that is no Directory", ""),
    must("CAS-30", "split chunks are the blob", "Bazel"),
    must("CAS-31", "split chunks can be read", ""),
    must("CAS-32", "splitting what is absent is NOT_FOUND", "Bazel"),
    must("CAS-33", "chunks keep to the chunking function's bounds", "Bazel"),
    should("CAS-34", "FastCDC chunks match the reference", ""),
    must("CAS-35", "a splice that is not the digest's is refused", ""),
    must("CAS-36", "a splice needs its chunks, in order", ""),
    must("CAS-37", "a spliced blob works everywhere", "justbuild"),
    should("CAS-38", "splicing again is OK", "Bazel"),
];

/// The rules about ByteStream.
pub const BS: &[Rule] = &[
    must("BS-01", "read names have any instance depth", "all"),
    must("BS-02", "write names may go on after the size", ""),
    must("BS-03", "the function segment is required where it is", "Bazel, buck2"),
    must("BS-04", "an unknown compressor is no missing blob", "Bazel"),
    must("BS-05", "malformed names are refused by all three calls", ""),
    should("BS-06", "uploads are keyed by the whole name", "justbuild"),
    must("BS-07", "Read sends exactly the blob from the offset", "Bazel"),
    must("BS-08", "reading an absent blob is NOT_FOUND", "Bazel, Pants"),
    must("BS-09", "read offsets stop at the size", ""),
    must("BS-10", "read limits cap the bytes", "Go SDK"),
    must("BS-11", "compressed reads take no limit", ""),
    must("BS-12", "compressed read offsets count plain bytes", "Bazel"),
    should("BS-13", "compressed reads decode with default settings", "Bazel, buck2"),
    should("BS-14", "read messages are neither tiny nor huge", ""),
    should("BS-15", "no read message is empty", "justbuild"),
    must("BS-16", "a read never ends OK short", ""),
    should("BS-17", "slow readers cost bounded memory", ""),
    must("BS-18", "the write name comes first and never changes", "Bazel, buck2, Go SDK, Pants, justbuild"),
    must("BS-19", "write offsets are contiguous", ""),
    must("BS-20", "an upload restarts or resumes", "Go SDK, buck2, Bazel"),
    must("BS-21", "nothing is visible before finish_write", "all"),
    must("BS-22", "wrong content is refused", "Bazel"),
    must("BS-23", "committed_size is the size", "Bazel, buck2, Pants, justbuild, Go SDK"),
    must("BS-24", "writing what is stored ends OK", "Bazel, Go SDK"),
    must("BS-25", "a compressed upload answers its length", "Bazel, buck2"),
    must("BS-26", "compressed uploads are verified", ""),
    must("BS-27", "compressed frames may be split anywhere", "Bazel"),
    must("BS-28", "simultaneous uploads all succeed", ""),
    must("BS-29", "a broken upload leaves nothing", ""),
    must("BS-30", "the empty blob can be uploaded", "Pants"),
    must("BS-31", "QueryWriteStatus follows the upload", "Bazel, justbuild"),
    should("BS-32", "an unknown upload is at 0", "Bazel"),
    must("BS-33", "compressed uploads are resumed by plain offset", "Bazel"),
];

/// The rules about ActionCache.
pub const AC: &[Rule] = &[
    must("AC-01", "a miss is NOT_FOUND", "Bazel"),
    must("AC-02", "the key is the whole action digest", ""),
    must("AC-03", "a hit is complete", "Bazel, buck2"),
    should("AC-04", "a hit extends the life of its blobs", ""),
    should("AC-05", "nothing is inlined unasked", ""),
    must("AC-06", "inlined bytes are the digest's", "Bazel, Pants"),
    must("AC-07", "inlining gives way to the size limit", ""),
    must("AC-08", "an update is seen and replaces", "Bazel, Please, Go SDK, buck2"),
    must("AC-09", "results carry execution metadata", "buck2"),
    must("AC-10", "malformed results are refused", "Bazel"),
    may("AC-11", "results with absent outputs are no hits", "Please"),
    must("AC-12", "updates that are off are refused as such", "Bazel"),
    should("AC-13", "failed results are no hits", "Bazel, justbuild"),
    must("AC-14", "unused fields come back unchanged", ""),
    should("AC-15", "a cache policy is harmless", ""),
];

/// The rules about Execution.
pub const EXE: &[Rule] = &[
    must("EXE-01", "the first Operation comes at once", "Bazel"),
    must("EXE-02", "an operation keeps its name", "Bazel, Go SDK, Pants"),
    must("EXE-03", "every message carries metadata", "Bazel, buck2, Pants, Please"),
    must("EXE-04", "stages are real", "Pants, Bazel"),
    must("EXE-05", "COMPLETED and done come together, last", "Go SDK, justbuild"),
    should("EXE-06", "stages move forward", "Pants"),
    must("EXE-07", "the end is a response, never an error", "justbuild, buck2, Please"),
    must("EXE-08", "a result is present whenever it ran", "Bazel, buck2, Pants, Please"),
    must("EXE-09", "late problems are inline", ""),
    must("EXE-10", "a stream never ends OK before done", "buck2, Bazel, Pants"),
    should("EXE-11", "waiting streams hear something", "Bazel"),
    must("EXE-12", "WaitExecution answers at once and to the end", ""),
    must("EXE-13", "WaitExecution of an unknown name is NOT_FOUND", "Bazel, Go SDK, Please"),
    should("EXE-14", "an operation outlives its client", ""),
    may("EXE-15", "identical actions may share a run", ""),
    must("EXE-16", "cached_result is truthful", "Bazel, Pants, Please"),
    must("EXE-17", "skip_cache_lookup runs and replaces", "Bazel, Pants"),
    should("EXE-18", "a success is cached by done", ""),
    must("EXE-19", "failures and do_not_cache are not cached", ""),
    should("EXE-20", "a non-zero exit is not cached", "Bazel"),
    must("EXE-21", "an incomplete cached result is not used", ""),
    must("EXE-22", "missing inputs are FAILED_PRECONDITION, MISSING", "Bazel"),
    must("EXE-23", "the subject names the blob", "Pants"),
    must("EXE-24", "missing inputs are the only detail", "Pants, Bazel"),
    should("EXE-25", "missing inputs are reported inline", "Pants, Bazel"),
    should("EXE-26", "all missing inputs are listed", "Pants"),
    must("EXE-27", "malformed actions are argument errors", ""),
    must("EXE-28", "hostile directory entries are refused", ""),
    must("EXE-29", "paths that leave the root are refused", "Bazel"),
    may("EXE-30", "non-canonical messages", ""),
    must("EXE-31", "platform comes from Action or Command", "buck2, Pants, Bazel"),
    must("EXE-32", "invalid timeouts are refused", ""),
    must("EXE-33", "the input root is reproduced exactly", "Bazel"),
    must("EXE-34", "is_executable decides the x bits", ""),
    must("EXE-35", "input symlinks keep their target", ""),
    must("EXE-36", "absolute input symlinks follow the strategy", ""),
    should("EXE-37", "input node properties are applied", "Bazel, BuildStream"),
    must("EXE-38", "parents of outputs exist", "Bazel, buck2"),
    must("EXE-39", "the working directory is honoured", "reclient"),
    must("EXE-40", "arguments arrive byte for byte", "Bazel"),
    must("EXE-41", "the environment is the Command's", ""),
    must("EXE-42", "a program that cannot start fails clearly", ""),
    must("EXE-43", "each action starts from a fresh tree", ""),
    should("EXE-44", "stdin is empty and nothing outlives the action", ""),
    must("EXE-45", "a timeout is inline, with the output so far", "Bazel, justbuild, Pants"),
    must("EXE-46", "the exit code is passed through", ""),
    must("EXE-47", "output_paths decide alone", "Bazel, Please, Pants, buck2"),
    must("EXE-48", "output paths are spelled as requested", "Bazel, Please, justbuild, Pants"),
    must("EXE-49", "each output appears exactly once", "Bazel"),
    must("EXE-50", "an output not produced is left out", "Bazel"),
    must("EXE-51", "legacy output lists", "buck2"),
    must("EXE-52", "output symlinks keep their target", ""),
    should("EXE-53", "output symlinks are in both generations of fields", "buck2, Go SDK, reclient, Bazel"),
    must("EXE-54", "outputs are stored before done", "Bazel"),
    must("EXE-55", "a Tree is whole and canonical", "Bazel, Go SDK, buck2, justbuild"),
    must("EXE-56", "the Tree of an empty directory is 0a 00", "Bazel"),
    must("EXE-57", "a sorted Tree is sorted", ""),
    must("EXE-58", "output_directory_format", "Bazel, buck2, Go SDK, Pants, justbuild, BuildStream"),
    must("EXE-59", "stdout and stderr are blobs, inlined on request", "Bazel, Pants"),
    must("EXE-60", "execution metadata is present and ordered", "buck2, Bazel, justbuild"),
    should("EXE-61", "server logs are readable blobs", "Bazel"),
    must("EXE-62", "a lost worker is UNAVAILABLE or invisible", "Bazel, Pants, justbuild"),
    may("EXE-63", "output_node_properties", ""),
    may("EXE-64", "live log streams can be read", ""),
];

/// The rules about google.longrunning.Operations.
pub const OPS: &[Rule] = &[
    should("OPS-01", "GetOperation shows what the stream shows", ""),
    may("OPS-02", "absent methods are UNIMPLEMENTED", ""),
    should("OPS-03", "CancelOperation ends the operation", "Pants"),
    must("OPS-04", "one client's cancel leaves the others", ""),
    should("OPS-05", "WaitOperation keeps to its timeout", ""),
];

/// The rules about Remote Asset.
pub const AST: &[Rule] = &[
    must("AST-01", "a malformed fetch is refused", ""),
    must("AST-02", "an unsupported qualifier is refused", ""),
    should("AST-03", "Bazel's qualifiers are supported", "Bazel, Please"),
    must("AST-04", "checksum.sri is verified", ""),
    must("AST-05", "origin failures are inline", "Bazel"),
    must("AST-06", "what was fetched is in the CAS", ""),
    must("AST-07", "the digest function is the request's", "Bazel"),
    must("AST-08", "stale content is not returned", "Bazel"),
    should("AST-09", "every URI is tried", ""),
    must("AST-10", "only allowed hosts are contacted", ""),
    may("AST-11", "pushed content can be fetched", ""),
];

/// The rules about LogStream.
pub const LOG: &[Rule] = &[
    must("LOG-01", "a log stream has a name and a secret", ""),
    must("LOG-02", "names are for reading or for writing", ""),
    must("LOG-03", "a Read follows the stream", ""),
    must("LOG-04", "streams are append-only", ""),
    must("LOG-05", "a Write may go on later", "Go SDK"),
];
