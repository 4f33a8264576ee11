//! Tests of the look-up for an Execute: the cached result of an action, or the action and its Command.

use super::{
    super::resolve::Resolution,
    results::{rich_result, update},
    *,
};
use futures::future::join_all;
use prost::Message as _;

/// Stores an Action and its Command.
async fn action(store: &TestStore, salt: &str, do_not_cache: bool) -> (Digest, Digest) {
    let command = reapi::Command { arguments: vec!["true".into(), salt.into()], ..Default::default() };
    let command = store.put(command.encode_to_vec()).await;
    let action = reapi::Action {
        command_digest: Some(command.to_wire()),
        input_root_digest: Some(digest(b"").to_wire()),
        do_not_cache,
        ..Default::default()
    };
    (store.put(action.encode_to_vec()).await, command)
}

async fn resolve(store: &TestStore, action: Digest, skip_cache_lookup: bool) -> Result<Resolution> {
    store.cas.resolve_action(&store.main, action, skip_cache_lookup, "anonymous").await
}

/// The error of an action that cannot run.
async fn unusable(store: &TestStore, action: Digest) -> Error {
    match resolve(store, action, false).await {
        Ok(Resolution::Unusable(error)) => error,
        other => panic!("{other:?}"),
    }
}

/// EXE-16, EXE-17, EXE-21.
#[actix::test]
async fn an_action_is_answered_from_the_cache_only_by_a_complete_result() {
    let store = TestStore::new().await;
    let (action, command) = action(&store, "x", false).await;
    assert!(matches!(resolve(&store, action, false).await, Ok(Resolution::Run(a)) if a.digest == action));
    let (result, references) = rich_result(&store).await;
    let stored = update(&store, action, result).await;
    for _ in 0..3 {
        assert!(matches!(resolve(&store, action, false).await, Ok(Resolution::Cached(r)) if r == stored));
    }
    assert!(matches!(resolve(&store, action, true).await, Ok(Resolution::Run(_))));
    store.lose(references[2].1).await;
    assert!(matches!(resolve(&store, action, false).await, Ok(Resolution::Run(_))));
    // The action is cached, but it cannot run without its Command.
    store.lose(command).await;
    assert_eq!(unusable(&store, action).await, Error::MissingBlobs(vec![command]));
}

/// EXE-19.
#[actix::test]
async fn an_action_that_says_do_not_cache_is_never_answered_from_the_cache() {
    let store = TestStore::new().await;
    let (action, _) = action(&store, "x", true).await;
    update(&store, action, reapi::ActionResult::default()).await;
    for _ in 0..3 {
        assert!(matches!(resolve(&store, action, false).await, Ok(Resolution::Run(_))));
    }
}

/// EXE-22, EXE-27.
#[actix::test]
async fn missing_and_malformed_actions_are_told_apart() {
    let store = TestStore::new().await;
    let absent = digest(b"absent");
    assert_eq!(unusable(&store, absent).await, Error::MissingBlobs(vec![absent]));
    let no_action = store.put("\u{1}no action").await;
    assert!(matches!(unusable(&store, no_action).await, Error::Invalid(m) if m.contains("Action")));
    let orphan = reapi::Action { command_digest: Some(absent.to_wire()), ..Default::default() };
    let orphan = store.put(orphan.encode_to_vec()).await;
    assert_eq!(unusable(&store, orphan).await, Error::MissingBlobs(vec![absent]));
    let empty = digest(b"");
    assert!(matches!(unusable(&store, empty).await, Error::Invalid(m) if m.contains("command_digest")));
    let huge = Digest::parse(SHA256, &"1".repeat(64), 1 << 40).unwrap();
    assert!(matches!(unusable(&store, huge).await, Error::Invalid(m) if m.contains("too large")));
}

/// EXE-27: messages are measured before they are decoded; these would take half a gigabyte.
#[actix::test]
async fn an_action_or_command_of_millions_of_empty_parts_is_refused_before_it_is_decoded() {
    let store = TestStore::new().await;
    let message_of = |field: u8| {
        let properties = b"\x0a\x00".repeat(8_000_000);
        let mut message = vec![field << 3 | 2];
        prost::encode_length_delimiter(properties.len(), &mut message).unwrap();
        [message, properties].concat()
    };
    let command = store.put(message_of(5)).await;
    let of_command = reapi::Action { command_digest: Some(command.to_wire()), ..Default::default() };
    let of_command = store.put(of_command.encode_to_vec()).await;
    let of_itself = store.put(message_of(10)).await;
    for (action, what) in [(of_command, "Command"), (of_itself, "Action")] {
        let Error::Invalid(message) = unusable(&store, action).await else { panic!("not refused") };
        assert!(message.contains("bytes of memory") && message.contains(what), "{message}");
    }
}

/// There are more actions at once than there is memory for, because their Actions and Commands are large.
#[actix::test]
async fn large_actions_are_looked_up_in_turn() {
    let store = TestStore::new().await;
    let text = "x".repeat(100_000);
    let command = reapi::Command { arguments: vec![text.clone()], ..Default::default() };
    let command = store.put(command.encode_to_vec()).await;
    let mut actions = Vec::new();
    for salt in 0..12 {
        let action = reapi::Action {
            command_digest: Some(command.to_wire()),
            input_root_digest: Some(digest(b"").to_wire()),
            salt: format!("{salt}{text}").into(),
            ..Default::default()
        };
        actions.push(store.put(action.encode_to_vec()).await);
    }
    let resolved = join_all(actions.iter().map(|action| resolve(&store, *action, false))).await;
    for (resolution, action) in resolved.iter().zip(&actions) {
        assert!(matches!(resolution, Ok(Resolution::Run(a)) if a.digest == *action));
    }
}

/// Platform properties are held in memory, so they count toward the weight of the action.
#[actix::test]
async fn an_action_with_a_huge_platform_is_not_kept_in_memory() {
    let store = TestStore::new().await;
    let (small, command) = action(&store, "x", false).await;
    let property = reapi::platform::Property { name: "x".repeat(1_000_000), value: "y".into() };
    let huge = reapi::Action {
        command_digest: Some(command.to_wire()),
        input_root_digest: Some(digest(b"").to_wire()),
        platform: Some(reapi::Platform { properties: vec![property] }),
        ..Default::default()
    };
    let huge = store.put(huge.encode_to_vec()).await;
    for (action, is_kept) in [(small, true), (huge, false)] {
        assert!(matches!(resolve(&store, action, false).await, Ok(Resolution::Run(_))));
        let kept = store.cas.shared().actions.get(&(store.main.id(), action));
        assert_eq!(kept.is_some(), is_kept);
    }
}
