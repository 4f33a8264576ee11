//! Parts of requests: filters, page tokens, metadata headers, platform properties, and the unary requests themselves.

#![no_main]

use gorego::{
    grpc::{convert, filter, get_tree::Paging, page_token},
    instance::Instances,
    platform::{self, Known, Offer, Offers, UnknownProperties},
};
use gorego_reapi::{error::Error, find_missing::FindMissingBlobsRequest, proto::reapi};
use http::{HeaderMap, HeaderValue};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    let instance = Instances::new([""]).and_then(|instances| instances.get("")).expect("the default");
    match (kind % 5, std::str::from_utf8(data)) {
        (0, Ok(text)) => match filter::parse(text) {
            Ok(filter) => {
                assert!(text.len() <= filter::FILTER_MAX_BYTES);
                // Each parsed value occurs in the text and contains no quotes.
                let told = &filter.operations;
                let values = [&told.invocation, &told.target, &told.pool, &told.worker, &filter.instance];
                for value in values.into_iter().flatten() {
                    assert!(text.contains(value.as_str()) && !value.contains('"'), "{value:?} of {text:?}");
                }
                assert_eq!(filter::parse(text.trim()), Ok(filter));
            }
            Err(error) => assert!(matches!(error, Error::Invalid(_)), "{error:?}"),
        },
        (1, Ok(text)) => {
            let refused = page_token::open("tree", text);
            assert!(matches!(refused, Err(Error::Invalid(_))), "nobody guesses a token: {text:?}");
        }
        (2, _) => {
            let mut headers = HeaderMap::new();
            let Ok(value) = HeaderValue::from_bytes(data) else { return };
            headers.insert("build.bazel.remote.execution.v2.requestmetadata-bin", value);
            convert::client_info(&headers);
        }
        (4, Ok(text)) => properties(text),
        _ => {
            let generated = reapi::FindMissingBlobsRequest::decode(data);
            let decoded = FindMissingBlobsRequest::decode(data);
            assert_eq!(decoded.is_ok(), generated.is_ok(), "{decoded:?} {generated:?}");
            if let Ok(request) = decoded {
                let (number, digests) = (request.digest_function, request.blob_digests);
                let _ = convert::digests(&instance, number, digests, "blob_digests");
            }
            if let Ok(request) = reapi::GetTreeRequest::decode(data) {
                let _ = Paging::decode(&instance, &request);
            }
        }
    }
});

/// One line for each property, as name=value. The list of differences is short and on one line. There are no
/// differences exactly if every known property matches.
fn properties(text: &str) {
    let asked = text.lines().filter_map(|line| line.split_once('='));
    let asked: Vec<_> = asked.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let offers = Offers::from([
        ("OSFamily".to_owned(), Offer::Exact("linux".into())),
        ("arch".to_owned(), Offer::Set(vec!["x86_64".into(), "amd64".into()])),
        ("cores".to_owned(), Offer::Minimum(8)),
        ("silo".to_owned(), Offer::Ignore),
    ]);
    let mut known = Known::new(UnknownProperties::Ignore);
    known.learn(&offers);
    let told = platform::list(known.differences(&offers, &asked));
    assert!(told.len() < 8 * 1024 && !told.contains(|c: char| c.is_control()), "{told:?}");
    let met = |(name, value): &(String, String)| match name.as_str() {
        "OSFamily" => value.eq_ignore_ascii_case("linux"),
        "arch" => value == "x86_64" || value == "amd64",
        "cores" => value.parse::<u64>().is_ok_and(|cores| cores <= 8),
        _ => true,
    };
    assert_eq!(told.is_empty(), asked.iter().all(met), "{told}");
}
