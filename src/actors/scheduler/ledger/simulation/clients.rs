//! The clients of the simulation: they submit, cancel, watch and delete operations, and lose their connections.

use super::*;

impl World {
    pub(super) fn submit(&mut self) {
        let id = OperationId::new(Default::default(), uuid::Uuid::from_u128(self.next_id));
        self.next_id += 1;
        // The digest determines everything about an action, including its platform and whether it may be cached.
        let (name, do_not_cache) = (self.random.below(8), self.random.chance(15));
        let platform =
            [None, None, None, None, Some("linux"), Some("Linux"), Some("plan9"), Some("amiga")][name];
        let name = name as u64 + if do_not_cache { 100 } else { 0 };
        let cores = [0, 1, 4, 2, 0, 3, 2, 0][(name % 100) as usize];
        let image = name % 3 == 1;
        let work = Work { name, do_not_cache, platform, cores, image };
        let cached = !work.do_not_cache && self.random.chance(10);
        let unusable = !cached && self.random.chance(10);
        let invocation = ["", "a", "b"][self.random.below(3)];
        let priority = self.random.below(5) as i32 - 2;
        let peer = match self.random.below(4) {
            3 => Peer::Principal(PrincipalId::of("token:ci")),
            number => peer(number as u8),
        };
        let caller = Caller::without_connection(peer);
        let mut limit =
            |chance, least: usize| self.random.chance(chance).then(|| least + self.random.below(6));
        let limits = OperationLimits { operations: limit(10, 2), queued: limit(10, 0) };
        let mut submit = Submit { priority, caller, limits, ..submit_of(invocation, &work) };
        submit.client.target_id = ["", "//a", "//b", "//c"][self.random.below(4)].into();
        let waiting = self.ledger.quota.all().waiting;
        let info = OperationInfo {
            id,
            instance: submit.instance.clone(),
            action: submit.action,
            inline: submit.inline.clone(),
            client: submit.client.clone(),
            principal: submit.principal.clone(),
            peer,
        };
        let owner = self.ledger.owner(&info);
        // The consequences of the shares are tested in the tests of the quotas.
        let has_room = self.ledger.quota.check(owner, 0).is_ok()
            && self.ledger.register.check_place(&info, OperationLimits::default()).is_ok();
        let (unfinished, queued) = self.count_of(peer);
        let is_within = |limit: Option<usize>, count| limit.is_none_or(|limit| count < limit);
        let has_quota = is_within(limits.operations, unfinished) && is_within(limits.queued, queued);
        let resolution = match unusable {
            true => Resolution::Unusable(Error::invalid("no Action")),
            false => resolution(&work, cached),
        };
        let admitted = self.ledger.admit(submit, resolution, id, self.now);
        match admitted {
            Ok(subscription) => {
                assert!(cached || unusable || work.platform != Some("amiga"), "nobody can run this");
                assert!(cached || unusable || has_quota);
                let snapshot = subscription.snapshots.borrow().clone();
                assert_eq!(snapshot.stage == Stage::Completed, cached || unusable);
                let known = KnownOperation {
                    subscription: Some(subscription),
                    do_not_cache: work.do_not_cache,
                    stage: snapshot.stage,
                    run_stage: snapshot.run_stage.map(|(stage, _)| stage),
                    may_be_cancelled: false,
                    completed: 0,
                    cached,
                };
                self.known.insert(id, known);
            }
            Err(Error::Exhausted { .. }) => {
                let free = self.ledger.settings.queue_size.saturating_sub(waiting);
                assert!(!has_room);
                self.seen.insert(if free == 0 { "refused: full" } else { "refused: share" });
            }
            Err(Error::OverQuota { .. }) => {
                assert!(!has_quota);
                let is_queue = is_within(limits.operations, unfinished);
                self.seen.insert(match is_queue {
                    true => "refused: queue of a quota",
                    false => "refused: operations of a quota",
                });
            }
            Err(Error::Precondition(message)) => {
                assert!(!self.pools.is_empty() && self.pools.suiting(work.platform).is_empty());
                assert!(
                    message.contains("the nearest") && message.contains(work.platform.unwrap()),
                    "{message}"
                );
                self.seen.insert("refused: platform");
            }
            Err(Error::Unavailable(_)) => {
                assert!(!self.pools.suiting(work.platform).iter().any(|pool| self.pools.is_open(*pool)));
                self.seen.insert("refused: no workers");
            }
            Err(other) => panic!("unexpected {other:?}"),
        }
    }

    /// The unfinished operations of a peer and those of them that wait, as the clients know them.
    pub(super) fn count_of(&self, peer: Peer) -> (usize, usize) {
        let of_peer = |id: &&OperationId| {
            let number = self.ledger.register.find(&instance(), **id).ok();
            number
                .and_then(|number| self.ledger.register.get(number))
                .is_some_and(|operation| operation.info.peer == peer)
        };
        let stages: Vec<_> = self.known.keys().filter(of_peer).map(|id| self.known[id].stage).collect();
        let unfinished = stages.iter().filter(|stage| **stage != Stage::Completed).count();
        (unfinished, stages.iter().filter(|stage| **stage == Stage::Queued).count())
    }

    pub(super) fn explain(&mut self) {
        let Some(id) = self.pick_operation() else { return };
        let status = self.ledger.explain(&instance(), id, self.now);
        let stage = self.known[&id].stage;
        assert_eq!(
            status.is_some(),
            stage == Stage::Queued,
            "there is a reason for each operation that waits, and for no other"
        );
        let Some(status) = status else { return };
        assert!(!status.reason.is_empty() && !status.pool.is_empty());
        assert!(status.busy <= status.slots && status.position != Some(0));
        self.seen.insert("explained");
    }

    pub(super) fn pick_operation(&mut self) -> Option<OperationId> {
        let ids: Vec<_> = self.known.keys().rev().take(RECENT).copied().collect();
        self.random.pick(&ids)
    }

    pub(super) fn cancel(&mut self) {
        let Some(id) = self.pick_operation() else { return };
        let result = self.ledger.cancel(&instance(), id, self.now);
        let known = self.known.get_mut(&id).unwrap();
        known.may_be_cancelled = true;
        assert!(result.is_ok() || known.stage == Stage::Completed, "only finished operations are forgotten");
    }

    pub(super) fn lose_client(&mut self) {
        if let Some(id) = self.pick_operation() {
            let known = self.known.get_mut(&id).unwrap();
            known.subscription = None;
            known.may_be_cancelled = true;
        }
    }

    pub(super) fn watch(&mut self) {
        let Some(id) = self.pick_operation() else { return };
        if let Ok(subscription) = self.ledger.watch(&instance(), id) {
            self.known.get_mut(&id).unwrap().subscription = Some(subscription);
        }
    }

    pub(super) fn forget(&mut self) {
        let Some(id) = self.pick_operation() else { return };
        match self.ledger.forget(&instance(), id) {
            Ok(()) => assert!(self.finished.remove(&id), "forgot what was not finished"),
            Err(Error::Precondition(_)) => assert_ne!(self.known[&id].stage, Stage::Completed),
            Err(Error::NotFound(_)) => {}
            Err(other) => panic!("unexpected {other:?}"),
        }
    }
}
