//! Suggests the key or variable that was meant by an unknown one.

use super::ENV_PREFIX;

/// Minimum similarity (0 to 1, by edit distance) of a mistyped key to a suggested one.
const SUGGESTION_LIMIT: f64 = 0.6;
/// Penalty on the similarity of last segments, compared with the similarity of whole keys.
const LAST_SEGMENT_PENALTY: f64 = 0.05;

/// "; did you mean ...?" if a candidate is close enough. The last segments are compared too, for a key in the wrong
/// section. The common prefix of all variables is ignored, because it would make all of them similar.
pub(super) fn suggestion<'a>(word: &str, candidates: impl Iterator<Item = &'a String>) -> String {
    fn bare(word: &str) -> &str {
        word.strip_prefix(ENV_PREFIX).unwrap_or(word)
    }
    fn tail(word: &str) -> &str {
        let dotted = word.rsplit('.').next().unwrap_or(word);
        dotted.rsplit("__").next().unwrap_or(dotted)
    }
    let word = bare(word);
    candidates
        .map(|candidate| {
            let other = bare(candidate);
            let whole = strsim::normalized_damerau_levenshtein(word, other);
            let tails =
                strsim::normalized_damerau_levenshtein(tail(word), tail(other)) - LAST_SEGMENT_PENALTY;
            (whole.max(tails), candidate)
        })
        .filter(|(likeness, _)| *likeness >= SUGGESTION_LIMIT)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| format!("; did you mean \"{candidate}\"?"))
        .unwrap_or_default()
}
