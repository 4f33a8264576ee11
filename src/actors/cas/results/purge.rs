//! Removes results by their origin: the part of a purge that one request does.
//!
//! A purge walks the slots of the index in pages. Only the index is read under its lock; files are read on a blocking
//! thread, one at a time and without decoding the results in them. The actor removes the results of a page in one
//! message, and the answer comes when the files are deleted, so that no restart brings them back. The whole server
//! works on one page at a time.

use super::replaced::origin_message;
use crate::{
    actors::{
        cas::{
            CasActor, LOG,
            checked::open_file,
            client::Cas,
            index::{EntryRef, FileId, FoundResult},
            reply::StoreReply,
            results,
            settings::CHANGES_PER_HOLD,
            volume,
        },
        mail::Receive,
    },
    instance::Instance,
    logging::Event,
};
use actix::Message;
use futures::FutureExt as _;
use gorego_reapi::{
    digest::Digest,
    duration::time_from_wire,
    error::{Error, Result},
    proto::gorego::{ResultOrigin, StoredOrigin},
};
use std::{collections::HashSet, time::SystemTime};

/// Holds of the index's lock for one page: about 100,000 slots, some milliseconds.
const HOLDS_PER_PAGE: usize = 400;
/// Bytes of result files that are read for one page. It ends with the file that exceeds this.
const BYTES_PER_PAGE: u64 = 64 << 20;
/// How often a result is examined. Compaction may move it before it is removed, again and again.
const EXAMINATIONS_MAX: usize = 10;

/// The condition that selects results. All of its fields that are set have to match.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct ResultCondition {
    /// The result of this action.
    pub action: Option<Digest>,
    /// Results that this run of a build tool caused.
    pub invocation: Option<String>,
    /// Results of this principal.
    pub principal: Option<String>,
    /// Results of this worker, or of the workers below this name.
    pub worker: Option<String>,
    /// Results that were written at this time or later.
    pub since: Option<SystemTime>,
}

/// The outcome of one request.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct PurgePage {
    /// Results that satisfy the condition. They were removed if this was requested.
    pub results: Vec<ResultOrigin>,
    /// Number of results that were examined.
    pub examined: u64,
    /// Number of these that could not be read.
    pub unreadable: u64,
    /// The slot to continue from; `None` at the end.
    pub next: Option<u32>,
}

impl ResultCondition {
    /// Whether the result that is stored under this key satisfies the condition.
    pub(crate) fn holds(&self, key: Digest, origin: &StoredOrigin) -> bool {
        let is = |wanted: &Option<String>, value: &str| wanted.as_ref().is_none_or(|wanted| wanted == value);
        let is_below = |wanted: &String| {
            origin.worker.strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let is_later = |since: SystemTime| {
            origin.stored_at.as_ref().and_then(time_from_wire).is_some_and(|stored| stored >= since)
        };
        let is_of_action = |wanted: Digest| match &origin.private_action_digest {
            Some(private) => *private == wanted.to_wire(),
            None => wanted == key,
        };
        self.action.is_none_or(is_of_action)
            && is(&self.invocation, &origin.tool_invocation_id)
            && is(&self.principal, &origin.principal)
            && self.worker.as_ref().is_none_or(is_below)
            && self.since.is_none_or(is_later)
    }
}

/// Removes these results, unless they were replaced or moved meanwhile. The answer comes when the files are deleted,
/// and names the removed results.
#[derive(Message)]
#[rtype(result = "Result<HashSet<FileId>>")]
pub struct RemoveResults(Vec<EntryRef>);

impl Cas {
    /// Works on one page of a purge: examines about `max` results from the slot `from` on. A result that was replaced
    /// or moved before it could be removed is examined again.
    ///
    /// # Errors
    /// `Unavailable` when the server is shutting down; `Internal` when files could not be deleted.
    pub(crate) async fn purge_results(
        &self,
        instance: &Instance,
        condition: &ResultCondition,
        from: u32,
        max: usize,
        remove: bool,
    ) -> Result<PurgePage> {
        let _turn = self.shared().purge_turn.lock().await;
        let (found, next) = self.results_from(instance, condition, from, max)?;
        let OriginsRead { mut matching, examined, mut unreadable, stopped_at } =
            self.read_origins(instance, condition, found).await?;
        let next = stopped_at.or(next);
        if !remove {
            let results = matching.into_iter().map(|(_, origin)| origin).collect();
            return Ok(PurgePage { results, examined, unreadable, next });
        }
        let mut results = Vec::with_capacity(matching.len());
        for _ in 1..EXAMINATIONS_MAX {
            if matching.is_empty() {
                break;
            }
            let gone =
                self.ask(RemoveResults(matching.iter().map(|(found, _)| found.at).collect())).await??;
            let (removed, left): (Vec<_>, Vec<_>) =
                matching.into_iter().partition(|(found, _)| gone.contains(&found.file));
            results.extend(removed.into_iter().map(|(_, origin)| origin));
            let again = |(found, _): &(FoundResult, _)| self.look_up(|index| index.result_of(&found.file));
            let again: Result<Vec<_>> = left.iter().map(again).collect();
            let again: Vec<_> = again?.into_iter().flatten().collect();
            let all = again.len() as u64;
            let read = self.read_origins(instance, condition, again).await?;
            unreadable += read.unreadable + (all - read.examined);
            matching = read.matching;
        }
        unreadable += matching.len() as u64;
        Ok(PurgePage { results, examined, unreadable, next })
    }

    /// Reads the origins of these results on a blocking thread.
    async fn read_origins(
        &self,
        instance: &Instance,
        condition: &ResultCondition,
        found: Vec<FoundResult>,
    ) -> Result<OriginsRead> {
        let (cas, instance, condition) = (self.clone(), instance.clone(), condition.clone());
        self.blocking(move || read_origins(&cas, &instance, &condition, &found)).await
    }

    /// The results of a page, according to the index.
    fn results_from(
        &self,
        instance: &Instance,
        condition: &ResultCondition,
        from: u32,
        max: usize,
    ) -> Result<(Vec<FoundResult>, Option<u32>)> {
        let (mut found, mut next) = (Vec::new(), Some(from));
        for _ in 0..HOLDS_PER_PAGE {
            let Some(from) = next else { break };
            if found.len() >= max {
                break;
            }
            let (part, after) = self.look_up(|index| index.results_from(instance, from))?;
            // The key of a private result does not identify the action.
            let is_meant = |found: &FoundResult| {
                let key = found.file.key;
                condition.action.is_none_or(|wanted| wanted == key.digest || key.instance != instance.id())
            };
            found.extend(part.into_iter().filter(is_meant));
            next = after;
        }
        Ok((found, next))
    }
}

struct OriginsRead {
    matching: Vec<(FoundResult, ResultOrigin)>,
    examined: u64,
    unreadable: u64,
    /// The slot of the first result that was not read.
    stopped_at: Option<u32>,
}

/// Reads the origins of these results. Blocks.
fn read_origins(
    cas: &Cas,
    instance: &Instance,
    condition: &ResultCondition,
    found: &[FoundResult],
) -> OriginsRead {
    let mut read = OriginsRead { matching: Vec::new(), examined: 0, unreadable: 0, stopped_at: None };
    let mut bytes = 0;
    for found in found {
        if bytes > BYTES_PER_PAGE {
            read.stopped_at = Some(found.at.slot());
            break;
        }
        read.examined += 1;
        let action = found.file.key.digest;
        let file = open_file(cas, &found.file);
        let content = file.and_then(|file| volume::read_all(&*file, results::MAX_FILE_BYTES));
        let content = match content {
            Ok(content) => content,
            // It was evicted or replaced meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(_) => {
                read.unreadable += 1;
                continue;
            }
        };
        bytes += content.len() as u64;
        match results::decode_origin(&content, instance.name(), action) {
            Ok(stored) if condition.holds(action, &stored) => {
                read.matching.push((*found, origin_message(action, &stored)));
            }
            Ok(_) => {}
            Err(_) => read.unreadable += 1,
        }
    }
    read
}

impl Receive<RemoveResults> for CasActor {
    type Answer = StoreReply<Result<HashSet<FileId>>>;

    fn receive(&mut self, RemoveResults(entries): RemoveResults, ctx: &mut Self::Context) -> Self::Answer {
        let mut victims = Vec::with_capacity(entries.len());
        for part in entries.chunks(CHANGES_PER_HOLD) {
            self.change(|index| victims.extend(part.iter().filter_map(|at| index.remove_promised(*at))));
        }
        if victims.is_empty() {
            return StoreReply::Now(Ok(HashSet::new()));
        }
        Event::info(LOG, "results_purged")
            .with("entries", victims.len())
            .with("bytes", victims.iter().map(|victim| victim.bytes).sum::<u64>())
            .log(format_args!("removed results of the action cache, because an administrator asked for it"));
        let gone: HashSet<FileId> = victims.iter().map(|victim| victim.file).collect();
        let deleted = self.delete_and_tell(victims, ctx);
        StoreReply::Later(
            async move {
                match deleted.await {
                    Ok(failed) if failed.is_empty() => Ok(gone),
                    Ok(failed) => Err(Error::Internal(format!(
                        "{} results are not served any more, but their files could not be deleted, so that the next start \
                         would serve them again; the log says why (delete_failed)",
                        failed.len()
                    ))),
                    Err(_) => Err(Error::internal("the files of purged results could not be deleted")),
                }
            }
            .boxed(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        actors::cas::{
            CasActor,
            client::Provenance,
            compaction::Relocate,
            tests::settings_at,
            volume::{Moves, memory::Memory},
        },
        instance::Instances,
    };
    use gorego_reapi::{digest::DigestFunction, proto::reapi::ActionResult};
    use std::sync::mpsc;
    use tokio::runtime::Builder;

    #[actix::test]
    async fn a_result_that_is_moved_before_it_is_removed_is_removed_too() {
        let runtime = Builder::new_multi_thread().worker_threads(1).max_blocking_threads(1).build().unwrap();
        let (volume, settings) = (Memory::default(), settings_at("nowhere".into(), 1 << 30));
        let cas =
            CasActor::over(Box::new(volume.clone()), settings, runtime.handle().clone()).unwrap().launch();
        let main = Instances::new([""]).unwrap().get("").unwrap();
        let action = DigestFunction::Sha256.digest(b"action");
        let result = ActionResult { exit_code: 1, ..ActionResult::default() };
        cas.put_result(&main, action, result, Provenance::default()).await.unwrap();

        let (free, busy) = mpsc::channel::<()>();
        runtime.spawn_blocking(move || busy.recv());
        let everything = ResultCondition::default();
        let purge = cas.purge_results(&main, &everything, 0, 10, true);
        // The purge has found the result when this is polled, and cannot read it before `free` is dropped.
        let move_it = async {
            let file = cas.results_from(&main, &everything, 0, 10).unwrap().0[0].file;
            let moves = Moves { moved: vec![(file, volume.copy(&file))], lost: Vec::new() };
            assert_eq!(cas.actor().send(Relocate(moves)).await.unwrap(), [true]);
            drop(free);
        };
        let (page, ()) = futures::join!(purge, move_it);
        let page = page.unwrap();
        assert_eq!((page.results.len(), page.examined, page.unreadable), (1, 1, 0));
        assert_eq!(cas.get_result(&main, action).await.unwrap(), None);
        drop(cas);
        runtime.shutdown_background();
    }
}
