//! Which waiting actions have their inputs staged, and that nothing depends on it. tests/sandbox has the scheduler's
//! part.

use super::{
    support::{Bench, eventually, file, sh, with_staging, with_tools, with_worker},
    tools::LIMITS,
};
use gorego_reapi::{digest::Digest, error::Error};

/// An input root of 20 files that contain this text.
fn root_of(bench: &Bench, text: &str) -> Digest {
    let names: Vec<_> = (0..20).map(|number| format!("d/{number}")).collect();
    bench.input(&names.iter().map(|name| (&**name, file(text))).collect::<Vec<_>>())
}

#[test]
fn a_run_uses_the_tree_that_was_staged_for_it() {
    with_staging(1 << 30, async |bench| {
        let job = sh("cat d/7; ls d | wc -l").root(root_of(bench, "text "));
        bench.stage_ahead(&job).await;
        assert_eq!(bench.trees(), 1);
        assert_eq!(bench.text(&bench.result(&job).await.stdout_digest), "text 20\n");
        assert_eq!(bench.trees(), 1);
    });
}

#[test]
fn without_overlays_nothing_is_staged() {
    with_worker(async |bench| {
        let job = sh("cat d/7").root(root_of(bench, "text"));
        bench.stage_ahead(&job).await;
        assert_eq!(bench.trees(), 0);
        assert_eq!(bench.text(&bench.result(&job).await.stdout_digest), "text");
    });
}

#[test]
fn a_root_with_a_file_that_is_too_large_for_an_overlay_is_not_staged() {
    with_staging(1 << 20, async |bench| {
        bench.stage_ahead(&sh("true").root(bench.input(&[("big", file(&"x".repeat(2 << 20)))]))).await;
        assert_eq!(bench.trees(), 0);
    });
}

/// A tool has an input root of its own.
#[test]
fn the_inputs_of_an_action_that_a_tool_serves_are_not_staged() {
    with_tools(LIMITS, async |bench| {
        let root = root_of(bench, "text");
        bench.stage_ahead(&sh("true").root(root).platform("persistentWorkerKey", "k")).await;
        assert_eq!(bench.trees(), 0);
        bench.stage_ahead(&sh("true").root(root)).await;
        assert_eq!(bench.trees(), usize::from(bench.is_sandboxed));
    });
}

#[test]
fn a_missing_blob_a_panic_or_the_end_of_the_action_leaves_nothing_behind_and_staging_continues() {
    with_staging(1 << 30, async |bench| {
        let root = root_of(bench, "text");
        let cancelled = sh("true").root(root);
        cancelled.cancel.cancel();
        bench.stage_ahead(&cancelled).await;
        assert_eq!(bench.trees(), 0);

        let job = sh("cat d/7").root(root);
        let blob = bench.store.put("text");
        *bench.store.lost_next.lock().unwrap() = Some(blob);
        bench.stage_ahead(&job).await;
        eventually("the incomplete tree is removed", || bench.trees() == 0).await;
        *bench.store.panic_next.lock().unwrap() = Some(blob);
        bench.stage_ahead(&job).await;
        assert_eq!(*bench.store.panic_next.lock().unwrap(), None);
        eventually("what the panic left is removed", || bench.trees() == 0).await;

        bench.stage_ahead(&job).await;
        assert_eq!(bench.trees(), 1);
        assert_eq!(bench.text(&bench.result(&job).await.stdout_digest), "text");
        bench.store.blobs.lock().unwrap().remove(&root);
        bench.stage_ahead(&job).await;
        assert!(matches!(bench.failure(&job).await.error, Error::MissingBlobs(_)), "the run says so");
    });
}
