//! Signed tokens, key sets, the credentials of requests, and the files of static tokens and passwords. The first byte
//! selects one of them.

#![no_main]

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use gorego::access::{
    basic::PasswordFile,
    credential::{CREDENTIAL_MAX_BYTES, Credential},
    jwt::{
        ClaimRole, IssuerRules, IssuerSettings, JwksLocation, KeySet, MAX_KEYS, RefusalKind,
        SignatureAlgorithm, verify_with,
    },
    tokens::TokenFile,
};
use http::{HeaderMap, HeaderValue, header::AUTHORIZATION};
use libfuzzer_sys::fuzz_target;
use std::{
    path::Path,
    sync::LazyLock,
    time::{Duration, UNIX_EPOCH},
};

/// The public key of RFC 8037, appendix A. Nothing here signs with it.
const KEYS: &str =
    r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo","kid":"k"}]}"#;
const HEADER: &str = r#"{"alg":"EdDSA","kid":"k"}"#;
const PAYLOAD: &str = r#"{"iss":"i","aud":"a","sub":"s","exp":2000000000,"owner":"us"}"#;

static ISSUER: LazyLock<(IssuerRules, KeySet)> = LazyLock::new(|| {
    let claims = [("owner".to_owned(), vec!["us".to_owned()])];
    let settings = IssuerSettings {
        issuer: "i".into(),
        audience: vec!["a".into()],
        algorithms: SignatureAlgorithm::ALL.map(|algorithm| algorithm.name().to_owned()).to_vec(),
        claims: claims.into(),
        roles: vec![ClaimRole { role: "ci".into(), claims: Default::default() }],
        leeway: Duration::from_secs(60),
    };
    let rules = IssuerRules::new(&settings).expect("the rules are right");
    (rules, KeySet::parse(KEYS.as_bytes()).expect("the keys are right"))
});

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match (kind % 7, std::str::from_utf8(data)) {
        (0, Ok(token)) => refused(token, &ISSUER.1),
        (1, Ok(texts)) => {
            let (header, payload) = texts.split_once('\n').unwrap_or((texts, PAYLOAD));
            refused(&token(header, payload), &ISSUER.1);
        }
        (2, _) => {
            if let Ok(keys) = KeySet::parse(data) {
                assert!((1..=MAX_KEYS).contains(&keys.count()) && keys.left_out().len() < MAX_KEYS);
                refused(&token(HEADER, PAYLOAD), &keys);
            }
        }
        (3, _) => credential(data),
        (4, Ok(text)) => {
            let location = JwksLocation::parse(text, Path::new("/"));
            // The URL may still have a host that cannot exist, such as 1.2.3.4.5.
            if let Ok(JwksLocation::Url(url)) = location
                && let Ok(url) = url::Url::parse(&url)
            {
                assert!(url.host().is_some() && url.username().is_empty() && url.password().is_none());
            }
        }
        (5, Ok(text)) => {
            if let Ok(list) = TokenFile::parse(text) {
                let written = list.render().expect("what was read can be written");
                assert_eq!(TokenFile::parse(&written).as_ref(), Ok(&list));
            }
        }
        (6, Ok(text)) => {
            if let Err(error) = PasswordFile::parse(text) {
                assert!(!error.to_string().contains(['\n', '\r']), "{error}");
            }
        }
        _ => {}
    }
});

/// A token with an arbitrary signature.
fn token(header: &str, payload: &str) -> String {
    let [header, payload, signature] =
        [header.as_bytes(), payload.as_bytes(), &[7; 64]].map(|part| URL_SAFE_NO_PAD.encode(part));
    format!("{header}.{payload}.{signature}")
}

/// No token is accepted, and the reason is one short line.
fn refused(token: &str, keys: &KeySet) {
    let now = UNIX_EPOCH + Duration::from_secs(1_900_000_000);
    let refusal = verify_with(&ISSUER.0, keys, token, now).expect_err("nobody signed it");
    assert!(refusal.reason.len() < 2_000 && !refusal.reason.contains(['\n', '\r']), "{refusal}");
    // The claims of a token are not evaluated before its signature is checked.
    assert!(!matches!(refusal.kind, RefusalKind::Expired | RefusalKind::NotYetValid | RefusalKind::Claims));
}

fn credential(bytes: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in bytes.split(|byte| *byte == b'\n').take(3) {
        if let Ok(value) = HeaderValue::from_bytes(line) {
            headers.append(AUTHORIZATION, value);
        }
    }
    match Credential::parse(&headers) {
        Ok(None) => assert!(headers.is_empty()),
        Ok(Some(Credential::Bearer(token))) => assert!(token.len() <= CREDENTIAL_MAX_BYTES),
        Ok(Some(Credential::Basic { user, .. })) => assert!(!user.is_empty()),
        Err(rejection) => assert!(!rejection.to_string().contains(['\n', '\r'])),
    }
}
