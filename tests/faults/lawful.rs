//! Permitted behaviour that resembles a fault. The suite must pass all of it.

use super::{
    Fault,
    change::{change_response, edit, exchange, instead, read_request},
    execution::hash,
    fault,
};
use futures::StreamExt as _;
use gorego_reapi::proto::{
    longrunning::Operation,
    reapi::{ActionResult, ExecuteRequest, GetActionResultRequest},
};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

/// How often a lagging cache returns the old answer.
const LAG: usize = 2;

/// Each behaviour, with the rules that it follows.
pub(crate) fn all() -> Vec<Fault> {
    vec![
        fault("a request that comes while a run is being wound up joins it", &["EXE-16"], {
            let seen = Arc::new(Mutex::new(HashMap::<String, Vec<ActionResult>>::new()));
            instead("Execute", move |call, upstream| {
                let seen = seen.clone();
                async move {
                    let (asked, call) = read_request::<ExecuteRequest>(call).await?;
                    let mut reply = upstream.forward(call).await?;
                    let join = move |operation: &mut Operation| {
                        change_response(operation, |response| {
                            let mut seen = seen.lock().unwrap();
                            let runs = seen.entry(hash(asked.action_digest.as_ref())).or_default();
                            runs.extend(response.result.clone());
                            // The first caller and two more.
                            if runs.len() <= 3 && response.result.is_some() {
                                response.result = runs.first().cloned();
                                response.cached_result &= runs.len() == 1;
                            }
                        });
                    };
                    reply.messages = reply.messages.map(move |message| edit(message, &join)).boxed();
                    Ok(reply)
                }
            })
        }),
        fault("the action cache shows a new result a little later", &["EXE-16", "EXE-17"], {
            let shown = Arc::new(Mutex::new(HashMap::<String, (ActionResult, usize)>::new()));
            exchange::<GetActionResultRequest, ActionResult>("GetActionResult", move |asked, answer| {
                let result = answer?;
                let mut shown = shown.lock().unwrap();
                let key = hash(asked.action_digest.as_ref());
                let (old, times) = shown.entry(key).or_insert_with(|| (result.clone(), 0));
                if *old != result && *times < LAG {
                    *times += 1;
                } else {
                    (*old, *times) = (result, 0);
                }
                Ok(old.clone())
            })
        }),
    ]
}
