//! AST: the Remote Asset services Fetch and Push. The suite itself is the origin of what is fetched.

use super::Beyond;
use crate::{
    blob::Blob,
    check::{Answer as _, Check, Step as _, Verdict, absent, ensure, equal, fail, inline, show, show_inline},
    checks,
    origin::{LOCAL_HOST, Origin, Page},
    patience::within_patience,
    session::Session,
};
use axum::http::StatusCode;
use base64::prelude::{BASE64_STANDARD, Engine as _};
use gorego_reapi::proto::{
    asset::{FetchBlobRequest, FetchBlobResponse, FetchDirectoryRequest, PushBlobRequest, Qualifier},
    rpc::BadRequest,
};
use prost::Message as _;
use sha2::{Sha256, Sha384, Sha512};
use std::time::{Duration, SystemTime};
use tonic::{Code, Request, Status};

pub(super) const CHECKS: &[Check] = checks![
    a_fetch_of_nothing_and_doubled_qualifiers_are_refused => "AST-01";
    unknown_qualifiers_are_not_ignored => "AST-02";
    headers_and_names_of_content_are_understood => "AST-03";
    checksums_are_verified => "AST-04";
    trouble_at_the_origin_is_inside_the_answer => "AST-05";
    what_was_fetched_is_stored => "AST-06";
    an_archive_is_fetched_as_a_directory => "AST-06";
    digests_are_of_the_function_asked_for => "AST-07";
    old_content_is_fetched_again_on_request => "AST-08";
    another_uri_is_tried_when_the_first_one_fails => "AST-09";
    a_slow_fetch_goes_on_without_its_caller => "AST-09";
    forbidden_places_are_not_contacted => "AST-10";
    pushed_content_is_found_under_every_uri_until_it_expires => "AST-11";
];

/// Rules that cannot be checked over the wire.
pub(super) const BEYOND: &[Beyond] = &[];

/// The timeout of each fetch, so that an unreachable origin leads to an answer.
const FETCH_LIMIT: Duration = Duration::from_secs(10);
/// An address that no client should reach: cloud machines find their credentials there.
const FORBIDDEN: &str = "http://169.254.169.254/latest/meta-data/";
const SRI: &str = "checksum.sri";

fn qualifier(name: &str, value: impl Into<String>) -> Qualifier {
    Qualifier { name: name.to_owned(), value: value.into() }
}

/// A fetch of these URIs with these qualifiers.
fn request(s: &Session, uris: &[&str], qualifiers: &[Qualifier]) -> FetchBlobRequest {
    FetchBlobRequest {
        instance_name: s.instance(),
        timeout: FETCH_LIMIT.try_into().ok(),
        oldest_content_accepted: None,
        uris: uris.iter().map(|uri| (*uri).to_owned()).collect(),
        qualifiers: qualifiers.to_vec(),
        digest_function: s.function_number(),
    }
}

async fn fetch(s: &Session, request: FetchBlobRequest) -> Result<FetchBlobResponse, Status> {
    Ok(s.fetch().fetch_blob(request).await?.into_inner())
}

/// Fetches a page, which must succeed, and reads the bytes from the CAS.
async fn fetched(s: &Session, request: FetchBlobRequest) -> Verdict<(FetchBlobResponse, bytes::Bytes)> {
    let answer = fetch(s, request).await.wanted("FetchBlob answers")?;
    inline("the fetch", answer.status.as_ref(), &[Code::Ok])?;
    let digest = answer.blob_digest.clone().ok_or_else(|| fail("a blob_digest", "none"))?;
    let bytes = s.read(&digest).await.needs("AST-06", "what was fetched is in the CAS")?;
    Ok((answer, bytes))
}

fn now() -> SystemTime {
    SystemTime::now()
}

/// An origin from which the server fetches.
///
/// # Errors
/// Absent when the server has no FetchBlob; skipped when it never contacts the origin.
async fn origin(s: &Session) -> Verdict<Origin> {
    let host = s.options().asset_origin.clone().unwrap_or_else(|| LOCAL_HOST.to_owned());
    let origin = Origin::start(&host).await?;
    let content = s.text(100);
    let uri = origin.page("probe", Page::Content(content.data.clone()));
    let answer = fetch(s, request(s, &[&uri], &[])).await;
    if let Err(status) = &answer
        && status.code() == Code::NotFound
        && origin.visits("probe") == 0
    {
        return Err(absent(format!("FetchBlob knows what was pushed and fetches nothing: {}", show(status))));
    }
    let answer = answer.offered("FetchBlob answers").needs("AST-06")?;
    if origin.visits("probe") == 0 {
        return Err(origin.unreachable(&show_inline(&answer.status.unwrap_or_default())));
    }
    inline("a fetch of what is there", answer.status.as_ref(), &[Code::Ok]).needs("AST-06")?;
    equal("blob_digest", &answer.blob_digest, &Some(content.digest)).needs("AST-06")?;
    Ok(origin)
}

fn content(s: &Session) -> Blob {
    s.text(200)
}

async fn a_fetch_of_nothing_and_doubled_qualifiers_are_refused(s: Session) -> Verdict {
    let refused = &[Code::InvalidArgument];
    let nothing = fetch(&s, request(&s, &[], &[])).await;
    if matches!(&nothing, Err(status) if status.code() == Code::Unimplemented) {
        return nothing.offered("FetchBlob").map(drop);
    }
    nothing.refused("a fetch without URIs", refused)?;
    let checksum = qualifier(SRI, sri::<Sha256>("sha256", b"x"));
    let uri = format!("http://{LOCAL_HOST}/{}", s.word());
    let doubled = fetch(&s, request(&s, &[&uri], &[checksum.clone(), checksum])).await;
    doubled.refused("a qualifier that occurs twice", refused).map(drop)
}

async fn unknown_qualifiers_are_not_ignored(s: Session) -> Verdict {
    let origin = origin(&s).await?;
    let uri = origin.page("page", Page::Content(content(&s).data));
    let answer = fetch(&s, request(&s, &[&uri], &[qualifier("x.y", "z")])).await;
    match answer {
        // A server with Push may have content with this qualifier, but not here.
        Ok(answer) => {
            let status = answer.status.unwrap_or_default();
            ensure(
                status.code != 0,
                "a qualifier that is not supported is refused",
                "content without a look at it",
            )
        }
        Err(status) => {
            ensure(status.code() == Code::InvalidArgument, "INVALID_ARGUMENT", show(&status))?;
            // The detail is a `should`: if it is present, it names the qualifier.
            let details =
                gorego_reapi::proto::rpc::Status::decode(status.details()).unwrap_or_default().details;
            for detail in details.iter().filter(|detail| detail.type_url.ends_with("/google.rpc.BadRequest"))
            {
                let bad = BadRequest::decode(detail.value.as_slice()).unwrap_or_default();
                let named =
                    bad.field_violations.iter().any(|violation| violation.description.contains("x.y"));
                ensure(named, "a violation that names the qualifier", format!("{bad:?}"))?;
            }
            Ok(())
        }
    }
}

async fn headers_and_names_of_content_are_understood(s: Session) -> Verdict {
    let origin = origin(&s).await?;
    let uri = origin.page("echo", Page::Echo("x-verify"));
    let word = s.word();
    let id = qualifier("bazel.canonical_id", word.clone());
    let header = qualifier("http_header:X-Verify", format!("all {word}"));
    let (_, all) = fetched(&s, request(&s, &[&uri], &[id.clone(), header.clone()])).await?;
    equal("the header that the origin saw", &all.as_ref(), &format!("all {word}").as_bytes())?;
    // Content of another origin, so that the cache cannot answer.
    let uri = origin.page("echo/again", Page::Echo("x-verify"));
    let own = qualifier("http_header_url:0:X-Verify", format!("own {word}"));
    let (_, own) = fetched(&s, request(&s, &[&uri], &[id, header, own])).await?;
    equal("the header of this URL alone", &own.as_ref(), &format!("own {word}").as_bytes())
}

/// A checksum in the format of `checksum.sri`.
fn sri<D: sha2::Digest>(name: &str, bytes: &[u8]) -> String {
    format!("{name}-{}", BASE64_STANDARD.encode(D::digest(bytes)))
}

async fn checksums_are_verified(s: Session) -> Verdict {
    type Sum = fn(&[u8]) -> String;
    let origin = origin(&s).await?;
    let sums: [(&str, Sum); 3] = [
        ("sha256", |bytes| sri::<Sha256>("sha256", bytes)),
        ("sha384", |bytes| sri::<Sha384>("sha384", bytes)),
        ("sha512", |bytes| sri::<Sha512>("sha512", bytes)),
    ];
    for (name, sum) in sums {
        s.case(name, async {
            let content = content(&s);
            let uri = origin.page(name, Page::Content(content.data.clone()));
            let (right, wrong) = (sum(&content.data), sum(b"something else"));
            let with = |value: &str| request(&s, &[&uri], &[qualifier(SRI, value)]);
            // The wrong checksum comes first: its result must not answer the later fetches.
            let answer = fetch(&s, with(&wrong)).await.wanted("FetchBlob answers")?;
            inline(&format!("a fetch against {wrong}"), answer.status.as_ref(), &[Code::Aborted])?;
            fetched(&s, with(&format!("{wrong} {right}"))).await?;
            let (_, bytes) = fetched(&s, with(&right)).await?;
            ensure(bytes == content.data, "the content", "other bytes")
        })
        .await?;
    }
    Ok(())
}

async fn trouble_at_the_origin_is_inside_the_answer(s: Session) -> Verdict {
    let origin = origin(&s).await?;
    let slow = Page::Slow(content(&s).data, FETCH_LIMIT);
    for (path, page, code) in [
        ("gone", Page::Status(StatusCode::NOT_FOUND), Code::NotFound),
        ("closed", Page::Status(StatusCode::FORBIDDEN), Code::PermissionDenied),
        ("slow", slow, Code::DeadlineExceeded),
    ] {
        s.case(format!("a fetch of what is {path}"), async {
            let uri = origin.page(path, page);
            let mut request = request(&s, &[&uri], &[]);
            if code == Code::DeadlineExceeded {
                request.timeout = Duration::from_secs(1).try_into().ok();
            }
            let answer = fetch(&s, request).await.wanted("FetchBlob answers with OK")?;
            inline("the fetch", answer.status.as_ref(), &[code])?;
            equal("uri", &answer.uri, &uri)
        })
        .await?;
    }
    Ok(())
}

async fn what_was_fetched_is_stored(s: Session) -> Verdict {
    let origin = origin(&s).await?;
    let content = content(&s);
    let uris = ["one", "two"].map(|path| origin.page(path, Page::Content(content.data.clone())));
    let (answer, bytes) = fetched(&s, request(&s, &uris.each_ref().map(String::as_str), &[])).await?;
    ensure(uris.contains(&answer.uri), "one of the URIs asked for", format!("uri {:?}", answer.uri))?;
    equal("blob_digest", &answer.blob_digest, &Some(content.digest.clone()))?;
    ensure(bytes == content.data, "the content", "other bytes")
}

async fn an_archive_is_fetched_as_a_directory(s: Session) -> Verdict {
    let origin = origin(&s).await?;
    let archived = |error: std::io::Error| fail("an archive of our own", error);
    let content = content(&s);
    let mut archive = tar::Builder::new(Vec::new());
    for path in ["file", "directory/inner"] {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.data.len() as u64);
        header.set_mode(0o644);
        archive.append_data(&mut header, path, content.data.as_ref()).map_err(archived)?;
    }
    let uri = origin.page("archive.tar", Page::Content(archive.into_inner().map_err(archived)?.into()));
    let request = FetchDirectoryRequest {
        instance_name: s.instance(),
        timeout: FETCH_LIMIT.try_into().ok(),
        uris: vec![uri],
        digest_function: s.function_number(),
        ..Default::default()
    };
    let answer = s.fetch().fetch_directory(request).await.map(tonic::Response::into_inner);
    let answer = answer.offered("FetchDirectory answers")?;
    inline("the fetch of an archive", answer.status.as_ref(), &[Code::Ok])?;
    let root = answer.root_directory_digest.ok_or_else(|| fail("a root_directory_digest", "none"))?;
    let pages = s.tree(&root, 0).await.wanted("GetTree of what was fetched")?;
    let directories: Vec<_> = pages.iter().flat_map(|page| &page.directories).collect();
    equal("number of Directories", &directories.len(), &2)?;
    let files: Vec<_> = directories.iter().flat_map(|directory| &directory.files).collect();
    let digests: Vec<_> = files.iter().filter_map(|file| file.digest.clone()).collect();
    equal("digests of the files", &digests, &vec![content.digest.clone(), content.digest.clone()])?;
    let read = s.read(&content.digest).await.wanted("a file of the archive is in the CAS")?;
    ensure(read == content.data, "the content", "other bytes")
}

async fn digests_are_of_the_function_asked_for(s: Session) -> Verdict {
    let origin = origin(&s).await?;
    for function in s.functions() {
        s.case(function.name(), async {
            let s = s.with_function(function);
            let content = content(&s);
            let uri = origin.page(&s.word(), Page::Content(content.data.clone()));
            let (answer, _) = fetched(&s, request(&s, &[&uri], &[])).await?;
            equal("blob_digest", &answer.blob_digest, &Some(content.digest))?;
            equal("digest_function", &answer.digest_function, &i32::from(function.wire()))
        })
        .await?;
    }
    let uri = origin.page("unset", Page::Content(content(&s).data));
    let unset = FetchBlobRequest { digest_function: 0, ..request(&s, &[&uri], &[]) };
    let answer = fetch(&s, unset).await.wanted("a fetch without digest_function answers")?;
    inline("a fetch without digest_function", answer.status.as_ref(), &[Code::Ok])?;
    ensure(answer.digest_function != 0, "the digest_function that was used", "UNKNOWN")?;
    let unknown = FetchBlobRequest { digest_function: 99, ..request(&s, &[&uri], &[]) };
    fetch(&s, unknown).await.refused("digest_function 99", &[Code::InvalidArgument]).map(drop)
}

async fn old_content_is_fetched_again_on_request(s: Session) -> Verdict {
    let origin = origin(&s).await?;
    let (old, new) = (content(&s), content(&s));
    let uri = origin.page("changing", Page::Content(old.data.clone()));
    let (answer, _) = fetched(&s, request(&s, &[&uri], &[])).await?;
    equal("blob_digest", &answer.blob_digest, &Some(old.digest))?;
    origin.page("changing", Page::Content(new.data.clone()));
    let in_an_hour = Some((now() + Duration::from_secs(3600)).into());
    let always = FetchBlobRequest { oldest_content_accepted: in_an_hour, ..request(&s, &[&uri], &[]) };
    let (answer, _) = fetched(&s, always).await?;
    equal("blob_digest of content younger than an hour from now", &answer.blob_digest, &Some(new.digest))
}

async fn another_uri_is_tried_when_the_first_one_fails(s: Session) -> Verdict {
    let origin = origin(&s).await?;
    let content = content(&s);
    let dead = origin.page("dead", Page::Status(StatusCode::SERVICE_UNAVAILABLE));
    let gone = origin.page("gone", Page::Status(StatusCode::NOT_FOUND));
    let good = origin.page("good", Page::Content(content.data.clone()));
    let (answer, _) = fetched(&s, request(&s, &[&dead, &gone, &good], &[])).await?;
    equal("blob_digest", &answer.blob_digest, &Some(content.digest))?;
    equal("uri", &answer.uri, &good)
}

async fn a_slow_fetch_goes_on_without_its_caller(s: Session) -> Verdict {
    const SLOW: Duration = Duration::from_secs(3);
    let origin = origin(&s).await?;
    let content = content(&s);
    let uri = origin.page("slow", Page::Slow(content.data.clone(), SLOW));
    let mut hurried = Request::new(request(&s, &[&uri], &[]));
    hurried.set_timeout(Duration::from_secs(1));
    let answer = s.fetch().fetch_blob(hurried).await;
    ensure(answer.is_err(), "no answer within a second from an origin that needs three", "an answer")?;
    // The origin answers in this time, and the server should finish its download.
    tokio::time::sleep(SLOW).await;
    let (answer, _) = fetched(&s, request(&s, &[&uri], &[])).await?;
    equal("blob_digest", &answer.blob_digest, &Some(content.digest))?;
    equal("visits of the origin", &origin.visits("slow"), &1)
}

async fn forbidden_places_are_not_contacted(s: Session) -> Verdict {
    let origin = origin(&s).await?;
    let redirect = origin.page("redirect", Page::Redirect(FORBIDDEN.into()));
    for uri in [FORBIDDEN, "file:///etc/passwd", &redirect] {
        let what = format!("a fetch of {uri}");
        match fetch(&s, request(&s, &[uri], &[])).await {
            Ok(answer) => inline(&what, answer.status.as_ref(), &[Code::PermissionDenied])?,
            // An invalid URL may be refused as an argument error.
            Err(status) => {
                let refused = [Code::InvalidArgument, Code::PermissionDenied];
                let answer: Result<(), _> = Err(status);
                answer.refused(&what, &refused)?;
            }
        }
    }
    Ok(())
}

async fn pushed_content_is_found_under_every_uri_until_it_expires(s: Session) -> Verdict {
    // On a busy machine or with different clocks, a short lifetime may end before the content is requested.
    for seconds in [4, 8] {
        if pushed_for(&s, Duration::from_secs(seconds)).await? {
            return Ok(());
        }
    }
    let last = pushed_for(&s, Duration::from_secs(16)).await?;
    ensure(last, "what was pushed, until it expires", "nothing, although it expires in 16 s").own()
}

/// Pushes content that expires after this time, and polls until it is gone. Returns whether it was found before.
async fn pushed_for(s: &Session, life: Duration) -> Verdict<bool> {
    let content = content(s);
    s.store(&[&content]).await?;
    // The host name does not resolve, so the content can only come from the push.
    let uris = ["one", "two"].map(|path| format!("https://gorego-verify.invalid/{}/{path}", s.word()));
    let end = now() + life;
    let push = PushBlobRequest {
        instance_name: s.instance(),
        uris: uris.to_vec(),
        expire_at: Some(end.into()),
        blob_digest: Some(content.digest.clone()),
        digest_function: s.function_number(),
        ..Default::default()
    };
    let answer = s.push().push_blob(push).await.map(drop);
    if let Err(status) = &answer
        && status.code() == Code::PermissionDenied
    {
        return Err(absent(format!("this caller may not push: {}", show(status))));
    }
    answer.offered("PushBlob is accepted")?;
    for (which, uri) in ["the first URI", "the second URI"].into_iter().zip(&uris) {
        let found = s.case(which, async {
            let answer = fetch(s, request(s, &[uri], &[])).await.wanted("FetchBlob answers")?;
            if answer.status.unwrap_or_default().code != 0 {
                return Ok(false);
            }
            equal("blob_digest of what was pushed", &answer.blob_digest, &Some(content.digest.clone()))?;
            Ok(true)
        });
        if !found.await? {
            return Ok(false);
        }
    }
    let left = end.duration_since(now()).unwrap_or_default();
    // The push expires in this time.
    tokio::time::sleep(left + Duration::from_secs(1)).await;
    let [uri, _] = &uris;
    within_patience(|| async {
        let answer = fetch(s, request(s, &[uri], &[])).await.or_refused("FetchBlob", &[Code::NotFound])?;
        // Gone means NOT_FOUND, in the call or inline, or the error of contacting the origin.
        let gone = answer.is_none_or(|answer| answer.status.unwrap_or_default().code != 0);
        ensure(gone, "nothing under the URI once the push has expired", "the content")
    })
    .await?;
    Ok(true)
}
