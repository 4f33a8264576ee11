//! Tests of GetTree: pages, tokens and bounds.

use super::*;
use crate::{
    actors::cas::trees::walk::{SMALL_WALK_BYTES, Walks},
    call::ConnectionInfo,
    caller::Caller,
    connections::{
        Connections,
        answers::{ANSWERS, FRAME_BYTES},
    },
    instance::Instances,
};
use bytes::Bytes;
use futures::{FutureExt as _, executor::block_on};
use gorego_reapi::{
    digest::DigestFunction,
    proto::reapi::{DirectoryNode, FileNode},
};
use proptest::prelude::*;
use std::collections::{HashMap, HashSet};

const SHA256: DigestFunction = DigestFunction::Sha256;

type Pages = futures::stream::BoxStream<'static, Result<GetTreeResponse>>;

#[derive(Default, Clone)]
struct Blobs(HashMap<Digest, Bytes>);

impl Blobs {
    fn add(&mut self, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = SHA256.digest(&bytes);
        self.0.insert(digest, bytes);
        digest
    }

    /// Adds a directory. Its file name makes it unique, and `padding` makes this name longer.
    fn directory(&mut self, name: &str, padding: usize, children: &[Digest]) -> Digest {
        let file = FileNode {
            name: format!("{name}{}", "x".repeat(padding)),
            digest: Some(Digest::empty(SHA256).to_wire()),
            ..Default::default()
        };
        let node = |(at, child): (usize, &Digest)| DirectoryNode {
            name: format!("d{at}"),
            digest: Some(child.to_wire()),
        };
        let directories = children.iter().enumerate().map(node).collect();
        let message = Directory { files: vec![file], directories, ..Default::default() };
        self.add(message.encode_to_vec())
    }

    fn walk(&self, request: GetTreeRequest) -> Result<Vec<GetTreeResponse>> {
        let pages = self.pages(request, &Walks::default())?;
        block_on(pages.collect::<Vec<_>>()).into_iter().collect()
    }

    fn pages(&self, request: GetTreeRequest, walks: &Walks) -> Result<Pages> {
        self.pages_for(peer(1), request, walks)
    }

    fn pages_for(&self, caller: Caller, request: GetTreeRequest, walks: &Walks) -> Result<Pages> {
        let blobs = self.0.clone();
        let paging = Paging::decode(&Instances::new([""]).unwrap().get("").unwrap(), &request)?;
        let walk = Walk::over(paging.root, walks.clone(), caller, move |digests: Vec<Digest>| {
            let get = |digest: Digest| match blobs.get(&digest) {
                Some(blob) => Ok(blob.clone()),
                None if digest.is_empty() => Ok(Bytes::new()),
                None => Err(Error::NotFound(digest.to_string())),
            };
            let answer = Ok(digests.into_iter().map(get).collect());
            async move { answer }.boxed()
        });
        Ok(run(paging, walk).boxed())
    }
}

/// A new connection of this peer.
fn peer(number: u8) -> Caller {
    Caller::connected(([127, 0, 0, number], 1).into())
}

fn request(root: Digest, page_size: i32) -> GetTreeRequest {
    GetTreeRequest { root_digest: Some(root.to_wire()), page_size, ..Default::default() }
}

fn digests(pages: &[GetTreeResponse]) -> Vec<Digest> {
    let directories = pages.iter().flat_map(|page| &page.directories);
    directories.map(|directory| SHA256.digest(&directory.encode_to_vec())).collect()
}

/// CAS-24.
#[test]
fn a_tree_that_doubles_at_every_level_is_sent_once_a_level() {
    let mut blobs = Blobs::default();
    let mut root = blobs.directory("leaf", 0, &[]);
    for level in 0..30 {
        root = blobs.directory(&level.to_string(), 0, &[root, root]);
    }
    let pages = blobs.walk(request(root, 0)).unwrap();
    assert_eq!(digests(&pages).len(), 31);
    assert_eq!(digests(&pages)[0], root);
}

/// CAS-26.
#[test]
fn only_an_absent_root_is_an_error() {
    let mut blobs = Blobs::default();
    let leaf = blobs.directory("leaf", 0, &[]);
    let middle = blobs.directory("middle", 0, &[leaf]);
    let other = blobs.directory("other", 0, &[]);
    let root = blobs.directory("root", 0, &[middle, other]);
    blobs.0.remove(&middle);
    assert_eq!(digests(&blobs.walk(request(root, 0)).unwrap()), [root, other]);
    blobs.0.remove(&root);
    assert!(matches!(blobs.walk(request(root, 0)), Err(Error::NotFound(_))));
}

/// CAS-29, GEN-06.
#[test]
fn the_empty_digest_is_one_empty_directory_and_other_blobs_are_refused() {
    let mut blobs = Blobs::default();
    let pages = blobs.walk(request(Digest::empty(SHA256), 0)).unwrap();
    assert_eq!(pages, [GetTreeResponse { directories: vec![Directory::default()], ..Default::default() }]);
    let text = blobs.add("this is no directory");
    assert!(matches!(blobs.walk(request(text, 0)), Err(Error::Invalid(_))));
    // This directory is well-formed as far as the walk checks, and takes two hundred megabytes of memory.
    let empty_files = blobs.add(b"\x0a\x00".repeat(2_000_001));
    assert!(matches!(blobs.walk(request(empty_files, 0)), Err(Error::Invalid(_))));
}

/// CAS-28.
#[test]
fn bad_tokens_and_sizes_are_refused() {
    let mut blobs = Blobs::default();
    let children: Vec<_> = (0..5).map(|n| blobs.directory(&n.to_string(), 0, &[])).collect();
    let root = blobs.directory("root", 0, &children);
    let token = blobs.walk(request(root, 2)).unwrap()[0].next_page_token.clone();
    let with = |root, token: &str| GetTreeRequest { page_token: token.into(), ..request(root, 2) };
    assert!(blobs.walk(with(root, &token)).is_ok());
    for request in [with(children[0], &token), with(root, &format!("1{token}")), request(root, -1)] {
        assert!(matches!(blobs.walk(request), Err(Error::Invalid(_))));
    }
    let absent = GetTreeRequest::default();
    assert!(matches!(blobs.walk(absent), Err(Error::Invalid(_))));
}

/// The next page, if it is ready.
fn next(pages: &mut Pages) -> Option<GetTreeResponse> {
    futures::FutureExt::now_or_never(pages.next()).map(|page| page.unwrap().unwrap())
}

#[test]
fn more_walks_than_there_are_places_for_wait_in_order() {
    let mut blobs = Blobs::default();
    let leaf = blobs.directory("leaf", 0, &[]);
    let root = blobs.directory("root", 0, &[leaf]);
    let walks = Walks::new(2, 1);
    let open = |number| blobs.pages_for(peer(number), request(root, 1), &walks).unwrap();
    let mut pages: Vec<Pages> = (1..=5).map(open).collect();
    let given: Vec<bool> = pages.iter_mut().map(|pages| next(pages).is_some()).collect();
    assert_eq!(given, [true, true, false, false, false]);
    drop(pages.remove(2));
    assert!(next(&mut pages[0]).unwrap().next_page_token.is_empty(), "who has a place goes on");
    let given: Vec<bool> = pages[2..].iter_mut().rev().map(|pages| next(pages).is_some()).collect();
    assert_eq!(given, [false, true], "a walk that is over, and one whose client has gone, hold nobody up");
    drop(pages.remove(1));
    assert!(next(&mut pages[2]).is_some(), "the client of another one has gone");
}

#[test]
fn large_walks_wait_for_each_other_and_small_ones_do_not_wait_for_them() {
    let mut blobs = Blobs::default();
    let files = b"\x0a\x00".repeat(SMALL_WALK_BYTES / (2 * size_of::<FileNode>()));
    // This directory is small on the wire. Its page and the directories that it names are counted before they are made.
    let large = blobs.add(files);
    let small = blobs.directory("small", 0, &[]);
    let root = blobs.directory("root", 0, &[large, small]);
    let walks = Walks::new(9, 1);
    let open = |root| blobs.pages(request(root, 1), &walks).unwrap();
    let mut walking = [open(root), open(root), open(small)];
    let given =
        |walking: &mut [Pages]| walking.iter_mut().map(|pages| next(pages).is_some()).collect::<Vec<_>>();
    assert_eq!(given(&mut walking), [true, false, true]);
    let [first, mut second, _] = walking;
    drop(first);
    assert!(next(&mut second).is_some());
}

#[test]
fn one_peer_does_not_take_all_large_places() {
    let mut blobs = Blobs::default();
    let large = blobs.add(b"\x0a\x00".repeat(SMALL_WALK_BYTES / (2 * size_of::<FileNode>())));
    let root = blobs.directory("root", 0, &[large]);
    let walks = Walks::default();
    let mut walking =
        [1, 1, 2].map(|number| blobs.pages_for(peer(number), request(root, 1), &walks).unwrap());
    let given: Vec<bool> = walking.iter_mut().map(|pages| next(pages).is_some()).collect();
    assert_eq!(given, [true, false, true]);
}

/// Otherwise, walks that wait for a place would keep the walk that has the place from sending its pages.
#[tokio::test]
async fn a_walk_holds_room_for_the_pages_that_it_has_given_and_for_nothing_else() {
    let connections = Connections::default();
    let admitted = connections.admit(([127, 0, 0, 1], 1).into()).unwrap();
    let state = admitted.state().clone();
    let call = || Call::begin(Some(ConnectionInfo::of(&admitted)), Default::default(), None, None);
    let mut blobs = Blobs::default();
    let leaf = blobs.directory("leaf", 100_000, &[]);
    let root = blobs.directory("root", 0, &[leaf]);
    let walks = Walks::new(1, 1);
    let open = |call| with_room(blobs.pages(request(root, 1), &walks).unwrap(), call).boxed();
    let first = call();
    let mut walking = open(first.clone());
    let small = next(&mut walking).unwrap().encoded_len() as u64;
    let mut waiting: Vec<Pages> = (0..9).map(|_| open(call())).collect();
    assert!(waiting.iter_mut().all(|pages| next(pages).is_none()), "there is one place");
    let large = next(&mut walking).unwrap().encoded_len() as u64;
    assert!(large > small);
    // Both pages may be sent in one frame.
    let room = first.take_room(small + large + FRAME_BYTES).expect("room for both");
    first.give_room_back();
    assert!(state.reserve_now(ANSWERS.connection - room.amount()).is_ok(), "nobody else holds room");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_loses_its_place_and_is_told_so() {
    let mut blobs = Blobs::default();
    let leaves: Vec<_> = (0..5).map(|n| blobs.directory(&n.to_string(), 0, &[])).collect();
    let root = blobs.directory("root", 0, &leaves);
    let walks = Walks::new(1, 1);
    let open = || attended(blobs.pages(request(root, 1), &walks).unwrap()).boxed();
    let (mut idle, mut waiting) = (open(), open());
    assert!(idle.next().await.unwrap().is_ok());
    tokio::task::yield_now().await;
    let started = tokio::time::Instant::now();
    assert_eq!(waiting.by_ref().collect::<Vec<_>>().await.len(), 6, "it has not been waiting for its client");
    assert!(started.elapsed() >= PAGE_WAIT);
    let rest: Vec<_> = idle.collect().await;
    assert!(rest.len() < 5, "{rest:?}");
    assert!(matches!(rest.last(), Some(Err(Error::Unavailable(_)))), "no tree ends early without a word");
}

/// GEN-25.
#[test]
fn no_page_is_larger_than_a_message_may_be() {
    let mut blobs = Blobs::default();
    let children: Vec<_> = (0..10).map(|n| blobs.directory(&n.to_string(), 1_000_000, &[])).collect();
    let root = blobs.directory("root", 0, &children);
    let pages = blobs.walk(request(root, 0)).unwrap();
    assert_eq!(digests(&pages).len(), 11);
    assert!(pages.len() >= 3);
    assert!(pages.iter().all(|page| page.encoded_len() <= inline::MESSAGE_MAX_BYTES));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// CAS-24, CAS-25, CAS-27, CAS-28: in random trees (each directory refers to some earlier ones), every directory is
    /// sent once, root first, and the walk can be resumed after any page.
    #[test]
    fn any_tree_is_sent_whole_in_any_page_size_and_from_any_token(
        links in proptest::collection::vec(proptest::collection::vec(any::<prop::sample::Index>(), 0..4), 1..40),
        page_size in 0i32..8,
    ) {
        let mut blobs = Blobs::default();
        let mut made: Vec<Digest> = Vec::new();
        for (at, links) in links.iter().enumerate() {
            let children: Vec<_> =
                if made.is_empty() { vec![] } else { links.iter().map(|link| *link.get(&made)).collect() };
            made.push(blobs.directory(&at.to_string(), 0, &children));
        }
        let root = blobs.directory("root", 0, &made);
        let pages = blobs.walk(request(root, page_size)).unwrap();
        let all = digests(&pages);
        prop_assert_eq!(all[0], root);
        prop_assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        prop_assert_eq!(all.len(), made.len() + 1);
        prop_assert!(pages.last().unwrap().next_page_token.is_empty());
        if page_size > 0 {
            prop_assert!(pages.iter().all(|page| page.directories.len() <= page_size as usize));
        }
        let mut sent = 0;
        for page in &pages[..pages.len() - 1] {
            prop_assert!(!page.next_page_token.is_empty());
            sent += page.directories.len();
            let resumed = GetTreeRequest { page_token: page.next_page_token.clone(), ..request(root, page_size) };
            prop_assert_eq!(&digests(&blobs.walk(resumed).unwrap())[..], &all[sent..]);
        }
    }
}
