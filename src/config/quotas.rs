//! `[quotas]`: the settings of quotas, and their checks.

use super::checker::{Checker, MIN_SIZE, size_range};
use crate::{
    quotas::limits::{PrincipalPattern, QuotaLimits, QuotaRules},
    size::Size,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Maximum number of entries of `[quotas.principals]`. Each request of a principal is compared with all of them.
const MAX_PRINCIPALS: usize = 256;

/// The `[quotas]` section: the limits of each principal in each instance. 0 means no limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuotasConfig {
    /// Maximum number of unfinished operations; 0 for no limit.
    pub operations: usize,
    /// Maximum number of operations that wait for a worker; 0 for no limit.
    pub queued: usize,
    /// Maximum number of bytes that are uploaded in an hour; 0 for no limit.
    pub upload_per_hour_gb: Size,
    /// Maximum number of requests per second; 0 for no limit.
    pub requests_per_second: u64,
    /// Other limits of principals, by name or by the beginning of the name and `*`.
    pub principals: BTreeMap<String, PrincipalQuotaConfig>,
}

impl Default for QuotasConfig {
    fn default() -> Self {
        Self {
            operations: 0,
            queued: 0,
            upload_per_hour_gb: Size::from_gb(0),
            requests_per_second: 0,
            principals: BTreeMap::new(),
        }
    }
}

/// The limits of a principal that differ.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrincipalQuotaConfig {
    /// Maximum number of unfinished operations; `None` for the general limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operations: Option<usize>,
    /// Maximum number of operations that wait for a worker; `None` for the general limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queued: Option<usize>,
    /// Maximum number of bytes that are uploaded in an hour; `None` for the general limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upload_per_hour_gb: Option<Size>,
    /// Maximum number of requests per second; `None` for the general limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_second: Option<u64>,
}

pub(super) fn quotas(check: &mut Checker<'_>) -> QuotaRules {
    let config = &check.loaded.config.quotas;
    let key = "quotas.principals";
    check.require(
        key,
        config.principals.len() <= MAX_PRINCIPALS,
        &format!("has more than {MAX_PRINCIPALS} entries"),
    );
    if config.upload_per_hour_gb.bytes() > 0 {
        check.size("quotas.upload_per_hour_gb", config.upload_per_hour_gb);
    }
    let mut principals = Vec::new();
    for (name, own) in &config.principals {
        let Some(pattern) = PrincipalPattern::parse(name) else {
            let problem = format!(
                "\"{}\" is neither the name of a principal (token:ID) nor the beginning of names (jwt:*)",
                name.escape_debug()
            );
            check.require(key, false, &problem);
            continue;
        };
        let problem = format!(
            "\"{}\" matches no principal: their names are anonymous, token:ID, basic:USER, cert:SUBJECT and \
             jwt:ISSUER#SUBJECT",
            name.escape_debug()
        );
        check.require(key, pattern.can_match(), &problem);
        let size = own.upload_per_hour_gb.unwrap_or(config.upload_per_hour_gb);
        if own.upload_per_hour_gb.is_some_and(|size| size.bytes() > 0) {
            let problem = format!("upload_per_hour_gb of \"{}\" {}", name.escape_debug(), size_range());
            check.require(key, size >= MIN_SIZE, &problem);
        }
        let limits = limits(
            own.operations.unwrap_or(config.operations),
            own.queued.unwrap_or(config.queued),
            size,
            own.requests_per_second.unwrap_or(config.requests_per_second),
        );
        principals.push((pattern, limits));
    }
    let (operations, queued) = (config.operations, config.queued);
    let default = limits(operations, queued, config.upload_per_hour_gb, config.requests_per_second);
    QuotaRules { default, principals }
}

fn limits(operations: usize, queued: usize, upload: Size, requests: u64) -> QuotaLimits {
    let count = |count: usize| (count > 0).then_some(count);
    QuotaLimits {
        operations: count(operations),
        queued: count(queued),
        upload_bytes: (upload.bytes() > 0).then_some(upload.bytes()),
        requests: (requests > 0).then_some(requests),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::load::from_text;
    use std::path::Path;

    fn rules(text: &str) -> Result<QuotaRules, Vec<String>> {
        let loaded = from_text(Path::new("gorego.toml"), text).unwrap();
        let mut check = Checker::new(&loaded);
        let rules = quotas(&mut check);
        if check.problems.is_empty() { Ok(rules) } else { Err(check.problems) }
    }

    #[test]
    fn a_principal_has_the_common_limits_where_it_has_none_of_its_own() {
        assert!(rules("").unwrap().are_off());
        let rules = rules(
            r#"
            [quotas]
            operations = 100
            upload_per_hour_gb = "10 GB"
            [quotas.principals]
            "token:ci" = { operations = 0, requests_per_second = 500 }
            "jwt:*" = { queued = 5 }
            "#,
        )
        .unwrap();
        let (hour, none) = (Some(10_000_000_000), None);
        let limits = |operations, queued, upload_bytes, requests| QuotaLimits {
            operations,
            queued,
            upload_bytes,
            requests,
        };
        assert_eq!(rules.of("basic:me"), limits(Some(100), none, hour, None));
        assert_eq!(rules.of("token:ci"), limits(None, none, hour, Some(500)));
        assert_eq!(rules.of("jwt:x#y"), limits(Some(100), Some(5), hour, None));
    }

    #[test]
    fn a_pattern_that_can_match_no_principal_is_refused_with_the_names_that_there_are() {
        let listed = |name: &str| rules(&format!("[quotas.principals]\n\"{name}\" = {{ operations = 1 }}"));
        for name in ["tokn:6b33", "tokn:*", "token", "token:", "Anonymous", "anonymous2", "alice", "jtw*"] {
            let error = listed(name).unwrap_err().join("\n");
            assert!(error.contains(&format!("\"{name}\" matches no principal")), "{error}");
            assert!(error.contains("token:ID") && error.contains("anonymous"), "{error}");
        }
        let fine = [
            "token:6b33",
            "basic:a",
            "cert:CN=a",
            "jwt:x#y",
            "anonymous",
            "*",
            "tok*",
            "token:*",
            "cert:CN=*",
        ];
        for name in fine {
            assert!(listed(name).is_ok(), "{name}");
        }
    }

    #[test]
    fn invalid_principals_and_sizes_are_refused() {
        let refused = |text: &str| rules(text).unwrap_err().join("\n");
        assert!(refused("[quotas.principals]\n\"a*b\" = {}").contains("\"a*b\" is neither"));
        assert!(refused("[quotas]\nupload_per_hour_gb = \"5 KB\"").contains("quotas.upload_per_hour_gb"));
        assert!(
            refused("[quotas.principals]\n\"jwt:*\" = { upload_per_hour_gb = \"5 KB\" }")
                .contains("quotas.principals")
        );
    }
}
