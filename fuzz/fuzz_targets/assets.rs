//! Remote assets: checksums, qualifiers, allowed origins, archive layouts, and whole archives. The first byte selects
//! one of them.

#![no_main]

use gorego::{
    actors::asset::{
        integrity::Integrity,
        layout::Layout,
        origins::Origins,
        outcome::{FailureKind, Problem},
        request::{AssetKind, AssetRequest, Qualifiers},
        unpack::{Contents, unpack},
    },
    host::{HostPortRule, Network},
    instance::Instances,
};
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::Error,
    tree::Directory,
};
use libfuzzer_sys::fuzz_target;
use std::{
    io::{Cursor, Read},
    net::IpAddr,
};

const FUNCTION: DigestFunction = DigestFunction::Sha256;
/// Size limit of an unpacked archive in this test.
const MAX_BYTES: u64 = 1024 * 1024;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match (kind % 5, std::str::from_utf8(data)) {
        (0, Ok(text)) => checksum(text),
        (1, Ok(text)) => request(text),
        (2, Ok(text)) => origin(text),
        (3, Ok(text)) => layout(text),
        (4, _) => archive(data),
        _ => {}
    }
});

/// One correct checksum is enough among any others, and a guessed one is not correct.
fn checksum(text: &str) {
    const HELLO: &str = "sha256-LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=";
    let is_met = |text: &str| {
        let integrity = Integrity::parse(text)?;
        let mut witness = integrity.witness();
        witness.update(b"hello");
        Ok(integrity.is_met_by(witness))
    };
    match is_met(text) {
        Ok(met) => {
            assert!(!met || text.contains(HELLO));
            assert_eq!(is_met(&format!("{text} {HELLO}")), Ok(true));
        }
        Err(error) => assert!(matches!(error, Error::Invalid(_)), "{error:?}"),
    }
}

/// One line for each qualifier, as name=value.
fn request(text: &str) {
    let list = text.lines().map(|line| line.split_once('=').unwrap_or((line, "")));
    let list = list.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let Ok(qualifiers) = Qualifiers::parse(list) else { return };
    let instance = Instances::new([""]).and_then(|instances| instances.get("")).expect("the default");
    let _ = (qualifiers.integrity(), qualifiers.unsupported(AssetKind::Blob));
    if let Ok(path) = qualifiers.directory() {
        assert!(path.as_path().is_relative());
    }
    assert!(qualifiers.shown().all(|(name, _)| !name.starts_with("http_header")), "a credential is shown");
    let new = |qualifiers| {
        let uris = vec!["http://a/".to_owned(), "http://b/".to_owned()];
        AssetRequest::new(instance, FUNCTION, AssetKind::Blob, uris, qualifiers).expect("fine URIs")
    };
    let request = new(qualifiers);
    let headers = [0, 1].map(|index| request.headers(index));
    assert_eq!(headers[0].is_ok(), headers[1].is_ok(), "the first check is one of all headers");
    for headers in headers.iter().flatten() {
        for header in headers.keys() {
            let deceptive = ["host", "range", "accept-encoding", "content-length", "transfer-encoding"];
            assert!(!deceptive.contains(&header.as_str()), "{header}");
        }
    }
    let keys = request.keys();
    assert!(keys[0] != keys[1] && !keys.contains(&request.flight_key()));
}

/// A host, an address range and a URL, one per line.
fn origin(text: &str) {
    let mut lines = text.lines();
    let (Some(host), Some(network), Some(url)) = (lines.next(), lines.next(), lines.next()) else { return };
    let Ok(url) = url::Url::parse(url) else { return };
    assert!(Origins::default().check_url(&url).is_err(), "nothing is allowed by default");
    let all = Origins::new(vec![HostPortRule::parse("*").expect("a rule")], Vec::new());
    if all.check_url(&url).is_ok() {
        assert!(matches!(url.scheme(), "http" | "https"));
        let host = url.host_str().expect("a host");
        let host = host.trim_start_matches('[').trim_end_matches(']').trim_end_matches('.');
        if let Ok(address) = host.parse::<IpAddr>() {
            assert!(all.check_address(address).is_ok() && !address.is_loopback());
        }
    }
    let Some((rule, network)) = HostPortRule::parse(host).zip(Network::parse(network)) else { return };
    let some = Origins::new(vec![rule], vec![network]);
    if some.check_url(&url).is_ok() && !host.starts_with('*') {
        let wanted = host.rsplit_once(':').map_or(host, |(wanted, _)| wanted);
        let is = url.host_str().expect("a host").trim_end_matches('.');
        let wanted = wanted.trim_end_matches('.');
        assert!(host.contains("::") || is.eq_ignore_ascii_case(wanted), "{host} covers {url}");
    }
}

/// One line for each entry: its kind, its path and, after a tab, its target.
fn layout(text: &str) {
    let mut layout = Layout::default();
    for line in text.lines() {
        let mut characters = line.chars();
        let kind = characters.next();
        let (path, target) = characters.as_str().split_once('\t').unwrap_or((characters.as_str(), ""));
        // A refused entry ends the whole archive; continuing tests more.
        let _ = match kind {
            Some('d') => layout.add_directory(path),
            Some('l') => layout.add_symlink(path, target).inspect(|()| leads_inside(path, target)),
            Some('h') => layout.add_hard_link(path, target),
            _ => layout.add_file(path, FUNCTION.digest(b""), kind == Some('x')),
        };
    }
    is_canonical(&layout);
}

fn leads_inside(path: &str, target: &str) {
    let names = |text: &str| text.split('/').filter(|name| !matches!(*name, "" | ".")).count();
    let mut depth = names(path) - 1;
    for name in target.split('/').filter(|name| !matches!(*name, "" | ".")) {
        depth = if name == ".." { depth.checked_sub(1).expect("a link leads out") } else { depth + 1 };
    }
}

/// Every message of the tree would be accepted from clients, and matches its digest.
fn is_canonical(layout: &Layout) {
    let (root, blobs) = layout.directories(FUNCTION);
    assert_eq!(blobs.last().map(|(digest, _)| *digest), Some(root));
    for (digest, bytes) in &blobs {
        assert_eq!(FUNCTION.digest(bytes), *digest);
        Directory::decode(bytes, FUNCTION).expect("a message of ours");
    }
}

/// A sink that counts its bytes.
struct Counted(u64);

impl Contents for Counted {
    fn put(&mut self, content: &mut dyn Read) -> Result<Digest, Problem> {
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes).map_err(|error| Problem::of_io(&error))?;
        self.0 += bytes.len() as u64;
        Ok(FUNCTION.digest(&bytes))
    }
}

fn archive(bytes: &[u8]) {
    let mut counted = Counted(0);
    match unpack(Cursor::new(bytes), MAX_BYTES, &mut counted) {
        Ok(layout) => is_canonical(&layout),
        // Input is never reported as a fault of this server.
        Err(Problem::Origin(failure)) => {
            assert!(matches!(failure.kind, FailureKind::Unusable | FailureKind::TooMuch), "{failure:?}");
        }
        Err(other) => panic!("{other:?}"),
    }
    assert!(counted.0 <= MAX_BYTES);
}
