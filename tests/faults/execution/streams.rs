//! Faults of the streams of Execute and WaitExecution.

use super::*;

pub(super) fn faults() -> Vec<Fault> {
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
