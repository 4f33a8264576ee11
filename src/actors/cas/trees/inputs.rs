//! Input roots: they are read, checked, held and copied out.
//!
//! Directories are read level by level, each distinct one once. Decoded directories are cached, because the next action
//! usually shares most of them. A root that was read is remembered ([`KnownRoots`](super::known_roots::KnownRoots)),
//! and a root that was checked recently is not checked again before the action is queued. So the cost of an action
//! whose root is known does not depend on its number of files, until a worker holds the blobs that it needs. All
//! missing Directories and files are reported at once, except those below a missing Directory, which cannot be known
//! (EXE-26). Bounds: [`MAX_DIRECTORY_BYTES`] per message, [`MAX_TREE_DEPTH`] levels, [`MAX_TREE_NODES`] entries in
//! distinct directories, and as many in the expanded tree.

use crate::actors::cas::{
    checked::{open_checked, read_whole},
    client::Cas,
    decoding::worst_case,
    guards::Hold,
    index::FoundEntry,
    lookup::Purpose,
    settings::{DIRECTORIES_AT_ONCE, LOOKUPS_PER_TURN, SMALL_BLOB_BYTES},
    trees::TreeRoom,
    volume::outside::NewInput,
};
use crate::{
    caller::{Caller, Owner},
    instance::Instance,
};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    tree::{
        Directory, InputTree, MAX_DIRECTORY_BYTES, MAX_MESSAGE_MEMORY, MAX_TREE_DEPTH, MAX_TREE_NODES,
        distinct_blobs,
    },
};
use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    sync::Arc,
    time::Instant,
};
use tokio::task::coop::consume_budget;

/// Iterating over this many nodes takes more than a millisecond.
const MANY_NODES: usize = 10_000;

/// The Directories found below a root.
#[derive(Debug, Default)]
pub(crate) struct Closure {
    /// Every distinct stored Directory.
    pub directories: HashMap<Digest, Arc<Directory>>,
    /// Directories that are not stored.
    pub missing: Vec<Digest>,
}

impl Closure {
    /// The digests of all files in these directories.
    pub(crate) fn files(&self) -> impl Iterator<Item = Digest> {
        self.directories.values().flat_map(|directory| directory.files.iter().map(|file| file.digest))
    }
}

/// The input root of an action. Blobs that it holds are not evicted.
#[derive(Debug)]
pub struct ActionInputs {
    cas: Cas,
    instance: Instance,
    tree: Arc<InputTree>,
    /// The files that are held, sorted by digest.
    files: Vec<FoundEntry>,
    holds: Vec<Hold>,
}

impl ActionInputs {
    /// The expanded tree of directories.
    pub fn tree(&self) -> &Arc<InputTree> {
        &self.tree
    }

    /// Holds every blob of the tree. Blocks.
    ///
    /// # Errors
    /// `MissingBlobs` with everything that is missing (EXE-26).
    pub fn hold_all(&mut self) -> Result<()> {
        let tree = self.tree.clone();
        self.hold_sorted(tree.blobs())
    }

    /// Holds these blobs of the tree. Blocks.
    ///
    /// # Errors
    /// `MissingBlobs` with everything that is missing (EXE-26).
    pub fn hold(&mut self, mut blobs: Vec<Digest>) -> Result<()> {
        blobs.retain(|digest| !digest.is_empty());
        blobs.sort_unstable();
        blobs.dedup();
        self.hold_sorted(&blobs)
    }

    fn hold_sorted(&mut self, blobs: &[Digest]) -> Result<()> {
        if blobs.is_empty() {
            return Ok(());
        }
        let instance = self.instance.clone();
        let located = self.cas.block_on(async |cas| cas.locate(&instance, blobs, Purpose::Read).await)?;
        let (found, hold) = located.complete(blobs)?;
        if self.files.is_empty() {
            self.files = found;
        } else {
            self.files.extend(found);
            self.files.sort_by_key(|found| found.file.key.digest);
        }
        self.holds.push(hold);
        Ok(())
    }

    /// Copies a held file of the tree to a new file `name` in the directory `parent`, with these permission bits. Uses
    /// a clone where the file system supports it, but never a hard link: an action may write to its inputs, and no
    /// other action may see that (EXE-43). Blocks.
    ///
    /// # Errors
    /// `MissingBlobs` when the stored file turns out to be damaged; `DiskFull` when the disk is full.
    pub fn materialise(&self, digest: &Digest, parent: &File, name: &str, mode: u32) -> Result<()> {
        let found = self.files.binary_search_by_key(digest, |found| found.file.key.digest).ok();
        let found = found.and_then(|at| self.files.get(at));
        materialise(&self.cas, digest, found, parent, name, mode)
    }
}

impl Cas {
    /// Reads an input root for an action of this build. None of its blobs are held yet. Called from a worker thread.
    /// The number of slots and of pools bounds the number of open input roots.
    ///
    /// # Errors
    /// `MissingBlobs` with everything that is missing (EXE-26), unless the root is known; `Invalid` when a Directory is
    /// malformed.
    pub fn open_inputs(&self, instance: &Instance, root: Digest, build: Owner) -> Result<ActionInputs> {
        let cas = self.working_for(Caller::without_connection(build.peer)).for_build(build);
        let tree = match self.shared().input_roots.get(&(instance.blobs(), root)) {
            Some(known) => known,
            None => cas.block_on(async |cas| cas.walk(instance, root).await)?,
        };
        let instance = instance.clone();
        Ok(ActionInputs { cas, instance, tree, files: Vec::new(), holds: Vec::new() })
    }

    /// Reads all Directories below a root. The returned room has to be kept for as long as they are.
    pub(crate) async fn closure(
        &self,
        instance: &Instance,
        root: Digest,
        room: &mut TreeRoom<'_>,
    ) -> Result<Closure> {
        let mut walk =
            ClosureWalk { root, nodes: 0, seen: HashSet::from_iter([root]), closure: Closure::default() };
        let mut level = vec![root];
        let mut depth = 0;
        while !level.is_empty() {
            if depth > MAX_TREE_DEPTH {
                return Err(Error::Invalid(format!(
                    "directory {root} is deeper than {MAX_TREE_DEPTH} directories"
                )));
            }
            depth += 1;
            let mut next = Vec::new();
            for part in level.chunks(LOOKUPS_PER_TURN) {
                for (digest, directory) in part.iter().zip(self.directories(instance, part).await?) {
                    let memory = directory.as_ref().map_or(0, |directory| directory.memory());
                    walk.visit(*digest, directory, &mut next)?;
                    room.grow(memory).await?;
                    // A tree whose many directories are all cached would otherwise block other tasks on this thread.
                    consume_budget().await;
                }
            }
            level = next;
        }
        Ok(walk.closure)
    }

    /// Checks that a whole input root is stored, and renews it.
    ///
    /// # Errors
    /// `MissingBlobs` with everything that is missing (EXE-26), `Invalid` when a Directory is malformed.
    pub async fn check_inputs(&self, instance: &Instance, root: Digest) -> Result<()> {
        let key = (instance.blobs(), root);
        let Some(known) = self.shared().input_roots.get(&key) else {
            return self.walk(instance, root).await.map(drop);
        };
        let missing = self.find_missing(instance, known.blobs()).await?;
        if !missing.is_empty() {
            return Err(Error::MissingBlobs(missing));
        }
        self.shared().input_roots.insert(key, &known, self.lessee(), Instant::now());
        Ok(())
    }

    /// Reads a whole input root, checks that all of it is stored, and remembers it.
    async fn walk(&self, instance: &Instance, root: Digest) -> Result<Arc<InputTree>> {
        let mut room = TreeRoom::new(self);
        let Closure { directories, mut missing } = self.closure(instance, root, &mut room).await?;
        let (is_large, place) = (is_large(&directories), room.into_place());
        if !missing.is_empty() {
            let list = move || distinct_blobs(&directories);
            let (known, _place) =
                if is_large { self.blocking_with(place, list).await? } else { (list(), place) };
            missing.extend(self.find_missing(instance, &known).await?);
            return Err(Error::MissingBlobs(missing));
        }
        let build = move || InputTree::new(root, directories);
        let (built, _place) =
            if is_large { self.blocking_with(place, build).await? } else { (build(), place) };
        let tree = Arc::new(built?);
        let missing = self.find_missing(instance, tree.blobs()).await?;
        if !missing.is_empty() {
            return Err(Error::MissingBlobs(missing));
        }
        self.shared().input_roots.insert((instance.blobs(), root), &tree, self.lessee(), Instant::now());
        Ok(tree)
    }

    /// Reads directories, in the order of the digests; `None` for those that are not stored.
    ///
    /// # Errors
    /// `Invalid` when a blob is not a Directory.
    pub async fn directories(
        &self,
        instance: &Instance,
        digests: &[Digest],
    ) -> Result<Vec<Option<Arc<Directory>>>> {
        if let Some(large) = digests.iter().find(|digest| digest.size() > MAX_DIRECTORY_BYTES) {
            return Err(Error::Invalid(format!(
                "directory {large} is too large: at most {MAX_DIRECTORY_BYTES} bytes are read"
            )));
        }
        let mut known = Vec::with_capacity(digests.len());
        let mut to_read = Vec::new();
        // A cached directory may no longer be stored, so all of them are looked up in the index.
        let located = self.locate(instance, digests, Purpose::Look).await?;
        for (at, (&digest, found)) in digests.iter().zip(located.found).enumerate() {
            known.push(match found {
                Some(found) => {
                    let kept = self.shared().directories.get(&found.file.key);
                    if kept.is_none() {
                        to_read.push((at, found));
                    }
                    kept
                }
                None => digest.is_empty().then(Arc::default),
            });
        }
        for (at, directory) in self.read_directories(to_read).await? {
            if let Some(place) = known.get_mut(at) {
                *place = directory;
            }
        }
        Ok(known)
    }

    /// Reads directories that are stored, with their positions; `None` for those whose files are damaged.
    async fn read_directories(
        &self,
        mut to_read: Vec<(usize, FoundEntry)>,
    ) -> Result<Vec<(usize, Option<Arc<Directory>>)>> {
        let mut all = Vec::with_capacity(to_read.len());
        while !to_read.is_empty() {
            let (count, bytes) = first_part(&to_read);
            let part: Vec<_> = to_read.drain(..count).collect();
            let room = self.room_to_decode(bytes).await?;
            let cas = self.clone();
            let read = self.blocking(move || {
                let read = |(at, found): (usize, FoundEntry)| Ok((at, read_directory(&cas, &found)?));
                let read = part.into_iter().map(read).collect::<Result<Vec<_>>>();
                drop(room);
                read
            });
            all.extend(read.await??);
        }
        Ok(all)
    }
}

/// A walk over the directories below a root.
struct ClosureWalk {
    root: Digest,
    nodes: u64,
    seen: HashSet<Digest>,
    closure: Closure,
}

impl ClosureWalk {
    /// Adds a directory that was read, or is missing, and its children to the `next` level.
    fn visit(
        &mut self,
        digest: Digest,
        directory: Option<Arc<Directory>>,
        next: &mut Vec<Digest>,
    ) -> Result<()> {
        let Some(directory) = directory else {
            self.closure.missing.push(digest);
            return Ok(());
        };
        self.nodes = self.nodes.saturating_add(directory.entries() as u64);
        if self.nodes > MAX_TREE_NODES {
            let root = self.root;
            return Err(Error::Invalid(format!(
                "directory {root} has more than {MAX_TREE_NODES} nodes below it"
            )));
        }
        let children = directory.directories.iter().map(|child| child.digest);
        next.extend(children.filter(|child| self.seen.insert(*child)));
        self.closure.directories.insert(digest, directory);
        Ok(())
    }
}

fn is_large(directories: &HashMap<Digest, Arc<Directory>>) -> bool {
    directories.values().map(|directory| 1 + directory.entries()).sum::<usize>() > MANY_NODES
}

/// The number of these directories that one job reads, at least one, and the memory that they need.
fn first_part(to_read: &[(usize, FoundEntry)]) -> (usize, u64) {
    let (mut count, mut bytes) = (0, 0);
    for (_, found) in to_read {
        let more = worst_case(found.file.key.digest.size(), MAX_MESSAGE_MEMORY);
        if count > 0 && bytes + more > DIRECTORIES_AT_ONCE {
            break;
        }
        (count, bytes) = (count + 1, bytes + more);
    }
    (count, bytes)
}

fn read_directory(cas: &Cas, found: &FoundEntry) -> Result<Option<Arc<Directory>>> {
    let digest = found.file.key.digest;
    let bytes = match read_whole(cas, found) {
        Ok(bytes) => bytes,
        Err(Error::NotFound(_)) => return Ok(None),
        Err(error) => return Err(error),
    };
    let directory = Directory::decode(&bytes, digest.function())
        .map_err(|error| Error::Invalid(format!("directory {digest}: {error}")))?;
    let directory = Arc::new(directory);
    cas.shared().directories.insert(found.file.key, directory.clone(), directory.memory());
    Ok(Some(directory))
}

fn materialise(
    cas: &Cas,
    digest: &Digest,
    found: Option<&FoundEntry>,
    parent: &File,
    name: &str,
    mode: u32,
) -> Result<()> {
    let failed =
        |error: io::Error| Error::io(&format!("make input file \"{}\"", name.escape_debug()), &error);
    let missing = |error| match error {
        Error::NotFound(_) => Error::MissingBlobs(vec![*digest]),
        error => error,
    };
    let make = || NewInput::create(parent, name);
    let found = match found {
        Some(found) => found,
        None if digest.is_empty() => return make().and_then(|file| file.finish(mode)).map_err(failed),
        None => return Err(Error::internal(format!("blob {digest} of the input root is not held"))),
    };
    if digest.size() <= SMALL_BLOB_BYTES {
        let bytes = read_whole(cas, found).map_err(missing)?;
        let written = || -> io::Result<()> {
            let mut file = make()?;
            file.write(&bytes)?;
            file.finish(mode)
        };
        return written().map_err(failed);
    }
    let stored = open_checked(cas, found).map_err(missing)?;
    let copied = || -> io::Result<_> {
        let file = make()?;
        stored.file().copy_to(file.file(), digest.size())?;
        Ok(file)
    };
    let file = copied().map_err(failed)?;
    // The copy is right only if the file did not change until the end.
    stored.confirm(cas, found).map_err(missing)?;
    file.finish(mode).map_err(failed)
}
