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

const STREAMS: &[&str] = &["Execute", "WaitExecution"];

pub fn faults() -> Vec<Fault> {
    let mut faults = stream_faults();
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
pub fn inline_as_status(max_details: usize) -> Behaviour {
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

fn stream_faults() -> Vec<Fault> {
    vec![
        fault("Execute is silent until it is done", &["EXE-01"], {
            messages("Execute", |messages| {
                stream::once(messages.try_collect::<Vec<_>>())
                    .map_ok(|all| stream::iter(all.into_iter().map(Ok)))
                    .try_flatten()
                    .boxed()
            })
        }),
        fault("the last message has no name", &["EXE-02"], {
            operation(|operation| {
                if operation.done {
                    operation.name.clear();
                }
            })
        }),
        fault("every message has another name", &["EXE-02"], {
            operation(|operation| operation.name = format!("{}-{}", operation.name, operation.done))
        }),
        fault("all operations have one name", &["EXE-02"], {
            operation(|operation| operation.name = "operations/1".into())
        }),
        fault("an operation that is over at once has no name that is known later", &["EXE-02"], {
            let (seen, over) = (Mutex::new(HashSet::new()), Arc::new(Mutex::new(HashSet::new())));
            let noted = over.clone();
            let note = operation(move |operation| {
                let is_first = seen.lock().unwrap().insert(operation.name.clone());
                if is_first && operation.done && code_of(operation) != 0 {
                    noted.lock().unwrap().insert(operation.name.clone());
                }
            });
            let forget = instead("WaitExecution", move |call, upstream| {
                let over = over.clone();
                async move {
                    let (asked, call) = read_request::<WaitExecutionRequest>(call).await?;
                    let was_over = over.lock().unwrap().contains(&asked.name);
                    if was_over {
                        return Err(Status::not_found("it was over before it began"));
                    }
                    upstream.forward(call).await
                }
            });
            both("WaitExecution", forget, note)
        }),
        fault("the last message has no metadata", &["EXE-03"], {
            operation(|operation| operation.metadata = operation.metadata.take().filter(|_| !operation.done))
        }),
        fault("the metadata names no action", &["EXE-03"], {
            operation(|operation| change_metadata(operation, |metadata| metadata.action_digest = None))
        }),
        fault("the metadata is something else", &["EXE-03", "GEN-18"], {
            operation(|operation| {
                if let Some(any) = &mut operation.metadata {
                    any.type_url = METADATA_TYPE.replace("ExecuteOperationMetadata", "ExecuteResponse");
                }
            })
        }),
        fault("the stage is unknown", &["EXE-04"], stage(|_| 0)),
        fault("the stage is queued until the end", &["EXE-04"], stage(|_| 2)),
        fault("an operation is done without being completed", &["EXE-05"], {
            operation(|operation| {
                if operation.done {
                    change_metadata(operation, |metadata| metadata.stage = 3);
                }
            })
        }),
        fault("an operation is completed before it is done", &["EXE-05"], stage(|_| 4)),
        fault("the last message comes twice", &["EXE-05"], {
            expand(|operation| {
                let again = operation.done.then(|| operation.clone());
                [operation].into_iter().chain(again).collect()
            })
        }),
        fault("a stream stays open after the end", &["EXE-05"], {
            streams(|messages| messages.chain(stream::pending()).boxed())
        }),
        fault("a stream ends in an error", &["EXE-05"], {
            streams(|messages| {
                messages.chain(stream::once(async { Err(Status::cancelled("the end")) })).boxed()
            })
        }),
        fault("a running operation is queued again and again", &["EXE-06"], {
            expand(|operation| {
                let mut again = operation.clone();
                let mut executing = false;
                change_metadata(&mut again, |metadata| {
                    executing = metadata.stage == 3;
                    metadata.stage = 2;
                });
                let again = if executing { vec![again, operation.clone()] } else { Vec::new() };
                [operation].into_iter().chain(again).collect()
            })
        }),
        fault("failures are in Operation.error", &["EXE-07"], {
            operation(|operation| {
                if code_of(operation) != 0 {
                    let mut status = rpc::Status::default();
                    change_response(operation, |response| {
                        status = response.status.clone().unwrap_or_default();
                    });
                    operation.result = Some(outcome::Result::Error(status));
                }
            })
        }),
        fault("an operation is done without a response", &["EXE-07"], {
            operation(|operation| operation.result = None)
        }),
        fault("a response comes before the end", &["EXE-07"], {
            operation(|operation| {
                if !operation.done {
                    let value = ExecuteResponse::default().encode_to_vec();
                    let any = prost_types::Any { type_url: change::RESPONSE_TYPE.into(), value };
                    operation.result = Some(outcome::Result::Response(any));
                }
            })
        }),
        fault("a failed command has no result", &["EXE-08"], {
            execute_response(|response| {
                response.result = response.result.take().filter(|result| result.exit_code == 0);
            })
        }),
        fault("a malformed request becomes an operation", &["EXE-09"], {
            failure("Execute", |status| {
                let response = ExecuteResponse {
                    status: Some(rpc::Status {
                        code: status.code() as i32,
                        message: status.message().into(),
                        details: vec![],
                    }),
                    ..Default::default()
                };
                let any = prost_types::Any {
                    type_url: change::RESPONSE_TYPE.into(),
                    value: response.encode_to_vec(),
                };
                let operation = Operation {
                    name: "operations/1".into(),
                    done: true,
                    result: Some(outcome::Result::Response(any)),
                    ..Default::default()
                };
                Ok(Some(encode(&operation)))
            })
        }),
        fault("what fails in an operation ends its stream", &["EXE-09", "EXE-25", "EXE-45"], {
            inline_as_status(4096)
        }),
        fault("streams end OK before the operation does", &["EXE-10", "EXE-05"], {
            streams(|messages| messages.take(1).boxed())
        }),
        fault("WaitExecution begins with a stage of long ago", &["EXE-12"], {
            messages("WaitExecution", |messages| {
                messages
                    .map(|message| {
                        let operation = decode::<Operation>(message?)?;
                        let mut before = Operation { done: false, result: None, ..operation.clone() };
                        change_metadata(&mut before, |metadata| metadata.stage = 2);
                        Ok::<_, Status>(stream::iter([Ok(encode(&before)), Ok(encode(&operation))]))
                    })
                    .try_flatten()
                    .boxed()
            })
        }),
        fault("WaitExecution takes its time", &["EXE-12"], {
            messages("WaitExecution", |messages| {
                let later = stream::once(tokio::time::sleep(Duration::from_secs(4)));
                later.filter_map(|()| async { None }).chain(messages).boxed()
            })
        }),
        fault("an operation has one waiter", &["EXE-12"], {
            let seen = Arc::new(Mutex::new(HashMap::<String, u32>::new()));
            instead("WaitExecution", move |call, upstream| {
                let seen = seen.clone();
                async move {
                    let (asked, call) = read_request::<WaitExecutionRequest>(call).await?;
                    let count = {
                        let mut seen = seen.lock().unwrap();
                        let count = seen.entry(asked.name).or_default();
                        *count += 1;
                        *count
                    };
                    if count > 1 {
                        return Err(Status::not_found("it is waited for already"));
                    }
                    upstream.forward(call).await
                }
            })
        }),
        fault("a forgotten operation is an argument error", &["EXE-13"], {
            change::code("WaitExecution", Code::NotFound, Code::InvalidArgument)
        }),
        fault("operations end with the client's connection", &["EXE-14", "OPS-04"], {
            instead("Execute", |call, upstream| async move {
                let mut reply = upstream.forward(call).await?;
                let mut guard = CancelOnDrop { upstream: upstream.clone(), name: None };
                reply.messages = reply
                    .messages
                    .map(move |message| {
                        let operation = decode::<Operation>(message?)?;
                        let guard = &mut guard;
                        guard.name = (!operation.done).then(|| operation.name.clone());
                        Ok(encode(&operation))
                    })
                    .boxed();
                Ok(reply)
            })
        }),
    ]
}

/// Cancels an operation when one of its streams is dropped before the end, even if other clients wait for it.
struct CancelOnDrop {
    upstream: Upstream,
    name: Option<String>,
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        let Some(name) = self.name.take() else { return };
        let upstream = self.upstream.clone();
        tokio::spawn(async move { cancel_all_of_its_action(&upstream, &name).await });
    }
}

/// Results of finished operations by the hash of their action.
pub type Results = Arc<Mutex<HashMap<String, ActionResult>>>;

pub fn hash(digest: Option<&Digest>) -> String {
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
