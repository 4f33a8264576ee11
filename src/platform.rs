//! Platform properties: what pools offer, what actions require, and how these differ. Pure.
//!
//! A property that some pool offers is *known* (EXE-31). An action that requires a known property runs only in pools
//! that offer it. Other properties are *unknown*: clients use such names to separate cache entries, so they are ignored
//! unless the configuration refuses them. If an action names a property more than once, each value must match.

use crate::size::Size;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// Number of differences that a message lists. An action may require thousands of properties.
const DIFFERENCES_SHOWN: usize = 8;
/// Number of characters of a client's name or value that a message shows.
const TEXT_SHOWN: usize = 100;

/// Bazel's property that names the persistent worker which may run the action.
pub(crate) const WORKER_KEY: &str = "persistentWorkerKey";
/// The property that names the encoding of the messages to that worker.
pub(crate) const WORKER_PROTOCOL: &str = "persistentWorkerProtocol";
/// Properties that say how an action may run faster. They do not restrict where it runs, and never cause a refusal.
const HINTS: &[&str] = &[WORKER_KEY, WORKER_PROTOCOL];

/// The values of one property that a pool accepts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Offer {
    /// Exactly this value, as a string.
    Exact(String),
    /// Any of these values.
    Set(Vec<String>),
    /// A whole number up to this. Actions require at least a number, and the pool has this many.
    Minimum(u64),
    /// A size up to this many bytes. Actions require at least a size, and the pool has this much.
    Size(u64),
    /// Any value; the property does not restrict the pool.
    Ignore,
}

/// The property of an action that needs a network, and the other names that clients use for it.
const NETWORK: &str = "network";
const NETWORK_ALIASES: &[&str] = &["dockerNetwork", "sandboxNetwork"];
/// Values that ask for a network. Some clients name a network of their container runtime instead.
const ON: &[&str] = &["on", "true", "1", "standard", "bridge", "host"];
/// Values that ask for no network.
const OFF: &[&str] = &["off", "false", "0", "none", ""];
/// The property of an action whose input root is its root file system, and its value.
const ROOTFS: &str = "rootfs";
const ROOTFS_INPUTS: &str = "inputs";

/// The properties that set the user id and group id that an action sees as its own.
const USER: &str = "unixUID";
const GROUP: &str = "unixGID";
/// The property of an action that names a container image, and the values that name no image.
const IMAGE: &str = "container-image";
const NO_IMAGE: &[&str] = &["", "none"];

/// The properties that the server defines, as a pool offers them with or without a sandbox and a network.
pub fn built_in(has_sandbox: bool, has_network: bool) -> impl Iterator<Item = (&'static str, Offer)> {
    let words: &[&[&str]] = if has_network { &[ON, OFF] } else { &[OFF] };
    let words = Offer::Set(words.concat().into_iter().map(str::to_owned).collect());
    let network = [NETWORK].iter().chain(NETWORK_ALIASES).map(move |name| (*name, words.clone()));
    let numbers = [USER, GROUP].map(|name| (name, Offer::Ignore));
    network.chain(has_sandbox.then(|| (ROOTFS, Offer::Exact(ROOTFS_INPUTS.into())))).chain(numbers)
}

/// The user id and group id that an action asks for. The error names a value that is not a valid id.
pub fn wanted_user(asked: &[(String, String)]) -> Result<(Option<u32>, Option<u32>), String> {
    let number = |wanted: &str| {
        let Some((_, value)) = asked.iter().find(|(name, _)| name == wanted) else { return Ok(None) };
        // The highest number means "no user" to the kernel.
        let number = value.parse().ok().filter(|number| *number != u32::MAX);
        number
            .map(Some)
            .ok_or_else(|| format!("{wanted} is \"{}\", which is no number of a user or group", shown(value)))
    };
    Ok((number(USER)?, number(GROUP)?))
}

/// Whether an action asks for a network.
pub fn wants_network(asked: &[(String, String)]) -> bool {
    asked.iter().any(|(name, value)| is_network(name) && ON.contains(&&**value))
}

fn is_network(name: &str) -> bool {
    name == NETWORK || NETWORK_ALIASES.contains(&name)
}

/// The container image that an action asks for.
///
/// # Errors
/// If the action names several images.
pub fn wanted_image(asked: &[(String, String)]) -> Result<Option<&str>, String> {
    let is_image = |(name, value): &&(String, String)| name == IMAGE && !NO_IMAGE.contains(&&**value);
    let mut names = asked.iter().filter(is_image).map(|(_, value)| value.as_str());
    let first = names.next();
    match names.find(|other| Some(*other) != first) {
        Some(_) => Err(format!("the action names several images ({IMAGE})")),
        None => Ok(first),
    }
}

/// The container images that pools name.
pub fn named_images<'a>(pools: impl Iterator<Item = &'a Offers>) -> BTreeSet<&'a str> {
    let offered = pools.filter_map(|offers| offers.get(IMAGE));
    let names = offered.flat_map(|offer| match offer {
        Offer::Exact(name) => std::slice::from_ref(name),
        Offer::Set(names) => names,
        Offer::Minimum(_) | Offer::Size(_) | Offer::Ignore => &[],
    });
    names.map(String::as_str).filter(|name| !NO_IMAGE.contains(name)).collect()
}

/// The pools of a server that can run images. If no pool names its images, every pool accepts all of them.
pub fn offer_images<'a>(pools: impl Iterator<Item = &'a mut Offers>) {
    let pools: Vec<_> = pools.collect();
    if pools.iter().all(|offers| !offers.contains_key(IMAGE)) {
        for offers in pools {
            offers.insert(IMAGE.into(), Offer::Ignore);
        }
    }
}

/// Whether an action asks for its input root as its root file system.
pub fn wants_input_root_as_root(asked: &[(String, String)]) -> bool {
    asked.iter().any(|(name, value)| name == ROOTFS && value == ROOTFS_INPUTS)
}

/// The offered properties of a pool, by name.
pub type Offers = BTreeMap<String, Offer>;

/// The treatment of actions that require an unknown property.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UnknownProperties {
    /// The property is ignored.
    #[default]
    Ignore,
    /// The action is refused.
    Refuse,
}

impl Offer {
    fn satisfies(&self, name: &str, wanted: &str) -> bool {
        // Clients write this value with different capitalisation: "linux", "Linux".
        let same = |offered: &String| match name {
            "OSFamily" => offered.eq_ignore_ascii_case(wanted),
            _ => offered == wanted,
        };
        match self {
            Self::Exact(value) => same(value),
            Self::Set(values) => values.iter().any(same),
            Self::Minimum(most) => wanted.parse::<u64>().is_ok_and(|wanted| wanted <= *most),
            Self::Size(most) => parse_size(wanted).is_some_and(|wanted| wanted <= *most),
            Self::Ignore => true,
        }
    }
}

impl fmt::Display for Offer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(value) => write!(f, "\"{value}\""),
            Self::Set(values) => write!(f, "\"{}\"", values.join("\" or \"")),
            Self::Minimum(most) => write!(f, "up to {most}, as a whole number"),
            Self::Size(most) => write!(f, "up to {}", Size::from_bytes(*most)),
            Self::Ignore => f.write_str("anything"),
        }
    }
}

/// A property for which a pool does not meet the requirement of an action.
#[derive(Debug)]
pub struct Difference<'a> {
    name: &'a str,
    wanted: &'a str,
    /// `None` when the pool does not offer the property, and it is known or unknown properties are refused.
    offered: Option<&'a Offer>,
    known: bool,
}

impl fmt::Display for Difference<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (asked for \"{}\", ", shown(self.name), shown(self.wanted))?;
        match self.offered {
            Some(offer) => write!(f, "offered {offer}")?,
            None if self.known => f.write_str("not offered")?,
            None => f.write_str("known to no pool, and execution.unknown_properties is \"refuse\"")?,
        }
        match self.name {
            ROOTFS => f.write_str("; see execution.sandbox.rootfs)"),
            name if is_network(name) => f.write_str(
                "; see execution.sandbox.network, and if that is \"on\", the event protection_missing in the server's log)",
            ),
            _ => f.write_str(")"),
        }
    }
}

/// The known properties, and the treatment of unknown ones.
#[derive(Debug, Default)]
pub struct Known {
    names: BTreeSet<String>,
    unknown: UnknownProperties,
}

impl Known {
    /// Creates the value in which no property is known yet.
    pub fn new(unknown: UnknownProperties) -> Self {
        Self { names: BTreeSet::new(), unknown }
    }

    /// The properties that a pool offers are known from now on, also after the pool was removed.
    pub fn learn(&mut self, offers: &Offers) {
        self.names.extend(offers.keys().cloned());
    }

    /// How far a pool is from the requirements of an action: the number of differences, and how many of them are
    /// properties that it does not offer at all. A pool with another value is nearer than one without the property.
    pub fn distance(&self, offers: &Offers, asked: &[(String, String)]) -> (usize, usize) {
        self.differences(offers, asked).fold((0, 0), |(all, absent), difference| {
            (all + 1, absent + usize::from(difference.offered.is_none()))
        })
    }

    /// The differences between a pool and the requirements of an action. Empty when the pool can run it.
    pub fn differences<'a>(
        &self,
        offers: &'a Offers,
        asked: &'a [(String, String)],
    ) -> impl Iterator<Item = Difference<'a>> {
        asked.iter().filter_map(move |(name, wanted)| {
            let offered = offers.get(name);
            let known = self.names.contains(name);
            let agrees = match offered {
                Some(offer) => offer.satisfies(name, wanted),
                None => {
                    !known && (self.unknown == UnknownProperties::Ignore || HINTS.contains(&name.as_str()))
                }
            };
            (!agrees).then_some(Difference { name, wanted, offered, known })
        })
    }
}

/// Parses a size as clients write it: bytes, or a number and a unit, of which the `B` may be missing (`512Mi`, `4G`).
pub(crate) fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    if let Ok(bytes) = text.parse() {
        return Some(bytes);
    }
    let has_b = text.ends_with(['b', 'B']);
    let size: Result<Size, _> = if has_b { text.parse() } else { format!("{text}B").parse() };
    size.ok().map(Size::bytes)
}

/// Lists the first few differences for a message.
pub fn list<'a>(mut differences: impl Iterator<Item = Difference<'a>>) -> String {
    let first: Vec<_> = differences.by_ref().take(DIFFERENCES_SHOWN).map(|d| d.to_string()).collect();
    match differences.count() {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}

fn shown(text: &str) -> String {
    text.chars().flat_map(char::escape_debug).take(TEXT_SHOWN).collect()
}

/// The sort key of pools, from most to least preferred. The most specialised pools come last, so that they stay free
/// for work that needs them: pools with the fewest properties come first, then those with the smallest amounts, then by
/// name.
pub fn preference(name: &str, offers: &Offers) -> (usize, Vec<u64>, String) {
    let is_demand = |(name, offer): (&String, &Offer)| match &**name {
        // Every pool has these.
        ROOTFS => false,
        NETWORK => offer.satisfies(name, "on"),
        name => *offer != Offer::Ignore && !NETWORK_ALIASES.contains(&name),
    };
    let demands = offers.iter().filter(|offer| is_demand(*offer)).count();
    let minimums = offers.values().filter_map(|offer| match offer {
        Offer::Minimum(most) | Offer::Size(most) => Some(*most),
        _ => None,
    });
    (demands, minimums.collect(), name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offers(list: &[(&str, Offer)]) -> Offers {
        list.iter().map(|(name, offer)| ((*name).to_owned(), offer.clone())).collect()
    }

    fn big() -> Offers {
        offers(&[
            ("OSFamily", Offer::Exact("linux".into())),
            ("arch", Offer::Set(vec!["x86_64".into(), "amd64".into()])),
            ("cores", Offer::Minimum(8)),
            ("silo", Offer::Ignore),
        ])
    }

    fn known(pools: &[Offers], unknown: UnknownProperties) -> Known {
        let mut known = Known::new(unknown);
        pools.iter().for_each(|offers| known.learn(offers));
        known
    }

    fn differences(known: &Known, offers: &Offers, asked: &[(&str, &str)]) -> Vec<String> {
        let asked: Vec<_> = asked.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        known.differences(offers, &asked).map(|difference| difference.to_string()).collect()
    }

    /// EXE-31.
    #[test]
    fn each_kind_of_offer_takes_what_it_says() {
        let known = known(&[big()], UnknownProperties::Ignore);
        let taken = |asked: &[(&str, &str)]| differences(&known, &big(), asked).is_empty();
        for asked in [
            &[][..],
            &[("OSFamily", "Linux"), ("arch", "amd64"), ("cores", "8"), ("silo", "x")],
            &[("cores", "0"), ("cores", "8"), ("arch", "x86_64"), ("arch", "amd64")],
            &[("never-heard-of", "1")],
        ] {
            assert!(taken(asked), "{asked:?}");
        }
        for asked in [
            &[("OSFamily", "plan9")][..],
            &[("arch", "X86_64")],
            &[("arch", "")],
            &[("cores", "9")],
            &[("cores", "-1")],
            &[("cores", "many")],
            &[("cores", "4"), ("cores", "9")],
            &[("OSFamily", "linux"), ("OSFamily", "macos")],
        ] {
            assert!(!taken(asked), "{asked:?}");
        }
    }

    #[test]
    fn a_property_that_another_pool_offers_has_to_be_offered() {
        let gpu = offers(&[("gpu", Offer::Exact("a100".into()))]);
        let known = known(&[big(), gpu.clone()], UnknownProperties::Refuse);
        assert!(differences(&known, &gpu, &[("gpu", "a100")]).is_empty());
        assert_eq!(
            differences(&known, &big(), &[("gpu", "a100")]),
            ["gpu (asked for \"a100\", not offered)"]
        );
        assert!(differences(&known, &big(), &[(WORKER_KEY, "7"), (WORKER_PROTOCOL, "json")]).is_empty());
        let refused = differences(&known, &big(), &[("colour", "red"), ("cores", "64")]);
        assert!(refused[0].contains("colour") && refused[0].contains("unknown_properties"), "{refused:?}");
        assert_eq!(refused[1], "cores (asked for \"64\", offered up to 8, as a whole number)");
    }

    #[test]
    fn a_network_is_offered_under_all_its_names_and_such_a_pool_is_preferred_less() {
        let pool = |has_network| -> Offers {
            built_in(true, has_network).map(|(name, offer)| (name.to_owned(), offer)).collect()
        };
        let known = known(&[pool(false)], UnknownProperties::Refuse);
        for asked in [("network", "on"), ("dockerNetwork", "standard"), ("sandboxNetwork", "bridge")] {
            assert!(wants_network(&[(asked.0.into(), asked.1.into())]));
            assert_eq!(differences(&known, &pool(true), &[asked]), [""; 0]);
            assert!(differences(&known, &pool(false), &[asked])[0].contains("execution.sandbox.network"));
        }
        for asked in [("network", "off"), ("dockerNetwork", "none"), ("rootfs", "inputs")] {
            assert!(!wants_network(&[(asked.0.into(), asked.1.into())]));
            assert_eq!(differences(&known, &pool(false), &[asked]), [""; 0]);
        }
        let numbers =
            |user: &str| wanted_user(&[("unixUID".into(), user.into()), ("unixGID".into(), "7".into())]);
        assert_eq!(numbers("0"), Ok((Some(0), Some(7))));
        assert!(numbers("root").unwrap_err().contains("root") && numbers("4294967295").is_err());
        assert!(preference("b", &pool(false)) < preference("a", &pool(true)));
        assert_eq!(preference("a", &pool(false)), preference("a", &Offers::new()));
    }

    #[test]
    fn a_message_stays_short_whatever_is_asked_for() {
        let asked: Vec<_> = (0..1000).map(|_| ("cores".to_owned(), "x\n".repeat(10_000))).collect();
        let (known, offers) = (known(&[big()], UnknownProperties::Ignore), big());
        let text = list(known.differences(&offers, &asked));
        assert!(text.len() < 4000 && text.ends_with("and 992 more") && !text.contains('\n'), "{text}");
    }

    #[test]
    fn sizes_are_read_as_clients_write_them() {
        for (text, bytes) in
            [("1000", 1000), ("4G", 4_000_000_000), ("512Mi", 512 << 20), (" 1.5 GB", 1_500_000_000)]
        {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        for text in ["", "-1", "4X", "G", "1e9"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }

    #[test]
    fn an_action_names_one_image_or_none_and_pools_name_those_to_have_ready() {
        let wanted = |asked: &[(&str, &str)]| {
            let asked: Vec<_> = asked.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
            wanted_image(&asked).map(|name| name.map(str::to_owned))
        };
        assert_eq!(
            wanted(&[("container-image", "oci:/x"), ("container-image", "oci:/x")]),
            Ok(Some("oci:/x".into()))
        );
        assert_eq!(wanted(&[("container-image", "none"), ("OSFamily", "linux")]), Ok(None));
        assert!(wanted(&[("container-image", "oci:/x"), ("container-image", "oci:/y")]).is_err());
        let mut pools = [
            offers(&[("container-image", Offer::Set(vec!["oci:/x".into(), "none".into()]))]),
            offers(&[("container-image", Offer::Ignore)]),
            big(),
        ];
        offer_images(pools.iter_mut());
        assert_eq!(named_images(pools.iter()), ["oci:/x"].into());
        assert!(!pools[2].contains_key("container-image"), "other pools take it already");
    }

    #[test]
    fn the_least_special_pool_comes_first() {
        let small = offers(&[("cores", Offer::Minimum(2)), ("silo", Offer::Ignore)]);
        let large = offers(&[("cores", Offer::Minimum(64))]);
        let mut pools = [("b", big()), ("l", large), ("s", small)];
        pools.sort_by_key(|(name, offers)| preference(name, offers));
        assert_eq!(pools.map(|(name, _)| name), ["s", "l", "b"]);
    }
}
