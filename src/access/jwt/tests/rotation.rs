//! Tests of keys that change, arrive late or cannot be fetched, by URL and by file. The time of the requests is an
//! argument; only the background task of a cache reads a clock.

use super::{
    RefusalKind::*,
    tokens::{SigningKey, key_set},
    *,
};
use key_server::KeyServer;
use std::path::Path;
use tokio::runtime::Handle;

const MINUTE: Duration = Duration::from_secs(60);

fn jwt_settings(location: &str) -> Vec<JwtSettings> {
    let location = JwksLocation::parse(location, Path::new("/")).unwrap();
    let (refresh, max_stale) = (15 * MINUTE, 60 * MINUTE);
    vec![JwtSettings { rules: settings(), keys: KeySettings { location, refresh, max_stale } }]
}

fn verifier(location: &str, now: SystemTime) -> JwtVerifier {
    JwtVerifier::start(&jwt_settings(location), None, now, &Handle::current(), |_, _| ()).unwrap()
}

/// A token that is valid at the real time, which the background task uses.
fn live_token(key: &SigningKey, now: SystemTime) -> String {
    let now = now.duration_since(UNIX_EPOCH).unwrap().as_secs();
    key.token("EdDSA", &claims_but(json!({"exp": now + 86_400, "nbf": now - 5, "iat": now - 5})))
}

async fn kind(verifier: &JwtVerifier, token: &str, now: SystemTime) -> Option<RefusalKind> {
    verifier.check(token, now).await.err().map(|refusal| refusal.kind)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_key_is_fetched_once_a_minute_and_the_old_one_is_forgotten() {
    let (old, new) = (SigningKey::ed25519("old"), SigningKey::ed25519("new"));
    let server = KeyServer::start(&key_set(&[&old]));
    let now = SystemTime::now();
    let verifier = verifier(&server.url(), now);
    let (of_old, of_new) = (live_token(&old, now), live_token(&new, now));
    assert_eq!(kind(&verifier, &of_old, now).await, None);
    server.publish(&key_set(&[&new]));
    for _ in 0..50 {
        assert_eq!(kind(&verifier, &of_new, now).await, Some(Key));
    }
    assert_eq!(server.requests(), 1, "the first fetch was less than a minute ago");
    assert_eq!(kind(&verifier, &of_old, now).await, None);
    let later = now + MINUTE * 2;
    let requests = (0..20).map(|_| kind(&verifier, &of_new, later));
    assert_eq!(futures::future::join_all(requests).await, [None; 20], "all wait for one request");
    assert_eq!(server.requests(), 2);
    for _ in 0..50 {
        assert_eq!(kind(&verifier, &of_old, later).await, Some(Key));
    }
    assert_eq!(server.requests(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn known_keys_serve_for_the_stated_time_while_the_issuer_does_not_answer() {
    let key = SigningKey::ed25519("key");
    let server = KeyServer::start(&key_set(&[&key]));
    let now = SystemTime::now();
    let verifier = verifier(&server.url(), now);
    let token = live_token(&key, now);
    assert_eq!(kind(&verifier, &token, now).await, None);
    server.answer_with("500 Internal Server Error", "", &key_set(&[&key]));
    assert_eq!(kind(&verifier, &token, now + 59 * MINUTE).await, None);
    let refusal = verifier.check(&token, now + 61 * MINUTE).await.unwrap_err();
    assert_eq!(refusal.kind, KeysUnavailable);
    assert!(refusal.reason.contains("max_stale") && refusal.reason.contains("500"), "{refusal}");
    server.publish(&key_set(&[&key]));
    assert_eq!(
        kind(&verifier, &token, now + 61 * MINUTE).await,
        Some(KeysUnavailable),
        "not before a minute"
    );
    assert_eq!(kind(&verifier, &token, now + 63 * MINUTE).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_but_a_small_and_direct_answer_is_a_key_set() {
    let key = SigningKey::ed25519("key");
    let set = key_set(&[&key]);
    let elsewhere = KeyServer::start(&set);
    let redirect = format!("Location: {}\r\n", elsewhere.url());
    let padded = format!("{}{set}", " ".repeat(MAX_KEY_SET_BYTES));
    let now = SystemTime::now();
    for (status, header, body, problem) in [
        ("302 Found", redirect.as_str(), "", "redirects are not followed"),
        ("307 Temporary Redirect", redirect.as_str(), set.as_str(), "redirects are not followed"),
        ("404 Not Found", "", set.as_str(), "404"),
        ("200 OK", "", padded.as_str(), "larger"),
        ("200 OK", "", "<html>", "not JSON"),
        ("200 OK", "", r#"{"keys":[]}"#, "no key"),
    ] {
        let server = KeyServer::start("");
        server.answer_with(status, header, body);
        let verifier = verifier(&server.url(), now);
        let refusal = verifier.check(&live_token(&key, now), now).await.unwrap_err();
        assert_eq!(refusal.kind, KeysUnavailable);
        assert!(refusal.reason.contains(problem), "{refusal}");
    }
    assert_eq!(elsewhere.requests(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_read_again_when_it_changes_and_a_broken_one_replaces_nothing() {
    let (old, new) = (SigningKey::ed25519("old"), SigningKey::ed25519("new"));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("jwks.json");
    let location = file.to_str().unwrap();
    let now = SystemTime::now();
    let refused =
        JwtVerifier::start(&jwt_settings(location), None, now, &Handle::current(), |_, _| ()).unwrap_err();
    assert!(refused.contains("jwks.json") && refused.contains("cannot be read"), "{refused}");
    std::fs::write(&file, key_set(&[&old])).unwrap();
    let verifier = verifier(location, now);
    assert_eq!(kind(&verifier, &live_token(&old, now), now).await, None);
    std::fs::write(&file, "{").unwrap();
    let later = now + Duration::from_secs(2);
    assert_eq!(kind(&verifier, &live_token(&new, now), later).await, Some(Key));
    assert_eq!(kind(&verifier, &live_token(&old, now), later).await, None);
    std::fs::write(&file, key_set(&[&new])).unwrap();
    assert_eq!(kind(&verifier, &live_token(&new, now), later + MINUTE).await, None);
    assert_eq!(kind(&verifier, &live_token(&old, now), later + MINUTE).await, Some(Key));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_keeps_the_keys_and_a_cache_without_users_ends() {
    let key = SigningKey::ed25519("key");
    let server = KeyServer::start(&key_set(&[&key]));
    let now = SystemTime::now();
    let first = verifier(&server.url(), now);
    let token = live_token(&key, now);
    let mark = first.check(&token, now).await.unwrap().mark;
    let next =
        JwtVerifier::start(&jwt_settings(&server.url()), Some(&first), now, &Handle::current(), |_, _| ())
            .unwrap();
    drop(first);
    assert!(next.trusts(mark), "the rules are the same");
    let mut stricter = jwt_settings(&server.url());
    stricter[0].rules.roles[0].role = "reader".into();
    let stricter = JwtVerifier::start(&stricter, Some(&next), now, &Handle::current(), |_, _| ()).unwrap();
    assert!(!stricter.trusts(mark) && !JwtVerifier::default().trusts(mark));
    drop(stricter);
    server.answer_with("500 Internal Server Error", "", "");
    assert_eq!(kind(&next, &token, now).await, None);
    assert_eq!(server.requests(), 1);
    let cache = Arc::downgrade(&next.issuers[0].keys);
    drop(next);
    // A running attempt ends first.
    let end = std::time::Instant::now() + Duration::from_secs(20);
    while cache.strong_count() > 0 {
        assert!(std::time::Instant::now() < end, "the keys of a dropped verifier are kept");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rules_are_those_of_the_issuer_and_the_audience() {
    let (one, other) = (SigningKey::ed25519("one"), SigningKey::ed25519("one"));
    let servers = [&one, &other].map(|key| KeyServer::start(&key_set(&[key])));
    let mut all: Vec<_> = servers.iter().flat_map(|server| jwt_settings(&server.url())).collect();
    all[1].rules.audience = vec!["other".into()];
    let now = SystemTime::now();
    let verifier = JwtVerifier::start(&all, None, now, &Handle::current(), |_, _| ()).unwrap();
    let seconds = now.duration_since(UNIX_EPOCH).unwrap().as_secs();
    let token = |key: &SigningKey, changes: Value| {
        let mut claims = claims_but(json!({"exp": seconds + 600, "nbf": null, "iat": null}));
        claims.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        key.token("EdDSA", &claims)
    };
    for (key, changes, expected) in [
        (&one, json!({}), None),
        (&other, json!({"aud": "other"}), None),
        (&other, json!({}), Some(Signature)),
        (&one, json!({"aud": "other"}), Some(Signature)),
        (&one, json!({"aud": "third"}), Some(Audience)),
        (&one, json!({"iss": "https://evil.test"}), Some(Issuer)),
    ] {
        assert_eq!(kind(&verifier, &token(key, changes.clone()), now).await, expected, "{changes}");
    }
}
