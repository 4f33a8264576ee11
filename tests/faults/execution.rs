//! Faults of Execution: the stream, the cache, missing and malformed inputs, running.

use super::{
    Fault,
    change::{
        self, METADATA_TYPE, both, change_metadata, change_response, decode, edit, every, exchange,
        execute_response, failure, instead, job, messages, operation, read_request, request, response,
        result,
    },
    fault,
    operations::cancel_all_of_its_action,
    proxy::{Behaviour, Messages, Upstream},
};
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use gorego_reapi::proto::{
    longrunning::{Operation, operation as outcome},
    reapi::{
        ActionResult, Digest, ExecuteRequest, ExecuteResponse, FileNode, GetActionResultRequest,
        ServerCapabilities, UpdateActionResultRequest, WaitExecutionRequest, command::EnvironmentVariable,
    },
    rpc::{self, precondition_failure::Violation},
};
use prost::Message as _;
use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};
use tonic::{Code, Status};

mod streams;

const STREAMS: &[&str] = &["Execute", "WaitExecution"];

pub(crate) fn faults() -> Vec<Fault> {
    let mut faults = streams::faults();
    faults.extend(cache());
    faults.extend(missing());
    faults.extend(inputs());
    faults.extend(running());
    faults
}

/// Changes only the stage that an unfinished operation reports.
fn stage(change: impl Fn(i32) -> i32 + Send + Sync + 'static) -> Behaviour {
    operation(move |operation| {
        if !operation.done {
            change_metadata(operation, |metadata| metadata.stage = change(metadata.stage));
        }
    })
}

/// Replaces the streams of Execute and WaitExecution.
fn streams(change: impl Fn(Messages) -> Messages + Send + Sync + Clone + 'static) -> Behaviour {
    every(|method| messages(method, change.clone()), STREAMS)
}

fn encode(operation: &Operation) -> Bytes {
    operation.encode_to_vec().into()
}

/// Replaces each message by any number of messages.
fn expand(change: impl Fn(Operation) -> Vec<Operation> + Send + Sync + Clone + 'static) -> Behaviour {
    streams(move |messages| {
        let change = change.clone();
        let many = messages.map(move |message| {
            let operations = change(decode::<Operation>(message?)?);
            Ok::<_, Status>(stream::iter(operations.into_iter().map(|operation| Ok(encode(&operation)))))
        });
        many.try_flatten().boxed()
    })
}

fn code_of(operation: &mut Operation) -> i32 {
    let mut code = 0;
    change_response(operation, |response| code = response.status.as_ref().map_or(0, |status| status.code));
    code
}

/// Changes a status that is not OK.
fn inline_failure(change: impl Fn(&mut rpc::Status) + Send + Sync + 'static) -> Behaviour {
    execute_response(move |response| {
        if let Some(status) = response.status.as_mut().filter(|status| status.code != 0) {
            change(status);
        }
    })
}

/// Ends the stream of a failed operation with its status, with at most this many bytes of details.
pub(crate) fn inline_as_status(max_details: usize) -> Behaviour {
    streams(move |messages| {
        let changed = messages.map(move |message| {
            let mut operation = decode::<Operation>(message?)?;
            let mut status = rpc::Status::default();
            change_response(&mut operation, |response| {
                status = response.status.clone().unwrap_or_default();
            });
            if status.code == 0 {
                return Ok(encode(&operation));
            }
            let details = status.encode_to_vec();
            let details = if details.len() > max_details { Vec::new() } else { details };
            Err(Status::with_details(Code::from(status.code), status.message, details.into()))
        });
        changed.boxed()
    })
}

/// Results of finished operations by the hash of their action.
pub(crate) type Results = Arc<Mutex<HashMap<String, ActionResult>>>;

pub(crate) fn hash(digest: Option<&Digest>) -> String {
    digest.map(|digest| digest.hash.clone()).unwrap_or_default()
}

fn cache() -> Vec<Fault> {
    vec![
        fault("no result is said to be cached", &["EXE-16"], {
            execute_response(|response| response.cached_result = false)
        }),
        fault("no result is said to be cached where nobody may upload one", &["EXE-16"], {
            both(
                "GetCapabilities",
                response::<ServerCapabilities>("GetCapabilities", |answer| {
                    if let Some(cache) = &mut answer.cache_capabilities {
                        cache.action_cache_update_capabilities = None;
                    }
                }),
                execute_response(|response| response.cached_result = false),
            )
        }),
        fault("every result is said to be cached", &["EXE-16", "EXE-17"], {
            execute_response(|response| response.cached_result = true)
        }),
        fault("skip_cache_lookup is ignored", &["EXE-17"], {
            request::<ExecuteRequest>("Execute", |asked| asked.skip_cache_lookup = false)
        }),
        fault("results are not cached", &["EXE-18"], job(|job| job.action.do_not_cache = true)),
        fault("do_not_cache is ignored", &["EXE-15", "EXE-19"], {
            job(|job| job.action.do_not_cache = false)
        }),
        fault("whatever comes of an action is cached", &["EXE-19", "EXE-20"], {
            let results = Results::default();
            let seen = results.clone();
            both(
                "GetActionResult",
                exchange::<GetActionResultRequest, ActionResult>("GetActionResult", move |asked, answer| {
                    let known = seen.lock().unwrap().get(&hash(asked.action_digest.as_ref())).cloned();
                    answer.or_else(|status| known.ok_or(status))
                }),
                instead("Execute", move |call, upstream| {
                    let results = results.clone();
                    async move {
                        let (asked, call) = read_request::<ExecuteRequest>(call).await?;
                        let mut reply = upstream.forward(call).await?;
                        let keep = move |operation: &mut Operation| {
                            change_response(operation, |response| {
                                let key = hash(asked.action_digest.as_ref());
                                let result = response.result.clone().unwrap_or_default();
                                results.lock().unwrap().insert(key, result);
                            });
                        };
                        reply.messages = reply.messages.map(move |message| edit(message, &keep)).boxed();
                        Ok(reply)
                    }
                }),
            )
        }),
        fault("a failure is not run again", &["EXE-20"], {
            let results = Results::default();
            instead("Execute", move |call, upstream| {
                let results = results.clone();
                async move {
                    let (asked, call) = read_request::<ExecuteRequest>(call).await?;
                    let mut reply = upstream.forward(call).await?;
                    let again = move |operation: &mut Operation| {
                        change_response(operation, |response| {
                            let key = hash(asked.action_digest.as_ref());
                            let result = response.result.clone().unwrap_or_default();
                            let first = results.lock().unwrap().entry(key).or_insert(result).clone();
                            response.result = response.result.take().map(|_| first);
                        });
                    };
                    reply.messages = reply.messages.map(move |message| edit(message, &again)).boxed();
                    Ok(reply)
                }
            })
        }),
        fault("incomplete results answer Execute", &["EXE-21"], {
            let results = Results::default();
            let updates = results.clone();
            both(
                "UpdateActionResult",
                exchange::<UpdateActionResultRequest, ActionResult>("UpdateActionResult", move |asked, _| {
                    let result = asked.action_result.clone().unwrap_or_default();
                    let key = hash(asked.action_digest.as_ref());
                    updates.lock().unwrap().insert(key, result.clone());
                    Ok(result)
                }),
                instead("Execute", move |call, upstream| {
                    let results = results.clone();
                    async move {
                        let (asked, call) = read_request::<ExecuteRequest>(call).await?;
                        let known = results.lock().unwrap().get(&hash(asked.action_digest.as_ref())).cloned();
                        let mut reply = upstream.forward(call).await?;
                        let serve = move |operation: &mut Operation| {
                            change_response(operation, |response| {
                                if let Some(result) = &known {
                                    response.result = Some(result.clone());
                                    response.cached_result = true;
                                }
                            });
                        };
                        reply.messages = reply.messages.map(move |message| edit(message, &serve)).boxed();
                        Ok(reply)
                    }
                }),
            )
        }),
    ]
}

/// Changes the violations of a status.
fn violations(change: impl Fn(&mut Vec<Violation>) + Send + Sync + 'static) -> Behaviour {
    inline_failure(move |status| {
        for any in &mut status.details {
            let Ok(mut failure) = rpc::PreconditionFailure::decode(any.value.as_slice()) else { continue };
            change(&mut failure.violations);
            any.value = failure.encode_to_vec();
        }
    })
}

fn missing() -> Vec<Fault> {
    let invalid_becomes = |to: Code| {
        streams(move |messages| {
            let change = move |operation: &mut Operation| {
                change_response(operation, |response| {
                    if let Some(status) = response.status.as_mut().filter(|status| status.code == 3) {
                        status.code = to as i32;
                    }
                });
            };
            let changed = messages.map(move |message| match message {
                Err(status) if status.code() == Code::InvalidArgument => {
                    Err(Status::new(to, status.message()))
                }
                message => edit(message, &change),
            });
            changed.boxed()
        })
    };
    vec![
        fault("missing inputs are NOT_FOUND", &["EXE-22"], {
            inline_failure(|status| status.code = Code::NotFound as i32)
        }),
        fault("missing inputs are violations of another type", &["EXE-22"], {
            violations(|list| list.iter_mut().for_each(|one| one.r#type = "ABSENT".into()))
        }),
        fault("subjects begin with a slash", &["EXE-23"], {
            violations(|list| list.iter_mut().for_each(|one| one.subject.insert(0, '/')))
        }),
        fault("subjects name the instance", &["EXE-23"], {
            violations(|list| list.iter_mut().for_each(|one| one.subject.insert_str(0, "main/")))
        }),
        fault("a second detail explains the first", &["EXE-24"], {
            inline_failure(|status| status.details.extend(status.details.clone()))
        }),
        fault("other violations are mixed in", &["EXE-24"], {
            violations(|list| list.push(Violation { r#type: "QUOTA".into(), ..Default::default() }))
        }),
        fault("one missing blob is named at a time", &["EXE-26"], violations(|list| list.truncate(1))),
        fault("malformed actions are internal errors", &["EXE-27"], invalid_becomes(Code::Internal)),
        fault("malformed actions are missing blobs", &["EXE-28", "EXE-29", "EXE-32"], {
            invalid_becomes(Code::FailedPrecondition)
        }),
        fault("unsorted messages are a bug", &["EXE-30"], {
            job(|job| {
                if !job.command.environment_variables.is_sorted_by(|a, b| a.name <= b.name) {
                    job.command.arguments = vec!["/bin/sh".into(), "-c".into(), "exit 99".into()];
                }
            })
        }),
        fault("the platform of the Command is ignored", &["EXE-31"], {
            #[allow(deprecated)]
            job(|job| job.command.platform = None)
        }),
        fault("the platform of the Action is ignored", &["EXE-31"], job(|job| job.action.platform = None)),
        fault("timeouts are ignored", &["EXE-32", "EXE-45"], job(|job| job.action.timeout = None)),
    ]
}

fn inputs() -> Vec<Fault> {
    vec![
        fault("something else lies in the root", &["EXE-33", "EXE-43"], {
            job(|job| {
                let digest =
                    gorego_reapi::digest::Digest::empty(gorego_reapi::digest::DigestFunction::Sha256)
                        .to_wire();
                let node = FileNode { name: "left-over".into(), digest: Some(digest), ..Default::default() };
                job.root.files.push(node);
            })
        }),
        fault("empty directories are left out", &["EXE-33"], {
            job(|job| {
                job.root.directories.retain(|node| node.digest.as_ref().is_none_or(|d| d.size_bytes > 0));
            })
        }),
        fault("every input can be run", &["EXE-34"], {
            job(|job| job.root.files.iter_mut().for_each(|node| node.is_executable = true))
        }),
        fault("no input can be run", &["EXE-34", "EXE-40"], {
            job(|job| job.root.files.iter_mut().for_each(|node| node.is_executable = false))
        }),
        fault("targets of symlinks are cleaned up", &["EXE-35"], {
            job(|job| {
                for link in &mut job.root.symlinks {
                    link.target = link.target.replace("./", "").replace("//", "/");
                }
            })
        }),
        fault("absolute symlinks are left out", &["EXE-36"], {
            job(|job| job.root.symlinks.retain(|link| !link.target.starts_with('/')))
        }),
        fault("node properties of inputs are ignored", &["EXE-37"], {
            job(|job| job.root.files.iter_mut().for_each(|node| node.node_properties = None))
        }),
        fault("unknown node properties are refused", &["EXE-37"], {
            job(|job| {
                if job
                    .root
                    .files
                    .iter()
                    .filter_map(|node| node.node_properties.as_ref())
                    .any(|p| !p.properties.is_empty())
                {
                    job.command.arguments.clear();
                }
            })
        }),
        fault(
            "directories of outputs are not made",
            &["EXE-38"],
            job(|job| job.command.output_paths.clear()),
        ),
        fault("outputs are made before the command runs", &["EXE-38"], {
            job(|job| {
                let outputs =
                    job.command.output_paths.iter().map(|path| format!("'{path}'")).collect::<Vec<_>>();
                wrap(job, &format!("mkdir -p {}", outputs.join(" ")));
            })
        }),
        fault("commands run in the root", &["EXE-39"], job(|job| job.command.working_directory.clear())),
    ]
}

/// Runs the command after this script, in one shell.
fn wrap(job: &mut change::Job, before: &str) {
    let arguments = std::mem::take(&mut job.command.arguments);
    job.command.arguments = ["/bin/sh", "-c"].map(str::to_owned).to_vec();
    job.command.arguments.push(format!("{before}\nexec \"$@\""));
    job.command.arguments.push("sh".into());
    job.command.arguments.extend(arguments);
}

fn running() -> Vec<Fault> {
    vec![
        fault("a shell stands between", &["EXE-40"], {
            job(|job| {
                let line = job.command.arguments.join(" ");
                job.command.arguments = vec!["/bin/sh".into(), "-c".into(), line];
            })
        }),
        fault("HOME leaks in", &["EXE-41"], {
            job(|job| {
                let variable = EnvironmentVariable { name: "HOME".into(), value: "/root".into() };
                job.command.environment_variables.push(variable);
            })
        }),
        fault("variables are trimmed", &["EXE-41"], {
            job(|job| {
                for variable in &mut job.command.environment_variables {
                    variable.value = variable.value.trim().to_owned();
                }
            })
        }),
        fault("a program that cannot be started is an internal error", &["EXE-42"], {
            execute_response(|response| {
                let code = response.result.as_ref().map_or(0, |result| result.exit_code);
                let refused = response.status.as_ref().is_some_and(|status| status.code == 3);
                if refused || matches!(code, 126 | 127) {
                    response.status = Some(rpc::Status { code: 13, ..Default::default() });
                }
            })
        }),
        fault("stdin is not empty", &["EXE-44"], {
            job(|job| {
                let arguments = std::mem::take(&mut job.command.arguments);
                let script = "echo something | \"$@\"".to_owned();
                job.command.arguments = vec!["/bin/sh".into(), "-c".into(), script, "sh".into()];
                job.command.arguments.extend(arguments);
            })
        }),
        fault("a timeout leaves nothing behind", &["EXE-45"], {
            execute_response(|response| {
                if response.status.as_ref().is_some_and(|status| status.code != 0) {
                    response.result = None;
                }
            })
        }),
        fault("a timeout is an exit code", &["EXE-45"], {
            execute_response(|response| {
                if let Some(status) = response.status.as_mut().filter(|status| status.code == 4) {
                    status.code = 0;
                    response.result.get_or_insert_default().exit_code = 137;
                }
            })
        }),
        fault("every failure is exit code 1", &["EXE-46"], {
            result(|result| result.exit_code = result.exit_code.min(1))
        }),
        fault("every command succeeds", &["EXE-46"], result(|result| result.exit_code = 0)),
    ]
}
