//! Names of operations as users type them: the whole name, the id, or the beginning of the id.

use super::FilterArgs;
use gorego_client::{Client, OperationState};
use gorego_reapi::error::{Error, Result};
use std::collections::BTreeMap;

/// Number of operations in a page.
const PAGE: i32 = 1_000;
/// Maximum number of pages that are read to find an id by its beginning.
const MAX_PAGES: usize = 100;
/// Length of a UUID.
const UUID_CHARS: usize = 36;
/// Minimum length of the beginning of an id.
const MIN_PREFIX: usize = 4;
/// Minimum number of characters of an id in tables.
const SHORT_ID: usize = 8;

/// The id in the name of an operation.
pub(super) fn id(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// The UUID of an id. On a server with a name, an id is `node.uuid`.
fn uuid(id: &str) -> &str {
    id.rsplit('.').next().unwrap_or(id)
}

/// Checks what a user has written for an operation, without its server.
///
/// # Errors
/// `Invalid` if it cannot be a name, or is too short for the beginning of an id.
pub(in crate::cli) fn check(written: &str) -> Result<()> {
    if !written.contains('/') && written.len() < MIN_PREFIX {
        return Err(Error::Invalid(format!(
            "\"{}\" is too short for the beginning of an id; write at least {MIN_PREFIX} characters",
            written.escape_debug()
        )));
    }
    Ok(())
}

/// The whole name of an operation. The beginning of an id may follow `operations/`, as in a name.
///
/// # Errors
/// `NotFound` if no operation has such an id, `Invalid` if several have.
pub(in crate::cli) async fn resolve(client: &Client, written: &str) -> Result<String> {
    let is_hex = |byte: u8| byte.is_ascii_hexdigit() || byte == b'-';
    let (is_name, tail) = (written.contains('/'), uuid(id(written)));
    let is_beginning = (MIN_PREFIX..UUID_CHARS).contains(&tail.len()) && tail.bytes().all(is_hex);
    if is_name && !is_beginning {
        return Ok(written.to_owned());
    }
    let written = id(written);
    if uuid(written).len() == UUID_CHARS {
        return Ok(client.operation_name(written));
    }
    check(written)?;
    let mut found = Vec::new();
    list_each(client, &FilterArgs::default(), true, |operation| {
        if begins_with(&operation.name, written) {
            found.push(operation.name);
        }
        true
    })
    .await?;
    match found.as_slice() {
        [name] => Ok(name.clone()),
        [] => Err(Error::NotFound(format!(
            "no operation that {} knows has an id that begins with \"{}\"; `gorego ops list --all` lists them",
            client.endpoint(),
            written.escape_debug()
        ))),
        [first, second, ..] => Err(Error::Invalid(format!(
            "{} operations have ids that begin with \"{written}\", such as {} and {}; write more of it",
            found.len(),
            id(first),
            id(second)
        ))),
    }
}

fn begins_with(name: &str, written: &str) -> bool {
    let id = id(name);
    id.starts_with(written) || uuid(id).starts_with(written)
}

/// Reads all pages of a listing, until `take` returns false. Returns whether there was more to read.
pub(super) async fn list_each(
    client: &Client,
    filter: &FilterArgs,
    all: bool,
    mut take: impl FnMut(OperationState) -> bool,
) -> Result<bool> {
    let filter = filter.text(all)?;
    let mut token = String::new();
    for _ in 0..MAX_PAGES {
        let page = client.list_operations(&filter, PAGE, &token).await?;
        for operation in page.operations {
            if !take(operation) {
                return Ok(true);
            }
        }
        token = page.next_page_token;
        if token.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The shortest unambiguous beginnings of the ids in a list, by name.
pub(super) fn short_ids<'a>(names: impl IntoIterator<Item = &'a str>) -> BTreeMap<&'a str, &'a str> {
    let mut ids: Vec<(&str, &str)> = names.into_iter().map(|name| (uuid(id(name)), name)).collect();
    ids.sort_unstable();
    let common = |at: usize, other: Option<usize>| {
        let (Some((mine, _)), Some((other, _))) = (ids.get(at), other.and_then(|other| ids.get(other)))
        else {
            return 0;
        };
        mine.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count()
    };
    let short = |at: usize| {
        let (uuid, name) = *ids.get(at)?;
        let shared = common(at, at.checked_sub(1)).max(common(at, Some(at + 1)));
        let length = SHORT_ID.max(shared + 1).min(uuid.len());
        Some((name, uuid.get(..length).unwrap_or(uuid)))
    };
    (0..ids.len()).filter_map(short).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_ids_tell_the_operations_of_a_list_apart() {
        let names = [
            "operations/6ba7b810-9dad-11d1-80b4-00c04fd430c8",
            "a/operations/build-3.6ba7b810-9dae-11d1-80b4-00c04fd430c8",
            "operations/7ba7b810-9dad-11d1-80b4-00c04fd430c8",
        ];
        let short = short_ids(names);
        assert_eq!(short[names[0]], "6ba7b810-9dad");
        assert_eq!(short[names[1]], "6ba7b810-9dae");
        assert_eq!(short[names[2]], "7ba7b810");
        for name in names {
            let found = names.iter().filter(|other| begins_with(other, short[name]));
            assert_eq!(found.count(), 1, "{name}");
        }
        assert!(begins_with(names[1], "build-3.6b"));
    }
}
