//! Tests of the rules with genuine tokens, forged tokens and expired tokens, and with keys that change.

#[path = "../../../tests/support/key_server.rs"]
mod key_server;
mod rotation;
#[path = "../../../tests/support/tokens.rs"]
mod tokens;

use super::{RefusalKind::*, *};
use crate::size::Size;
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    time::{Duration, UNIX_EPOCH},
};
use tokens::{SigningKey, encode, key_set, symmetric_token};

const ISSUER: &str = "https://token.example.com";
const AUDIENCE: &str = "https://gorego.example.com";
/// The time of these tests, in seconds.
const NOW: u64 = 1_800_000_000;
/// The leeway of the rules.
const LEEWAY: u64 = 60;

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

fn claims_of(pairs: &[(&str, &[&str])]) -> ClaimSettings {
    let texts = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
    pairs.iter().map(|(claim, values)| (claim.to_string(), texts(values))).collect()
}

fn settings() -> IssuerSettings {
    IssuerSettings {
        issuer: ISSUER.into(),
        audience: vec![AUDIENCE.into()],
        algorithms: SignatureAlgorithm::ALL.map(|algorithm| algorithm.name().to_owned()).to_vec(),
        claims: claims_of(&[("repository_owner", &["us"])]),
        roles: vec![
            ClaimRole { role: "ci".into(), claims: claims_of(&[("ref", &["refs/heads/main"])]) },
            ClaimRole { role: "developer".into(), claims: BTreeMap::new() },
            ClaimRole { role: "developer".into(), claims: BTreeMap::new() },
        ],
        leeway: Duration::from_secs(LEEWAY),
    }
}

/// The claims of a good token.
fn claims() -> Value {
    json!({
        "iss": ISSUER, "aud": AUDIENCE, "sub": "repo:us/it", "exp": NOW + 600, "nbf": NOW - 5, "iat": NOW - 5,
        "repository_owner": "us", "ref": "refs/heads/main",
    })
}

/// The claims of a good token, with some of them replaced. A null removes a claim.
fn claims_but(changes: Value) -> Value {
    let mut claims = claims();
    for (name, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => _ = claims.as_object_mut().unwrap().remove(name),
            value => claims[name] = value.clone(),
        }
    }
    claims
}

struct World {
    rules: IssuerRules,
    keys: KeySet,
    rsa: SigningKey,
    p256: SigningKey,
    p384: SigningKey,
    ed25519: SigningKey,
}

fn world() -> World {
    let (rsa, p256) = (SigningKey::rsa("rsa"), SigningKey::p256("p256"));
    let (p384, ed25519) = (SigningKey::p384("p384"), SigningKey::ed25519("ed"));
    let keys = KeySet::parse(key_set(&[&rsa, &p256, &p384, &ed25519]).as_bytes()).unwrap();
    World { rules: IssuerRules::new(&settings()).unwrap(), keys, rsa, p256, p384, ed25519 }
}

impl World {
    fn verify(&self, token: &str) -> Result<VerifiedToken, TokenRefusal> {
        verify_with(&self.rules, &self.keys, token, at(NOW))
    }

    fn refused(&self, token: &str) -> RefusalKind {
        let refusal = self.verify(token).expect_err(token);
        let signature = token.rsplit('.').next().unwrap();
        assert!(signature.len() < 8 || !refusal.reason.contains(signature), "{refusal}");
        assert!(refusal.reason.len() < 500 && !refusal.reason.contains('\n'), "{refusal}");
        refusal.kind
    }

    /// A token with changed claims.
    fn signed(&self, changes: Value) -> String {
        self.ed25519.token("EdDSA", &claims_but(changes))
    }
}

#[test]
fn tokens_of_every_algorithm_are_accepted_and_give_the_roles_of_their_claims() {
    let world = world();
    for algorithm in SignatureAlgorithm::ALL {
        let key = match algorithm.name() {
            "ES256" => &world.p256,
            "ES384" => &world.p384,
            "EdDSA" => &world.ed25519,
            _ => &world.rsa,
        };
        let verified = world.verify(&key.token(algorithm.name(), &claims())).unwrap();
        let expected = VerifiedToken {
            issuer: ISSUER.into(),
            subject: "repo:us/it".into(),
            roles: vec!["ci".into(), "developer".into()],
            expires: at(NOW + 600 + LEEWAY),
            mark: verified.mark,
        };
        assert_eq!(verified, expected, "{algorithm}");
    }
    let branch = world.verify(&world.signed(json!({"ref": "refs/heads/x"}))).unwrap();
    assert_eq!(branch.roles, ["developer"]);
}

#[test]
fn a_signature_by_anything_but_the_named_key_and_algorithm_is_refused() {
    let world = world();
    let good = world.p256.token("ES256", &claims());
    let (message, signature) = good.rsplit_once('.').unwrap();
    let swap = |from: &SigningKey, named: &str, algorithm: &str| {
        from.token_with(&json!({"alg": algorithm, "kid": named}), &claims())
    };
    assert_eq!(world.refused(&swap(&SigningKey::p256("other"), "p256", "ES256")), Signature);
    assert_eq!(world.refused(&swap(&SigningKey::ed25519("other"), "ed", "EdDSA")), Signature);
    assert_eq!(world.refused(&swap(&world.rsa, "p256", "RS256")), Algorithm);
    assert_eq!(world.refused(&format!("{message}.")), Signature);
    assert_eq!(world.refused(&format!("{message}.{}", &signature[..20])), Signature);
    let payload = encode(claims_but(json!({"ref": "refs/heads/x"})).to_string());
    let header = good.split('.').next().unwrap();
    assert_eq!(world.refused(&format!("{header}.{payload}.{signature}")), Signature);
    // An RSA signature of another scheme or hash, under a name that the key allows.
    let texts = |named: &str| (json!({"alg": named, "kid": "rsa"}).to_string(), claims().to_string());
    for (named, used) in [("PS256", "RS256"), ("RS256", "RS512"), ("RS512", "PS512")] {
        let (header, payload) = texts(named);
        assert_eq!(world.refused(&world.rsa.sign_texts(used, &header, &payload)), Signature, "{named}");
    }
    // A signature of zeros, which faulty libraries accept for ECDSA.
    assert_eq!(world.refused(&format!("{message}.{}", encode([0; 64]))), Signature);
}

#[test]
fn unsigned_tokens_and_tokens_with_a_shared_secret_are_refused() {
    let world = world();
    for name in ["none", "None", "NONE", "nOnE", "", "HS257"] {
        let header = encode(json!({"alg": name}).to_string());
        for signature in ["", "AAAA"] {
            let token = format!("{header}.{}.{signature}", encode(claims().to_string()));
            let kind = world.refused(&token);
            assert!(matches!((name, kind), ("", Malformed) | (_, Algorithm)), "{name} {kind:?}");
        }
    }
    // Key confusion: the public key, in each form in which a server may have it, is used as the secret.
    let jwk = world.rsa.jwk();
    let modulus = jwk["n"].as_str().unwrap();
    for secret in [modulus.as_bytes(), jwk.to_string().as_bytes(), key_set(&[&world.rsa]).as_bytes(), b""] {
        for (algorithm, key) in [("HS256", "rsa"), ("HS256", "ed"), ("RS256", "rsa"), ("EdDSA", "ed")] {
            let header = json!({"alg": algorithm, "kid": key});
            let kind = world.refused(&symmetric_token(&header, &claims(), secret));
            assert_eq!(kind, if algorithm == "HS256" { Algorithm } else { Signature });
        }
    }
}

#[test]
fn algorithms_that_are_not_configured_are_refused() {
    let world = world();
    let only = IssuerSettings { algorithms: vec!["RS256".into()], ..settings() };
    let rules = IssuerRules::new(&only).unwrap();
    assert!(verify_with(&rules, &world.keys, &world.rsa.token("RS256", &claims()), at(NOW)).is_ok());
    for token in [world.rsa.token("RS512", &claims()), world.p256.token("ES256", &claims())] {
        let refusal = verify_with(&rules, &world.keys, &token, at(NOW)).unwrap_err();
        assert_eq!(refusal.kind, Algorithm);
    }
}

#[test]
fn a_token_is_accepted_from_its_start_to_its_end_with_the_leeway() {
    let world = world();
    let verify = |changes: Value| world.verify(&world.signed(changes)).map(|_| ()).map_err(|r| r.kind);
    for (changes, expected) in [
        (json!({"exp": NOW - LEEWAY + 1}), Ok(())),
        (json!({"exp": NOW - LEEWAY}), Err(Expired)),
        (json!({"exp": 0}), Err(Expired)),
        (json!({"exp": (NOW as f64) + 0.5}), Ok(())),
        (json!({"nbf": NOW + LEEWAY}), Ok(())),
        (json!({"nbf": NOW + LEEWAY + 1}), Err(NotYetValid)),
        (json!({"iat": NOW + LEEWAY}), Ok(())),
        (json!({"iat": NOW + LEEWAY + 1}), Err(NotYetValid)),
        (json!({"nbf": null, "iat": null}), Ok(())),
        (json!({"exp": null}), Err(Malformed)),
        (json!({"exp": u64::MAX}), Err(Malformed)),
        (json!({"exp": i64::MAX as u64}), Err(Malformed)),
        (json!({"exp": 1e300}), Err(Malformed)),
        (json!({"exp": -1}), Err(Malformed)),
        (json!({"exp": NOW.to_string()}), Err(Malformed)),
        (json!({"nbf": [NOW]}), Err(Malformed)),
        (json!({"iat": "now"}), Err(Malformed)),
    ] {
        assert_eq!(verify(changes.clone()), expected, "{changes}");
    }
    let early = verify_with(&world.rules, &world.keys, &world.signed(json!({})), UNIX_EPOCH);
    assert_eq!(early.unwrap_err().kind, NotYetValid);
}

#[test]
fn issuer_audience_and_subject_are_exact() {
    let world = world();
    let kind = |changes: Value| world.refused(&world.signed(changes));
    for issuer in ["https://token.example.com/", "https://evil.test", "HTTPS://token.example.com"] {
        assert_eq!(kind(json!({"iss": issuer})), Issuer);
    }
    for issuer in [json!([ISSUER]), json!(1), json!(""), Value::Null] {
        assert_eq!(kind(json!({"iss": issuer})), Malformed);
    }
    for audience in [json!("https://gorego.example.com/"), json!(["other"]), json!([]), json!("")] {
        assert_eq!(kind(json!({"aud": audience})), Audience, "{audience}");
    }
    for audience in
        [json!([1]), json!([AUDIENCE, 1]), json!({"a": AUDIENCE}), json!(vec!["a"; 33]), Value::Null]
    {
        assert_eq!(kind(json!({"aud": audience})), Malformed, "{audience}");
    }
    assert!(world.verify(&world.signed(json!({"aud": ["other", AUDIENCE]}))).is_ok());
    for subject in [json!(""), json!(1), json!("x".repeat(2_000)), Value::Null] {
        assert_eq!(kind(json!({"sub": subject})), Malformed);
    }
}

#[test]
fn the_conditions_on_claims_are_checked() {
    let world = world();
    for owner in [json!("them"), json!("us2"), json!(""), json!({"us": "us"}), Value::Null] {
        assert_eq!(world.refused(&world.signed(json!({"repository_owner": owner}))), Claims);
    }
    assert!(world.verify(&world.signed(json!({"repository_owner": ["them", "us"]}))).is_ok());
}

#[test]
fn invalid_tokens_are_refused_and_bounded() {
    let world = world();
    let good = world.signed(json!({}));
    let parts: Vec<&str> = good.split('.').collect();
    let [header, payload, signature] = parts[..] else { panic!("three parts") };
    for token in [
        "".into(),
        ".".into(),
        "..".into(),
        "...".into(),
        header.into(),
        format!("{header}.{payload}"),
        format!("{good}.{signature}"),
        format!("{good}."),
        format!(" {good}"),
        format!("{header}=.{payload}.{signature}"),
        format!("{header}.{payload}==.{signature}"),
        format!("{header}.{}+/.{signature}", &payload[2..]),
        format!("{header}\n.{payload}.{signature}"),
        format!("{payload}.{header}.{signature}"),
        format!("é{good}"),
        "\0.\0.\0".into(),
    ] {
        assert_eq!(world.refused(&token), Malformed, "{token}");
    }
    assert_eq!(world.refused(&format!("{good}=")), Signature, "a padded signature");
    let huge = |bytes: usize| world.signed(json!({"more": "x".repeat(bytes)}));
    assert!(world.verify(&huge(11_000)).is_ok());
    assert_eq!(world.refused(&huge(MAX_TOKEN_BYTES)), Malformed);
    assert_eq!(world.refused(&"a".repeat(Size::from_bytes(10_000_000).bytes() as usize)), Malformed);
    let nested = (0..30).fold(json!(1), |inner, _| json!({ "a": inner }));
    assert_eq!(world.refused(&world.signed(json!({"more": nested}))), Malformed);
    let brackets = format!("{{\"a\":{}", "[".repeat(10_000));
    assert_eq!(
        world.refused(&world.ed25519.sign_texts("EdDSA", r#"{"alg":"EdDSA","kid":"ed"}"#, &brackets)),
        Malformed
    );
    assert_eq!(world.refused(&format!("{}.{payload}.{signature}", encode(brackets))), Malformed);
}

#[test]
fn duplicate_names_and_unknown_demands_are_refused() {
    let world = world();
    let header = r#"{"alg":"EdDSA","kid":"ed"}"#;
    let sign = |header: &str, payload: &str| world.ed25519.sign_texts("EdDSA", header, payload);
    let claims = claims().to_string();
    assert!(world.verify(&sign(header, &claims)).is_ok());
    let twice = claims.replacen('{', r#"{"repository_owner":"them","#, 1);
    assert_eq!(world.refused(&sign(header, &twice)), Malformed);
    for header in [
        r#"{"alg":"EdDSA","kid":"ed","alg":"none"}"#,
        r#"{"alg":"EdDSA","kid":"ed","crit":["exp"]}"#,
        r#"{"alg":"EdDSA","kid":"ed","crit":["b64"],"b64":false}"#,
        r#"{"alg":"EdDSA","kid":"ed","crit":[]}"#,
        r#"{"alg":"EdDSA","kid":"ed","typ":"logout+jwt"}"#,
        r#"{"alg":"EdDSA","kid":1}"#,
        r#"{"alg":"EdDSA","kid":""}"#,
        r#"{"alg":["EdDSA"],"kid":"ed"}"#,
        r#"{"kid":"ed"}"#,
        r#"[]"#,
    ] {
        assert_eq!(world.refused(&sign(header, &claims)), Malformed, "{header}");
    }
    for kind in ["JWT", "jwt", "at+jwt", "application/at+JWT"] {
        let header = json!({"alg": "EdDSA", "kid": "ed", "typ": kind}).to_string();
        assert!(world.verify(&sign(&header, &claims)).is_ok(), "{kind}");
    }
}

/// A token cannot choose the key that it is checked with, except by the id of a known key.
#[test]
fn keys_that_a_token_brings_are_ignored() {
    let world = world();
    let own = SigningKey::ed25519("ed");
    for id in [Some("ed"), None] {
        let mut header = json!({
            "alg": "EdDSA", "jwk": own.jwk(), "jku": "http://127.0.0.1:1/jwks", "x5u": "http://127.0.0.1:1/x",
            "x5c": ["AAAA"],
        });
        if let Some(id) = id {
            header["kid"] = id.into();
        }
        assert_eq!(world.refused(&own.token_with(&header, &claims())), Signature);
        assert!(world.verify(&world.ed25519.token_with(&header, &claims())).is_ok());
    }
}

#[test]
fn a_token_without_a_key_id_needs_a_key_that_is_the_only_one_of_its_kind() {
    let world = world();
    let anonymous = |key: &SigningKey| key.token_with(&json!({"alg": "EdDSA"}), &claims());
    assert!(world.verify(&anonymous(&world.ed25519)).is_ok());
    let two = KeySet::parse(key_set(&[&world.ed25519, &SigningKey::ed25519("2")]).as_bytes()).unwrap();
    let refusal = verify_with(&world.rules, &two, &anonymous(&world.ed25519), at(NOW)).unwrap_err();
    assert_eq!(refusal.kind, Key, "{refusal}");
    // Two keys with the same id, as exist while an issuer replaces a key, are both tried.
    let same = KeySet::parse(key_set(&[&SigningKey::ed25519("ed"), &world.ed25519]).as_bytes()).unwrap();
    assert!(verify_with(&world.rules, &same, &world.signed(json!({})), at(NOW)).is_ok());
}

#[test]
fn keys_that_are_no_public_keys_for_signatures_are_left_out() {
    let (rsa, ed) = (SigningKey::rsa("rsa").jwk(), SigningKey::ed25519("ed").jwk());
    let with = |key: &Value, name: &str, value: Value| {
        let mut key = key.clone();
        key[name] = value;
        key
    };
    let parse = |keys: Value| KeySet::parse(json!({ "keys": keys }).to_string().as_bytes());
    for (key, problem) in [
        (json!({"kty": "oct", "k": "AAAA"}), "symmetric"),
        (with(&rsa, "d", json!("AAAA")), "private"),
        (with(&rsa, "use", json!("enc")), "not for signatures"),
        (with(&rsa, "key_ops", json!(["encrypt"])), "not for checking"),
        (with(&rsa, "alg", json!("RSA-OAEP")), "RSA-OAEP"),
        (with(&rsa, "alg", json!("ES256")), "ES256"),
        (with(&rsa, "alg", json!("HS256")), "HS256"),
        (with(&rsa, "n", json!(encode([0xff; 128]))), "1024 bits"),
        (with(&rsa, "n", json!(encode([0; 256]))), "0 bits"),
        (with(&rsa, "n", json!(encode([0xff; 2048]))), "16384 bits"),
        (with(&rsa, "n", json!("%")), "base64url"),
        (with(&ed, "x", json!(encode([1; 31]))), "length"),
        (with(&ed, "crv", json!("X25519")), "unknown kind"),
        (json!({"kty": "EC", "crv": "secp256k1"}), "unknown kind"),
        (json!("key"), "not an object"),
        (json!({}), "no kty"),
    ] {
        let refused = parse(json!([key])).unwrap_err();
        assert!(refused.contains(problem), "{refused}");
        let set = parse(json!([key, ed])).unwrap();
        assert_eq!((set.count(), set.left_out().len()), (1, 1));
    }
    assert_eq!(
        parse(json!([with(&rsa, "n", json!(encode([&[0, 0], &[0xff; 256][..]].concat())))])).unwrap().count(),
        1
    );
    for document in ["", "[]", "{}", r#"{"keys":{}}"#, r#"{"keys":[]}"#, r#"{"keys":[],"keys":[]}"#] {
        assert!(KeySet::parse(document.as_bytes()).is_err(), "{document}");
    }
    assert!(parse(json!(vec![&ed; MAX_KEYS + 1])).unwrap_err().contains("more than"));
    assert!(KeySet::parse(&vec![b' '; MAX_KEY_SET_BYTES + 1]).unwrap_err().contains("larger"));
}

#[test]
fn every_setting_that_narrows_who_is_accepted_is_mandatory() {
    let problems = |change: fn(&mut IssuerSettings)| {
        let mut changed = settings();
        change(&mut changed);
        IssuerRules::new(&changed).map(|_| ()).unwrap_err()
    };
    let one = |change: fn(&mut IssuerSettings)| {
        let problems = problems(change);
        assert_eq!(problems.len(), 1, "{problems:?}");
        problems[0].clone()
    };
    assert_eq!(one(|s| s.issuer.clear()).0, "issuer");
    assert_eq!(one(|s| s.audience.clear()).0, "audience");
    assert_eq!(one(|s| s.audience = vec!["".into()]).0, "audience");
    assert_eq!(one(|s| s.algorithms.clear()).0, "algorithms");
    assert_eq!(one(|s| s.claims.clear()).0, "claims");
    assert_eq!(one(|s| s.roles.clear()).0, "roles");
    assert_eq!(one(|s| s.leeway = MAX_LEEWAY * 2).0, "leeway");
    let (key, problem) = one(|s| s.algorithms = vec!["RS256".into(), "HS256".into()]);
    assert!(key == "algorithms" && problem.contains("symmetric"), "{problem}");
    assert_eq!(one(|s| s.algorithms = vec!["none".into()]).0, "algorithms");
    assert_eq!(one(|s| s.claims = claims_of(&[("aud", &["x"])])).0, "claims");
    assert_eq!(one(|s| s.claims = claims_of(&[("repository_owner", &["*"])])).0, "claims");
    assert_eq!(one(|s| s.roles[0].claims = claims_of(&[("ref", &[])])).0, "roles");
    let all: Vec<_> = problems(|s| {
        s.issuer.clear();
        s.claims.clear();
    });
    assert_eq!(all.iter().map(|(key, _)| *key).collect::<Vec<_>>(), ["issuer", "claims"]);
}
