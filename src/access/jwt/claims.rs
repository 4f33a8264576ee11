//! [`ClaimConditions`]: conditions on the claims of a token. Pure.

use super::refusal::shown;
use crate::access::claim_pattern::ClaimPattern;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Maximum number of conditions in a set, and of patterns in a condition.
const MAX_CONDITIONS: usize = 64;

/// Claims that do not identify the holder of the token. A condition on one of them would not restrict access: they are
/// checked anyway, and any user of the issuer may get a token with the same value.
const NON_IDENTIFYING: &[&str] = &["iss", "aud", "exp", "nbf", "iat", "jti"];

/// The settings of conditions: the patterns of each claim, one of which must match.
pub type ClaimSettings = BTreeMap<String, Vec<String>>;

/// A set of conditions, all of which a token must meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ClaimConditions(Vec<ClaimCondition>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct ClaimCondition {
    /// A name, or a path such as `/realm_access/roles` to a nested claim.
    claim: String,
    patterns: Vec<ClaimPattern>,
}

impl ClaimConditions {
    /// Parses conditions.
    ///
    /// # Errors
    /// The problems, each as the part of a sentence that follows the key.
    pub(super) fn parse(settings: &ClaimSettings) -> Result<Self, Vec<String>> {
        let mut problems = Vec::new();
        if settings.len() > MAX_CONDITIONS {
            problems.push(format!("has more than {MAX_CONDITIONS} claims"));
        }
        let mut conditions = Vec::new();
        for (claim, texts) in settings {
            let named = shown(claim);
            if claim.is_empty() || NON_IDENTIFYING.contains(&claim.as_str()) {
                problems.push(format!("has \"{named}\", which says nothing about the holder of a token"));
            }
            if texts.is_empty() || texts.len() > MAX_CONDITIONS {
                problems.push(format!("needs between 1 and {MAX_CONDITIONS} values for \"{named}\""));
            }
            let mut patterns = Vec::with_capacity(texts.len().min(MAX_CONDITIONS));
            for text in texts.iter().take(MAX_CONDITIONS) {
                match ClaimPattern::parse(text) {
                    Ok(pattern) => patterns.push(pattern),
                    Err(problem) => problems.push(format!("has for \"{named}\": {problem}")),
                }
            }
            conditions.push(ClaimCondition { claim: claim.clone(), patterns });
        }
        if problems.is_empty() { Ok(Self(conditions)) } else { Err(problems) }
    }

    /// The first claim that does not meet its condition.
    pub(super) fn unmet(&self, claims: &Map<String, Value>) -> Option<&str> {
        self.0.iter().find(|condition| !condition.is_met(claims)).map(|condition| condition.claim.as_str())
    }
}

impl ClaimCondition {
    fn is_met(&self, claims: &Map<String, Value>) -> bool {
        match find(claims, &self.claim) {
            Some(Value::Array(values)) => values.iter().any(|value| self.fits(value)),
            Some(value) => self.fits(value),
            None => false,
        }
    }

    /// Whether a single value matches. Nested lists and objects never match.
    fn fits(&self, value: &Value) -> bool {
        let written;
        let text = match value {
            Value::String(text) => text,
            Value::Bool(_) | Value::Number(_) => {
                written = value.to_string();
                &written
            }
            Value::Null | Value::Array(_) | Value::Object(_) => return false,
        };
        self.patterns.iter().any(|pattern| pattern.matches(text))
    }
}

/// The claim with this name. A name that begins with "/" is a JSON pointer (RFC 6901).
fn find<'a>(claims: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let Some(path) = name.strip_prefix('/') else { return claims.get(name) };
    let unescaped = |step: &str| step.replace("~1", "/").replace("~0", "~");
    let mut steps = path.split('/').map(unescaped);
    let first = claims.get(&steps.next()?)?;
    steps.try_fold(first, |value, step| value.as_object()?.get(&step))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn conditions(settings: &[(&str, &[&str])]) -> Result<ClaimConditions, Vec<String>> {
        let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        ClaimConditions::parse(
            &settings.iter().map(|(claim, values)| (claim.to_string(), texts(values))).collect(),
        )
    }

    fn unmet(settings: &[(&str, &[&str])], claims: Value) -> Option<String> {
        let Value::Object(claims) = claims else { panic!("an object") };
        conditions(settings).unwrap().unmet(&claims).map(str::to_owned)
    }

    #[test]
    fn every_condition_must_be_met_by_one_of_its_values() {
        let settings: &[(&str, &[&str])] = &[("owner", &["us"]), ("ref", &["main", "release-*"])];
        assert_eq!(unmet(settings, json!({"owner": "us", "ref": "main", "more": 1})), None);
        assert_eq!(unmet(settings, json!({"owner": "us", "ref": "release-2"})), None);
        assert_eq!(unmet(settings, json!({"owner": "us", "ref": "other"})).unwrap(), "ref");
        assert_eq!(unmet(settings, json!({"owner": "them", "ref": "main"})).unwrap(), "owner");
        assert_eq!(unmet(settings, json!({"ref": "main"})).unwrap(), "owner");
    }

    #[test]
    fn lists_numbers_and_claims_in_claims_are_compared_and_objects_are_not() {
        assert_eq!(unmet(&[("groups", &["a"])], json!({"groups": ["b", "a"]})), None);
        assert!(unmet(&[("groups", &["a"])], json!({"groups": [["a"], {"a": "a"}, null]})).is_some());
        assert_eq!(unmet(&[("protected", &["true"])], json!({"protected": true})), None);
        assert_eq!(unmet(&[("id", &["42"])], json!({"id": 42})), None);
        assert_eq!(unmet(&[("/realm/roles", &["a"])], json!({"realm": {"roles": ["a"]}})), None);
        assert!(unmet(&[("/realm/roles", &["a"])], json!({"/realm/roles": "a", "realm": ["a"]})).is_some());
        assert_eq!(unmet(&[("https://x/roles", &["a"])], json!({"https://x/roles": "a"})), None);
        assert_eq!(unmet(&[("/a~1b", &["a"])], json!({"a/b": "a"})), None);
        assert!(unmet(&[("null", &["null"])], json!({"null": null})).is_some());
    }

    #[test]
    fn invalid_conditions_are_refused() {
        for claim in ["aud", "iss", "exp", ""] {
            assert!(conditions(&[(claim, &["x"])]).unwrap_err()[0].contains("nothing about the holder"));
        }
        assert!(conditions(&[("owner", &[])]).unwrap_err()[0].contains("\"owner\""));
        assert!(conditions(&[("owner", &["us", "*"])]).unwrap_err()[0].contains("no condition"));
    }
}
