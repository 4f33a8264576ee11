//! BS-11 to BS-13, BS-25 to BS-27: transfers compressed with zstd. They are optional.

use crate::{
    blob::Blob,
    check::{Answer as _, Check, Verdict, ensure, equal},
    checks,
    compression::{ZSTD, bomb, compress, decompress, defused},
    session::{Session, listed},
    store::pieces,
};
use bytes::Bytes;
use gorego_reapi::proto::reapi::Digest;
use tonic::{Code, Status};

pub(crate) const CHECKS: &[Check] = checks![
    a_compressed_read_takes_no_limit => "BS-11";
    a_compressed_read_from_an_offset_is_the_rest => "BS-12";
    compressed_reads_decode_with_default_settings => "BS-13", "BS-15";
    a_compressed_read_of_an_absent_blob_is_not_found => "BS-08";
    a_compressed_upload_answers_its_compressed_length => "BS-25";
    compressed_content_is_verified => "BS-26";
    a_bomb_is_refused => "BS-26";
    frames_are_split_anywhere => "BS-27";
    several_frames_follow_each_other => "BS-27";
];

const INVALID: &[Code] = &[Code::InvalidArgument];

fn zstd(s: &Session) -> Verdict {
    listed("zstd for ByteStream", &s.cache()?.supported_compressors, ZSTD)
}

/// Stores a text and returns the name under which it is read compressed.
async fn readable(s: &Session, size: usize) -> Verdict<(Blob, String)> {
    zstd(s)?;
    let blob = s.text(size);
    s.store(&[&blob]).await?;
    let name = s.qualify(&blob.compressed_name("zstd"));
    Ok((blob, name))
}

async fn upload(s: &Session, blob: &Blob, data: &Bytes, piece: usize) -> Result<i64, Status> {
    s.write_messages(pieces(&s.compressed_write_name(blob), data, 0, piece)).await
}

async fn is_stored(s: &Session, blob: &Blob) -> Verdict {
    let read = s.read(&blob.digest).await.needs("BS-07", "the blob is read plain after its upload")?;
    ensure(read == blob.data, "the bytes before compression", "others")
}

async fn a_compressed_read_takes_no_limit(s: Session) -> Verdict {
    let (blob, name) = readable(&s, 10_000).await?;
    let packed = s.read_pieces(&name, 0, 0).await.needs("BS-13", "a compressed read is OK")?.concat();
    ensure(decompress(&packed, blob.data.len())? == blob.data, "the blob, once decompressed", "other bytes")?;
    s.read_pieces(&name, 0, 1).await.refused("a compressed read with limit 1", INVALID)?;
    Ok(())
}

async fn a_compressed_read_from_an_offset_is_the_rest(s: Session) -> Verdict {
    let (blob, name) = readable(&s, 300_000).await?;
    for offset in [0, 1, 100_000, 150_001, 299_999, 300_000] {
        s.case(format!("offset {offset}"), async {
            let int = i64::try_from(offset).unwrap_or(i64::MAX);
            let packed = s.read_pieces(&name, int, 0).await;
            let packed = packed.wanted("a compressed read is OK")?.concat();
            let rest = decompress(&packed, blob.data.len())?;
            let seen = format!("{} bytes", rest.len());
            ensure(rest == blob.data.slice(offset..), format!("the blob from byte {offset} on"), seen)
        })
        .await?;
    }
    let answer = s.read_pieces(&name, 300_001, 0).await;
    answer.refused("a compressed read from beyond the end", &[Code::OutOfRange])?;
    Ok(())
}

async fn compressed_reads_decode_with_default_settings(s: Session) -> Verdict {
    zstd(&s)?;
    // The first blob is large enough for a window above 8 MiB.
    for blob in [s.text(9_000_000), s.blob(100_000), s.empty()] {
        s.case(format!("a blob of {} bytes", blob.data.len()), async {
            s.store(&[&blob]).await?;
            let pieces = s.read_pieces(&s.qualify(&blob.compressed_name("zstd")), 0, 0).await;
            let pieces = pieces.wanted("a compressed read is OK")?;
            ensure(!pieces.iter().any(Bytes::is_empty), "no empty message", "one")?;
            let plain = decompress(&pieces.concat(), blob.data.len())?;
            let seen = format!("{} bytes", plain.len());
            ensure(plain == blob.data, "the blob, once decompressed", seen)
        })
        .await?;
    }
    Ok(())
}

async fn a_compressed_read_of_an_absent_blob_is_not_found(s: Session) -> Verdict {
    let (_, name) = readable(&s, 1000).await?;
    s.read_named(&name).await.needs("BS-13", "a compressed read of a stored blob is OK")?;
    let absent = s.qualify(&s.blob(100).compressed_name("zstd"));
    s.read_named(&absent).await.refused("a compressed read of an absent blob", &[Code::NotFound])?;
    Ok(())
}

async fn a_compressed_upload_answers_its_compressed_length(s: Session) -> Verdict {
    zstd(&s)?;
    let blob = s.text(100_000);
    let packed = compress(&blob.data)?;
    let committed = upload(&s, &blob, &packed, 1000).await.wanted("a compressed upload is accepted")?;
    let length = i64::try_from(packed.len()).unwrap_or(i64::MAX);
    let expected = format!("committed_size {length}, the compressed bytes, or -1");
    ensure([length, -1].contains(&committed), expected, format!("{committed} for 100000 bytes"))?;
    is_stored(&s, &blob).await?;
    // It is stored now, so the upload may end early with -1.
    let again = upload(&s, &blob, &packed, 1000).await.wanted("the same upload is accepted again")?;
    ensure([length, -1].contains(&again), format!("committed_size {length} or -1"), again)
}

async fn compressed_content_is_verified(s: Session) -> Verdict {
    zstd(&s)?;
    let good = s.text(10_000);
    upload(&s, &good, &compress(&good.data)?, 1000)
        .await
        .needs("BS-25", "a compressed upload is accepted")?;
    is_stored(&s, &good).await?;
    let noise = s.blob(1000).data;
    for what in [
        "garbage",
        "a cut frame",
        "a frame and garbage",
        "a frame of other content",
        "a short frame",
        "nothing",
    ] {
        let blob = s.text(10_000);
        let frame = compress(&blob.data)?;
        let data: Bytes = match what {
            "garbage" => noise.clone(),
            "a cut frame" => frame.slice(..frame.len() - 4),
            "a frame and garbage" => [&frame[..], &noise[..]].concat().into(),
            "a frame of other content" => compress(&s.text(10_000).data)?,
            "a short frame" => compress(&blob.data.slice(..9_999))?,
            _ => Bytes::new(),
        };
        upload(&s, &blob, &data, 500).await.refused(&format!("an upload of {what}"), INVALID)?;
        let asked = std::slice::from_ref(&blob.digest);
        let missing = s.missing(asked).await.needs("CAS-01", "FindMissingBlobs answers")?;
        equal(&format!("after {what}: missing_blob_digests"), &missing, &asked.to_vec())?;
    }
    Ok(())
}

async fn a_bomb_is_refused(s: Session) -> Verdict {
    zstd(&s)?;
    // 10 GiB of zeros with a claimed size of 1000 bytes. A server that decompresses everything is too late.
    let claimed = Blob { digest: Digest { size_bytes: 1000, ..s.unknown() }, ..s.blob(0) };
    let bomb = bomb(10 * 1024)?;
    let answer = defused(upload(&s, &claimed, &bomb, 64 * 1024)).await?;
    answer.refused("10 GiB in 1000 bytes", INVALID)?;
    Ok(())
}

async fn frames_are_split_anywhere(s: Session) -> Verdict {
    zstd(&s)?;
    let blob = s.blob(1500);
    let packed = compress(&blob.data)?;
    upload(&s, &blob, &packed, 1).await.wanted("an upload in messages of one byte is accepted")?;
    is_stored(&s, &blob).await
}

async fn several_frames_follow_each_other(s: Session) -> Verdict {
    zstd(&s)?;
    let blob = s.text(100_000);
    let mut packed = Vec::new();
    for part in blob.data.chunks(30_000) {
        packed.extend_from_slice(&compress(part)?);
    }
    upload(&s, &blob, &packed.into(), 777).await.wanted("an upload of four frames is accepted")?;
    is_stored(&s, &blob).await
}
