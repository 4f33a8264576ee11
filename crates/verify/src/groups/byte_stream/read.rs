//! BS-07 to BS-10, BS-14, BS-15: uncompressed reads.

use crate::{
    blob::Blob,
    check::{Answer as _, Check, Step as _, Verdict, ensure, equal, fail, skipped},
    checks,
    session::Session,
};
use bytes::Bytes;
use futures::stream;
use gorego_reapi::proto::bytestream::{ReadRequest, WriteRequest};
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    blobs_of_every_size_are_read_whole => "BS-07", "BS-15";
    any_offset_gives_the_rest => "BS-07", "BS-15";
    an_absent_blob_is_not_found => "BS-08";
    an_offset_at_the_end_gives_nothing => "BS-09";
    offsets_outside_the_blob_are_out_of_range => "BS-09";
    a_limit_caps_the_bytes => "BS-10";
    a_negative_limit_is_refused => "BS-10";
    messages_are_of_a_useful_size => "BS-14", "BS-15";
    a_gigabyte_is_read_whole => "BS-07", "GEN-25";
];

/// The large blob consists of this many blocks, which are never all in memory.
const LARGE_BLOCKS: u32 = 1024;
const BLOCK_BYTES: usize = 1024 * 1024;
/// The message sizes that BS-14 requires. Its "about 2 MiB" is interpreted generously.
const MESSAGE_BYTES: std::ops::RangeInclusive<usize> = 16 * 1024..=2_200_000;

/// Reads, compares, and checks that no message is empty.
async fn reads(s: &Session, blob: &Blob, offset: usize, limit: usize, expected: &[u8]) -> Verdict {
    let what = format!("{} bytes at offset {offset} with limit {limit}", blob.data.len());
    let int = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    let pieces = s.read_pieces(&s.read_name(&blob.digest), int(offset), int(limit)).await;
    let pieces = pieces.wanted(&format!("Read of {what} is OK"))?;
    let bytes = pieces.concat();
    // If there is nothing to send, an empty message does no harm.
    let has_empty = !bytes.is_empty() && pieces.iter().any(Bytes::is_empty);
    ensure(!has_empty, "no empty message", format!("one in {what}"))?;
    let seen = format!("{} bytes, not the same", bytes.len());
    ensure(bytes == expected, format!("{what}: the {} bytes stored there", expected.len()), seen)
}

async fn blobs_of_every_size_are_read_whole(s: Session) -> Verdict {
    const MIB: usize = 1024 * 1024;
    reads(&s, &s.empty(), 0, 0, b"").await?;
    let one = s.blob_of(&b"7"[..]);
    s.store(&[&one]).await?;
    reads(&s, &one, 0, 0, b"7").await?;
    for size in [17, 16_383, 16_384, 16_385, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1] {
        s.case(format!("a blob of {size} bytes"), async {
            let blob = s.stored(size).await?;
            reads(&s, &blob, 0, 0, &blob.data).await
        })
        .await?;
    }
    Ok(())
}

async fn any_offset_gives_the_rest(s: Session) -> Verdict {
    let blob = s.stored(1_000_003).await?;
    for offset in [1, 16_384, 65_535, 500_000, 999_999, 1_000_002] {
        reads(&s, &blob, offset, 0, blob.data.get(offset..).unwrap_or_default()).await?;
    }
    Ok(())
}

async fn an_absent_blob_is_not_found(s: Session) -> Verdict {
    let stored = s.stored(100).await?;
    reads(&s, &stored, 0, 0, &stored.data).await.needs("BS-07")?;
    let name = s.read_name(&s.unknown());
    s.read_pieces(&name, 0, 0).await.refused("Read of an absent blob", &[Code::NotFound])?;
    Ok(())
}

async fn an_offset_at_the_end_gives_nothing(s: Session) -> Verdict {
    let blob = s.stored(1000).await?;
    reads(&s, &blob, 999, 0, blob.data.get(999..).unwrap_or_default()).await?;
    reads(&s, &blob, 1000, 0, b"").await
}

async fn offsets_outside_the_blob_are_out_of_range(s: Session) -> Verdict {
    let blob = s.stored(1000).await?;
    reads(&s, &blob, 0, 0, &blob.data).await.needs("BS-07")?;
    let name = s.read_name(&blob.digest);
    for offset in [1001, -1, i64::MAX, i64::MIN] {
        let answer = s.read_pieces(&name, offset, 0).await;
        answer.refused(&format!("Read of 1000 bytes at offset {offset}"), &[Code::OutOfRange])?;
    }
    Ok(())
}

async fn a_limit_caps_the_bytes(s: Session) -> Verdict {
    let blob = s.stored(200_000).await?;
    for (offset, limit, end) in [
        (0, 1, 1),
        (0, 199_999, 199_999),
        (0, 200_000, 200_000),
        (0, 200_001, 200_000),
        (1000, 5, 1005),
        (199_999, 10, 200_000),
        (200_000, 10, 200_000),
    ] {
        reads(&s, &blob, offset, limit, blob.data.get(offset..end).unwrap_or_default()).await?;
    }
    Ok(())
}

async fn a_negative_limit_is_refused(s: Session) -> Verdict {
    let blob = s.stored(1000).await?;
    let name = s.read_name(&blob.digest);
    let pieces = s.read_pieces(&name, 0, 1).await.control("Read with limit 1 is OK")?;
    equal("bytes", &pieces.concat(), &blob.data.slice(..1).to_vec())?;
    s.read_pieces(&name, 0, -1).await.refused("Read with limit -1", &[Code::InvalidArgument])?;
    Ok(())
}

async fn messages_are_of_a_useful_size(s: Session) -> Verdict {
    let blob = s.stored(10_000_000).await?;
    let pieces = s.read_pieces(&s.read_name(&blob.digest), 0, 0).await.needs("BS-07", "the blob is read")?;
    ensure(pieces.concat() == blob.data, "its bytes", "others")?;
    ensure(!pieces.iter().any(Bytes::is_empty), "no empty message", "one")?;
    // The last message may be small.
    let full = pieces.split_last().map_or(&[][..], |(_, full)| full);
    let odd = full.iter().map(Bytes::len).find(|size| !MESSAGE_BYTES.contains(size));
    ensure(odd.is_none(), "messages of 16 KiB to 2 MiB", format!("one of {} bytes", odd.unwrap_or(0)))
}

/// A block of the large blob: noise with the number of the block.
fn block(noise: &Bytes, number: u32) -> Bytes {
    Bytes::from([&number.to_be_bytes(), noise.get(4..).unwrap_or_default()].concat())
}

async fn a_gigabyte_is_read_whole(s: Session) -> Verdict {
    if !s.options().large {
        return Err(skipped("moves a gigabyte: run with --large"));
    }
    // A separate connection, so that other calls do not wait behind it.
    let s = s.reconnect().await?;
    let noise = s.blob(BLOCK_BYTES).data;
    let (function, blocks) = (s.function(), noise.clone());
    let size = u64::from(LARGE_BLOCKS) * BLOCK_BYTES as u64;
    let hashing = tokio::task::spawn_blocking(move || {
        let mut hasher = function.hasher(size);
        (0..LARGE_BLOCKS).for_each(|number| hasher.update(&block(&blocks, number)));
        hasher.finish()
    });
    let digest = hashing.await.map_err(|error| fail("this program can hash a gigabyte", error))?.to_wire();
    let name = s.write_name(&Blob { digest: digest.clone(), data: Bytes::new(), function });
    let messages = (0..LARGE_BLOCKS).map(move |number| WriteRequest {
        resource_name: if number == 0 { name.clone() } else { String::new() },
        write_offset: i64::from(number) * BLOCK_BYTES as i64,
        finish_write: number + 1 == LARGE_BLOCKS,
        data: block(&noise, number),
    });
    s.count_written(LARGE_BLOCKS as usize * BLOCK_BYTES);
    let answer = s.byte_stream().write(stream::iter(messages)).await.wanted("a gigabyte is accepted")?;
    equal("committed_size", &answer.into_inner().committed_size, &digest.size_bytes)?;

    let request = ReadRequest { resource_name: s.read_name(&digest), ..Default::default() };
    let mut messages = s.byte_stream().read(request).await.wanted("a gigabyte is read")?.into_inner();
    let mut hasher = function.hasher(size);
    while let Some(message) = messages.message().await.wanted("the Read of a gigabyte goes on")? {
        hasher.update(&message.data);
    }
    equal("the digest of what was read", &hasher.finish().to_wire(), &digest)
}
