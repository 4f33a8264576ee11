//! Faults of the results of Execute: outputs, Trees, logs, metadata.

use super::{
    Fault,
    change::{execute_response, job, request, result, result_with_blobs, trees, write_blob},
    fault,
};
use gorego_reapi::{
    digest::DigestFunction,
    proto::{
        reapi::{Digest, ExecuteRequest, LogFile, OutputDirectory, OutputFile},
        rpc,
    },
};
use prost::Message as _;

fn empty() -> Digest {
    gorego_reapi::digest::Digest::empty(DigestFunction::Sha256).to_wire()
}

fn absent() -> Digest {
    DigestFunction::Sha256.digest(b"what nobody ever stores: a fault of the suite's own tests").to_wire()
}

#[allow(deprecated)]
pub(crate) fn faults() -> Vec<Fault> {
    let mut faults = paths();
    faults.extend(directories());
    faults.extend(logs());
    faults.extend(metadata());
    faults
}

#[allow(deprecated)]
fn paths() -> Vec<Fault> {
    vec![
        fault("the old lists count beside output_paths", &["EXE-47"], {
            job(|job| {
                let old = [job.command.output_files.clone(), job.command.output_directories.clone()].concat();
                job.command.output_paths.extend(old);
            })
        }),
        fault("a file is reported as a directory", &["EXE-47"], {
            result(|result| {
                for file in result.output_files.drain(..) {
                    result.output_directories.push(OutputDirectory {
                        path: file.path,
                        tree_digest: file.digest,
                        ..Default::default()
                    });
                }
            })
        }),
        fault("paths begin with a dot", &["EXE-48"], {
            result(|result| result.output_files.iter_mut().for_each(|file| file.path.insert_str(0, "./")))
        }),
        fault("directories end with a slash", &["EXE-48"], {
            result(|result| result.output_directories.iter_mut().for_each(|one| one.path.push('/')))
        }),
        fault("an output is listed twice", &["EXE-49"], {
            result(|result| result.output_files.extend(result.output_files.clone()))
        }),
        fault("an output within an output is left out", &["EXE-49"], {
            result(|result| {
                let directories: Vec<_> =
                    result.output_directories.iter().map(|one| format!("{}/", one.path)).collect();
                result.output_files.retain(|file| !directories.iter().any(|one| file.path.starts_with(one)));
            })
        }),
        fault("an absent output is an error", &["EXE-50"], {
            execute_response(|response| {
                if response.result.as_ref().is_some_and(|result| result.output_files.len() == 1) {
                    response.status = Some(rpc::Status { code: 9, ..Default::default() });
                }
            })
        }),
        fault("an absent output is an empty file", &["EXE-50"], {
            result(|result| {
                let file = OutputFile { digest: Some(empty()), ..Default::default() };
                result.output_files.push(OutputFile { path: "absent".into(), ..file });
            })
        }),
        fault("the kind of an old output does not matter", &["EXE-51"], {
            job(|job| {
                let old = [job.command.output_files.clone(), job.command.output_directories.clone()].concat();
                job.command.output_paths.extend(old);
                (job.command.output_files, job.command.output_directories) = Default::default();
            })
        }),
        fault("targets of symlinks are resolved", &["EXE-52"], {
            result(|result| {
                for link in &mut result.output_symlinks {
                    link.target = link.target.trim_start_matches("./").trim_start_matches("../").to_owned();
                }
            })
        }),
        fault("dangling symlinks are left out", &["EXE-52"], {
            result(|result| result.output_symlinks.clear())
        }),
        fault("the old lists of symlinks are empty", &["EXE-53"], {
            result(|result| {
                result.output_file_symlinks.clear();
                result.output_directory_symlinks.clear();
            })
        }),
        fault("the old lists of symlinks say otherwise", &["EXE-53"], {
            result(|result| {
                let old = result.output_file_symlinks.iter_mut().chain(&mut result.output_directory_symlinks);
                old.for_each(|link| link.target.push('x'));
            })
        }),
        fault("outputs are there a little later", &["EXE-54"], {
            result(|result| {
                result.output_files.iter_mut().for_each(|file| file.digest = Some(absent()));
            })
        }),
        fault("a failure leaves no outputs", &["EXE-54"], {
            result(|result| {
                if result.exit_code != 0 {
                    result.output_files.clear();
                }
            })
        }),
        fault("no output can be run", &["EXE-54"], {
            result(|result| result.output_files.iter_mut().for_each(|file| file.is_executable = false))
        }),
        fault("a FIFO is an empty file", &["EXE-54"], {
            execute_response(|response| {
                if let Some(status) = response.status.as_mut().filter(|status| matches!(status.code, 3 | 9)) {
                    status.code = 0;
                    response.result.get_or_insert_default();
                }
            })
        }),
    ]
}

fn directories() -> Vec<Fault> {
    vec![
        fault("a Tree lacks a child", &["EXE-55"], {
            trees(|mut tree, _| {
                tree.children.pop();
                tree.encode_to_vec()
            })
        }),
        fault("a Tree has a child twice", &["EXE-55"], {
            trees(|mut tree, _| {
                tree.children.extend(tree.children.clone());
                tree.encode_to_vec()
            })
        }),
        fault("Directories in a Tree are unsorted", &["EXE-55"], {
            trees(|mut tree, _| {
                tree.root.iter_mut().for_each(|root| root.files.reverse());
                tree.encode_to_vec()
            })
        }),
        fault(
            "the Tree of an empty directory is empty",
            &["EXE-56"],
            trees(|mut tree, _| {
                tree.root = tree.root.filter(|root| root.encoded_len() > 0);
                tree.encode_to_vec()
            }),
        ),
        fault("an empty directory is left out", &["EXE-56"], {
            result(|result| {
                result
                    .output_directories
                    .retain(|one| one.tree_digest.as_ref().is_none_or(|digest| digest.size_bytes > 2));
            })
        }),
        fault(
            "children come before parents",
            &["EXE-57"],
            trees(|mut tree, directory| {
                tree.children.reverse();
                directory.is_topologically_sorted = true;
                tree.encode_to_vec()
            }),
        ),
        fault("no two Trees are equal", &["EXE-57"], {
            let next = std::sync::atomic::AtomicU32::new(0);
            trees(move |mut tree, _| {
                let number = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed) as usize;
                let count = tree.children.len().max(1);
                tree.children.rotate_left(number % count);
                tree.encode_to_vec()
            })
        }),
        fault("the root directory is another one", &["EXE-58"], {
            result(|result| {
                for directory in &mut result.output_directories {
                    directory.root_directory_digest = directory.root_directory_digest.take().map(|_| empty());
                }
            })
        }),
        fault("there is no Tree", &["EXE-58"], {
            result(|result| result.output_directories.iter_mut().for_each(|one| one.tree_digest = None))
        }),
        fault("node properties of outputs are left out", &["EXE-63"], {
            result(|result| result.output_files.iter_mut().for_each(|file| file.node_properties = None))
        }),
        fault("unknown node properties of outputs are ignored", &["EXE-63"], {
            job(|job| {
                job.command.output_node_properties.retain(|name| name == "unix_mode" || name == "mtime")
            })
        }),
    ]
}

fn logs() -> Vec<Fault> {
    vec![
        fault("stdout is inlined, always", &["EXE-59"], {
            request::<ExecuteRequest>("Execute", |asked| {
                (asked.inline_stdout, asked.inline_stderr) = (true, true);
            })
        }),
        fault("stdout is never inlined", &["EXE-59"], {
            // A server may omit inlined output, but must not inline other bytes.
            result(|result| {
                if !result.stdout_raw.is_empty() {
                    result.stdout_raw = vec![b'?'; result.stdout_raw.len()].into();
                }
            })
        }),
        fault("stdout has no digest", &["EXE-59"], result(|result| result.stdout_digest = None)),
        fault("nothing printed is a digest of nothing", &["EXE-59"], {
            result(|result| {
                result.stderr_digest.get_or_insert_default();
            })
        }),
        fault("line ends are changed", &["EXE-59"], {
            result_with_blobs(|mut result, upstream, instance| async move {
                let Some(digest) = result.stdout_digest.clone() else { return result };
                if let Some(bytes) = super::change::read_blob(&upstream, &instance, digest).await {
                    let bytes = String::from_utf8_lossy(&bytes).replace('\n', "\r\n").into_bytes();
                    result.stdout_digest = write_blob(&upstream, &instance, bytes).await;
                }
                result
            })
        }),
        fault("server logs have paths for names", &["EXE-61"], {
            execute_response(|response| {
                let log = LogFile { digest: Some(empty()), human_readable: true };
                response.server_logs.insert("../log".into(), log);
            })
        }),
        fault("server logs are nowhere", &["EXE-61"], {
            execute_response(|response| {
                let log = LogFile { digest: Some(absent()), human_readable: true };
                response.server_logs.insert("log".into(), log);
            })
        }),
        fault("the message is a novel", &["EXE-61"], {
            execute_response(|response| response.message = "It was a dark and stormy night. ".repeat(1000))
        }),
        fault("names of streams are made up", &["EXE-64"], {
            super::change::operation(|operation| {
                super::change::change_metadata(operation, |metadata| {
                    metadata.stdout_stream_name = "logstreams/nowhere".into();
                });
            })
        }),
    ]
}

fn metadata() -> Vec<Fault> {
    vec![
        fault("results of actions have no metadata", &["EXE-60"], {
            result(|result| result.execution_metadata = None)
        }),
        fault("a timestamp is not set", &["EXE-60"], {
            result(|result| {
                if let Some(metadata) = &mut result.execution_metadata {
                    metadata.output_upload_start_timestamp = None;
                }
            })
        }),
        fault("timestamps are out of order", &["EXE-60"], {
            result(|result| {
                if let Some(metadata) = &mut result.execution_metadata {
                    std::mem::swap(&mut metadata.queued_timestamp, &mut metadata.worker_completed_timestamp);
                }
            })
        }),
    ]
}
