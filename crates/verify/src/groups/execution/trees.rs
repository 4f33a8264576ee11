//! EXE-55 to EXE-58: the representation of output directories.

use crate::{
    check::{Answer as _, Check, Step as _, Verdict, ensure, equal, fail},
    checks,
    job::Job,
    session::Session,
};
use bytes::Bytes;
use gorego_reapi::proto::reapi::{
    Directory, OutputDirectory, Tree, command::OutputDirectoryFormat as Format,
};
use prost::Message as _;
use std::collections::{BTreeSet, HashMap};

pub(crate) const CHECKS: &[Check] = checks![
    a_tree_holds_each_directory_once_and_all_its_files_are_stored => "EXE-55", "GEN-30";
    the_tree_of_an_empty_directory_is_two_bytes => "EXE-56";
    trees_are_sorted_as_they_claim_and_equal_directories_have_equal_trees => "EXE-57";
    each_output_directory_format_describes_the_same_root => "EXE-58";
];

/// Creates an output directory `d` that contains equal and nested directories.
const MAKE: &str = "mkdir -p d/a/x d/b/x d/c/deep/er d/empty
echo one > d/f1; echo two > d/f2; echo same > d/a/x/f; echo same > d/b/x/f; echo deep > d/c/deep/er/f; ln -s f1 d/link";

/// Runs a job with one output directory, and returns it.
async fn directory_of(job: &Job) -> Verdict<OutputDirectory> {
    let result = job.result().await?;
    let seen = format!("{} directories, exit code {}", result.output_directories.len(), result.exit_code);
    let mut directories = result.output_directories.into_iter();
    match (directories.next(), directories.next()) {
        (Some(directory), None) => Ok(directory),
        _ => Err(fail("one output directory", seen)),
    }
}

/// The Tree of a directory, encoded and decoded.
async fn tree_of(s: &Session, directory: &OutputDirectory) -> Verdict<(Bytes, Tree)> {
    let digest = directory.tree_digest.as_ref().ok_or_else(|| fail("a tree_digest", "none"))?;
    let bytes = s.read(digest).await.needs("EXE-54", "the Tree can be read")?;
    let tree = Tree::decode(bytes.clone()).map_err(|error| fail("a Tree", error))?;
    Ok((bytes, tree))
}

/// Checks that the names are sorted in each list and unique in the whole Directory.
fn sorted(directory: &Directory) -> Verdict {
    let files: Vec<_> = directory.files.iter().map(|node| node.name.as_str()).collect();
    let directories: Vec<_> = directory.directories.iter().map(|node| node.name.as_str()).collect();
    let symlinks: Vec<_> = directory.symlinks.iter().map(|node| node.name.as_str()).collect();
    let lists = [files, directories, symlinks];
    let in_order = lists.iter().all(|list| list.is_sorted());
    let names: BTreeSet<_> = lists.iter().flatten().collect();
    let unique = names.len() == lists.iter().map(Vec::len).sum::<usize>();
    ensure(in_order && unique, "sorted and unique names in each Directory", format!("{lists:?}"))
}

async fn a_tree_holds_each_directory_once_and_all_its_files_are_stored(s: Session) -> Verdict {
    let directory = directory_of(&Job::sh(&s, MAKE).outputs(["d"])).await?;
    let (bytes, tree) = tree_of(&s, &directory).await?;
    let root = tree.root.clone().ok_or_else(|| fail("a root in the Tree", "none"))?;
    // Clients hash their own encoding of a Tree, so the encoding must match byte for byte (GEN-30).
    let canonical = tree.encode_to_vec() == bytes;
    ensure(canonical, "a Tree in canonical encoding", "another encoding than that of its own messages")?;
    let mut children = HashMap::new();
    for child in &tree.children {
        let twice = children.insert(s.message(child).digest.hash, child).is_some();
        ensure(!twice, "each child once", "a child twice")?;
    }
    let mut files = Vec::new();
    let mut seen = BTreeSet::new();
    let mut open = vec![&root];
    while let Some(directory) = open.pop() {
        sorted(directory)?;
        files.extend(directory.files.iter().filter_map(|node| node.digest.clone()));
        for node in &directory.directories {
            let hash = node.digest.as_ref().map(|digest| digest.hash.clone()).unwrap_or_default();
            let child = children.get(&hash);
            let child =
                child.ok_or_else(|| fail(format!("a child for {}", node.name), "a dangling reference"))?;
            if seen.insert(hash) {
                open.push(child);
            }
        }
    }
    equal("children that are referenced", &seen.len(), &tree.children.len())?;
    // The root, a and b (which are equal), their x, c, deep, er and empty.
    equal("distinct directories below the root", &seen.len(), &6)?;
    equal("files", &files.len(), &4)?;
    let links: Vec<_> = root.symlinks.iter().map(|link| (link.name.as_str(), link.target.as_str())).collect();
    equal("symlinks of the root", &links, &vec![("link", "f1")])?;
    let missing = s.missing(&files).await.needs("CAS-01", "FindMissingBlobs answers")?;
    equal("files of the Tree that are missing", &missing, &Vec::new())
}

async fn the_tree_of_an_empty_directory_is_two_bytes(s: Session) -> Verdict {
    let directory = directory_of(&Job::sh(&s, "mkdir d").outputs(["d"])).await?;
    let two_bytes = s.blob_of(&b"\x0a\x00"[..]);
    equal("tree_digest of an empty directory", &directory.tree_digest, &Some(two_bytes.digest))?;
    let (bytes, _) = tree_of(&s, &directory).await?;
    equal("the Tree", &bytes.as_ref(), &b"\x0a\x00".as_slice())
}

/// Whether an encoded Tree consists of one root and then children, each after a directory that refers to it.
fn topologically_sorted(s: &Session, tree: &Tree, bytes: &Bytes) -> bool {
    let mut known: BTreeSet<String> = BTreeSet::new();
    let children = |directory: &Directory| {
        let digests = directory.directories.iter().filter_map(|node| node.digest.as_ref());
        digests.map(|digest| digest.hash.clone()).collect::<Vec<_>>()
    };
    known.extend(tree.root.iter().flat_map(children));
    let after_parents = tree.children.iter().all(|child| {
        let referred = known.contains(&s.message(child).digest.hash);
        known.extend(children(child));
        referred
    });
    after_parents && tree.encode_to_vec() == *bytes
}

async fn trees_are_sorted_as_they_claim_and_equal_directories_have_equal_trees(s: Session) -> Verdict {
    let job = Job::sh(&s, MAKE).outputs(["d"]).uncached();
    let mut digests = Vec::new();
    for at in 1..=3 {
        s.case(format!("run {at} of 3"), async {
            let directory = directory_of(&job).await?;
            let (bytes, tree) = tree_of(&s, &directory).await?;
            if directory.is_topologically_sorted {
                let holds = topologically_sorted(&s, &tree, &bytes);
                ensure(holds, "parents before children, as is_topologically_sorted says", "another order")?;
            }
            digests.push(directory.tree_digest);
            Ok(())
        })
        .await?;
    }
    let equal_trees = digests.windows(2).all(|pair| pair.first() == pair.last());
    ensure(equal_trees, "equal Trees for equal directories", format!("{digests:?}"))
}

async fn each_output_directory_format_describes_the_same_root(s: Session) -> Verdict {
    for format in [Format::TreeOnly, Format::DirectoryOnly, Format::TreeAndDirectory] {
        s.case(format.as_str_name(), async {
            let job = Job::sh(&s, MAKE).outputs(["d"]);
            let job = job.command(|command| command.output_directory_format = format.into());
            let directory = directory_of(&job).await?;
            let has = (directory.tree_digest.is_some(), directory.root_directory_digest.is_some());
            let (tree, root) = match format {
                Format::TreeOnly => (true, has.1),
                // A server may fall back to TREE_ONLY.
                Format::DirectoryOnly => (!has.1 || has.0, has.1),
                Format::TreeAndDirectory => (true, has.1),
            };
            let seen = format!("tree_digest {}, root_directory_digest {}", has.0, has.1);
            ensure(has == (tree, root), "the digests of the format", seen)?;
            let described = match has.0 {
                true => Some(tree_of(&s, &directory).await?.1),
                false => None,
            };
            if let Some(digest) = &directory.root_directory_digest {
                let pages = s.tree(digest, 0).await.wanted("GetTree of root_directory_digest")?;
                let found: BTreeSet<_> = pages
                    .iter()
                    .flat_map(|page| &page.directories)
                    .map(|directory| s.message(directory).digest.hash)
                    .collect();
                // The root and the six directories of the Tree.
                equal("distinct Directories below root_directory_digest", &found.len(), &7)?;
                let root = described.and_then(|tree| tree.root).map(|root| s.message(&root).digest);
                if root.is_some() {
                    equal("digest of the root in the Tree", &root.as_ref(), &Some(digest))
                        .case(format.as_str_name())?;
                }
            }
            Ok(())
        })
        .await?;
    }
    Ok(())
}
