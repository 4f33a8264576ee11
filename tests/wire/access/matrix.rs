//! The matrix: every principal, every RPC and HTTP request, every instance. The tables of `docs/securing.md` are the
//! expectation; unit tests hold them equal to the code.

use super::{Guarded, call};
use crate::support::http_client;
use bytes::Bytes;
use gorego::access::tokens::NewToken;
use reqwest::{Method, StatusCode};
use std::collections::{BTreeMap, BTreeSet};
use tonic::{Code, Status};

const DOCUMENT: &str = include_str!("../../../docs/securing.md");
/// The instances of the server.
const INSTANCES: [&str; 2] = ["", "team/a"];
const UUID: &str = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";

/// The rows of the table below a heading: the texts in backquotes of the first cells.
fn table(heading: &str) -> Vec<(Vec<&'static str>, Vec<&'static str>)> {
    let section = DOCUMENT.split(&format!("\n{heading}\n")).nth(1).unwrap();
    let rows =
        section.lines().skip_while(|line| !line.starts_with("| `")).take_while(|line| line.starts_with('|'));
    let quoted = |cell: &'static str| cell.split('`').skip(1).step_by(2).collect::<Vec<_>>();
    let rows = rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').collect();
        let needs = if cells[1].trim() == "any" { vec!["any"] } else { quoted(cells[1]) };
        (quoted(cells[0]), needs)
    });
    rows.collect()
}

/// A request of an RPC about an instance. It is malformed or names nothing that exists, so that it changes nothing even
/// if it is allowed. If a method needs different permissions for different resources, the request names a resource that
/// needs this permission.
fn message(path: &str, instance: &str, permission: &str) -> Bytes {
    let inside = |rest: String| if instance.is_empty() { rest } else { format!("{instance}/{rest}") };
    let blob = format!("blobs/{}/1", "0".repeat(64));
    let (service, method) = path[1..].split_once('/').unwrap();
    let (tag, text) = match (service, method) {
        (_, "ListOperations") => (4, instance.to_owned()),
        ("google.longrunning.Operations", _) | (_, "WaitExecution") => {
            (1, inside(format!("operations/{UUID}")))
        }
        ("google.bytestream.ByteStream", _) if permission.starts_with("operations") => {
            (1, inside(format!("logstreams/{UUID}-stdout")))
        }
        ("google.bytestream.ByteStream", _) if permission == "logs" => {
            (1, inside(format!("logstreams/{UUID}/{}", "0".repeat(64))))
        }
        ("google.bytestream.ByteStream", "Read") => (1, inside(blob)),
        ("google.bytestream.ByteStream", _) => (1, inside(format!("uploads/{UUID}/{blob}"))),
        ("grpc.health.v1.Health" | "grpc.reflection.v1.ServerReflection", _)
        | ("grpc.reflection.v1alpha.ServerReflection", _) => (1, String::new()),
        _ => (1, instance.to_owned()),
    };
    let mut bytes = vec![tag << 3 | 2, text.len() as u8];
    bytes.extend_from_slice(text.as_bytes());
    bytes.into()
}

/// The permissions of the principals in each instance.
fn principals() -> BTreeMap<&'static str, [BTreeSet<&'static str>; 2]> {
    let roles = table("## What a client may do");
    let mut principals: BTreeMap<&str, [BTreeSet<&str>; 2]> = roles
        .into_iter()
        .map(|(name, permissions)| (name[0], [(); 2].map(|()| permissions.iter().copied().collect())))
        .collect();
    let team = [BTreeSet::new(), principals["ci"][0].clone()];
    principals.insert("team", team);
    principals
}

/// Whether a request of this kind is allowed with these permissions.
fn is_allowed(path: &str, permission: &str, here: &BTreeSet<&str>, anywhere: bool) -> bool {
    match permission {
        "any" if path.contains("Reflection") => anywhere,
        "any" => !here.is_empty(),
        // No client knows the name of this output.
        "operations.own" if path.contains("ByteStream") => here.contains("operations.all"),
        _ if path.contains("Push/Push") => here.contains("assets") && here.contains("ac.write"),
        // The list of the client's own operations is empty, and an unknown operation has no owner.
        "operations.all" if !path.contains("ByteStream") => here.contains("operations.own"),
        _ => here.contains(permission),
    }
}

#[tokio::test]
async fn every_principal_may_call_what_its_role_permits_in_its_instances_and_nothing_else() {
    let guarded = Guarded::start(&[]).await;
    let channel = guarded.channel().await;
    let (rpcs, mut cells) = (table("### What each RPC needs"), 0);
    assert!(rpcs.len() > 25, "{rpcs:?}");
    let mut tokens = Vec::new();
    for (role, permissions) in principals() {
        tokens.push((role, guarded.token(role).await, permissions));
    }
    for (path, needed) in &rpcs {
        let path = format!("/{}", path[0]);
        let kinds = if needed.is_empty() { &vec!["open"] } else { needed };
        for (permission, (at, instance)) in
            kinds.iter().flat_map(|kind| INSTANCES.iter().enumerate().map(move |place| (*kind, place)))
        {
            let message = message(&path, instance, permission);
            let ask = |token| call(&channel, &path, message.clone(), token);
            for (role, token, permissions) in &tokens {
                let anywhere = permissions.iter().any(|permissions| !permissions.is_empty());
                let allowed =
                    permission == "open" || is_allowed(&path, permission, &permissions[at], anywhere);
                let outcome = ask(Some(&token.text)).await;
                let code = outcome.as_ref().err().map_or(Code::Ok, Status::code);
                assert_eq!(
                    code != Code::PermissionDenied,
                    allowed,
                    "{role} {path} {permission} \"{instance}\": {outcome:?}"
                );
                assert_ne!(code, Code::Unauthenticated, "{role} {path}");
                if !allowed {
                    let denied = outcome.unwrap_err();
                    let text = denied.message();
                    assert!(
                        text.contains(&format!("token:{}", token.id)) && text.contains("docs/securing.md"),
                        "{text}"
                    );
                }
                cells += 1;
            }
            // GEN-23: these requests have no credential or a wrong one.
            let wrong = NewToken::random().unwrap();
            for token in [None, Some(wrong.text.as_str()), Some("x.y.z")] {
                let code = ask(token).await.err().map_or(Code::Ok, |status| status.code());
                assert_eq!(code == Code::Unauthenticated, permission != "open", "{path} {token:?}: {code:?}");
                cells += 1;
            }
        }
    }
    assert!(cells > 600, "{cells}");
}

#[tokio::test]
async fn every_principal_may_request_over_http_what_its_role_permits_and_nothing_else() {
    let guarded = Guarded::start(&[]).await;
    let (http, client, mut cells) = (guarded.http(), http_client(), 0);
    let mut tokens = Vec::new();
    for (role, permissions) in principals() {
        tokens.push((role, guarded.token(role).await, permissions));
    }
    for (request, needed) in table("### What each HTTP request needs") {
        let Some((path, methods)) = request.split_last() else { panic!("{request:?}") };
        let is_of_cache = ["/cas/", "/ac/", "/cache/"].contains(path);
        for (method, (at, instance)) in
            methods.iter().flat_map(|method| INSTANCES.iter().enumerate().map(move |place| (*method, place)))
        {
            if !is_of_cache && at > 0 {
                continue;
            }
            let start =
                if instance.is_empty() || !is_of_cache { String::new() } else { format!("/{instance}") };
            let rest = if *path == "/cache/" { "key".to_owned() } else { "0".repeat(64) };
            let url = format!("{http}{start}{path}{}", if is_of_cache { rest.as_str() } else { "" });
            let ask = async |change: &dyn Fn(reqwest::RequestBuilder) -> reqwest::RequestBuilder| {
                let request =
                    client.request(Method::from_bytes(method.as_bytes()).unwrap(), &url).header("depth", "0");
                change(request).send().await.unwrap()
            };
            for (role, token, permissions) in &tokens {
                let here = &permissions[at];
                let allowed = needed.is_empty() || needed.iter().any(|permission| here.contains(permission));
                // The credential is sent as a token, and as a password for tools that can only send passwords.
                let bearer = ask(&|request| request.bearer_auth(&token.text)).await.status();
                let basic = ask(&|request| request.basic_auth("x", Some(&token.text))).await.status();
                for status in [bearer, basic] {
                    assert_eq!(status != StatusCode::FORBIDDEN, allowed, "{role} {method} {url}: {status}");
                    assert_ne!(status, StatusCode::UNAUTHORIZED, "{role} {method} {url}");
                    cells += 1;
                }
            }
            let wrong = NewToken::random().unwrap();
            for answer in [
                ask(&|request| request).await,
                ask(&|request| request.bearer_auth(&wrong.text)).await,
                ask(&|request| request.basic_auth("x", Some("y"))).await,
                ask(&|request| request.bearer_auth(&wrong.text).bearer_auth(&wrong.text)).await,
                ask(&|request| request.header("authorization", "Negotiate abc")).await,
            ] {
                assert_eq!(answer.status() == StatusCode::UNAUTHORIZED, !needed.is_empty(), "{method} {url}");
                let challenges = answer.headers().get_all("www-authenticate").iter();
                let challenges: Vec<_> = challenges.map(|value| value.to_str().unwrap().to_owned()).collect();
                assert_eq!(challenges.iter().any(|text| text.starts_with("Bearer ")), !needed.is_empty());
                cells += 1;
            }
        }
    }
    assert!(cells > 200, "{cells}");
    for open in ["/healthz", "/status", "/"] {
        let answer = client.get(format!("{http}{open}")).bearer_auth("wrong").send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK, "{open}");
    }
}
