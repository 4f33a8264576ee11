//! [`Assets`]: the handle through which RPC handlers use remote assets.
//!
//! Bound content is served only while all of it is stored, which is checked at that moment and renews it (AST-06).
//! Bound content that is no longer stored is fetched again.

use super::{
    AssetActor, AssetShared,
    bindings::{Binding, KnownAsset, MAX_REFERENCES, References},
    integrity::Witness,
    messages::{BindAsset, JoinFlight, LookUpAsset},
    outcome::{FailureKind, Fetched, FlightOutcome, OriginFailure, Problem},
    request::{AssetKind, AssetRequest},
};
use crate::{caller::Caller, instance::Instance};
use actix::{Addr, Handler, Message, dev::ToEnvelope};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
};
use reqwest::Url;
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{sync::watch, time::Instant};

/// A handle to the asset service; cheap to clone.
#[derive(Debug, Clone)]
pub struct Assets {
    actor: Addr<AssetActor>,
    shared: Arc<AssetShared>,
    /// The caller of the requests.
    caller: Caller,
}

impl Assets {
    pub(super) fn new(actor: Addr<AssetActor>, shared: Arc<AssetShared>) -> Self {
        Self { actor, shared, caller: Caller::default() }
    }

    /// The actor's address, for [`super::messages::CloseAssets`].
    pub fn actor(&self) -> &Addr<AssetActor> {
        &self.actor
    }

    /// Returns a handle for the requests of a client, whose downloads count against the bounds of its peer.
    pub fn on_behalf_of(&self, caller: Caller) -> Self {
        Self { caller, ..self.clone() }
    }

    /// Whether clients may push (AST-11).
    pub fn push_enabled(&self) -> bool {
        self.shared.settings.push
    }

    /// Gets an asset: content that is bound to one of its URIs, or else a download from the first URI that has it.
    /// `wait` bounds how long this takes. The download runs until the latest deadline of all callers that wait for it,
    /// even if they leave (AST-09).
    ///
    /// # Errors
    /// The failure of the origins, a fault of this server, or an invalid or unsupported qualifier.
    pub async fn fetch(
        &self,
        request: AssetRequest,
        oldest: Option<SystemTime>,
        wait: Option<Duration>,
    ) -> Result<Fetched, Problem> {
        // A malformed request is refused even if there is an answer.
        request.headers(0)?;
        request.qualifiers.integrity()?;
        if request.kind == AssetKind::Directory {
            request.qualifiers.directory()?;
        }
        let unsupported = request.qualifiers.unsupported(request.kind);
        let unsupported: Vec<String> = unsupported.into_iter().map(ToOwned::to_owned).collect();
        if !self.push_enabled() && !unsupported.is_empty() {
            return Err(Problem::Unsupported(unsupported));
        }
        let known = self.ask(LookUpAsset { keys: request.keys(), oldest }).await?;
        for (uri, known) in request.uris.iter().zip(&known) {
            let KnownAsset::Fresh(Binding { digest, references, expires_at, .. }) = known else { continue };
            if self.is_stored(&request, *digest, references).await? {
                return Ok(Fetched { uri: uri.clone(), digest: *digest, expires_at: *expires_at });
            }
        }
        let was_bound = known.iter().any(|known| !matches!(known, KnownAsset::Nothing));
        check_downloadable(&request, unsupported, was_bound)?;
        self.check_fetchable(&request, was_bound)?;
        self.download(request, known, oldest, wait).await
    }

    /// Joins or starts the download of an asset, and waits for its content.
    async fn download(
        &self,
        request: AssetRequest,
        known: Vec<KnownAsset>,
        oldest: Option<SystemTime>,
        wait: Option<Duration>,
    ) -> Result<Fetched, Problem> {
        let limit = self.shared.settings.timeout.min(wait.unwrap_or(Duration::MAX));
        let deadline = Instant::now() + limit;
        let request = Arc::new(request);
        let caller = self.caller;
        let join = JoinFlight { request: request.clone(), known, oldest, deadline, caller };
        let mut flight = self.ask(join).await??.0;
        let fetched = match tokio::time::timeout_at(deadline, landing(&mut flight)).await {
            Ok(outcome) => outcome?,
            Err(_) => {
                let message = format!("it takes longer than {limit:?}; ask again later for the result");
                return Err(Problem::origin(FailureKind::TimedOut, message));
            }
        };
        if self.is_stored(&request, fetched.digest, &References::default()).await? {
            return Ok(fetched);
        }
        Err(Error::Exhausted {
            message: "the fetched content was evicted before it could be used".into(),
            retry_after: Some(gorego_reapi::error::DISK_FULL_RETRY),
        }
        .into())
    }

    /// Binds stored content to every URI of the request (AST-11).
    ///
    /// # Errors
    /// `MissingBlobs` if the content or something that it refers to is not stored; `Invalid` if it does not match the
    /// checksum among the qualifiers, or when a Directory is malformed.
    pub async fn push(
        &self,
        request: AssetRequest,
        digest: Digest,
        references: References,
        expires_at: Option<SystemTime>,
    ) -> Result<()> {
        let count = references.blobs.len() + references.directories.len();
        if count > MAX_REFERENCES {
            return Err(Error::Invalid(format!(
                "there are {count} references; at most {MAX_REFERENCES} are kept"
            )));
        }
        if request.kind == AssetKind::Directory && request.qualifiers.integrity()?.is_some() {
            return Err(Error::invalid(
                "qualifier checksum.sri does not apply to a Directory; push without it",
            ));
        }
        let missing = self.missing(&request, digest, &references).await?;
        if !missing.is_empty() {
            return Err(Error::MissingBlobs(missing));
        }
        if request.kind == AssetKind::Blob {
            self.check_integrity(&request, digest).await?;
        }
        let obtained_at = SystemTime::now();
        let binding = Binding { digest, obtained_at, expires_at, references: Arc::new(references) };
        self.ask(BindAsset { keys: request.keys(), binding }).await
    }

    /// Checks that at least one of the URIs can be downloaded.
    fn check_fetchable(&self, request: &AssetRequest, was_bound: bool) -> Result<(), Problem> {
        let mut first = None;
        for uri in &request.uris {
            let (kind, message) = match Url::parse(uri) {
                Ok(url) => match self.shared.settings.origins.check_url(&url) {
                    Ok(()) => return Ok(()),
                    // A URN is a name without a location: it can only be pushed.
                    Err(_) if url.scheme() == "urn" => {
                        (FailureKind::NotFound, "nothing is bound to it".into())
                    }
                    Err(problem) => (FailureKind::Denied, problem),
                },
                Err(error) => (FailureKind::Denied, format!("it is not a URI: {error}")),
            };
            first.get_or_insert(OriginFailure { kind, uri: uri.clone(), message });
        }
        let Some(mut failure) = first else { return Ok(()) };
        if was_bound {
            failure.kind = FailureKind::NotFound;
            failure.message = format!(
                "the content bound to it is expired, too old or no longer stored, and {}",
                failure.message
            );
        }
        Err(Problem::Origin(failure))
    }

    async fn is_stored(
        &self,
        request: &AssetRequest,
        digest: Digest,
        references: &References,
    ) -> Result<bool> {
        match self.missing(request, digest, references).await {
            Ok(missing) => Ok(missing.is_empty()),
            // A malformed Directory in the tree means that it was never complete.
            Err(Error::Invalid(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The blobs of some content that are not stored; all others are renewed.
    async fn missing(
        &self,
        request: &AssetRequest,
        digest: Digest,
        references: &References,
    ) -> Result<Vec<Digest>> {
        let cas = &self.shared.cas;
        let mut blobs = references.blobs.clone();
        let mut directories = references.directories.clone();
        match request.kind {
            AssetKind::Blob => blobs.push(digest),
            AssetKind::Directory => directories.push(digest),
        }
        let mut missing = cas.find_missing(&request.instance, &blobs).await?;
        for root in directories {
            missing.extend(self.missing_below(&request.instance, root).await?);
        }
        Ok(missing)
    }

    async fn missing_below(&self, instance: &Instance, root: Digest) -> Result<Vec<Digest>> {
        match self.shared.cas.working_for(self.caller).check_inputs(instance, root).await {
            Ok(()) => Ok(Vec::new()),
            Err(Error::MissingBlobs(missing)) => Ok(missing),
            Err(error) => Err(error),
        }
    }

    /// Checks pushed content against the checksum among the qualifiers (AST-04).
    async fn check_integrity(&self, request: &AssetRequest, digest: Digest) -> Result<()> {
        let Some(integrity) = request.qualifiers.integrity()? else { return Ok(()) };
        let cas = self.shared.cas.working_for(self.caller);
        let reader = cas.open(&request.instance, digest).await?;
        let witness = cas.read_through(reader, integrity.witness(), Witness::update).await?;
        if integrity.is_met_by(witness) {
            return Ok(());
        }
        Err(Error::Invalid(format!("blob {digest} does not have the checksum of qualifier checksum.sri")))
    }

    async fn ask<M>(&self, message: M) -> Result<M::Result>
    where
        M: Message<Result: Send> + Send + 'static,
        AssetActor: Handler<M>,
        <AssetActor as actix::Actor>::Context: ToEnvelope<AssetActor, M>,
    {
        self.actor.send(message).await.map_err(|_| going_down())
    }
}

/// Checks that a download can honour the qualifiers. It cannot honour those in `unsupported`.
fn check_downloadable(
    request: &AssetRequest,
    unsupported: Vec<String>,
    was_bound: bool,
) -> Result<(), Problem> {
    let is_location = |uri: &String| uri.starts_with("http:") || uri.starts_with("https:");
    if unsupported.is_empty() {
        return Ok(());
    }
    if was_bound {
        // Reached only if no usable content was pushed under these qualifiers.
        let message = "the content pushed under these qualifiers is expired, too old or no longer stored";
        return Err(Problem::origin(FailureKind::NotFound, message));
    }
    if request.uris.iter().any(is_location) {
        return Err(Problem::Unsupported(unsupported));
    }
    // A name without a location can be answered: nothing is bound to it.
    Ok(())
}

/// Waits for the outcome of a flight.
async fn landing(flight: &mut watch::Receiver<Option<FlightOutcome>>) -> FlightOutcome {
    let landed = flight.wait_for(Option::is_some).await.map(|outcome| outcome.clone());
    landed.ok().flatten().unwrap_or_else(|| Err(going_down().into()))
}

fn going_down() -> Error {
    Error::Unavailable("the asset service of this server is shutting down".into())
}
