//! The actor's part of leases: it makes room for them and logs events about them. [`super::index`] defines leases.

use super::{
    CasActor, LOG,
    client::Cas,
    index::{Totals, Withdrawn},
    settings::FULL_LEASES_LOG_INTERVAL,
    uptime_seconds,
};
use crate::{actors::mail::Receive, caller::Owner, logging::Event};
use actix::{Context, Message, MessageResult};
use gorego_reapi::error::Result;
use std::time::Instant;

/// Makes room to lease the blobs of a result to a build. The answer says whether there is room now.
#[derive(Message)]
#[rtype(result = "bool")]
pub struct EaseLeases {
    /// The bytes of those of the blobs that are not leased yet.
    pub wanted: u64,
    /// The build that asks for the result.
    pub build: Owner,
}

impl Cas {
    /// Makes room to lease `wanted` more bytes to the build of this handle. Returns whether there is room. If there is
    /// none, the result that needs these bytes is not served. That costs a rebuild, while a broken promise would cost a
    /// failed build.
    pub(super) async fn ease_leases(&self, wanted: u64) -> Result<bool> {
        match self.lessee() {
            Some(build) => self.ask(EaseLeases { wanted, build }).await,
            None => Ok(true),
        }
    }
}

impl CasActor {
    /// Takes the oldest leases from builds with more than their share, if leases would otherwise exceed their budget.
    pub(super) fn ease_leases(&self, wanted: u64, asker: Option<Owner>) {
        if self.shared.view.read(None, |index| index.can_lease(wanted)).0 {
            return;
        }
        // Each step has a hold of its own, because it looks at all builds.
        let step = || self.change(|index| index.ease_leases(wanted, asker, uptime_seconds()));
        let withdrawn: Vec<Withdrawn> = std::iter::from_fn(step).collect();
        if let Some(first) = withdrawn.first() {
            let bytes: u64 = withdrawn.iter().map(|Withdrawn { bytes, .. }| bytes).sum();
            Event::info(LOG, "leases_withdrawn").with_shown("peer", &first.peer).with("bytes", bytes).log(
                format_args!(
                    "builds have leased more of the store than their share; the oldest leases of those with the most are over"
                ),
            );
        }
    }
}

impl Receive<EaseLeases> for CasActor {
    type Answer = MessageResult<EaseLeases>;

    fn receive(&mut self, EaseLeases { wanted, build }: EaseLeases, _: &mut Context<Self>) -> Self::Answer {
        self.ease_leases(wanted, Some(build));
        let has_room = self.change(|index| {
            let has_room = index.can_lease(wanted);
            if !has_room {
                index.count_refused_result();
            }
            has_room
        });
        let is_due = self.full_leases_logged.is_none_or(|at| at.elapsed() >= FULL_LEASES_LOG_INTERVAL);
        if !has_room && is_due {
            self.full_leases_logged = Some(Instant::now());
            let Totals { leased, limit, .. } = self.change(|index| index.totals());
            Event::warn(LOG, "leases_full").with("leased_bytes", leased).with("limit_bytes", limit).log(format_args!(
                "results are not served while builds have leased nine tenths of the store; raise max_size_gb, free space on \
                 its disk, or lower cache.build_lease"
            ));
        }
        MessageResult(has_room)
    }
}
