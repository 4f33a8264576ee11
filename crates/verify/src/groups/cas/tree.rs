//! CAS-24 to CAS-29: GetTree, which is optional.

use crate::{
    blob::Blob,
    check::{Answer as _, Check, Step as _, Verdict, ensure, equal, fail, skipped},
    checks,
    session::Session,
};
use gorego_reapi::proto::reapi::{
    Digest, Directory, DirectoryNode, FileNode, GetTreeRequest, GetTreeResponse,
};
use prost::Message as _;
use std::collections::HashSet;
use tonic::Code;

pub(crate) const CHECKS: &[Check] = checks![
    a_tree_of_two_to_the_thirty_paths_is_sent_by_its_directories => "CAS-24";
    parents_come_before_children_in_a_stable_order => "CAS-25", "CAS-24";
    an_absent_descendant_is_skipped => "CAS-26";
    an_absent_root_is_not_found => "CAS-26";
    small_pages_bound_messages_and_not_the_stream => "CAS-27";
    a_page_token_resumes_after_its_message => "CAS-28";
    garbled_tokens_and_negative_sizes_are_refused => "CAS-28";
    a_root_that_is_no_directory_is_an_argument_error => "CAS-29";
    the_empty_digest_is_one_empty_directory => "CAS-29", "GEN-06";
];

/// A stored tree and its directories.
struct StoredTree {
    root: Blob,
    below: Vec<Blob>,
}

impl StoredTree {
    fn root(&self) -> &Digest {
        &self.root.digest
    }

    fn count(&self) -> usize {
        self.below.len() + 1
    }

    fn hashes(&self) -> HashSet<&str> {
        self.below.iter().chain([&self.root]).map(|blob| blob.digest.hash.as_str()).collect()
    }

    async fn store(self, s: &Session) -> Verdict<Self> {
        s.store(&self.below.iter().chain([&self.root]).collect::<Vec<_>>()).await?;
        Ok(self)
    }
}

fn node(name: String, child: &Blob) -> DirectoryNode {
    DirectoryNode { name, digest: Some(child.digest.clone()) }
}

/// Stores a root with `width` subdirectories, each of which contains another: 1 + 2 * width directories.
async fn store_tree(s: &Session, width: usize) -> Verdict<StoredTree> {
    let (mut middles, mut leaves) = (Vec::new(), Vec::new());
    for at in 0..width {
        let file = FileNode {
            name: format!("f-{at}-{}", s.word()),
            digest: Some(s.empty().digest),
            ..Default::default()
        };
        let leaf = s.message(&Directory { files: vec![file], ..Default::default() });
        let directories = vec![node("leaf".into(), &leaf)];
        middles.push(s.message(&Directory { directories, ..Default::default() }));
        leaves.push(leaf);
    }
    let directories = middles.iter().enumerate().map(|(at, blob)| node(format!("d{at:03}"), blob)).collect();
    let root = s.message(&Directory { directories, ..Default::default() });
    middles.extend(leaves);
    StoredTree { root, below: middles }.store(s).await
}

/// The hashes of the directories in the order of a traversal, computed from their encoding.
fn hashes(s: &Session, pages: &[GetTreeResponse]) -> Vec<String> {
    let all = pages.iter().flat_map(|page| &page.directories);
    all.map(|directory| s.blob_of(directory.encode_to_vec()).digest.hash).collect()
}

fn same_set(sent: &[String], stored_tree: &StoredTree) -> Verdict {
    let set: HashSet<&str> = sent.iter().map(String::as_str).collect();
    let found = set.intersection(&stored_tree.hashes()).count();
    let seen = format!("{found} of {}, and {} others", stored_tree.count(), set.len() - found);
    ensure(set == stored_tree.hashes(), "exactly the directories of the tree", seen)
}

async fn a_tree_of_two_to_the_thirty_paths_is_sent_by_its_directories(s: Session) -> Verdict {
    let leaf = FileNode { name: s.word(), digest: Some(s.empty().digest), ..Default::default() };
    let mut current = s.message(&Directory { files: vec![leaf], ..Default::default() });
    let mut below = Vec::new();
    for _ in 0..30 {
        let directories = vec![node("a".into(), &current), node("b".into(), &current)];
        below.push(current);
        current = s.message(&Directory { directories, ..Default::default() });
    }
    let stored_tree = StoredTree { root: current, below }.store(&s).await?;
    let pages = s.tree(stored_tree.root(), 0).await.offered("a tree of 31 directories is sent")?;
    let sent = hashes(&s, &pages);
    same_set(&sent, &stored_tree)?;
    ensure(sent.len() <= 2 * 31, "about 31 directories", format!("{} directories", sent.len()))
}

async fn parents_come_before_children_in_a_stable_order(s: Session) -> Verdict {
    let stored_tree = store_tree(&s, 10).await?;
    let pages = s.tree(stored_tree.root(), 4).await.offered("the tree is sent")?;
    let sent = hashes(&s, &pages);
    same_set(&sent, &stored_tree)?;
    equal("the first directory", &sent.first(), &Some(&stored_tree.root().hash))?;
    let mut known: HashSet<String> = [stored_tree.root().hash.clone()].into();
    for directory in pages.iter().flat_map(|page| &page.directories) {
        let hash = s.blob_of(directory.encode_to_vec()).digest.hash;
        ensure(known.contains(&hash), "each directory after one that names it", format!("{hash} first"))?;
        let children = directory.directories.iter().filter_map(|node| node.digest.as_ref());
        known.extend(children.map(|digest| digest.hash.clone()));
    }
    let again = s.tree(stored_tree.root(), 4).await.wanted("the tree is sent again")?;
    ensure(hashes(&s, &again) == sent, "the same order each time", "another one")
}

async fn an_absent_descendant_is_skipped(s: Session) -> Verdict {
    let (leaf, absent) = (s.message(&Directory::default()), s.unknown());
    let kept = s.message(&Directory {
        files: vec![FileNode { name: s.word(), digest: Some(leaf.digest.clone()), ..Default::default() }],
        ..Default::default()
    });
    let gone = DirectoryNode { name: "b".into(), digest: Some(absent) };
    let directories = vec![node("a".into(), &kept), gone, node("c".into(), &kept)];
    let root = s.message(&Directory { directories, ..Default::default() });
    let stored_tree = StoredTree { root, below: vec![kept] }.store(&s).await?;
    let pages =
        s.tree(stored_tree.root(), 0).await.offered("a tree without one of its directories is sent")?;
    same_set(&hashes(&s, &pages), &stored_tree)
}

async fn an_absent_root_is_not_found(s: Session) -> Verdict {
    let stored_tree = store_tree(&s, 1).await?;
    s.tree(stored_tree.root(), 0).await.offered("a stored tree is sent").needs("CAS-24")?;
    s.tree(&s.unknown(), 0).await.refused("GetTree of an absent root", &[Code::NotFound])?;
    Ok(())
}

async fn small_pages_bound_messages_and_not_the_stream(s: Session) -> Verdict {
    let stored_tree = store_tree(&s, 3).await?;
    let pages = s.tree(stored_tree.root(), 2).await.offered("a tree of 7 directories is sent")?;
    same_set(&hashes(&s, &pages), &stored_tree)?;
    let largest = pages.iter().map(|page| page.directories.len()).max().unwrap_or(0);
    ensure(largest <= 2, "at most 2 directories in a message", largest)?;
    let last = pages.last().map(|page| page.next_page_token.as_str());
    equal("next_page_token of the last message", &last, &Some(""))
}

async fn a_page_token_resumes_after_its_message(s: Session) -> Verdict {
    let stored_tree = store_tree(&s, 10).await?;
    let pages = s.tree(stored_tree.root(), 3).await.offered("a tree of 21 directories is sent")?;
    let (Some(cut), true) = (pages.get(1), pages.len() > 2) else {
        return Err(skipped("the server sent the tree in fewer than three messages"));
    };
    ensure(!cut.next_page_token.is_empty(), "a next_page_token in the second of many messages", "none")?;
    let request = GetTreeRequest {
        instance_name: s.instance(),
        root_digest: Some(stored_tree.root().clone()),
        page_size: 3,
        page_token: cut.next_page_token.clone(),
        digest_function: s.function_number(),
    };
    // On another connection, as after a break.
    let rest = s
        .reconnect()
        .await
        .control()?
        .tree_request(request)
        .await
        .wanted("GetTree resumes from a page token")?;
    let mut joined = hashes(&s, pages.get(..2).unwrap_or_default());
    let before = joined.len();
    joined.extend(hashes(&s, &rest));
    same_set(&joined, &stored_tree)?;
    let again = joined.len() - before;
    ensure(again < stored_tree.count(), "only what comes after the message", format!("{again} directories"))
}

async fn garbled_tokens_and_negative_sizes_are_refused(s: Session) -> Verdict {
    let stored_tree = store_tree(&s, 3).await?;
    let request = |page_token: String, page_size| GetTreeRequest {
        instance_name: s.instance(),
        root_digest: Some(stored_tree.root().clone()),
        page_size,
        page_token,
        digest_function: s.function_number(),
    };
    s.tree_request(request(String::new(), 1)).await.offered("a stored tree is sent").needs("CAS-24")?;
    for token in ["nonsense", "\u{7f}", "AAAAAAAAAAAAAAAAAAAAAAAA", "9223372036854775808"] {
        let answer = s.tree_request(request(token.to_owned(), 1)).await;
        answer.refused(&format!("the page token {token:?}"), &[Code::InvalidArgument])?;
    }
    let answer = s.tree_request(request(String::new(), -1)).await;
    answer.refused("a page_size of -1", &[Code::InvalidArgument])?;
    let other = store_tree(&s, 3).await?;
    let pages = s.tree(other.root(), 1).await.needs("CAS-24", "another stored tree is sent")?;
    let foreign = pages.first().map(|page| page.next_page_token.clone()).unwrap_or_default();
    ensure(!foreign.is_empty(), "a next_page_token in the first of seven messages", "none")?;
    let answer = s.tree_request(request(foreign, 1)).await;
    answer.refused("the page token of another tree", &[Code::InvalidArgument])?;
    Ok(())
}

async fn a_root_that_is_no_directory_is_an_argument_error(s: Session) -> Verdict {
    let stored_tree = store_tree(&s, 1).await?;
    s.tree(stored_tree.root(), 0).await.offered("a stored tree is sent").needs("CAS-24")?;
    let text = s.blob_of(format!("this is no Directory: {}", s.word()));
    if Directory::decode(&*text.data).is_ok() {
        return Err(fail("text that does not parse as a Directory", "it does"));
    }
    s.store(&[&text]).await?;
    s.tree(&text.digest, 0).await.refused("GetTree of a text", &[Code::InvalidArgument])?;
    Ok(())
}

async fn the_empty_digest_is_one_empty_directory(s: Session) -> Verdict {
    let pages = s.tree(&s.empty().digest, 0).await.offered("GetTree of the empty digest answers")?;
    let all: Vec<_> = pages.into_iter().flat_map(|page| page.directories).collect();
    equal("directories", &all, &vec![Directory::default()])
}
