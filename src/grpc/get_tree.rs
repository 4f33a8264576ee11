//! GetTree: a walk over the distinct directories below a root, breadth first, root first.
//!
//! One call streams the whole tree in pages (CAS-27). Each distinct directory is read and sent once, so a tree that refers to
//! one directory a million times costs as much as one that does so once (CAS-24). Directories are sent as their blobs say, not
//! as this server would write them: clients find children by the digest of what they get.
//!
//! The walk is pure: it names what it wants to know next, is told, and gives pages. A page token counts the directories of the
//! walk up to the end of its page; resuming walks again from the root and skips so many. The server keeps nothing in between.

use super::{TreeStream, convert, inline, page_token};
use crate::{
    actors::cas::client::Cas,
    digest::Digest,
    error::{Error, Result},
    instance::Instance,
    proto::reapi::{Directory, GetTreeRequest, GetTreeResponse},
    tree::{MAX_DIRECTORY_BYTES, check_entries},
};
use bytes::Bytes;
use futures::stream::{self, Stream, StreamExt as _};
use prost::Message as _;
use std::collections::{HashSet, VecDeque};

/// Directories in a page when the client does not say, and at most.
pub const PAGE_MAX_DIRECTORIES: usize = 1_000;
/// Bytes of Directories in a page; what 4 MiB leave over is for the page token and framing (GEN-25). A larger directory
/// travels alone, in a message that only clients with a raised limit take.
pub const PAGE_MAX_BYTES: usize = inline::MESSAGE_MAX_BYTES - 4 * 1024;
/// Most distinct directories in one walk; each takes about 200 bytes of memory while the walk lasts.
pub const MAX_DIRECTORIES: usize = 1_000_000;
/// Directories that are read at once.
const READ_MAX_DIRECTORIES: usize = 256;
/// Bytes of directories that are read at once, as far as their digests say; a larger one is read alone.
const READ_MAX_BYTES: u64 = 1024 * 1024;
/// Tag and length of one directory in a page, rounded up.
const ENTRY_BYTES: usize = 8;

/// A walk that is under way.
#[derive(Debug)]
pub struct Walk {
    root: Digest,
    /// Directories of the walk up to here; those that are not stored count too.
    position: u64,
    /// Directories that an earlier call has sent.
    skip: u64,
    page_size: usize,
    /// Found, not yet read.
    queue: VecDeque<Digest>,
    found: HashSet<Digest>,
    page: Vec<Directory>,
    page_bytes: usize,
}

impl Walk {
    /// A walk as a request asks for it.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a malformed digest, a negative page size, or a token of another tree (CAS-28).
    pub fn decode(instance: &Instance, request: &GetTreeRequest) -> Result<Self> {
        let root =
            convert::digest(instance, request.digest_function, request.root_digest.as_ref(), "root_digest")?;
        let page_size = match usize::try_from(request.page_size) {
            Ok(0) => PAGE_MAX_DIRECTORIES,
            Ok(size) => size.min(PAGE_MAX_DIRECTORIES),
            Err(_) => return Err(Error::invalid("page_size is negative")),
        };
        let skip = match request.page_token.as_str() {
            "" => 0,
            token => page_token::open(&binding(&root), token)?,
        };
        Ok(Self {
            root,
            position: 0,
            skip,
            page_size,
            queue: VecDeque::from([root]),
            found: HashSet::from([root]),
            page: Vec::new(),
            page_bytes: 0,
        })
    }

    /// The directories to read next, in the order in which [`Walk::visit`] wants them; none at the end of the walk.
    fn next_batch(&mut self) -> Result<Vec<Digest>> {
        let mut batch = Vec::new();
        let mut bytes = 0u64;
        while let Some(digest) = self.queue.front().copied() {
            if digest.size() > MAX_DIRECTORY_BYTES {
                return Err(Error::Invalid(format!(
                    "directory {digest} is larger than the {MAX_DIRECTORY_BYTES} bytes that this server reads"
                )));
            }
            bytes += digest.size();
            if !batch.is_empty() && (bytes > READ_MAX_BYTES || batch.len() == READ_MAX_DIRECTORIES) {
                break;
            }
            batch.push(digest);
            self.queue.pop_front();
        }
        Ok(batch)
    }

    /// Takes the next directory of the walk. Gives a page when this directory does not fit into it any more; so there is
    /// always at least one directory after such a page.
    fn visit(&mut self, digest: Digest, blob: Result<Bytes>) -> Result<Option<GetTreeResponse>> {
        let blob = match blob {
            Ok(blob) => blob,
            // CAS-26: only the root must be there.
            Err(Error::NotFound(_)) if digest != self.root => {
                self.position += 1;
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        check_entries(&blob, 1).map_err(|error| Error::Invalid(format!("directory {digest}: {error}")))?;
        let directory = Directory::decode(blob.as_ref()).map_err(|error| {
            Error::Invalid(format!("blob {digest} does not parse as a Directory: {error}"))
        })?;
        for child in &directory.directories {
            let child = Digest::from_wire(digest.function(), child.digest.as_ref(), "DirectoryNode.digest")
                .map_err(|error| Error::Invalid(format!("directory {digest}: {error}")))?;
            if self.found.insert(child) {
                self.queue.push_back(child);
            }
        }
        if self.found.len() > MAX_DIRECTORIES {
            return Err(Error::Precondition(format!(
                "the tree below {} has more than {MAX_DIRECTORIES} distinct directories",
                self.root
            )));
        }
        let bytes = directory.encoded_len() + ENTRY_BYTES;
        let full = !self.page.is_empty()
            && (self.page.len() >= self.page_size || self.page_bytes + bytes > PAGE_MAX_BYTES);
        // Before this directory is counted: the token of a page points right behind its last directory.
        let page = full.then(|| self.take_page(true));
        if self.position >= self.skip {
            self.page_bytes += bytes;
            self.page.push(directory);
        }
        self.position += 1;
        Ok(page)
    }

    /// What is left when there is nothing more to visit; empty only if the tree has shrunk since the token was made.
    fn last_page(&mut self) -> GetTreeResponse {
        self.take_page(false)
    }

    fn take_page(&mut self, more: bool) -> GetTreeResponse {
        self.page_bytes = 0;
        let next_page_token =
            if more { page_token::seal(&binding(&self.root), self.position) } else { String::new() };
        GetTreeResponse { directories: std::mem::take(&mut self.page), next_page_token }
    }
}

/// What a token is bound to: a token of another root is refused (CAS-28).
fn binding(root: &Digest) -> String {
    format!("tree of {}/{root}", root.function().name())
}

/// The pages of a walk.
pub fn pages(cas: Cas, instance: Instance, walk: Walk) -> TreeStream {
    run(walk, move |digests| {
        let (cas, instance) = (cas.clone(), instance.clone());
        async move { cas.read_many(&instance, digests).await }
    })
    .map(|page| page.map_err(Into::into))
    .boxed()
}

/// Runs a walk over directories that `read` gives, in the order asked for.
fn run<F>(
    walk: Walk,
    read: impl Fn(Vec<Digest>) -> F + Send + 'static,
) -> impl Stream<Item = Result<GetTreeResponse>> + Send
where
    F: Future<Output = Result<Vec<Result<Bytes>>>> + Send,
{
    /// Directories that were read and not yet visited.
    type Ready = std::vec::IntoIter<(Digest, Result<Bytes>)>;
    let start: Option<(Walk, Ready)> = Some((walk, Vec::new().into_iter()));
    stream::try_unfold((start, read), |(state, read)| async move {
        let Some((mut walk, mut ready)) = state else { return Ok(None) };
        loop {
            for (digest, blob) in ready.by_ref() {
                if let Some(page) = walk.visit(digest, blob)? {
                    return Ok(Some((page, (Some((walk, ready)), read))));
                }
            }
            let batch = walk.next_batch()?;
            if batch.is_empty() {
                return Ok(Some((walk.last_page(), (None, read))));
            }
            let blobs = read(batch.clone()).await?;
            ready = batch.into_iter().zip(blobs).collect::<Vec<_>>().into_iter();
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        digest::DigestFunction,
        instance::Instances,
        proto::reapi::{DirectoryNode, FileNode},
    };
    use futures::executor::block_on;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const SHA256: DigestFunction = DigestFunction::Sha256;

    #[derive(Default, Clone)]
    struct Blobs(HashMap<Digest, Bytes>);

    impl Blobs {
        fn add(&mut self, bytes: impl Into<Bytes>) -> Digest {
            let bytes = bytes.into();
            let digest = SHA256.digest(&bytes);
            self.0.insert(digest, bytes);
            digest
        }

        /// A directory that is told apart from others by a file name of `padding` more bytes.
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
            let blobs = self.0.clone();
            let pages = run(
                Walk::decode(&Instances::new([""]).unwrap().get("").unwrap(), &request)?,
                move |digests| {
                    let get = |digest: Digest| match blobs.get(&digest) {
                        Some(blob) => Ok(blob.clone()),
                        None if digest.is_empty() => Ok(Bytes::new()),
                        None => Err(Error::NotFound(digest.to_string())),
                    };
                    let answer = Ok(digests.into_iter().map(get).collect());
                    async move { answer }
                },
            );
            block_on(pages.collect::<Vec<_>>()).into_iter().collect()
        }
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
        assert_eq!(
            pages,
            [GetTreeResponse { directories: vec![Directory::default()], ..Default::default() }]
        );
        let text = blobs.add("this is no directory");
        assert!(matches!(blobs.walk(request(text, 0)), Err(Error::Invalid(_))));
        // Sound as far as this walk looks, and two hundred megabytes of memory.
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

        /// CAS-24, CAS-25, CAS-27, CAS-28: over random trees (each directory refers to some of those made before it), every
        /// directory is sent once, root first, and the walk can be taken up after any page.
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
}
