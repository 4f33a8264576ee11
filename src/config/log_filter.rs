//! The check of `log.filter`.

use log::LevelFilter;
use std::str::FromStr as _;

/// Checks that env_logger understands a filter: `level`, `target` or `target=level`, separated by commas. Its own
/// parser silently ignores what it does not understand, which would lose logs.
///
/// # Errors
/// A sentence that describes the problem.
pub(super) fn check_filter(filter: &str) -> Result<(), String> {
    let (directives, _) = filter.split_once('/').unwrap_or((filter, ""));
    for directive in directives.split(',').map(str::trim).filter(|directive| !directive.is_empty()) {
        let (target, level) = directive.split_once('=').unwrap_or(("", directive));
        let known = LevelFilter::from_str(level.trim()).is_ok();
        // A word that is not a level is a target. But a word that is similar to a level is more likely a typing error.
        if !known && (directive.contains('=') || near_level(level)) {
            let place = if target.is_empty() { String::new() } else { format!(" of target \"{target}\"") };
            return Err(format!(
                "\"{}\"{place} is not a level; levels are error, warn, info, debug, trace and off",
                level.escape_debug()
            ));
        }
    }
    Ok(())
}

fn near_level(word: &str) -> bool {
    let word = word.to_lowercase();
    let levels = ["off", "error", "warn", "info", "debug", "trace"];
    word == "warning" || levels.iter().any(|level| strsim::damerau_levenshtein(&word, level) <= 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_would_be_ignored_is_refused() {
        for good in ["", "info", "WARN,gorego=debug", "gorego::cas=trace, h2=off", "gorego", "info/needle"] {
            assert_eq!(check_filter(good), Ok(()), "{good}");
        }
        for bad in ["warning", "gorego=inof", "inof", "gorego=", "info,h2=loud"] {
            assert!(check_filter(bad).is_err(), "{bad}");
        }
    }
}
