//! `[[access.jwt]]`: the settings of issuers of signed tokens, and their checks.

use super::{Machine, checker::Checker};
use crate::access::jwt::{
    ClaimRole, ClaimSettings, IssuerRules, IssuerSettings, JwksLocation, JwtSettings, KeySettings,
};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, SeqAccess, Visitor},
};
use std::{collections::BTreeMap, fmt, ops::RangeInclusive, time::Duration};

/// Maximum number of issuers. The keys of each are fetched separately.
const MAX_ISSUERS: usize = 32;
/// The allowed intervals for fetching keys. A shorter interval would burden the issuer, and with a longer one a removed
/// key would be accepted for too long.
const REFRESH: RangeInclusive<Duration> = Duration::from_secs(60)..=Duration::from_secs(24 * 3600);
/// Maximum time for which keys are used without an answer of the issuer.
const MAX_STALE: Duration = Duration::from_secs(30 * 24 * 3600);

/// An `[[access.jwt]]` section: an issuer of signed tokens, and the rules for its tokens. Keys without a default must
/// be set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JwtConfig {
    /// The exact issuer (`iss`).
    pub issuer: String,
    /// The accepted audiences (`aud`).
    pub audience: Texts,
    /// The signature algorithms that are accepted, by their JWT names.
    pub algorithms: Texts,
    /// The file or https URL with the keys of the issuer.
    pub jwks: String,
    /// Conditions on claims: the patterns of each, one of which must match.
    pub claims: BTreeMap<String, Texts>,
    /// The roles that tokens give.
    pub roles: Vec<ClaimRoleConfig>,
    /// How far the clocks of issuer and server may differ.
    #[serde(with = "humantime_serde")]
    pub leeway: Duration,
    /// How often the keys are fetched from a URL.
    #[serde(with = "humantime_serde")]
    pub refresh: Duration,
    /// How long keys are used after they were last fetched.
    #[serde(with = "humantime_serde")]
    pub max_stale: Duration,
}

/// A role for the tokens whose claims meet further conditions.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ClaimRoleConfig {
    /// The name of the role.
    pub role: String,
    /// The conditions; none for all accepted tokens.
    pub claims: BTreeMap<String, Texts>,
}

impl Default for JwtConfig {
    fn default() -> Self {
        Self {
            issuer: String::new(),
            audience: Texts::default(),
            algorithms: Texts::default(),
            jwks: String::new(),
            claims: BTreeMap::new(),
            roles: Vec::new(),
            leeway: Duration::from_secs(60),
            refresh: Duration::from_secs(15 * 60),
            max_stale: Duration::from_secs(24 * 3600),
        }
    }
}

/// One text or a list of texts.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Texts(Vec<String>);

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextsVisitor)
    }
}

struct TextsVisitor;

impl<'de> Visitor<'de> for TextsVisitor {
    type Value = Texts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"value\" or [\"value\", \"other\"]")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Texts, E> {
        Ok(Texts(vec![text.to_owned()]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Texts, A::Error> {
        let mut texts = Vec::new();
        while let Some(text) = list.next_element()? {
            texts.push(text);
        }
        Ok(Texts(texts))
    }
}

/// Checks the issuers. Nothing is read or fetched yet.
pub(super) fn issuers(check: &mut Checker<'_>, machine: &Machine) -> Vec<JwtSettings> {
    let configured = &check.loaded.config.access.jwt;
    let mut problems = Vec::new();
    if configured.len() > MAX_ISSUERS {
        problems.push(format!("there are {} issuers; at most {MAX_ISSUERS} are possible", configured.len()));
    }
    let mut issuers: Vec<JwtSettings> = Vec::new();
    for (number, config) in configured.iter().enumerate() {
        let mut of_issuer = Vec::new();
        if let Some(settings) = issuer(config, machine, &mut of_issuer) {
            if issuers.iter().any(|other| clash(other, &settings)) {
                of_issuer.push(("audience", "is also in another entry with the same issuer".into()));
            }
            issuers.push(settings);
        }
        let of_issuer = of_issuer.into_iter();
        problems.extend(of_issuer.map(|(key, problem)| format!("{key} of entry {} {problem}", number + 1)));
    }
    for problem in problems {
        let origin = check.loaded.origin("access.jwt");
        check.problems.push(format!("access.jwt ({origin}): {problem}"));
    }
    issuers
}

fn issuer(
    config: &JwtConfig,
    machine: &Machine,
    problems: &mut Vec<(&'static str, String)>,
) -> Option<JwtSettings> {
    let texts = |texts: &Texts| texts.0.clone();
    let claims = |claims: &BTreeMap<String, Texts>| -> ClaimSettings {
        claims.iter().map(|(claim, patterns)| (claim.clone(), texts(patterns))).collect()
    };
    let role =
        |entry: &ClaimRoleConfig| ClaimRole { role: entry.role.clone(), claims: claims(&entry.claims) };
    let rules = IssuerSettings {
        issuer: config.issuer.clone(),
        audience: texts(&config.audience),
        algorithms: texts(&config.algorithms),
        claims: claims(&config.claims),
        roles: config.roles.iter().map(role).collect(),
        leeway: config.leeway,
    };
    if let Err(more) = IssuerRules::new(&rules) {
        problems.extend(more);
    }
    if !REFRESH.contains(&config.refresh) {
        problems.push(("refresh", "is not between one minute and one day".into()));
    }
    if config.max_stale < config.refresh || config.max_stale > MAX_STALE {
        problems.push(("max_stale", "is shorter than refresh, or longer than 30 days".into()));
    }
    match JwksLocation::parse(&config.jwks, &machine.current_dir) {
        Ok(location) => {
            let keys = KeySettings { location, refresh: config.refresh, max_stale: config.max_stale };
            Some(JwtSettings { rules, keys })
        }
        Err(problem) => {
            problems.push(("jwks", problem));
            None
        }
    }
}

/// Whether a token could match both entries. The conditions that it must meet would then depend on the order of the
/// entries.
fn clash(one: &JwtSettings, other: &JwtSettings) -> bool {
    let (one, other) = (&one.rules, &other.rules);
    one.issuer == other.issuer && one.audience.iter().any(|audience| other.audience.contains(audience))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Loaded, Settings, load::from_text};
    use std::path::Path;

    const GOOD: &str = r#"
        [[access.jwt]]
        issuer = "https://token.example.com"
        audience = "https://gorego.example.com"
        algorithms = "RS256"
        jwks = "https://token.example.com/jwks"
        claims = { repository_owner = "my-company" }
        roles = [{ role = "ci", claims = { ref = ["refs/heads/main", "refs/tags/*"] } }, { role = "developer" }]
    "#;

    fn machine() -> Machine {
        Machine { cpus: 1, cache_home: Some("/cache".into()), current_dir: "/srv".into() }
    }

    fn loaded(text: &str) -> Loaded {
        from_text(Path::new("gorego.toml"), text).unwrap()
    }

    fn issuers_of(text: &str) -> Result<Vec<JwtSettings>, Vec<String>> {
        let loaded = loaded(text);
        let mut check = Checker::new(&loaded);
        let issuers = issuers(&mut check, &machine());
        if check.problems.is_empty() { Ok(issuers) } else { Err(check.problems) }
    }

    #[test]
    fn an_issuer_is_read_with_its_defaults() {
        let [issuer] = &issuers_of(GOOD).unwrap()[..] else { panic!("one issuer") };
        assert_eq!(issuer.rules.claims["repository_owner"], ["my-company"]);
        assert_eq!(issuer.rules.roles[0].claims["ref"], ["refs/heads/main", "refs/tags/*"]);
        let (minutes, hours) = (Duration::from_secs(15 * 60), Duration::from_secs(24 * 3600));
        let location = JwksLocation::Url("https://token.example.com/jwks".into());
        assert_eq!(issuer.keys, KeySettings { location, refresh: minutes, max_stale: hours });
        let file = issuers_of(&GOOD.replace("https://token.example.com/jwks", "jwks.json")).unwrap();
        assert_eq!(file[0].keys.location, JwksLocation::File("/srv/jwks.json".into()));
    }

    #[test]
    fn the_start_is_refused_without_a_mandatory_key_and_names_it() {
        for key in ["issuer", "audience", "algorithms", "jwks", "claims", "roles"] {
            let text: String = GOOD
                .lines()
                .filter(|line| !line.trim_start().starts_with(key))
                .map(|line| format!("{line}\n"))
                .collect();
            assert_ne!(text.lines().count(), GOOD.lines().count());
            let loaded = loaded(&text);
            let refused = Settings::new(&loaded, &machine()).unwrap_err().to_string();
            assert!(refused.contains(&format!("{key} of entry 1 is missing")), "{refused}");
            assert!(refused.contains("access.jwt (gorego.toml:2)"), "{refused}");
        }
    }

    #[test]
    fn values_that_make_no_sense_are_refused() {
        let refused = |from: &str, to: &str| {
            let changed = GOOD.replacen(from, to, 1);
            assert_ne!(changed, GOOD);
            issuers_of(&changed).unwrap_err().join("\n")
        };
        assert!(
            refused("https://token.example.com/jwks", "http://token.example.com/jwks").contains("use https")
        );
        assert!(refused("algorithms = ", "refresh = \"5s\"\nalgorithms = ").contains("refresh of entry 1"));
        assert!(
            refused("algorithms = ", "max_stale = \"1m\"\nalgorithms = ").contains("max_stale of entry 1")
        );
        assert!(refused("algorithms = ", "leeway = \"1h\"\nalgorithms = ").contains("leeway of entry 1"));
        assert!(refused("RS256", "HS256").contains("symmetric"));
        assert!(refused("my-company", "*").contains("no condition"));
        let twice = issuers_of(&format!("{GOOD}{GOOD}")).unwrap_err();
        assert!(twice[0].contains("audience of entry 2 is also in another entry"), "{twice:?}");
        assert!(
            issuers_of(&format!("{GOOD}{}", GOOD.replace("gorego.example.com", "other.example.com"))).is_ok()
        );
        let mistyped =
            from_text(Path::new("x"), &GOOD.replace("audience", "audiance")).unwrap_err().to_string();
        assert!(mistyped.contains("audiance") && mistyped.contains("audience"), "{mistyped}");
    }
}
