//! A session: one connection to the server, one instance, one digest function, and the clients of all services.
//!
//! It is cheap to clone and to modify: [`Session::with_instance`], [`Session::with_function`], [`Session::reconnect`].
//! All sessions of a run share its salt, its options and the capabilities that the server reported at the beginning.

use super::{
    Options,
    blob::{Blob, Salt, tail},
    check::{Answer as _, Step as _, Stop, Verdict, absent, fail},
    connection::{CONNECT_LIMIT, Service, Target},
};
use gorego_client::{
    AuthorizedChannel, diagnose,
    stubs::{
        ActionCacheClient, ByteStreamClient, CapabilitiesClient, ContentAddressableStorageClient,
        ExecutionClient, FetchClient, LogStreamServiceClient, OperationsClient, PushClient,
    },
};
use gorego_reapi::{
    digest::DigestFunction,
    error::{Error, Result},
    instance_name::check_instance_name,
    proto::{
        longrunning::CancelOperationRequest,
        reapi::{self, CacheCapabilities, ExecutionCapabilities, GetCapabilitiesRequest, ServerCapabilities},
    },
};
use http::HeaderMap;
use prost::Message;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Display,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::OnceCell;

/// Time limit for cancelling all operations that checks left behind.
const CLEAN_UP_LIMIT: Duration = Duration::from_secs(5);

/// One connection, instance and digest function; see the top of this file.
#[derive(Debug, Clone)]
pub struct Session {
    run: Arc<RunState>,
    channel: AuthorizedChannel,
    instance: String,
    function: DigestFunction,
    /// The value of `digest_function` in requests; 0 if the field is left unset.
    function_number: i32,
    /// The cases that the check is currently in.
    cases: Arc<Cases>,
}

/// The cases that a check is in, in the order in which it entered them.
#[derive(Debug, Default)]
struct Cases(Mutex<BTreeMap<u64, String>>);

impl Cases {
    fn open(&self) -> MutexGuard<'_, BTreeMap<u64, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, case: String) -> u64 {
        let mut open = self.open();
        let number = open.last_key_value().map_or(0, |(last, _)| last + 1);
        open.insert(number, case);
        number
    }
}

/// The state that all sessions of a run share.
#[derive(Debug)]
struct RunState {
    options: Options,
    target: Target,
    capabilities: ServerCapabilities,
    salt: Salt,
    written: AtomicU64,
    /// Names of operations that this run started and whose end it has not seen.
    operations: Mutex<BTreeSet<String>>,
    /// The result of a trivial action; see [`Session::runs_actions`].
    first_action: OnceCell<Verdict>,
}

impl Session {
    /// Connects and requests the capabilities for the whole run.
    ///
    /// # Errors
    /// `Invalid` for invalid options; `Unavailable` when no server answers or GetCapabilities fails.
    pub async fn connect(options: Options) -> Result<Self> {
        check_instance_name(&options.instance)?;
        let salt = Salt::new();
        let target = Target::new(&options, &salt)?;
        target.prepare().await?;
        let first_answer = async {
            let channel = target.connect().await?;
            let request = GetCapabilitiesRequest { instance_name: options.instance.clone() };
            let mut client = CapabilitiesClient::new(target.service(channel.clone()));
            let answer = client.get_capabilities(request).await.wanted("GetCapabilities answers")?;
            Ok((channel, answer.into_inner()))
        };
        let answer = tokio::time::timeout(CONNECT_LIMIT, first_answer).await;
        let answer =
            answer.unwrap_or_else(|_| Err(fail("an answer", format!("none within {CONNECT_LIMIT:?}"))));
        let (channel, capabilities) = match answer {
            Ok(found) => found,
            Err(stop) => {
                let why = match stop {
                    Stop::Fail { observed, .. } | Stop::Unmet { observed, .. } => observed,
                    Stop::Absent(why) | Stop::Skipped(why) => why,
                };
                let why = diagnose(&options.server).await.unwrap_or(why);
                return Err(Error::Unavailable(format!(
                    "no server to verify at {}: {why}",
                    options.server.endpoint
                )));
            }
        };
        let function = choose_function(options.digest_function.as_deref(), &capabilities)?;
        let instance = options.instance.clone();
        let run = RunState {
            options,
            target,
            capabilities,
            salt,
            written: AtomicU64::new(0),
            operations: Mutex::default(),
            first_action: OnceCell::new(),
        };
        let function_number = function.wire().into();
        Ok(Self { run: Arc::new(run), channel, instance, function, function_number, cases: Arc::default() })
    }

    /// A copy for a new check, which is not in a case yet.
    pub fn for_check(&self) -> Self {
        Self { cases: Arc::default(), ..self.clone() }
    }

    /// Runs a part of a check as one of its cases, so that a failure of this part names the case.
    ///
    /// # Errors
    /// The errors of the part.
    pub async fn case<T>(&self, case: impl Display, part: impl Future<Output = Verdict<T>>) -> Verdict<T> {
        let case = case.to_string();
        let number = self.cases.enter(case.clone());
        let verdict = part.await;
        // If the part is dropped because the check timed out, the case stays in the list for the report.
        self.cases.open().remove(&number);
        verdict.case(case)
    }

    /// The cases that the check is in, outermost first.
    pub fn open_cases(&self) -> Vec<String> {
        self.cases.open().values().cloned().collect()
    }

    /// A copy with its own connection.
    ///
    /// # Errors
    /// A failure when the server does not accept another connection.
    pub async fn reconnect(&self) -> Verdict<Self> {
        Ok(Self { channel: self.run.target.connect().await?, ..self.clone() })
    }

    /// A copy with its own connection, which sends pings at this interval even without open calls.
    ///
    /// # Errors
    /// See [`Session::reconnect`].
    pub async fn reconnect_pinging(&self, interval: Duration) -> Verdict<Self> {
        Ok(Self { channel: self.run.target.connect_pinging(interval).await?, ..self.clone() })
    }

    /// A copy with a connection of a caller who sends these headers instead of credentials.
    ///
    /// # Errors
    /// See [`Session::reconnect`].
    pub async fn stranger(&self, headers: HeaderMap) -> Verdict<Self> {
        Ok(Self { channel: self.run.target.connect_with(headers).await?, ..self.clone() })
    }

    /// What this caller may do, as far as the server has said so.
    pub fn caller(&self) -> String {
        let server = &self.options().server;
        let has_credentials =
            !server.headers.is_empty() || server.identity.is_some() || server.credential_helper.is_some();
        let may = |verdict: bool| if verdict { "may" } else { "may not" };
        format!(
            "{} credentials: {} run actions, {} write action results",
            if has_credentials { "with" } else { "without" },
            may(self.executes().is_ok()),
            may(self.updates_results().is_ok())
        )
    }

    /// A copy for another instance.
    pub fn with_instance(&self, instance: impl Into<String>) -> Self {
        Self { instance: instance.into(), ..self.clone() }
    }

    /// A copy for another digest function.
    pub fn with_function(&self, function: DigestFunction) -> Self {
        Self { function, function_number: function.wire().into(), ..self.clone() }
    }

    /// A copy that leaves the field `digest_function` of every request unset (GEN-08).
    pub fn without_function_number(&self) -> Self {
        Self { function_number: 0, ..self.clone() }
    }

    pub fn options(&self) -> &Options {
        &self.run.options
    }

    /// The capabilities that the server reported at the beginning of the run.
    pub fn capabilities(&self) -> &ServerCapabilities {
        &self.run.capabilities
    }

    /// The cache capabilities.
    ///
    /// # Errors
    /// Absent when the server claims none.
    pub fn cache(&self) -> Verdict<&CacheCapabilities> {
        let cache = self.run.capabilities.cache_capabilities.as_ref();
        cache.ok_or_else(|| absent("the server claims no cache_capabilities"))
    }

    /// The execution capabilities.
    ///
    /// # Errors
    /// Absent when the server claims none, or has execution disabled.
    pub fn executes(&self) -> Verdict<&ExecutionCapabilities> {
        let execution = self.run.capabilities.execution_capabilities.as_ref();
        let execution = execution.filter(|execution| execution.exec_enabled);
        execution.ok_or_else(|| absent("the server does not claim execution (exec_enabled)"))
    }

    /// Passes if this caller may write results to the action cache.
    ///
    /// # Errors
    /// Absent otherwise.
    pub fn updates_results(&self) -> Verdict {
        let updates = self.cache()?.action_cache_update_capabilities.as_ref();
        match updates {
            Some(updates) if updates.update_enabled => Ok(()),
            _ => Err(absent("the server does not claim that this caller may update the action cache")),
        }
    }

    /// The digest functions that both the server and this build support.
    pub fn functions(&self) -> Vec<DigestFunction> {
        let cache = self.run.capabilities.cache_capabilities.as_ref();
        let listed = cache.map_or(&[][..], |cache| &cache.digest_functions);
        let mut known = DigestFunction::ALL.to_vec();
        known.retain(|function| listed.contains(&(function.wire() as i32)));
        known
    }

    /// The size limit of a batch; if the server states none, the one that clients then assume (CAP-10).
    pub fn batch_limit(&self) -> usize {
        let cache = self.run.capabilities.cache_capabilities.as_ref();
        match cache.map_or(0, |cache| cache.max_batch_total_size_bytes) {
            limit @ 1.. => usize::try_from(limit).unwrap_or(usize::MAX),
            _ => 4_000_000,
        }
    }

    /// The instance name for requests.
    pub fn instance(&self) -> String {
        self.instance.clone()
    }

    /// The digest function of this session's blobs.
    pub fn function(&self) -> DigestFunction {
        self.function
    }

    /// The value of `digest_function` in requests.
    pub fn function_number(&self) -> i32 {
        self.function_number
    }

    /// A resource name below the instance (GEN-12).
    pub fn qualify(&self, rest: &str) -> String {
        if self.instance.is_empty() { rest.to_owned() } else { format!("{}/{rest}", self.instance) }
    }

    /// The name for reading this digest.
    pub fn read_name(&self, digest: &reapi::Digest) -> String {
        self.qualify(&format!("blobs/{}", tail(self.function, digest)))
    }

    /// A new name for writing this blob.
    pub fn write_name(&self, blob: &Blob) -> String {
        self.qualify(&format!("uploads/{}/{}", uuid::Uuid::new_v4(), blob.name()))
    }

    /// A new name for writing this blob compressed.
    pub fn compressed_write_name(&self, blob: &Blob) -> String {
        self.qualify(&format!("uploads/{}/{}", uuid::Uuid::new_v4(), blob.compressed_name("zstd")))
    }

    /// A blob with this content.
    pub fn blob_of(&self, data: impl Into<bytes::Bytes>) -> Blob {
        Blob::new(self.function, data)
    }

    /// A unique incompressible blob of at least 16 bytes.
    pub fn blob(&self, size: usize) -> Blob {
        self.blob_of(self.run.salt.noise(size))
    }

    /// A unique compressible blob of at least 60 bytes.
    pub fn text(&self, size: usize) -> Blob {
        self.blob_of(self.run.salt.text(size))
    }

    /// An encoded message as a blob.
    pub fn message(&self, message: &impl Message) -> Blob {
        self.blob_of(message.encode_to_vec())
    }

    /// The digest of a blob that was never stored.
    pub fn unknown(&self) -> reapi::Digest {
        self.blob(100).digest
    }

    pub fn empty(&self) -> Blob {
        self.blob_of(bytes::Bytes::new())
    }

    /// A unique word for file names and arguments.
    pub fn word(&self) -> String {
        self.run.salt.word()
    }

    /// Counts bytes that are sent to be stored.
    pub fn count_written(&self, bytes: usize) {
        self.run.written.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Number of bytes sent to be stored so far in the whole run.
    pub fn bytes_written(&self) -> u64 {
        self.run.written.load(Ordering::Relaxed)
    }

    /// The result of the run's first action.
    pub(super) fn first_action(&self) -> &OnceCell<Verdict> {
        &self.run.first_action
    }

    /// Records an operation that this run has started, until [`Session::operation_ended`].
    pub fn operation_started(&self, name: &str) {
        self.operations_of_run().insert(name.to_owned());
    }

    /// Removes an operation that need not be cancelled any more.
    pub fn operation_ended(&self, name: &str) {
        self.operations_of_run().remove(name);
    }

    fn operations_of_run(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.run.operations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cancels the operations that checks have started and whose end they have not seen.
    pub async fn cancel_what_is_left(&self) {
        let names = std::mem::take(&mut *self.operations_of_run());
        let cancel_all = async {
            for name in names {
                // If the server lacks the method, the operations end by their timeouts.
                let _ = self.operations().cancel_operation(CancelOperationRequest { name }).await;
            }
        };
        let _ = tokio::time::timeout(CLEAN_UP_LIMIT, cancel_all).await;
    }

    /// The connection with deadline and identity.
    pub fn service(&self) -> Service {
        self.run.target.service(self.channel.clone())
    }

    /// The bare connection, for checks of transport details.
    pub fn channel(&self) -> AuthorizedChannel {
        self.channel.clone()
    }

    pub fn capabilities_client(&self) -> CapabilitiesClient<Service> {
        CapabilitiesClient::new(self.service())
    }

    pub fn cas(&self) -> ContentAddressableStorageClient<Service> {
        ContentAddressableStorageClient::new(self.service())
    }

    pub fn byte_stream(&self) -> ByteStreamClient<Service> {
        ByteStreamClient::new(self.service())
    }

    pub fn action_cache(&self) -> ActionCacheClient<Service> {
        ActionCacheClient::new(self.service())
    }

    pub fn execution(&self) -> ExecutionClient<Service> {
        ExecutionClient::new(self.service())
    }

    pub fn operations(&self) -> OperationsClient<Service> {
        OperationsClient::new(self.service())
    }

    pub fn fetch(&self) -> FetchClient<Service> {
        FetchClient::new(self.service())
    }

    pub fn push(&self) -> PushClient<Service> {
        PushClient::new(self.service())
    }

    pub fn log_streams(&self) -> LogStreamServiceClient<Service> {
        LogStreamServiceClient::new(self.service())
    }
}

/// The digest function of the run: the requested one, or SHA256, or the first listed one that this build supports.
fn choose_function(asked: Option<&str>, capabilities: &ServerCapabilities) -> Result<DigestFunction> {
    let by_name = |name: &str| {
        let named = |function: &&DigestFunction| function.wire().as_str_name().eq_ignore_ascii_case(name);
        DigestFunction::ALL.iter().copied().find(|function| named(&function))
    };
    if let Some(name) = asked {
        return by_name(name).ok_or_else(|| {
            Error::Invalid(format!("digest function \"{}\" is not known here", name.escape_debug()))
        });
    }
    let listed = capabilities.cache_capabilities.as_ref().map_or(&[][..], |cache| &cache.digest_functions);
    let known = DigestFunction::ALL.iter().copied();
    let offered = known.filter(|function| listed.contains(&(function.wire() as i32)));
    Ok(offered.min_by_key(|function| *function != DigestFunction::Sha256).unwrap_or(DigestFunction::Sha256))
}

/// A feature that the server lists by number, such as a compressor.
///
/// # Errors
/// Absent when it is not in the list.
pub(crate) fn listed(what: &str, list: &[i32], number: i32) -> Verdict {
    let claimed = list.contains(&number);
    if claimed { Ok(()) } else { Err(Stop::Absent(format!("the server does not list {what}"))) }
}
