//! Page tokens: a position in one listing.
//!
//! A token contains the position and a checksum over it and the request. So a damaged token, or a token of another
//! listing, is refused. Otherwise it could skip entries silently (CAS-28). A token is not a secret and grants nothing.

use gorego_reapi::{
    digest::DigestFunction,
    error::{Error, Result},
};

/// Length of the checksum in a token, in hex characters.
const CHECKSUM_CHARS: usize = 16;

/// Makes the token of a position in the listing that `binding` describes.
pub fn seal(binding: &str, position: u64) -> String {
    format!("{position:x}-{}", checksum(binding, position))
}

/// Reads the position of a token.
///
/// # Errors
/// [`Error::Invalid`] when the token is not one that [`seal`] made for this `binding`.
pub fn open(binding: &str, token: &str) -> Result<u64> {
    let position = token
        .split_once('-')
        .and_then(|(position, _)| u64::from_str_radix(position, 16).ok())
        .filter(|position| seal(binding, *position) == token);
    position.ok_or_else(|| {
        Error::invalid(
            "page_token does not belong to this request; leave it empty to start from the beginning",
        )
    })
}

fn checksum(binding: &str, position: u64) -> String {
    let digest = DigestFunction::Sha256.digest(format!("{position}\n{binding}").as_bytes());
    let mut hex = digest.hash_hex();
    hex.truncate(CHECKSUM_CHARS);
    hex
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// CAS-28.
        #[test]
        fn a_token_opens_only_the_listing_it_came_from(
            binding in ".{0,20}", other in ".{0,20}", position in any::<u64>()
        ) {
            let token = seal(&binding, position);
            prop_assert_eq!(open(&binding, &token), Ok(position));
            if other != binding {
                prop_assert!(open(&other, &token).is_err());
            }
        }

        /// CAS-28.
        #[test]
        fn a_garbled_token_is_refused(at in 0usize..20, with in "[0-9a-z+ -]", position in any::<u64>()) {
            let token = seal("tree", position);
            let mut garbled = token.clone();
            let at = at.min(token.len() - 1);
            garbled.replace_range(at..=at, &with);
            prop_assert_eq!(open("tree", &garbled).is_ok(), garbled == token);
        }

        #[test]
        fn no_text_makes_it_panic(token in ".*") {
            prop_assert!(open("tree", &token).is_err());
        }
    }
}
