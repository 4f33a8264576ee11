//! Compares the hand-written messages with the generated ones.

use super::*;
use crate::error::Error;
use proptest::{collection::vec, prelude::*};

const FIELD: &str = "blob_digests";

/// Bytes that a client may write in place of a hash.
fn hash() -> impl Strategy<Value = Vec<u8>> {
    let lengths = prop_oneof![
        8 => Just(64usize), 2 => Just(32), 2 => Just(40), 1 => Just(96), 1 => Just(128), 1 => 0..140usize
    ];
    let characters = prop_oneof![
        20 => Just("0123456789abcdef"), 1 => Just("0123456789abcdefABCDEF"), 1 => Just("abcxyz/\u{e9}")
    ];
    (lengths, characters, any::<u64>()).prop_map(|(length, characters, mut seed)| {
        let characters: Vec<char> = characters.chars().collect();
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            characters[(seed >> 33) as usize % characters.len()]
        };
        let mut text: String = (0..length).map(|_| next()).collect();
        while text.len() > length {
            text.pop();
        }
        text.into_bytes()
    })
}

/// A key and its content as in a message. The type may not have such a field.
fn field(key: u8, content: &[u8]) -> Vec<u8> {
    let mut bytes = vec![key];
    if key & 7 == 2 {
        encoding::encode_varint(content.len() as u64, &mut bytes);
    }
    bytes.extend(content);
    bytes
}

fn number() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![0..200u64, any::<u64>(), any::<i64>().prop_map(|n| n as u64)];
    (number, 0..3usize).prop_map(|(number, longer)| {
        let mut bytes = Vec::new();
        encoding::encode_varint(number, &mut bytes);
        // A number may be written with more bytes than necessary, up to ten.
        for _ in 0..longer.min(9usize.saturating_sub(bytes.len())) {
            *bytes.last_mut().unwrap() |= 0x80;
            bytes.push(0);
        }
        bytes
    })
}

/// A Digest in its usual form, or with any fields in any order.
fn digest() -> impl Strategy<Value = Vec<u8>> {
    let usual =
        (hash(), number()).prop_map(|(hash, size)| [field(TEXT_1, &hash), field(NUMBER_2, &size)].concat());
    let odd = prop_oneof![
        hash().prop_map(|hash| field(TEXT_1, &hash)),
        number().prop_map(|size| field(NUMBER_2, &size)),
        vec(any::<u8>(), 0..4).prop_map(|unknown| field(0x2a, &unknown)),
        vec(any::<u8>(), 0..20).prop_map(|hash| field(TEXT_1, &hash)),
        Just(field(MESSAGE_2, b"x")),
        Just(vec![0x23, 0x24]),
        vec(any::<u8>(), 0..3),
    ];
    prop_oneof![6 => usual, 1 => vec(odd, 0..4).prop_map(|fields| fields.concat())]
}

fn request() -> impl Strategy<Value = Vec<u8>> {
    let fields = prop_oneof![
        20 => digest().prop_map(|digest| field(MESSAGE_2, &digest)),
        1 => Just(field(TEXT_1, b"instance")),
        1 => number().prop_map(|number| field(0x18, &number)),
        1 => vec(any::<u8>(), 0..4).prop_map(|unknown| field(0x2a, &unknown)),
        1 => Just(field(NUMBER_2, b"\x01")),
    ];
    (vec(fields, 0..30), 0..20usize).prop_map(|(fields, cut)| {
        let mut message = fields.concat();
        // The last field is sometimes truncated.
        message.truncate(message.len() - if cut < 3 { cut.min(message.len()) } else { 0 });
        message
    })
}

/// The expected result of [`UnresolvedDigests::resolve`].
fn resolve(wire: &reapi::FindMissingBlobsRequest, function: DigestFunction) -> Result<Vec<Digest>> {
    wire.blob_digests.iter().map(|digest| Digest::from_wire(function, Some(digest), FIELD)).collect()
}

proptest! {
    /// GEN-01..05, GEN-08, CAS-06.
    #[test]
    fn a_request_is_decoded_as_the_generated_one_is(bytes in request(), piece in 1..100usize) {
        // The message is also decoded from two pieces.
        let (first, second) = bytes.split_at(piece.min(bytes.len()));
        for read in [FindMissingBlobsRequest::decode(&*bytes), FindMissingBlobsRequest::decode(first.chain(second))] {
            let (ours, theirs) = match (read, reapi::FindMissingBlobsRequest::decode(&*bytes)) {
                (Ok(ours), Ok(theirs)) => (ours, theirs),
                (ours, theirs) => {
                    prop_assert_eq!(ours.map(drop).map_err(|e| e.to_string()), theirs.map(drop).map_err(|e| e.to_string()));
                    continue;
                }
            };
            prop_assert_eq!(&ours.instance_name, &theirs.instance_name);
            prop_assert_eq!(ours.digest_function, theirs.digest_function);
            for &function in DigestFunction::ALL {
                prop_assert_eq!(ours.blob_digests.clone().resolve(function, FIELD), resolve(&theirs, function));
            }
            // For any set of lengths that an instance knows, both forms lead to the same first one.
            for known in 0..1u32 << 5 {
                let known = |chars: &usize| {
                    [32, 40, 64, 96, 128].iter().position(|c| c == chars).is_some_and(|at| known >> at & 1 == 1)
                };
                let expected = theirs.blob_digests.iter().map(|digest| digest.hash.len()).find(known);
                prop_assert_eq!(ours.blob_digests.hash_chars().find(known), expected);
            }
        }
    }

    #[test]
    fn well_formed_messages_are_encoded_as_the_generated_ones_are(
        digests in vec((0..DigestFunction::ALL.len(), any::<u64>(), prop_oneof![0..200u64, any::<u64>()]), 0..20),
    ) {
        let digests: Vec<Digest> = digests
            .into_iter()
            .map(|(function, content, size)| {
                let hash = DigestFunction::ALL[function].digest(&content.to_le_bytes()).hash_hex();
                Digest::parse(DigestFunction::ALL[function], &hash, (size >> 1) as i64).unwrap()
            })
            .collect();
        let wire: Vec<_> = digests.iter().map(|digest| digest.to_wire()).collect();
        let theirs = reapi::FindMissingBlobsResponse { missing_blob_digests: wire.clone() };
        let ours = FindMissingBlobsResponse { missing_blob_digests: digests };
        prop_assert_eq!(ours.encoded_len(), theirs.encoded_len());
        prop_assert_eq!(ours.encode_to_vec(), theirs.encode_to_vec());

        let request = reapi::FindMissingBlobsRequest {
            instance_name: "instance".into(),
            blob_digests: wire,
            digest_function: 1,
        };
        let bytes = request.encode_to_vec();
        let ours = FindMissingBlobsRequest::decode(&*bytes).unwrap();
        prop_assert_eq!(ours.encoded_len(), bytes.len());
        prop_assert_eq!(ours.encode_to_vec(), bytes);
    }
}

#[test]
fn only_the_first_malformed_digest_is_kept() {
    let digest = |n: u32| reapi::Digest { hash: format!("{n:064x}"), size_bytes: 1 };
    let mut blob_digests = vec![digest(1), reapi::Digest::default()];
    blob_digests.extend((2..1_000).map(digest));
    let bytes = reapi::FindMissingBlobsRequest { blob_digests, ..Default::default() }.encode_to_vec();
    let digests = FindMissingBlobsRequest::decode(&*bytes).unwrap().blob_digests;
    assert_eq!(digests.parsed.len(), 1);
    assert_eq!(digests.hash_chars().collect::<Vec<_>>(), [64]);
    let refusal = digests.resolve(DigestFunction::Sha256, FIELD).unwrap_err();
    assert_eq!(refusal, Error::Invalid("blob_digests is not set".into()));
}

/// The memory of a request is bounded by its length, so it need not be measured before it is decoded.
#[test]
fn a_decoded_request_takes_a_few_times_its_length_at_most() {
    const COUNT: u32 = 1_001;
    for gap in [1, 7, COUNT] {
        let mut bytes = Vec::new();
        for n in 0..COUNT {
            if n % gap == 0 {
                // Another field hides the number of the digests that follow.
                encoding::int32::encode(DIGEST_FUNCTION, &1, &mut bytes);
            }
            let digest = reapi::Digest { hash: format!("{n:032x}"), size_bytes: 0 };
            encoding::message::encode(BLOB_DIGESTS, &digest, &mut bytes);
        }
        let digests = FindMissingBlobsRequest::decode(&*bytes).unwrap().blob_digests;
        assert_eq!(digests.parsed.len(), COUNT as usize);
        let memory = digests.parsed.capacity() * size_of::<Digest>();
        assert!(
            memory as u64 <= FindMissingBlobsRequest::EXPANSION_MAX * bytes.len() as u64,
            "{gap}: {memory}"
        );
    }
}
