//! Users with passwords: a file in the format of htpasswd(1), with bcrypt hashes only. Pure. Checking a password is
//! slow; the [`authenticator`](super::authenticator) bounds the checks.

use super::{
    credential::{PASSWORD_MAX_BYTES, is_user},
    policy::Policy,
    principal::{Principal, PrincipalKind},
};
use bcrypt::HashParts;
use gorego_reapi::error::{Error, Result};
use sha2::{Digest as _, Sha256};
use std::{
    collections::{BTreeMap, HashMap, hash_map::RandomState},
    fmt,
    hash::BuildHasher as _,
};

/// Maximum number of users in a file.
pub const USERS_MAX: usize = 10_000;
/// The allowed cost parameters of hashes. A check with the highest cost takes about a second. With a lower cost than
/// the lowest, passwords could be guessed from a stolen file.
pub const COSTS: std::ops::RangeInclusive<u32> = 5..=14;

/// The users of a password file, with the hashes of their passwords.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct PasswordFile(BTreeMap<String, String>);

impl fmt::Debug for PasswordFile {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_set().entries(self.0.keys()).finish()
    }
}

impl PasswordFile {
    /// Parses a file. Ignores empty lines and lines that begin with `#`.
    ///
    /// # Errors
    /// `Invalid` with the number of the faulty line.
    pub fn parse(text: &str) -> Result<Self> {
        let mut users = BTreeMap::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (user, hash) =
                parse_line(line).map_err(|why| Error::Invalid(format!("line {}: {why}", index + 1)))?;
            if users.insert(user.to_owned(), hash.to_owned()).is_some() {
                return Err(Error::Invalid(format!("line {}: user \"{user}\" appears twice", index + 1)));
            }
            if users.len() > USERS_MAX {
                return Err(Error::Invalid(format!("there are more than {USERS_MAX} users")));
            }
        }
        Ok(Self(users))
    }
}

/// The user and the hash of a line. Errors do not contain the line, because it may contain a password.
fn parse_line(line: &str) -> std::result::Result<(&str, &str), String> {
    let (user, hash) = line.split_once(':').ok_or("the form is USER:HASH")?;
    if !is_user(user) {
        return Err("the user is empty, too long, or not printable".into());
    }
    let version = ["$2y$", "$2b$", "$2a$"].iter().any(|version| hash.starts_with(version));
    let cost = hash.parse::<HashParts>().ok().filter(|_| version).map(|parts| parts.get_cost());
    match cost {
        None => Err(format!("the hash of user \"{user}\" is not one of bcrypt; make it with `htpasswd -B`")),
        Some(cost) if !COSTS.contains(&cost) => Err(format!(
            "the hash of user \"{user}\" has the cost {cost}; it must be between {} and {} (`htpasswd -B -C 10`)",
            COSTS.start(),
            COSTS.end()
        )),
        Some(_) => Ok((user, hash)),
    }
}

/// A number that changes when the hash of a password changes.
fn mark(hash: &str) -> u64 {
    let sha256: [u8; 32] = Sha256::digest(hash.as_bytes()).into();
    let [a, b, c, d, e, f, g, h, ..] = sha256;
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

/// The users of a server with their principals.
#[derive(Default)]
pub struct UserSet {
    users: HashMap<String, KnownUser>,
    /// The names of the users. For an unknown user, the hash of one of them is checked instead, so that the check takes
    /// as long. Hashes may have different costs.
    names: Vec<String>,
    /// Selects the user whose hash is checked. It always selects the same one for a name, in a way that clients cannot
    /// predict.
    choice: RandomState,
}

struct KnownUser {
    hash: String,
    principal: Principal,
}

impl fmt::Debug for UserSet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_set().entries(self.users.keys()).finish()
    }
}

impl UserSet {
    /// The users of a file, with the roles that the configuration gives them by name.
    ///
    /// # Errors
    /// `Invalid` if a role does not exist.
    pub fn new(
        file: &PasswordFile,
        roles_of: &BTreeMap<String, Vec<String>>,
        policy: &Policy,
    ) -> Result<Self> {
        let mut users = HashMap::new();
        for (user, hash) in &file.0 {
            let named = roles_of.get(user).map(Vec::as_slice).unwrap_or_default();
            let roles =
                policy.roles_named(named)?.into_iter().chain(policy.everybody().iter().cloned()).collect();
            let principal = Principal::marked(PrincipalKind::Basic, user, roles, None, mark(hash));
            users.insert(user.clone(), KnownUser { hash: hash.clone(), principal });
        }
        let names = file.0.keys().cloned().collect();
        Ok(Self { users, names, choice: RandomState::new() })
    }

    /// The principal of a user with this password; `None` if the password is wrong or there is no such user. Takes as
    /// long as the hash requires.
    pub fn check(&self, user: &str, password: &[u8]) -> Option<Principal> {
        let known = self.users.get(user);
        let hash = &known.or_else(|| self.dummy_user(user))?.hash;
        let is_right =
            password.len() <= PASSWORD_MAX_BYTES && bcrypt::verify(password, hash).unwrap_or(false);
        known.filter(|_| is_right).map(|known| known.principal.clone())
    }

    /// The user whose hash is checked in place of an unknown user's hash; `None` if there are no users.
    fn dummy_user(&self, unknown: &str) -> Option<&KnownUser> {
        let count = u64::try_from(self.names.len()).ok().filter(|count| *count > 0)?;
        let at = usize::try_from(self.choice.hash_one(unknown) % count).ok()?;
        self.users.get(self.names.get(at)?)
    }

    /// The principal of a user.
    pub fn principal(&self, user: &str) -> Option<&Principal> {
        self.users.get(user).map(|known| &known.principal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(password: &[u8]) -> String {
        bcrypt::hash(password, 5).unwrap()
    }

    #[test]
    fn a_password_is_right_for_its_user_alone() {
        let long = [b'x'; PASSWORD_MAX_BYTES + 1];
        let text = format!(
            "# users\n\nalice:{}\n bob:{}\nodd:{}\nlong:{}\n",
            hash(b"a"),
            hash(b"b").replace("$2b$", "$2y$"),
            hash(b"\xff\x01:"),
            hash(&long)
        );
        let file = PasswordFile::parse(&text).unwrap();
        assert!(!format!("{file:?}").contains('$'));
        let roles =
            [("alice".to_owned(), vec!["ci".to_owned()]), ("nobody".to_owned(), vec!["ci".to_owned()])]
                .into();
        let policy = Policy::with_roles([], &["reader"]);
        let users = UserSet::new(&file, &roles, &policy).unwrap();
        let alice = users.check("alice", b"a").unwrap();
        assert_eq!((alice.name(), alice.roles().len()), ("basic:alice", 2));
        assert_eq!(users.check("bob", b"b").unwrap().roles().len(), 1);
        assert!(users.check("odd", b"\xff\x01:").is_some());
        for (user, password) in [
            ("alice", &b"b"[..]),
            ("alice", b""),
            ("Alice", b"a"),
            ("nobody", b"a"),
            ("long", &long[..PASSWORD_MAX_BYTES]),
            ("long", &long),
        ] {
            let expected = user == "long" && password.len() == PASSWORD_MAX_BYTES;
            assert_eq!(users.check(user, password).is_some(), expected, "{user}: bcrypt ends at 72 bytes");
        }
        assert!(UserSet::default().check("alice", b"a").is_none());
    }

    /// If the costs differed, the time of a refusal would otherwise show which users exist.
    #[test]
    fn unknown_users_are_checked_with_the_costs_that_users_have() {
        let costs = |cost: u32| bcrypt::hash(b"p", cost).unwrap();
        let file = PasswordFile::parse(&format!("a:{}\nb:{}\n", costs(5), costs(6))).unwrap();
        let users = UserSet::new(&file, &BTreeMap::new(), &Policy::with_roles([], &[])).unwrap();
        let dummy_user = |user: &str| users.dummy_user(user).unwrap().hash.clone();
        let unknown: Vec<_> = (0..64).map(|number| format!("unknown{number}")).collect();
        let seen: std::collections::BTreeSet<_> = unknown.iter().map(|user| dummy_user(user)).collect();
        assert_eq!(seen.len(), 2);
        assert!(unknown.iter().all(|user| dummy_user(user) == dummy_user(user)));
        assert!(unknown.iter().all(|user| users.check(user, b"p").is_none()), "its password is not theirs");
    }

    #[test]
    fn a_file_with_another_hash_or_cost_is_refused_by_line_and_shows_no_secret() {
        let good = hash(b"p");
        for (line, part) in [
            ("alice".to_owned(), "USER:HASH"),
            ("alice:secret".into(), "htpasswd -B"),
            ("alice:$apr1$secret$x".into(), "htpasswd -B"),
            ("alice:{SHA}secret".into(), "htpasswd -B"),
            (format!("alice:{}", good.replace("$2b$", "$2x$")), "htpasswd -B"),
            (format!("alice:{}", good.replace("$05$", "$04$")), "cost 4"),
            (format!("alice:{}", good.replace("$05$", "$31$")), "cost 31"),
            (format!(":{good}"), "the user"),
            (format!("a\u{1}:{good}"), "the user"),
            (format!("b:{good}\nb:{good}"), "twice"),
        ] {
            let text = format!("# comment\n{line}\n");
            let error = PasswordFile::parse(&text).unwrap_err().to_string();
            assert!(error.starts_with("line ") && error.contains(part), "{line}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
