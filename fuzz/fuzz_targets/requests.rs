//! What comes with requests: filters, page tokens, metadata headers, and the unary requests themselves.

#![no_main]

use gorego::{
    error::Error,
    grpc::{convert, filter, get_tree::Walk, page_token},
    instance::Instances,
    proto::reapi,
};
use http::{HeaderMap, HeaderValue};
use libfuzzer_sys::fuzz_target;
use prost::Message as _;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    let instance = Instances::new([""]).and_then(|instances| instances.get("")).expect("the default");
    match (kind % 4, std::str::from_utf8(data)) {
        (0, Ok(text)) => match filter::parse(text) {
            Ok(_) => assert!(text.len() <= filter::FILTER_MAX_BYTES),
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
        _ => {
            if let Ok(request) = reapi::FindMissingBlobsRequest::decode(data) {
                let digests = &request.blob_digests;
                let _ = convert::digests(&instance, request.digest_function, digests, "blob_digests");
            }
            if let Ok(request) = reapi::GetTreeRequest::decode(data) {
                let _ = Walk::decode(&instance, &request);
            }
        }
    }
});
