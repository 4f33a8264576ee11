//! [`QuotaRules`]: what each principal may use in each instance. Pure.

use crate::access::principal::{begins_a_name, is_name};

/// What one principal may use in one instance. `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QuotaLimits {
    /// Maximum number of unfinished operations.
    pub operations: Option<usize>,
    /// Unfinished operations that wait for a worker.
    pub queued: Option<usize>,
    /// Uploaded bytes per hour.
    pub upload_bytes: Option<u64>,
    /// Maximum number of requests per second, on average.
    pub requests: Option<u64>,
}

/// Which principals a limit is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PrincipalPattern {
    /// The principal with this name.
    Named(String),
    /// The principals whose names begin with this text. Each has an account of its own.
    Prefix(String),
}

impl PrincipalPattern {
    /// Parses the name of a principal, or the beginning of a name followed by `*`. `None` if the text is neither.
    pub fn parse(text: &str) -> Option<Self> {
        match text.strip_suffix('*') {
            Some(prefix) if !prefix.contains('*') => Some(Self::Prefix(prefix.to_owned())),
            None if !text.is_empty() && !text.contains('*') => Some(Self::Named(text.to_owned())),
            _ => None,
        }
    }

    /// Whether there can be a principal that matches.
    pub(crate) fn can_match(&self) -> bool {
        match self {
            Self::Named(name) => is_name(name),
            Self::Prefix(prefix) => begins_a_name(prefix),
        }
    }

    /// How closely the pattern describes a principal; `None` if it does not match.
    fn closeness(&self, name: &str) -> Option<usize> {
        match self {
            Self::Named(own) => (own == name).then_some(usize::MAX),
            Self::Prefix(prefix) => name.starts_with(prefix.as_str()).then_some(prefix.len()),
        }
    }
}

/// The limits of all principals.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct QuotaRules {
    /// The limits of principals that are not listed.
    pub default: QuotaLimits,
    /// The limits of the others. The closest pattern applies.
    pub principals: Vec<(PrincipalPattern, QuotaLimits)>,
}

impl QuotaRules {
    /// Whether no principal has a limit.
    pub fn are_off(&self) -> bool {
        let mut all = self.principals.iter().map(|(_, limits)| limits).chain([&self.default]);
        all.all(|limits| *limits == QuotaLimits::default())
    }

    /// The limits of a principal.
    pub fn of(&self, name: &str) -> QuotaLimits {
        let described = self.principals.iter();
        let described = described.filter_map(|(pattern, limits)| Some((pattern.closeness(name)?, limits)));
        described.max_by_key(|(closeness, _)| *closeness).map_or(self.default, |(_, limits)| *limits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closest_description_of_a_principal_counts() {
        let limits = |operations| QuotaLimits { operations: Some(operations), ..QuotaLimits::default() };
        let entry = |text: &str, operations| (PrincipalPattern::parse(text).unwrap(), limits(operations));
        let rules = QuotaRules {
            default: limits(1),
            principals: vec![
                entry("jwt:https://x#*", 2),
                entry("jwt:*", 3),
                entry("jwt:https://x#me", 4),
                entry("anonymous", 5),
            ],
        };
        let of = |name| rules.of(name).operations.unwrap();
        assert_eq!(["jwt:https://x#you", "jwt:y", "jwt:https://x#me", "anonymous"].map(of), [2, 3, 4, 5]);
        assert_eq!(["jwt", "token:ci", "anonymous2"].map(of), [1; 3]);
        assert!(!rules.are_off() && QuotaRules::default().are_off());
        for text in ["", "a*b", "**", "*a"] {
            assert_eq!(PrincipalPattern::parse(text), None, "{text}");
        }
        assert_eq!(PrincipalPattern::parse("*"), Some(PrincipalPattern::Prefix(String::new())));
    }
}
