//! [`Bindings`]: which content each asset stands for. Pure. [`super::AssetActor`] owns the only instance.
//!
//! A binding does not imply that the content is still stored: users of a binding check that. An expired binding is kept
//! until room is needed, because "expired" is a better answer than "unknown".

use super::request::AssetKey;
use gorego_reapi::{
    digest::{Digest, DigestFunction},
    proto::{gorego, reapi},
};
use prost::Message as _;
use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::Bound,
    sync::Arc,
    time::SystemTime,
};

/// Maximum number of bindings, about 20 MB. Beyond it, the least recently used binding is dropped.
pub(crate) const MAX_BINDINGS: usize = 50_000;
/// Maximum number of references of one binding. Build tools use a few.
pub(crate) const MAX_REFERENCES: usize = 1_000;
/// Maximum number of references of all bindings together, about 20 MB.
pub(crate) const MAX_REFERENCES_IN_ALL: usize = 200_000;

/// The content that an asset stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// The blob or the root Directory.
    pub digest: Digest,
    /// When the content was asked for at its origin, or pushed.
    pub obtained_at: SystemTime,
    /// When the content expires; `None` if it never does.
    pub expires_at: Option<SystemTime>,
    /// Other blobs and Directories that have to be stored for it to be served.
    pub references: Arc<References>,
}

/// The references of pushed content.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct References {
    pub blobs: Vec<Digest>,
    /// Referenced root Directories, each with everything below it.
    pub directories: Vec<Digest>,
}

impl References {
    fn len(&self) -> usize {
        self.blobs.len() + self.directories.len()
    }
}

/// The answer to a look-up of an asset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KnownAsset {
    /// There is content that may be served, if it is still stored.
    Fresh(Binding),
    /// There is content, but it is expired or older than the caller accepts (AST-08).
    Stale,
    /// No content is bound to the asset.
    Nothing,
}

/// The table; see the module documentation.
#[derive(Debug)]
pub(crate) struct Bindings {
    entries: HashMap<AssetKey, UsedBinding>,
    /// The keys by last use, oldest first.
    order: BTreeMap<u64, AssetKey>,
    uses: u64,
    references: usize,
    limit: usize,
    reference_limit: usize,
    copying: Option<Copying>,
}

/// A copy that is being made in parts; see [`Bindings::begin_copy`].
#[derive(Debug)]
struct Copying {
    /// The last use that was copied.
    after: u64,
    /// The last use before the copy began.
    end: u64,
    /// Bindings that were between these two and were used since then.
    moved: VecDeque<AssetKey>,
}

#[derive(Debug)]
struct UsedBinding {
    binding: Binding,
    used: u64,
}

impl Default for Bindings {
    fn default() -> Self {
        Self::with_limits(MAX_BINDINGS, MAX_REFERENCES_IN_ALL)
    }
}

impl Bindings {
    fn with_limits(limit: usize, reference_limit: usize) -> Self {
        Self {
            entries: HashMap::new(),
            order: BTreeMap::new(),
            uses: 0,
            references: 0,
            limit,
            reference_limit,
            copying: None,
        }
    }

    /// Looks up what an asset stands for, and counts it as a use. Content older than `oldest` is not returned; if
    /// `oldest` is in the future, nothing is (AST-08).
    pub(crate) fn look_up(
        &mut self,
        key: &AssetKey,
        oldest: Option<SystemTime>,
        now: SystemTime,
    ) -> KnownAsset {
        let Some(entry) = self.entries.get_mut(key) else { return KnownAsset::Nothing };
        let binding = &entry.binding;
        let expired = binding.expires_at.is_some_and(|at| at <= now);
        let too_old = oldest.is_some_and(|oldest| binding.obtained_at < oldest);
        if expired || too_old {
            return KnownAsset::Stale;
        }
        self.uses += 1;
        self.order.remove(&entry.used);
        self.order.insert(self.uses, *key);
        let before = std::mem::replace(&mut entry.used, self.uses);
        let fresh = KnownAsset::Fresh(binding.clone());
        self.note_moved(*key, before);
        fresh
    }

    /// Records that a binding is no longer at this place in the order. A copy that has not reached it yet takes it
    /// later.
    fn note_moved(&mut self, key: AssetKey, before: u64) {
        if let Some(copying) = &mut self.copying
            && (copying.after + 1..=copying.end).contains(&before)
        {
            copying.moved.push_back(key);
        }
    }

    /// The first of these assets whose look-up differs from `before` and whose content may be served.
    pub(crate) fn newer(
        &mut self,
        keys: &[AssetKey],
        before: &[KnownAsset],
        oldest: Option<SystemTime>,
        now: SystemTime,
    ) -> Option<(usize, Binding)> {
        keys.iter().zip(before).enumerate().find_map(|(index, (key, before))| {
            match self.look_up(key, oldest, now) {
                same if same == *before => None,
                KnownAsset::Fresh(binding) => Some((index, binding)),
                KnownAsset::Stale | KnownAsset::Nothing => None,
            }
        })
    }

    /// Binds content to an asset, in place of any earlier binding.
    pub(crate) fn bind(&mut self, key: AssetKey, binding: Binding) {
        self.remove(&key);
        self.uses += 1;
        self.references += binding.references.len();
        self.order.insert(self.uses, key);
        self.entries.insert(key, UsedBinding { binding, used: self.uses });
        while (self.entries.len() > self.limit || self.references > self.reference_limit)
            && let Some((_, oldest)) = self.order.first_key_value()
        {
            let oldest = *oldest;
            self.remove(&oldest);
        }
    }

    /// Like [`Bindings::bind`], for content that took a while to arrive: content that was requested or pushed later
    /// stays. A time in the future is ignored, because the clock must have been set back.
    pub(crate) fn bind_unless_newer(&mut self, key: AssetKey, binding: Binding, now: SystemTime) {
        let bound = self.entries.get(&key).map(|entry| entry.binding.obtained_at);
        if !bound.is_some_and(|bound| binding.obtained_at < bound && bound <= now) {
            self.bind(key, binding);
        }
    }

    fn remove(&mut self, key: &AssetKey) {
        if let Some(entry) = self.entries.remove(key) {
            self.order.remove(&entry.used);
            self.references -= entry.binding.references.len();
            self.note_moved(*key, entry.used);
        }
    }

    /// Starts copying the current bindings.
    pub(crate) fn begin_copy(&mut self) {
        self.copying = Some(Copying { after: 0, end: self.uses, moved: VecDeque::new() });
    }

    /// Appends up to `max` bindings to the copy that was begun, in the order of use. Returns whether there are more.
    /// Bindings may be used, replaced and added between two calls. Bindings that are added during the copy may be left
    /// out. Each of the others is copied once, so the copy ends even if they are used all the time.
    pub(crate) fn copy(&mut self, copy: &mut Vec<(AssetKey, Binding)>, max: usize) -> bool {
        let Some(copying) = &mut self.copying else { return false };
        let mut copied = 0;
        let rest = self.order.range((Bound::Excluded(copying.after), Bound::Included(copying.end)));
        for (used, key) in rest.take(max) {
            copy.extend(self.entries.get(key).map(|entry| (*key, entry.binding.clone())));
            (copying.after, copied) = (*used, copied + 1);
        }
        while copied < max
            && let Some(key) = copying.moved.pop_front()
        {
            copy.extend(self.entries.get(&key).map(|entry| (key, entry.binding.clone())));
            copied += 1;
        }
        if copied < max {
            self.copying = None;
        }
        copied == max
    }

    /// Encodes all bindings as the content of a file.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let all = self.order.values().filter_map(|key| Some((*key, self.entries.get(key)?.binding.clone())));
        encode(&all.collect::<Vec<_>>())
    }

    /// Decodes the content of a file. An entry that this version cannot read is left out.
    ///
    /// # Errors
    /// What is wrong with the file as a whole.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let file = gorego::StoredBindings::decode(bytes).map_err(|_| "it does not parse")?;
        let mut bindings = Self::default();
        for stored in file.bindings {
            if let Some((key, binding)) = read(stored) {
                bindings.bind(key, binding);
            }
        }
        Ok(bindings)
    }
}

/// Encodes a copy of the bindings as the content of a file.
pub(crate) fn encode(copy: &[(AssetKey, Binding)]) -> Vec<u8> {
    let wire = |digests: &[Digest]| digests.iter().map(|digest| digest.to_wire()).collect();
    let stored = |(key, binding): &(AssetKey, Binding)| {
        let Binding { digest, obtained_at, expires_at, references } = binding;
        gorego::StoredBinding {
            key: key.0.to_vec().into(),
            digest_function: digest.function().wire() as i32,
            digest: Some(digest.to_wire()),
            obtained_at: Some((*obtained_at).into()),
            expires_at: expires_at.map(Into::into),
            references_blobs: wire(&references.blobs),
            references_directories: wire(&references.directories),
        }
    };
    gorego::StoredBindings { bindings: copy.iter().map(stored).collect() }.encode_to_vec()
}

fn read(stored: gorego::StoredBinding) -> Option<(AssetKey, Binding)> {
    let key = AssetKey(stored.key.as_ref().try_into().ok()?);
    let function = DigestFunction::from_wire(stored.digest_function).ok()?;
    let digest = |wire: &reapi::Digest| Digest::from_wire(function, Some(wire), "binding").ok();
    let digests = |list: &[reapi::Digest]| list.iter().map(digest).collect::<Option<Vec<_>>>();
    let binding = Binding {
        digest: digest(stored.digest.as_ref()?)?,
        obtained_at: stored.obtained_at?.try_into().ok()?,
        expires_at: stored.expires_at.map(SystemTime::try_from).transpose().ok()?,
        references: Arc::new(References {
            blobs: digests(&stored.references_blobs)?,
            directories: digests(&stored.references_directories)?,
        }),
    };
    Some((key, binding))
}

#[cfg(test)]
impl Bindings {
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn key(name: u8) -> AssetKey {
        AssetKey([name; 32])
    }

    fn binding(content: &[u8], obtained: u64, expires: Option<u64>) -> Binding {
        let digest = DigestFunction::Sha256.digest(content);
        Binding { digest, obtained_at: at(obtained), expires_at: expires.map(at), references: Arc::default() }
    }

    /// AST-08, AST-11.
    #[test]
    fn content_is_served_until_it_expires_and_never_if_newer_content_is_wanted() {
        let mut bindings = Bindings::default();
        let pushed = binding(b"x", 100, Some(200));
        bindings.bind(key(1), pushed.clone());
        let fresh = KnownAsset::Fresh(pushed);
        assert_eq!(bindings.look_up(&key(1), None, at(199)), fresh);
        assert_eq!(bindings.look_up(&key(1), None, at(200)), KnownAsset::Stale);
        assert_eq!(bindings.look_up(&key(1), Some(at(100)), at(150)), fresh);
        assert_eq!(bindings.look_up(&key(1), Some(at(101)), at(150)), KnownAsset::Stale);
        assert_eq!(bindings.look_up(&key(1), Some(at(9_999)), at(150)), KnownAsset::Stale);
        assert_eq!(bindings.look_up(&key(2), None, at(150)), KnownAsset::Nothing);
    }

    /// Content that is no longer stored stays bound until it is fetched again.
    #[test]
    fn a_binding_made_since_a_look_up_is_told_from_an_earlier_one() {
        let mut bindings = Bindings::default();
        let (keys, now) = ([key(1), key(2)], at(150));
        bindings.bind(key(1), binding(b"lost", 100, None));
        let before = keys.map(|key| bindings.look_up(&key, None, now));
        assert_eq!(bindings.newer(&keys, &before, None, now), None);
        let fetched = binding(b"x", 120, None);
        bindings.bind(key(2), fetched.clone());
        assert_eq!(bindings.newer(&keys, &before, None, now), Some((1, fetched)));
        assert_eq!(bindings.newer(&keys, &before, Some(at(121)), now), None);
    }

    /// AST-08: a slow download does not undo a later one.
    #[test]
    fn content_that_arrives_late_does_not_replace_newer_content() {
        let mut bindings = Bindings::default();
        let (newer, late) = (binding(b"newer", 120, None), binding(b"late", 100, None));
        bindings.bind_unless_newer(key(1), newer.clone(), at(130));
        bindings.bind_unless_newer(key(1), late.clone(), at(140));
        assert_eq!(bindings.look_up(&key(1), None, at(150)), KnownAsset::Fresh(newer));
        bindings.bind_unless_newer(key(1), late.clone(), at(110));
        assert_eq!(
            bindings.look_up(&key(1), None, at(150)),
            KnownAsset::Fresh(late),
            "the clock was set back"
        );
    }

    #[test]
    fn the_table_is_bounded_and_the_last_used_bindings_stay() {
        let mut bindings = Bindings::with_limits(2, 3);
        let now = at(0);
        for name in [1, 2] {
            bindings.bind(key(name), binding(b"x", 0, None));
        }
        bindings.look_up(&key(1), None, now);
        bindings.bind(key(3), binding(b"x", 0, None));
        assert_eq!(bindings.look_up(&key(2), None, now), KnownAsset::Nothing);
        assert!(matches!(bindings.look_up(&key(1), None, now), KnownAsset::Fresh(_)));
        let references =
            References { blobs: vec![DigestFunction::Sha256.digest(b"r"); 4], directories: vec![] };
        bindings.bind(key(4), Binding { references: Arc::new(references), ..binding(b"x", 0, None) });
        assert!(bindings.is_empty(), "references have their own bound");
    }

    #[test]
    fn a_copy_that_is_made_in_parts_ends_and_has_all_bindings_however_often_they_are_used_meanwhile() {
        let mut bindings = Bindings::default();
        for name in 0..30 {
            bindings.bind(key(name), binding(b"old", 0, None));
        }
        let (mut copy, mut parts) = (Vec::new(), 1);
        bindings.begin_copy();
        while bindings.copy(&mut copy, 3) {
            parts += 1;
            assert!(parts <= 11, "it does not end");
            for name in 20..30 {
                bindings.look_up(&key(name), None, at(1));
            }
            bindings.bind(key(100 + parts), binding(b"new", 0, None));
            bindings.bind(key(10), binding(&[parts], 0, None));
        }
        let names: Vec<_> = copy.iter().map(|(key, _)| *key).collect();
        let distinct: std::collections::HashSet<_> = names.iter().copied().collect();
        assert_eq!((names.len(), distinct.len()), (30, 30));
        assert!((0..30).all(|name| distinct.contains(&key(name))));
        // The next copy has the others, in the order of use.
        copy.clear();
        bindings.begin_copy();
        while bindings.copy(&mut copy, 7) {}
        assert_eq!(encode(&copy), bindings.encode());
    }

    proptest! {
        #[test]
        fn bindings_are_read_back_as_they_were_in_the_same_order_of_use(
            list in proptest::collection::vec((any::<u8>(), any::<[u8; 2]>(), 0u64..1 << 40, proptest::option::of(0u64..1 << 40)), 0..40)
        ) {
            let mut bindings = Bindings::default();
            for (name, content, obtained, expires) in list {
                let references = References { blobs: vec![DigestFunction::Sha256.digest(&content)], directories: vec![] };
                bindings.bind(key(name), Binding { references: Arc::new(references), ..binding(&content, obtained, expires) });
            }
            let again = Bindings::decode(&bindings.encode()).unwrap();
            let all = |bindings: &Bindings| -> Vec<_> {
                bindings.order.values().map(|key| (*key, bindings.entries[key].binding.clone())).collect()
            };
            prop_assert_eq!(all(&again), all(&bindings));
            prop_assert_eq!(again.references, bindings.references);
        }
    }
}
