//! [`Call`]: one request, at either port. It is made once, when the request arrives.
//!
//! It knows the client and the connection, holds the room for the answer, and collects what the log line needs.
//! Handlers take the caller from it and add what they learn about the request.

use crate::{
    access::{
        audit::DenialKind,
        permission::{Permission, PermissionSet, Permissions},
        principal::Principal,
    },
    actors::{
        cas::client::Provenance,
        scheduler::operation::{ClientInfo, OperationId},
    },
    budget::Share,
    caller::{Build, Caller, Owner},
    connections::{
        Admitted, ConnectionState, Connections,
        answers::{FRAME_BYTES, room_with_frames},
    },
    instance::Instance,
    quotas::UploadMeter,
    result::ResultRoom,
    unfinished_requests::UnfinishedRequest,
};
use bytes::Bytes;
use gorego_reapi::{digest::Digest, error::Result};
use http::Extensions;
use std::{
    future::poll_fn,
    mem,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering::Relaxed},
    },
};

/// Answers up to this size always wait for room ([`Call::reserve_soon`]).
pub(crate) const SMALL_ANSWER_BYTES: usize = 64 * 1024;

/// The connection of a request.
#[derive(Debug, Clone)]
pub(crate) struct ConnectionInfo {
    pub(crate) state: Arc<ConnectionState>,
    /// The set of all connections, this one included.
    pub(crate) connections: Connections,
}

impl ConnectionInfo {
    pub(crate) fn of(admitted: &Admitted) -> Self {
        Self { state: admitted.state().clone(), connections: admitted.connections().clone() }
    }

    /// The address of the client.
    pub(crate) fn address(&self) -> SocketAddr {
        self.state.address
    }

    /// The caller of its requests.
    pub(crate) fn caller(&self) -> Caller {
        self.state.caller
    }
}

/// One request; see the top of this file. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Call(Arc<CallState>);

#[derive(Debug, Default)]
struct CallState {
    /// Set once, before a handler sees the request.
    principal: OnceLock<Principal>,
    client: ClientInfo,
    /// `None` for a request that does not come from a socket.
    connection: Option<ConnectionInfo>,
    /// `None` for a method that is unknown.
    permissions: Option<Permissions>,
    instance: OnceLock<Instance>,
    /// The permissions that the request needs in the instance to go on, as [`PermissionSet::bits`].
    used: AtomicU16,
    notes: Mutex<Notes>,
    /// Room for the next part of the answer.
    room: Mutex<Option<Share>>,
    /// The room of a result that was read for this request, until there is room for the answer.
    result: Mutex<Option<Arc<ResultRoom>>>,
    /// Set when the request was counted for the quotas of its principal. An upload that has a quota has a meter.
    counted: OnceLock<Option<UploadMeter>>,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    is_broken_off: AtomicBool,
    /// The entry by which a shutdown tracks the request; `None` for streams that clients keep open.
    unfinished: Option<UnfinishedRequest>,
}

/// What handlers record for the log line.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    pub(crate) operation: Option<OperationId>,
    pub(crate) action: Option<Digest>,
    pub(crate) blob: Option<Digest>,
    /// Whether the action cache had an answer.
    pub(crate) cached: Option<bool>,
    /// The error inside a response whose gRPC code is OK.
    pub(crate) inner_error: Option<String>,
}

impl Call {
    /// A request that has just arrived.
    pub(crate) fn begin(
        connection: Option<ConnectionInfo>,
        client: ClientInfo,
        permissions: Option<Permissions>,
        unfinished: Option<UnfinishedRequest>,
    ) -> Self {
        Self(Arc::new(CallState { connection, client, permissions, unfinished, ..CallState::default() }))
    }

    /// The call of a request with these extensions. Without a call in them, the result is a call of an unknown client,
    /// which has no permissions.
    pub(crate) fn of(extensions: &Extensions) -> Self {
        extensions.get::<Self>().cloned().unwrap_or_default()
    }

    /// Records who sends the request.
    pub(crate) fn identify(&self, principal: Principal) {
        let _ = self.0.principal.set(principal);
    }

    /// The identity of the client. It has no permissions until it is recorded.
    pub(crate) fn principal(&self) -> &Principal {
        self.0.principal.get().unwrap_or_else(|| Principal::nobody())
    }

    /// The name of the principal, if the client has presented a credential.
    pub(crate) fn known_principal(&self) -> Option<&str> {
        Some(self.principal()).filter(|principal| !principal.is_anonymous()).map(Principal::name)
    }

    /// The permissions of the method that was called; `None` for an unknown method.
    pub(crate) fn permissions(&self) -> Option<Permissions> {
        self.0.permissions
    }

    /// What the client says about itself in the headers of the request.
    pub(crate) fn client(&self) -> &ClientInfo {
        &self.0.client
    }

    /// The network address of the client.
    pub(crate) fn peer(&self) -> Option<SocketAddr> {
        self.0.connection.as_ref().map(ConnectionInfo::address)
    }

    /// Whether the client is on this machine.
    pub(crate) fn is_local(&self) -> bool {
        self.peer().is_some_and(|peer| peer.ip().to_canonical().is_loopback())
    }

    /// The caller for budgets.
    pub(crate) fn caller(&self) -> Caller {
        self.0.connection.as_ref().map(ConnectionInfo::caller).unwrap_or_default()
    }

    /// The build that the request is part of, which belongs to its principal, or else to its peer.
    pub(crate) fn build(&self) -> Owner {
        let peer = self.principal().peer(self.caller().peer);
        Owner { peer, build: Build::of(&self.client().tool_invocation_id) }
    }

    /// The connection; `None` for a request that does not come from a socket.
    pub(crate) fn connection(&self) -> Option<&ConnectionInfo> {
        self.0.connection.as_ref()
    }

    /// The origin of an action result that the request uploads.
    pub(crate) fn provenance(&self) -> Provenance {
        Provenance {
            worker: String::new(),
            tool_invocation_id: self.client().tool_invocation_id.clone(),
            peer: self.peer().map(|peer| peer.to_string()).unwrap_or_default(),
            principal: self.principal().name().to_owned(),
        }
    }
}

/// Room for the answer.
impl Call {
    /// Waits for room for this much of the answer, and keeps it for what is sent next.
    ///
    /// # Errors
    /// `Exhausted` if there is no room for too long.
    pub(crate) async fn reserve(&self, bytes: usize) -> Result<()> {
        if let Some(connection) = self.connection() {
            self.keep(self.wait_for_room(connection.state.reserve(room_with_frames(bytes))).await?);
        }
        self.hold(None);
        Ok(())
    }

    /// Waits for room, which clients free when they take their answers. So a shutdown does not wait for this request
    /// meanwhile.
    pub(crate) async fn wait_for_room<T>(&self, room: impl Future<Output = T>) -> T {
        let mut room = pin!(room);
        let room = poll_fn(|context| {
            let polled = room.as_mut().poll(context);
            if polled.is_pending() {
                self.wait_for_client();
            }
            polled
        });
        let room = room.await;
        self.client_moved();
        room
    }

    /// Keeps the room of a result until there is room for the answer, or the request ends. Replaces what was kept.
    pub(crate) fn hold(&self, room: Option<Arc<ResultRoom>>) {
        drop(mem::replace(&mut *self.0.result.lock().unwrap_or_else(PoisonError::into_inner), room));
    }

    /// Like [`Call::reserve`], but only answers up to [`SMALL_ANSWER_BYTES`] wait. For handlers that hold the answer or
    /// a large request in memory while they wait.
    ///
    /// # Errors
    /// `Exhausted` if there is no room for a larger answer now, or no room for a small one for too long.
    pub(crate) async fn reserve_soon(&self, bytes: usize) -> Result<()> {
        if bytes <= SMALL_ANSWER_BYTES {
            return self.reserve(bytes).await;
        }
        if let Some(connection) = self.connection() {
            self.keep(connection.state.reserve_now(room_with_frames(bytes))?);
        }
        Ok(())
    }

    /// Reserves room for the next piece of a stream. Returns the size that the piece may have, at most `max`.
    ///
    /// # Errors
    /// See [`Call::reserve`].
    pub(crate) async fn reserve_piece(&self, max: usize) -> Result<usize> {
        let Some(connection) = self.connection() else { return Ok(max) };
        if self.room().is_some() {
            // The piece before was not taken yet: tonic collects small messages while more are ready. They are sent
            // first, so that no more than one piece is held.
            tokio::task::yield_now().await;
            // The piece may have been shorter than its room. Otherwise what is left of each piece would add up until
            // the connection has no room for anything.
            self.give_room_back();
        }
        let (piece, room) = self.wait_for_room(connection.state.reserve_piece(max)).await?;
        self.keep(room);
        Ok(piece)
    }

    /// Takes this much of the reserved room, if there is as much. A remainder that is only enough for framing is taken
    /// too.
    pub(crate) fn take_room(&self, bytes: u64) -> Option<Share> {
        let mut kept = self.room();
        let all = kept.as_mut().filter(|kept| kept.amount() >= bytes)?;
        let rest = all.amount() - bytes;
        let part = all.split(if rest <= 2 * FRAME_BYTES { all.amount() } else { bytes });
        if all.amount() == 0 {
            *kept = None;
        }
        Some(part)
    }

    /// Ties all reserved room to these bytes, until they are sent.
    pub(crate) fn charge(&self, bytes: Bytes) -> Bytes {
        match (self.room().take(), self.connection()) {
            (Some(room), Some(connection)) => connection.state.charge(bytes, room),
            _ => bytes,
        }
    }

    /// Returns the room that no part of the answer has used.
    pub(crate) fn give_room_back(&self) {
        drop(self.room().take());
    }

    fn keep(&self, room: Share) {
        let mut kept = self.room();
        match &mut *kept {
            Some(kept) => kept.merge(room),
            None => *kept = Some(room),
        }
    }

    fn room(&self) -> MutexGuard<'_, Option<Share>> {
        self.0.room.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the log line and a shutdown need to know.
impl Call {
    pub(crate) fn note_instance(&self, instance: &Instance) {
        let _ = self.0.instance.set(instance.clone());
    }

    /// The instance, once it is known.
    pub(crate) fn instance(&self) -> Option<&Instance> {
        self.0.instance.get()
    }

    /// Records a permission that the request needs to go on in the instance that it has entered.
    pub(crate) fn note_permission(&self, permission: Permission) {
        self.0.used.fetch_or(PermissionSet::of(&[permission]).bits(), Relaxed);
    }

    /// The permissions that the request needs to go on in the instance that it has entered.
    pub(crate) fn used_permissions(&self) -> PermissionSet {
        PermissionSet::from_bits(self.0.used.load(Relaxed))
    }

    /// Why the request was refused; `None` if it was not.
    pub(crate) fn denial(&self) -> DenialKind {
        match self.0.principal.get() {
            None => DenialKind::WrongCredential,
            Some(principal) if principal.is_anonymous() => DenialKind::NoCredential,
            Some(_) => DenialKind::NoPermission,
        }
    }

    pub(crate) fn note_operation(&self, id: OperationId) {
        self.notes().operation = Some(id);
    }

    pub(crate) fn note_action(&self, action: Digest) {
        self.notes().action = Some(action);
    }

    /// Records the blob of a request that is about one.
    pub(crate) fn note_blob(&self, blob: Digest) {
        self.notes().blob = Some(blob);
    }

    /// Records whether the action cache had an answer.
    pub(crate) fn note_cached(&self, cached: bool) {
        self.notes().cached = Some(cached);
    }

    /// Records the error inside an answer whose gRPC code is OK.
    pub(crate) fn note_inner_error(&self, error: &str) {
        self.notes().inner_error = Some(error.to_owned());
    }

    /// Takes what was recorded. For the end of the request.
    pub(crate) fn take_notes(&self) -> Notes {
        mem::take(&mut self.notes())
    }

    /// Whether the request was counted for the quotas of its principal.
    pub(crate) fn is_counted(&self) -> bool {
        self.0.counted.get().is_some()
    }

    /// Records that the request was counted for the quotas of its principal, and the meter of its upload.
    pub(crate) fn note_counted(&self, meter: Option<UploadMeter>) {
        let _ = self.0.counted.set(meter);
    }

    /// Counts the bytes of an upload that have arrived since the last call for the quota of the principal, if it has
    /// one.
    ///
    /// # Errors
    /// `OverQuota` if the principal has uploaded too many bytes in the last hour.
    pub(crate) fn count_upload(&self) -> Result<()> {
        match self.0.counted.get() {
            Some(Some(meter)) => meter.count_up_to(self.bytes_in()),
            _ => Ok(()),
        }
    }

    /// Counts bytes of the request.
    pub(crate) fn received(&self, bytes: usize) {
        self.0.bytes_in.fetch_add(bytes as u64, Relaxed);
    }

    /// Counts bytes of the answer.
    pub(crate) fn sent(&self, bytes: usize) {
        self.0.bytes_out.fetch_add(bytes as u64, Relaxed);
    }

    /// Records that the client left before the end of its request.
    pub(crate) fn break_off(&self) {
        self.0.is_broken_off.store(true, Relaxed);
    }

    /// Whether the client left before the end of its request.
    pub(crate) fn is_broken_off(&self) -> bool {
        self.0.is_broken_off.load(Relaxed)
    }

    /// Number of bytes of the request so far.
    pub(crate) fn bytes_in(&self) -> u64 {
        self.0.bytes_in.load(Relaxed)
    }

    /// Number of bytes of the answer so far.
    pub(crate) fn bytes_out(&self) -> u64 {
        self.0.bytes_out.load(Relaxed)
    }

    /// Records that the request now waits for its client.
    pub(crate) fn wait_for_client(&self) {
        if let Some(unfinished) = &self.0.unfinished {
            unfinished.wait_for_client();
        }
    }

    /// Records that the client has made progress.
    pub(crate) fn client_moved(&self) {
        if let Some(unfinished) = &self.0.unfinished {
            unfinished.client_moved();
        }
    }

    /// Records that the request is over.
    pub(crate) fn end(&self) {
        if let Some(unfinished) = &self.0.unfinished {
            unfinished.end();
        }
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.0.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{connections::answers::ANSWERS, unfinished_requests::UnfinishedRequests};
    use std::time::Duration;
    use tokio::time::{sleep, timeout};

    #[tokio::test]
    async fn what_short_pieces_leave_of_their_room_does_not_add_up() {
        let connections = Connections::default();
        let admitted = connections.admit(([127, 0, 0, 1], 1).into()).unwrap();
        let call = Call::begin(Some(ConnectionInfo::of(&admitted)), Default::default(), None, None);
        let piece = 128 * 1024;
        for _ in 0..3 {
            assert_eq!(call.reserve_piece(piece).await, Ok(piece));
            drop(call.take_room(1_000).expect("room for a short piece"));
        }
        let others = admitted.state().reserve_now(ANSWERS.connection - room_with_frames(piece));
        assert!(others.is_ok(), "only the last piece may hold room");
    }

    #[tokio::test(start_paused = true)]
    async fn a_shutdown_does_not_wait_for_reads_that_wait_until_their_client_takes_something() {
        const QUIET: Duration = Duration::from_secs(2);
        let (connections, unfinished_requests) = (Connections::default(), UnfinishedRequests::default());
        let admitted = connections.admit(([127, 0, 0, 1], 1).into()).unwrap();
        let info = Some(ConnectionInfo::of(&admitted));
        let call = Call::begin(info, Default::default(), None, Some(unfinished_requests.begin()));
        let others = admitted.state().reserve_now(ANSWERS.connection).unwrap();
        let mut waiting = pin!(call.reserve_piece(1_000));
        assert!(timeout(QUIET, waiting.as_mut()).await.is_err());
        tokio::select! {
            () = unfinished_requests.finished(QUIET) => {}
            _ = waiting.as_mut() => panic!("there is no room"),
            () = sleep(2 * QUIET) => panic!("the shutdown waits for a request that waits for its client"),
        }
        drop(others);
        assert_eq!(waiting.await, Ok(1_000));
        assert!(
            timeout(2 * QUIET, unfinished_requests.finished(QUIET)).await.is_err(),
            "the server has to go on"
        );
    }
}
