//! Streams of bytes: zstd decoding and encoding, chunks, and the table of a stored stream. The first byte selects one
//! of them.

#![no_main]

use gorego_reapi::{
    chunking::{Chunking, Splitter},
    compression::{Decoder, Encoder, LEVELS, SeekTable, TABLE_END_BYTES, decode_all, stored_frame},
    error::Error,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [kind, first, second, data @ ..] = data else { return };
    match kind % 4 {
        0 => decode(data, u64::from(*first) * 64, usize::from(*second)),
        1 => encode(data, i32::from(*first)),
        2 => chunk(data, *first, usize::from(*second)),
        _ => table(data),
    }
});

/// The output never exceeds the limit, and does not depend on how the stream is cut.
fn decode(stream: &[u8], limit: u64, piece: usize) {
    let whole = decode_all(stream, limit);
    if let Ok(bytes) = &whole {
        assert!(bytes.len() as u64 <= limit);
    }
    let mut decoder = Decoder::new(limit).expect("memory");
    let mut bytes = Vec::new();
    let mut decode = |piece: &[u8]| {
        decoder.decode(piece, |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })
    };
    let outcome = stream.chunks(piece + 1).try_for_each(&mut decode).and_then(|()| decoder.finish());
    assert!(bytes.len() as u64 <= limit);
    match (outcome, whole) {
        (Ok(()), Ok(whole)) => assert_eq!(bytes, whole),
        (Err(Error::Invalid(_)), Err(Error::Invalid(_))) => {}
        (pieces, whole) => panic!("in pieces {pieces:?}, as a whole {:?}", whole.map(|bytes| bytes.len())),
    }
}

fn encode(plain: &[u8], level: i32) {
    let level = LEVELS.start() + level % LEVELS.end();
    let (mut packed, mut stored) = (Vec::new(), Vec::new());
    Encoder::new(level).expect("a level that can be configured").frames(plain, &mut packed).expect("memory");
    stored_frame(plain, &mut stored);
    for stream in [packed, stored] {
        let size = plain.len() as u64;
        assert_eq!(decode_all(&stream, size).as_deref(), Ok(plain));
        assert!(size == 0 || decode_all(&stream, size - 1).is_err(), "a byte less was allowed");
    }
}

/// The chunks together are the stream, and do not depend on how it arrives.
fn chunk(data: &[u8], parameter: u8, piece: usize) {
    // Small chunks, so that there is more than one.
    let chunkings = [
        Chunking::fast_cdc(1024 << (parameter & 3), u32::from(parameter)),
        Chunking::rep_max(64 + u32::from(parameter & 15), u32::from(parameter) * 8),
    ];
    for chunking in chunkings {
        let chunking = chunking.expect("parameters in range");
        let whole = cut(chunking, std::iter::once(data));
        assert_eq!(whole.concat(), data);
        let sizes = chunking.chunk_sizes();
        for (at, chunk) in whole.iter().enumerate() {
            let size = chunk.len() as u64;
            assert!(size > 0 && size <= *sizes.end());
            assert!(size >= *sizes.start() || at + 1 == whole.len());
        }
        assert_eq!(cut(chunking, data.chunks(piece + 1)), whole);
    }
}

fn cut<'a>(chunking: Chunking, pieces: impl Iterator<Item = &'a [u8]>) -> Vec<Vec<u8>> {
    let mut splitter = Splitter::new(chunking);
    let mut chunks = Vec::new();
    for piece in pieces {
        splitter.push(piece);
        chunks.extend(std::iter::from_fn(|| splitter.next_chunk()).map(|chunk| chunk.to_vec()));
    }
    splitter.end();
    chunks.extend(std::iter::from_fn(|| splitter.next_chunk()).map(|chunk| chunk.to_vec()));
    chunks
}

fn table(bytes: &[u8]) {
    if let Some(end) = bytes.last_chunk::<TABLE_END_BYTES>() {
        let _ = SeekTable::length(end);
    }
    let Some(table) = SeekTable::decode(bytes) else { return };
    assert_eq!(table.encode(), bytes);
    let (plain, packed) = table.sizes();
    for offset in [0, 1, plain / 2, plain, u64::MAX] {
        let (at, in_stream) = table.frame_from(offset);
        assert!(at <= plain && in_stream <= packed && at >= offset.min(plain));
    }
}
