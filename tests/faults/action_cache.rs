//! Faults of ActionCache.

use super::{
    Fault,
    change::{code, exchange, failure, instead, read_request, request, response},
    fault,
    proxy::{Behaviour, Reply},
};
use gorego_reapi::proto::reapi::{ActionResult, Digest, GetActionResultRequest, UpdateActionResultRequest};
use prost::Message as _;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};
use tonic::{Code, Status};

/// The results that clients have stored, for servers that return them unchanged.
type Stored = Arc<Mutex<HashMap<String, ActionResult>>>;

fn key(digest: Option<&Digest>) -> String {
    digest.map(|digest| digest.hash.clone()).unwrap_or_default()
}

/// Remembers each accepted update. `serve` makes a response from it and the server's own response.
fn remembering(
    serve: impl Fn(
        &GetActionResultRequest,
        Option<ActionResult>,
        Result<ActionResult, Status>,
    ) -> Result<ActionResult, Status>
    + Send
    + Sync
    + 'static,
) -> Behaviour {
    let stored = Stored::default();
    let updates = stored.clone();
    super::change::both(
        "UpdateActionResult",
        exchange::<UpdateActionResultRequest, ActionResult>("UpdateActionResult", move |asked, answer| {
            if let Some(result) = &asked.action_result {
                updates.lock().unwrap().insert(key(asked.action_digest.as_ref()), result.clone());
            }
            answer
        }),
        exchange::<GetActionResultRequest, ActionResult>("GetActionResult", move |asked, answer| {
            let known = stored.lock().unwrap().get(&key(asked.action_digest.as_ref())).cloned();
            serve(asked, known, answer)
        }),
    )
}

pub(crate) fn faults() -> Vec<Fault> {
    let (get, update) = ("GetActionResult", "UpdateActionResult");
    vec![
        fault("a miss is an empty result", &["AC-01"], {
            failure(get, |status| match status.code() {
                Code::NotFound => Ok(Some(ActionResult::default().encode_to_vec().into())),
                _ => Err(status),
            })
        }),
        fault("a miss is an internal error", &["AC-01"], code(get, Code::NotFound, Code::Internal)),
        fault("the size of the action is no part of the key", &["AC-02"], {
            remembering(|_, known, answer| match (known, answer) {
                (Some(result), Err(_)) => Ok(result),
                (_, answer) => answer,
            })
        }),
        fault("results are served whatever is left of them", &["AC-03", "AC-11"], {
            remembering(|_, known, answer| match (known, answer) {
                (Some(result), Err(_)) => Ok(result),
                (_, answer) => answer,
            })
        }),
        fault("results come as they were stored", &["AC-05"], {
            remembering(|_, known, answer| answer.map(|result| known.unwrap_or(result)))
        }),
        fault("everything is inlined, always", &["AC-05"], {
            request::<GetActionResultRequest>(get, |asked| {
                (asked.inline_stdout, asked.inline_stderr) = (true, true);
            })
        }),
        fault("inlined bytes are not those of the digest", &["AC-06"], {
            response::<ActionResult>(get, |result| {
                if !result.stdout_raw.is_empty() {
                    result.stdout_raw = vec![b'x'; result.stdout_raw.len()].into();
                }
            })
        }),
        fault("digests are zero where nothing is", &["AC-06"], {
            response::<ActionResult>(get, |result| {
                result.stderr_digest.get_or_insert_default();
            })
        }),
        fault("a result too large to inline is an error", &["AC-07"], {
            exchange::<GetActionResultRequest, ActionResult>(get, |asked, answer| {
                let result = answer?;
                let large =
                    |digest: &Option<Digest>| digest.as_ref().is_some_and(|d| d.size_bytes >= 3_000_000);
                if asked.inline_stdout && large(&result.stdout_digest) {
                    return Err(Status::resource_exhausted("the result is too large"));
                }
                Ok(result)
            })
        }),
        fault("updates are taken and forgotten", &["AC-08"], {
            instead(update, |call, _| async move {
                let (asked, _) = read_request::<UpdateActionResultRequest>(call).await?;
                let result = asked.action_result.unwrap_or_default();
                Ok(Reply::of([result.encode_to_vec().into()]))
            })
        }),
        fault("the first update is the last", &["AC-08"], {
            let first = Stored::default();
            request::<UpdateActionResultRequest>(update, move |asked| {
                let result = asked.action_result.clone().unwrap_or_default();
                let mut first = first.lock().unwrap();
                let kept = first.entry(key(asked.action_digest.as_ref())).or_insert(result);
                asked.action_result = Some(kept.clone());
            })
        }),
        fault("results have no metadata", &["AC-09"], {
            response::<ActionResult>(get, |result| result.execution_metadata = None)
        }),
        fault("malformed results are taken", &["AC-10"], {
            exchange::<UpdateActionResultRequest, ActionResult>(update, |asked, answer| {
                answer.or_else(|_| Ok(asked.action_result.clone().unwrap_or_default()))
            })
        }),
        fault("an update is refused as an internal error", &["AC-10"], {
            code(update, Code::InvalidArgument, Code::Internal)
        }),
        fault("failures are served as successes", &["AC-13"], {
            remembering(|_, known, answer| match (known, answer) {
                (Some(result), Err(_)) if result.exit_code != 0 => {
                    Ok(ActionResult { exit_code: 0, ..result })
                }
                (_, answer) => answer,
            })
        }),
        fault("what the server does not use is dropped", &["AC-14"], {
            response::<ActionResult>(get, |result| {
                if let Some(metadata) = &mut result.execution_metadata {
                    metadata.auxiliary_metadata.clear();
                }
                for file in &mut result.output_files {
                    file.node_properties = None;
                }
            })
        }),
        fault("a cache policy is refused", &["AC-15"], {
            exchange::<UpdateActionResultRequest, ActionResult>(update, |asked, answer| {
                match asked.results_cache_policy {
                    Some(_) => Err(Status::invalid_argument("results_cache_policy is not supported")),
                    None => answer,
                }
            })
        }),
    ]
}
