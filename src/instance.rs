//! Instances: separate namespaces behind one endpoint. Pure.
//!
//! Blobs, action results and operations of one instance are invisible from another (GEN-15), unless the configuration
//! lets them share blobs. Results of clients can be invisible to other principals of the same instance: they are kept
//! in a second namespace, under keys that depend on the principal ([`Instance::private_result`]). Every [`Instance`] is
//! configured. An unknown name is an error that no client mistakes for a cache miss (GEN-14). The [`InstancePolicy`] of
//! an instance says what its clients may do.

use gorego_reapi::{
    digest::{Digest, DigestFunction},
    error::{Error, Result},
    escape::shown,
    instance_name::check_instance_name,
};
use std::{collections::HashMap, fmt, sync::Arc};

/// The number of an instance within this process. It may change at a restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId(pub u16);

/// What clients of an instance may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstancePolicy {
    /// The enabled digest functions, each once, in the order of [`DigestFunction::ALL`]; at least one (CAP-05).
    pub digest_functions: Vec<DigestFunction>,
    /// Whether clients may write action results (AC-12, CAP-09).
    pub action_cache_updates: bool,
    /// Whether only the principal that wrote an action result gets it.
    pub private_results: bool,
    /// Whether clients may execute actions, if the server executes any (CAP-01, CAP-08).
    pub execution: bool,
    /// The name of the instance whose blobs it shares; `None` if it has its own (GEN-15).
    pub blobs_of: Option<String>,
}

impl Default for InstancePolicy {
    /// Everything is allowed and nothing is shared.
    fn default() -> Self {
        Self {
            digest_functions: DigestFunction::ALL.to_vec(),
            action_cache_updates: true,
            private_results: false,
            execution: true,
            blobs_of: None,
        }
    }
}

/// A configured instance. Cheap to clone.
#[derive(Clone)]
pub struct Instance {
    id: InstanceId,
    blobs: InstanceId,
    /// The namespace of results that only their principals see; the same as `id` if there are none.
    private: InstanceId,
    inner: Arc<InstanceDetails>,
}

struct InstanceDetails {
    name: String,
    policy: InstancePolicy,
}

impl Instance {
    /// The namespace of its action results and operations.
    pub fn id(&self) -> InstanceId {
        self.id
    }

    /// The namespace of its blobs. It belongs to another instance if they share blobs (GEN-15).
    pub fn blobs(&self) -> InstanceId {
        self.blobs
    }

    /// The namespace of results that only their principals see, if the instance has one.
    pub fn private_results(&self) -> Option<InstanceId> {
        (self.private != self.id).then_some(self.private)
    }

    /// The namespace and the key of the result of an action that only this principal sees; `None` if the instance has
    /// no such results. The key is a digest of the names of both, so no other principal can ask for it. The size of the
    /// action is not part of the key, because HTTP clients do not know it.
    pub(crate) fn private_result(&self, principal: &str, action: Digest) -> Option<(Self, Digest)> {
        let space = Self { id: self.private_results()?, ..self.clone() };
        let text = format!("goREgo private result\0{}\0{principal}", action.hash_hex());
        Some((space, action.function().digest(text.as_bytes())))
    }

    /// The name on the wire; empty for the default instance.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// What its clients may do.
    pub fn policy(&self) -> &InstancePolicy {
        &self.inner.policy
    }

    /// The resource name of `rest` in this instance; `rest` itself if the name is empty (GEN-12).
    pub fn qualify(&self, rest: &str) -> String {
        if self.name().is_empty() { rest.to_owned() } else { format!("{}/{rest}", self.name()) }
    }

    /// The digest function of a request: the one with the number in the request; otherwise the one that the first hash
    /// of a known length implies; otherwise the preferred one (GEN-08). Hashes of other lengths are left to
    /// [`Digest::from_wire`], which refuses them one by one or together (GEN-10).
    ///
    /// # Errors
    /// [`Error::Invalid`] for a function that is not enabled here (GEN-09), or when several functions match.
    pub fn digest_function(
        &self,
        number: i32,
        hash_chars: impl IntoIterator<Item = usize>,
    ) -> Result<DigestFunction> {
        if number != 0 {
            return self.supported(DigestFunction::from_wire(number)?);
        }
        let functions = &self.policy().digest_functions;
        let known = |chars: &usize| functions.iter().any(|function| function.hash_bytes() * 2 == *chars);
        match hash_chars.into_iter().find(known) {
            Some(chars) => DigestFunction::infer(functions, chars),
            None => functions.first().copied().ok_or_else(|| Error::internal("there is no digest function")),
        }
    }

    /// Checks the digest in a resource name. Names do not include the older functions, and one client omits the newer
    /// ones too: if the server has only one function with this hash length, the client means that one.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a function that is not enabled here (GEN-09).
    pub fn digest_in_name(&self, digest: Digest, function_is_named: bool) -> Result<Digest> {
        if function_is_named || self.supported(digest.function()).is_ok() {
            return self.supported(digest.function()).map(|_| digest);
        }
        let hash = digest.hash_hex();
        let function = DigestFunction::infer(&self.policy().digest_functions, hash.len())?;
        Digest::parse(function, &hash, i64::try_from(digest.size()).unwrap_or(i64::MAX))
    }

    fn supported(&self, function: DigestFunction) -> Result<DigestFunction> {
        let functions = &self.policy().digest_functions;
        if functions.contains(&function) {
            return Ok(function);
        }
        let names: Vec<&str> = functions.iter().map(|function| function.name()).collect();
        Err(Error::Invalid(format!(
            "digest function {} is not enabled for instance name \"{}\"; supported are {}",
            function.name(),
            self.name(),
            names.join(", ")
        )))
    }
}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Instance({:?})", self.name())
    }
}

impl PartialEq for Instance {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}
impl Eq for Instance {}

/// The instances of this server. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Instances(Arc<HashMap<String, Instance>>);

impl Instances {
    /// Creates unrestricted instances with these names, with ids in this order.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a malformed or repeated name, or an empty list.
    pub fn new(names: impl IntoIterator<Item = impl AsRef<str>>) -> Result<Self> {
        Self::with_policies(
            names.into_iter().map(|name| (name.as_ref().to_owned(), InstancePolicy::default())),
        )
    }

    /// Creates instances with these names and policies, with ids in this order.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a malformed or repeated name, an empty list, or a policy that shares the blobs of an
    /// instance that does not exist or itself shares another's.
    pub fn with_policies(instances: impl IntoIterator<Item = (String, InstancePolicy)>) -> Result<Self> {
        let mut map: HashMap<String, Instance> = HashMap::new();
        for (name, policy) in instances {
            check_instance_name(&name)?;
            let id = u16::try_from(map.len()).map_err(|_| Error::invalid("too many instance names"))?;
            let id = InstanceId(id);
            if map.contains_key(&name) {
                return Err(Error::Invalid(format!("instance name \"{name}\" is listed twice")));
            }
            let inner = Arc::new(InstanceDetails { name: name.clone(), policy });
            map.insert(name, Instance { id, blobs: id, private: id, inner });
        }
        // The namespaces of private results have the numbers after all instances.
        let numbers = map.len()..;
        let mut with_private: Vec<&mut Instance> =
            map.values_mut().filter(|instance| instance.inner.policy.private_results).collect();
        with_private.sort_by_key(|instance| instance.id);
        for (number, instance) in numbers.zip(with_private) {
            let id = u16::try_from(number).map_err(|_| Error::invalid("too many instance names"))?;
            instance.private = InstanceId(id);
        }
        if map.is_empty() {
            return Err(Error::invalid("no instance name is listed"));
        }
        let owners: HashMap<String, (InstanceId, bool)> = map
            .iter()
            .map(|(name, instance)| (name.clone(), (instance.id, instance.policy().blobs_of.is_none())))
            .collect();
        for instance in map.values_mut() {
            let Some(owner) = instance.inner.policy.blobs_of.clone() else { continue };
            instance.blobs = match owners.get(&owner) {
                Some((id, true)) => *id,
                Some((_, false)) => {
                    return Err(Error::Invalid(format!(
                        "instance name \"{}\" shares the blobs of \"{owner}\", which itself shares the blobs of another instance",
                        instance.name()
                    )));
                }
                None => {
                    return Err(Error::Invalid(format!(
                        "instance name \"{}\" shares the blobs of \"{owner}\", which is no instance of this server; add \"{owner}\" to instance_names",
                        instance.name()
                    )));
                }
            };
        }
        Ok(Self(Arc::new(map)))
    }

    /// Looks up an instance by name.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a malformed or unknown name.
    pub fn get(&self, name: &str) -> Result<Instance> {
        check_instance_name(name)?;
        self.0.get(name).cloned().ok_or_else(|| {
            Error::Invalid(format!("instance name \"{}\" is unknown to this server", shown(name)))
        })
    }

    /// All instances in order of their ids.
    pub fn all(&self) -> Vec<Instance> {
        let mut all: Vec<_> = self.0.values().cloned().collect();
        all.sort_by_key(Instance::id);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// GEN-12, GEN-13, GEN-14.
    #[test]
    fn instance_names_are_checked_and_unknown_ones_refused() {
        let instances = Instances::new(["", "a/b/c"]).unwrap();
        assert_eq!(instances.get("").unwrap().qualify("operations/1"), "operations/1");
        assert_eq!(instances.get("a/b/c").unwrap().qualify("operations/1"), "a/b/c/operations/1");
        for name in ["nope", "blobs", "x/uploads", "/x", "x/", "x//y", "a/b", "x\0"] {
            assert!(matches!(instances.get(name), Err(Error::Invalid(_))), "{name:?}");
        }
    }

    fn with(name: &str, policy: InstancePolicy) -> (String, InstancePolicy) {
        (name.into(), policy)
    }

    /// GEN-08, GEN-09, GEN-10.
    #[test]
    fn a_request_uses_one_function_that_its_instance_allows() {
        use DigestFunction::{Blake3, Sha1, Sha256};
        let few = InstancePolicy { digest_functions: vec![Sha256, Blake3], ..InstancePolicy::default() };
        let few = Instances::with_policies([with("", few)]).unwrap().get("").unwrap();
        for (number, chars, function) in [
            (0, &[][..], Sha256),
            (0, &[64], Sha256),
            (0, &[3, 64], Sha256),
            (9, &[64], Blake3),
            (1, &[40], Sha256),
        ] {
            assert_eq!(few.digest_function(number, chars.iter().copied()), Ok(function));
        }
        for number in [2, 10, 99, -1] {
            assert!(matches!(few.digest_function(number, [40]), Err(Error::Invalid(_))), "{number}");
        }
        let all = Instances::new([""]).unwrap().get("").unwrap();
        assert_eq!(all.digest_function(0, [40]), Ok(Sha1));
        assert_eq!(all.digest_function(9, [64]), Ok(Blake3));
    }

    /// BS-03: a client that never names a function may use a server that has only a newer one.
    #[test]
    fn a_name_without_a_function_means_an_older_one_unless_there_is_only_a_newer_one() {
        use DigestFunction::{Blake3, Sha256};
        let blake3 = InstancePolicy { digest_functions: vec![Blake3], ..InstancePolicy::default() };
        let blake3 = Instances::with_policies([with("", blake3)]).unwrap().get("").unwrap();
        let all = Instances::new([""]).unwrap().get("").unwrap();
        let (as_sha256, as_blake3) = (Sha256.digest(b"x"), Blake3.digest(b"x"));
        let misread = Digest::parse(Sha256, &as_blake3.hash_hex(), 1).unwrap();
        assert_eq!(all.digest_in_name(as_sha256, false), Ok(as_sha256));
        assert_eq!(all.digest_in_name(as_blake3, true), Ok(as_blake3));
        assert_eq!(blake3.digest_in_name(misread, false), Ok(as_blake3));
        assert!(matches!(
            blake3.digest_in_name(DigestFunction::Sha1.digest(b"x"), false),
            Err(Error::Invalid(_))
        ));
    }

    #[test]
    fn private_results_have_a_namespace_and_keys_of_their_principal() {
        let private = InstancePolicy { private_results: true, ..InstancePolicy::default() };
        let instances =
            [with("a", private.clone()), with("b", InstancePolicy::default()), with("c", private)];
        let instances = Instances::with_policies(instances).unwrap();
        let [a, b, c] = ["a", "b", "c"].map(|name| instances.get(name).unwrap());
        assert_eq!(
            [a.private_results(), b.private_results(), c.private_results()],
            [Some(InstanceId(3)), None, Some(InstanceId(4))]
        );
        let action = DigestFunction::Sha256.digest(b"action");
        assert_eq!(b.private_result("token:ci", action), None);
        let (space, key) = a.private_result("token:ci", action).unwrap();
        assert_eq!((space.id(), space.blobs(), space.name()), (InstanceId(3), a.blobs(), "a"));
        assert_ne!(key, a.private_result("token:other", action).unwrap().1);
        assert_ne!(key.hash(), action.hash());
    }

    /// GEN-15.
    #[test]
    fn blobs_are_shared_only_with_an_instance_that_has_its_own() {
        let sharing = |of: &str| InstancePolicy { blobs_of: Some(of.into()), ..InstancePolicy::default() };
        let instances =
            Instances::with_policies([with("ci", sharing("main")), with("main", InstancePolicy::default())])
                .unwrap();
        let (ci, main) = (instances.get("ci").unwrap(), instances.get("main").unwrap());
        assert_eq!((ci.blobs(), main.blobs()), (main.id(), main.id()));
        assert_ne!(ci.id(), main.id());
        for wrong in ["nobody", "ci"] {
            let refused = Instances::with_policies([
                with("ci", sharing(wrong)),
                with("main", InstancePolicy::default()),
            ]);
            assert!(matches!(refused, Err(Error::Invalid(_))), "{wrong}");
        }
    }
}
