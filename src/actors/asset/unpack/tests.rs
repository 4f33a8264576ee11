//! Archives of every format, and hostile archives.

use super::*;
use crate::{budget::Budget, caller::Caller};
use gorego_reapi::digest::DigestFunction;
use proptest::prelude::*;
use std::{collections::HashMap, io::Write as _};

const SHA256: DigestFunction = DigestFunction::Sha256;
const PLENTY: u64 = 1 << 30;

/// Keeps contents in memory.
#[derive(Default)]
struct Kept {
    files: HashMap<Digest, Vec<u8>>,
}

impl Contents for Kept {
    fn put(&mut self, content: &mut dyn Read) -> Result<Digest, Problem> {
        let mut bytes = Vec::new();
        content.read_to_end(&mut bytes).map_err(|error| Problem::of_io(&error))?;
        let digest = SHA256.digest(&bytes);
        self.files.insert(digest, bytes);
        Ok(digest)
    }
}

fn read(bytes: &[u8]) -> Result<Layout, Problem> {
    unpack(io::Cursor::new(bytes), PLENTY, &mut Kept::default())
}

/// The kind and the message of the failure.
fn refusal(bytes: &[u8]) -> (FailureKind, String) {
    match read(bytes) {
        Err(Problem::Origin(failure)) => (failure.kind, failure.message),
        other => panic!("not refused: {other:?}"),
    }
}

/// A tar entry with any path, valid or not.
fn entry(kind: EntryType, path: &[u8], link: &[u8], mode: u32, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..path.len()].copy_from_slice(path);
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(content.len() as u64);
    header.set_cksum();
    let padding = vec![0; content.len().next_multiple_of(512) - content.len()];
    [header.as_bytes(), content, &padding].concat()
}

fn file(path: &str, content: &[u8]) -> Vec<u8> {
    entry(EntryType::Regular, path.as_bytes(), b"", 0o644, content)
}

fn end() -> Vec<u8> {
    vec![0; 1024]
}

fn pax(key: &str, value: &str) -> Vec<u8> {
    let mut length = key.len() + value.len() + 3;
    while length != key.len() + value.len() + 3 + length.to_string().len() {
        length = key.len() + value.len() + 3 + length.to_string().len();
    }
    entry(EntryType::XHeader, b"pax", b"", 0o644, format!("{length} {key}={value}\n").as_bytes())
}

fn sample_tar() -> Vec<u8> {
    let long = "d/".repeat(80) + "name";
    [
        entry(EntryType::Directory, b"./", b"", 0o755, b""),
        entry(EntryType::Directory, b"pkg/", b"", 0o755, b""),
        file("pkg/a.txt", b"content"),
        entry(EntryType::Regular, b"pkg/run.sh", b"", 0o755, b"#!/bin/sh\n"),
        entry(EntryType::Symlink, b"pkg/link", b"a.txt", 0o777, b""),
        entry(EntryType::Link, b"pkg/hard", b"pkg/a.txt", 0o644, b""),
        entry(EntryType::GNULongName, b"././@LongLink", b"", 0o644, &[long.as_bytes(), b"\0"].concat()),
        file("short", b"long name"),
        pax("path", "pkg/p\u{e4}x"),
        file("ignored", b"pax name"),
        end(),
    ]
    .concat()
}

fn expected_layout() -> Layout {
    let mut layout = Layout::default();
    let mut add = |path: &str, content: &[u8], executable| {
        layout.add_file(path, SHA256.digest(content), executable).unwrap();
    };
    add("pkg/a.txt", b"content", false);
    add("pkg/run.sh", b"#!/bin/sh\n", true);
    add("pkg/hard", b"content", false);
    add(&("d/".repeat(80) + "name"), b"long name", false);
    add("pkg/p\u{e4}x", b"pax name", false);
    layout.add_symlink("pkg/link", "a.txt").unwrap();
    layout
}

/// The digest of a layout, to compare whole trees.
fn root(layout: &Layout) -> Digest {
    layout.directories(SHA256).0
}

#[test]
fn a_tar_is_read_however_it_is_compressed() {
    let tar = sample_tar();
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(&tar).unwrap();
    let zstd = zstd::encode_all(tar.as_slice(), 1).unwrap();
    for bytes in [tar.clone(), gzip(&tar), xz.finish().unwrap(), zstd] {
        assert_eq!(root(&read(&bytes).unwrap()), root(&expected_layout()));
    }
    // A concatenation of two gzip streams, as parallel tools make them.
    let (first, second) = tar.split_at(700);
    let parts = [gzip(first), gzip(second)].concat();
    assert_eq!(root(&read(&parts).unwrap()), root(&expected_layout()));
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

/// The checksum of a compressed stream is at its end, behind the blocks that end the tar.
#[test]
fn an_archive_with_a_wrong_checksum_is_refused() {
    let tar = [sample_tar(), vec![0; 8 * 1024]].concat();
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(&tar).unwrap();
    let mut zstd = zstd::Encoder::new(Vec::new(), 1).unwrap();
    zstd.include_checksum(true).unwrap();
    zstd.write_all(&tar).unwrap();
    // Where the checksum begins, from the end: behind it, gzip has the length of the content, and xz a footer.
    for (name, mut bytes, from_end) in
        [("gzip", gzip(&tar), 8), ("xz", xz.finish().unwrap(), 16), ("zstd", zstd.finish().unwrap(), 4)]
    {
        assert!(read(&bytes).is_ok(), "{name}");
        let at = bytes.len() - from_end;
        bytes[at] ^= 1;
        let (kind, message) = refusal(&bytes);
        assert!(kind == FailureKind::Unusable && message.contains("damaged"), "{name}: {message}");
    }
}

#[test]
fn zeros_may_follow_a_gzip_stream_but_nothing_else() {
    let stream = gzip(&sample_tar());
    // More zeros than the input buffer holds.
    let padded = [&stream[..], &vec![0; 2 * BUFFER_BYTES]].concat();
    assert_eq!(root(&read(&padded).unwrap()), root(&expected_layout()));
    for garbage in [&b"garbage, which is no gzip member"[..], b"\0\0garbage, which is no gzip member"] {
        let (kind, message) = refusal(&[&stream[..], garbage].concat());
        assert!(kind == FailureKind::Unusable && message.contains("damaged"), "{message}");
    }
}

#[test]
fn a_bomb_behind_the_end_of_the_tar_ends_at_the_limit() {
    let bomb = gzip(&[sample_tar(), vec![0; 3 << 20]].concat());
    let refused = unpack(io::Cursor::new(&bomb), 1 << 20, &mut Kept::default());
    let Err(Problem::Origin(failure)) = refused else { panic!("not refused") };
    assert_eq!(failure.kind, FailureKind::TooMuch, "{}", failure.message);
}

/// A frame of zstd 0.7 that holds these bytes uncompressed.
fn legacy_frame(bytes: &[u8; 100]) -> Vec<u8> {
    [&[0x27, 0xB5, 0x2F, 0xFD, 0x20, 100, 0x40, 0, 100][..], bytes, &[0xC0, 0, 0]].concat()
}

#[test]
fn every_frame_of_a_zstd_stream_must_have_the_current_format() {
    let tar = sample_tar();
    let pack = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
    let (first, rest) = tar.split_at(700);
    let (middle, last) = rest.split_first_chunk::<100>().unwrap();
    let skippable = [0x53, 0x2A, 0x4D, 0x18, 3, 0, 0, 0, 1, 2, 3];
    let good = [&pack(first)[..], &skippable, &pack(b""), &pack(middle), &pack(last)].concat();
    assert_eq!(root(&read(&good).unwrap()), root(&expected_layout()));
    let old = [&pack(first)[..], &legacy_frame(middle), &pack(last)].concat();
    let (kind, message) = refusal(&old);
    assert!(kind == FailureKind::Unusable && message.contains("no zstd frame begins"), "{message}");
}

fn zip(build: impl FnOnce(&mut zip::ZipWriter<io::Cursor<Vec<u8>>>)) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
    build(&mut writer);
    writer.finish().unwrap().into_inner()
}

fn options(mode: u32) -> zip::write::SimpleFileOptions {
    zip::write::SimpleFileOptions::default().unix_permissions(mode)
}

#[test]
fn a_zip_is_read() {
    let bytes = zip(|zip| {
        zip.add_directory("pkg", options(0o755)).unwrap();
        zip.start_file("pkg/a.txt", options(0o644)).unwrap();
        zip.write_all(b"content").unwrap();
        zip.start_file("pkg/run.sh", options(0o755)).unwrap();
        zip.write_all(b"#!/bin/sh\n").unwrap();
        zip.add_symlink("pkg/link", "a.txt", options(0o777)).unwrap();
    });
    let mut layout = Layout::default();
    layout.add_file("pkg/a.txt", SHA256.digest(b"content"), false).unwrap();
    layout.add_file("pkg/run.sh", SHA256.digest(b"#!/bin/sh\n"), true).unwrap();
    layout.add_symlink("pkg/link", "a.txt").unwrap();
    assert_eq!(root(&read(&bytes).unwrap()), root(&layout));
    let empty = zip(|_| {});
    assert_eq!(root(&read(&empty).unwrap()), SHA256.digest(b""));
}

#[test]
fn hostile_archives_are_refused_with_the_reason() {
    let link = |target: &[u8]| entry(EntryType::Symlink, b"l", target, 0o777, b"");
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("node name", file("../../etc/cron.d/x", b"x")),
        ("absolute", file("/etc/passwd", b"x")),
        ("absolute", link(b"/etc/passwd")),
        ("leads out", link(b"../x")),
        ("twice", [file("a", b"1"), file("a", b"2")].concat()),
        ("no directory", [link(b"d"), file("l/x", b"1")].concat()),
        ("absolute", entry(EntryType::Link, b"h", b"/etc/passwd", 0o644, b"")),
        ("hard link", entry(EntryType::Link, b"h", b"nothing", 0o644, b"")),
        ("device", entry(EntryType::Char, b"null", b"", 0o666, b"")),
        ("device", entry(EntryType::Fifo, b"pipe", b"", 0o666, b"")),
        ("UTF-8", entry(EntryType::Regular, b"\xff\xfe", b"", 0o644, b"")),
        ("extension header", entry(EntryType::GNULongName, b"x", b"", 0o644, &vec![b'a'; 70_000])),
        ("size", [pax("size", "1"), file("a", b"x")].concat()),
        ("sparse", [pax("GNU.sparse.major", "1"), file("a", b"x")].concat()),
        ("node name", [pax("path", "a/../../x"), file("a", b"x")].concat()),
        ("absolute", zip(|zip| zip.add_symlink("l", "/etc/passwd", options(0o777)).unwrap())),
        (
            "node name",
            // Renamed below to a path that the zip library would not write.
            zip(|zip| zip.start_file("aa/aa", options(0o644)).unwrap()),
        ),
    ];
    for (what, mut bytes) in cases {
        if bytes.starts_with(b"PK") {
            for at in 0..bytes.len() - 5 {
                if &bytes[at..at + 5] == b"aa/aa" {
                    bytes[at..at + 5].copy_from_slice(b"../aa");
                }
            }
        } else {
            bytes.extend(end());
        }
        let (kind, message) = refusal(&bytes);
        assert_eq!(kind, FailureKind::Unusable, "{what}: {message}");
        assert!(message.contains(what), "{what}: {message}");
    }
}

#[test]
fn archives_that_end_early_are_refused() {
    refusal(b"");
    let tar = [file("a", &[7; 3_000]), end()].concat();
    refusal(&tar[..2_000]);
    let gzip = gzip(&sample_tar());
    refusal(&gzip[..gzip.len() / 2]);
    let zip = zip(|zip| zip.add_directory("a", options(0o755)).unwrap());
    refusal(&zip[..zip.len() - 5]);
    refusal(
        b"this is no archive at all, but a page that says that the download has moved elsewhere"
            .repeat(9)
            .as_slice(),
    );
}

#[test]
fn bombs_end_at_the_limit() {
    const LIMIT: u64 = 1 << 20;
    let bomb = [file("a", &vec![0; 3 << 20]), end()].concat();
    let zstd = zstd::encode_all(bomb.as_slice(), 1).unwrap();
    let zipped = zip(|zip| {
        for name in ["a", "b", "c"] {
            zip.start_file(name, options(0o644)).unwrap();
            zip.write_all(&vec![0; LIMIT as usize / 2]).unwrap();
        }
    });
    // Megabytes of headers without content.
    let headers = entry(EntryType::Directory, b"d", b"", 0o755, b"").repeat(3_000);
    for bytes in [bomb, zstd, zipped, headers] {
        let refused = unpack(io::Cursor::new(&bytes), LIMIT, &mut Kept::default());
        let Err(Problem::Origin(failure)) = refused else { panic!("not refused") };
        assert_eq!(failure.kind, FailureKind::TooMuch, "{}", failure.message);
        assert!(failure.message.contains("max_unpacked_gb"), "{}", failure.message);
    }
}

#[test]
fn a_zip_with_a_huge_or_64_bit_directory_is_refused_before_it_is_read() {
    // A central directory that claims to be small, but each of its entries has a comment of 64 KiB.
    let entries = u16::try_from(ZIP_DIRECTORY_MAX_BYTES / 65_535 + 2).unwrap();
    let mut header = b"PK\x01\x02".to_vec();
    header.extend([0; 24]);
    header.extend([1, 0, 0, 0, 0xff, 0xff]);
    header.extend([0; 12]);
    header.push(b'n');
    header.extend(vec![b'c'; 65_535]);
    let mut bytes = b"PK\x03\x04".to_vec();
    bytes.extend(header.repeat(entries.into()));
    bytes.extend(b"PK\x05\x06\0\0\0\0");
    bytes.extend([entries.to_le_bytes(), entries.to_le_bytes()].concat());
    bytes.extend([46u32.to_le_bytes(), 4u32.to_le_bytes()].concat());
    bytes.extend([0; 2]);
    assert!(refusal(&bytes).1.contains("list of contents"), "{:?}", refusal(&bytes));
    let locator = [b"PK\x06\x07".as_slice(), &[0; 16], b"PK\x05\x06", &[0; 18]].concat();
    let archive = [b"PK\x03\x04".as_slice(), &locator].concat();
    assert!(refusal(&archive).1.contains("64-bit"));
}

#[test]
fn faults_of_the_store_are_not_attributed_to_the_archive() {
    struct Full;
    impl Contents for Full {
        fn put(&mut self, _: &mut dyn Read) -> Result<Digest, Problem> {
            Err(gorego_reapi::error::Error::internal("no store").into())
        }
    }
    let tar = sample_tar();
    let outcome = unpack(io::Cursor::new(tar.as_slice()), PLENTY, &mut Full);
    assert!(matches!(outcome, Err(Problem::Server(_))), "{outcome:?}");
    struct Failing;
    impl Read for Failing {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(Problem::Server(gorego_reapi::error::Error::internal("no disk")).into_io())
        }
    }
    impl Seek for Failing {
        fn seek(&mut self, _: SeekFrom) -> io::Result<u64> {
            Ok(0)
        }
    }
    let outcome = unpack(Failing, PLENTY, &mut Kept::default());
    assert!(matches!(outcome, Err(Problem::Server(_))), "{outcome:?}");
}

proptest! {
    /// Unpacking a damaged archive never panics, and the result has only safe names.
    #[test]
    fn damaged_archives_never_panic(at in 0usize..6_000, byte: u8, format in 0usize..4, cut in 0usize..12_000) {
        let tar = sample_tar();
        let mut bytes = match format {
            0 => tar,
            1 => zstd::encode_all(tar.as_slice(), 1).unwrap(),
            2 => gzip(&tar),
            _ => zip(|zip| {
                zip.start_file("pkg/a.txt", options(0o644)).unwrap();
                zip.write_all(b"content").unwrap();
                zip.add_symlink("pkg/link", "a.txt", options(0o777)).unwrap();
            }),
        };
        let at = at % bytes.len();
        bytes[at] = byte;
        bytes.truncate(cut.max(1));
        if let Ok(layout) = read(&bytes) {
            for (_, directory) in layout.directories(SHA256).1 {
                prop_assert!(gorego_reapi::tree::Directory::decode(&directory, SHA256).is_ok());
            }
        }
    }
}

/// One address unpacks one large archive, and another one finds room beside it and beside a small one.
#[test]
fn decoders_with_large_dictionaries_are_counted() {
    let budget = Budget::keeping_free(UNPACKING, LARGEST_BYTES);
    let [one, other] = [1, 2].map(|host| Caller::connected(([127, 0, 0, host], 1).into()));
    let [xz, zstd] = [&b"\xfd7zXZ\0"[..], b"\x28\xb5\x2f\xfd\0\0"].map(|magic| memory_bytes(magic, 1_000));
    let gzip = memory_bytes(b"\x1f\x8b\x08\0\0\0", 1 << 40);
    let _held = budget.take(one, xz).unwrap();
    assert!(budget.take(one, zstd).is_err());
    let _small = budget.take(one, gzip).unwrap();
    let _other = budget.take(other, zstd).unwrap();
    let zip = |length| memory_bytes(b"PK\x03\x04\0\0", length) - LAYOUT_BYTES;
    assert!(zip(100) < 2 << 20 && zip(1 << 40) <= 65 << 20);
}
