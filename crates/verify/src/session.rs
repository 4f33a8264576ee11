//! A session: one connection to the server, one instance and one digest function, and the clients of every service.
//!
//! It is cheap to clone and to change: [`Session::with_instance`], [`Session::with_function`], [`Session::reconnect`]. All
//! sessions of a run share its salt, its options and what the server said of itself at the beginning.

use super::{
    Options,
    blob::{Blob, Salt, tail},
    check::{Answer as _, Step as _, Stop, Verdict, absent, fail},
    connection::{CONNECT_LIMIT, Service, Target},
};
use gorego_client::{
    foreign_protocol,
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
use tonic::transport::Channel;

/// How long the operations that checks left behind may take to be cancelled, all together.
const CLEAN_UP_LIMIT: Duration = Duration::from_secs(5);

/// See the top of this file.
#[derive(Debug, Clone)]
pub struct Session {
    run: Arc<Run>,
    channel: Channel,
    instance: String,
    function: DigestFunction,
    /// What requests say about it; 0 in a session that leaves the field unset.
    function_number: i32,
    /// The cases that the check is in.
    cases: Arc<Cases>,
}

/// The cases that a check is in, by the order in which it entered them.
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

/// What all sessions of a run share.
#[derive(Debug)]
struct Run {
    options: Options,
    target: Target,
    capabilities: ServerCapabilities,
    salt: Salt,
    written: AtomicU64,
    /// Names of operations that this run started and has not seen the end of.
    operations: Mutex<BTreeSet<String>>,
    /// Whether a trivial action was run; see [`Session::runs_actions`].
    first_action: OnceCell<Verdict>,
}

impl Session {
    /// Connects, and asks for the capabilities that the whole run goes by.
    ///
    /// # Errors
    /// `Invalid` for options that make no sense; `Unavailable` when nobody answers or GetCapabilities fails.
    pub async fn connect(options: Options) -> Result<Self> {
        check_instance_name(&options.instance)?;
        let salt = Salt::new();
        let target = Target::new(&options, &salt)?;
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
                let why = foreign_protocol(&options.endpoint).await.map_or(why, str::to_owned);
                return Err(Error::Unavailable(format!(
                    "no server to verify at {}: {why}",
                    options.endpoint
                )));
            }
        };
        let function = choose_function(options.digest_function.as_deref(), &capabilities)?;
        let instance = options.instance.clone();
        let run = Run {
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

    /// The same for one check, which is in no case yet.
    pub fn for_check(&self) -> Self {
        Self { cases: Arc::default(), ..self.clone() }
    }

    /// Runs a part of a check as one of its cases: a failure of the part names the case.
    ///
    /// # Errors
    /// Those of the part.
    pub async fn case<T>(&self, case: impl Display, part: impl Future<Output = Verdict<T>>) -> Verdict<T> {
        let case = case.to_string();
        let number = self.cases.enter(case.clone());
        let verdict = part.await;
        // A part that is given up, because the check ran out of time, stays in the list for the report.
        self.cases.open().remove(&number);
        verdict.case(case)
    }

    /// The cases that the check is in, the outermost first.
    pub fn open_cases(&self) -> Vec<String> {
        self.cases.open().values().cloned().collect()
    }

    /// The same over a connection of its own.
    ///
    /// # Errors
    /// A failure when the server does not take another connection.
    pub async fn reconnect(&self) -> Verdict<Self> {
        Ok(Self { channel: self.run.target.connect().await?, ..self.clone() })
    }

    /// The same over a connection that sends a ping at this interval, also while nothing is asked.
    ///
    /// # Errors
    /// As [`Session::reconnect`].
    pub async fn reconnect_pinging(&self, interval: Duration) -> Verdict<Self> {
        Ok(Self { channel: self.run.target.connect_pinging(interval).await?, ..self.clone() })
    }

    /// The same on another instance.
    pub fn with_instance(&self, instance: impl Into<String>) -> Self {
        Self { instance: instance.into(), ..self.clone() }
    }

    /// The same with another digest function.
    pub fn with_function(&self, function: DigestFunction) -> Self {
        Self { function, function_number: function.wire().into(), ..self.clone() }
    }

    /// The same, leaving the field `digest_function` of every request unset (GEN-08).
    pub fn without_function_number(&self) -> Self {
        Self { function_number: 0, ..self.clone() }
    }

    /// The options of the run.
    pub fn options(&self) -> &Options {
        &self.run.options
    }

    /// What the server said when the run began.
    pub fn capabilities(&self) -> &ServerCapabilities {
        &self.run.capabilities
    }

    /// What it said of its cache.
    ///
    /// # Errors
    /// Absent when it claims none.
    pub fn cache(&self) -> Verdict<&CacheCapabilities> {
        let cache = self.run.capabilities.cache_capabilities.as_ref();
        cache.ok_or_else(|| absent("the server claims no cache_capabilities"))
    }

    /// What it said of its execution.
    ///
    /// # Errors
    /// Absent when it claims none, or that it is off.
    pub fn executes(&self) -> Verdict<&ExecutionCapabilities> {
        let execution = self.run.capabilities.execution_capabilities.as_ref();
        let execution = execution.filter(|execution| execution.exec_enabled);
        execution.ok_or_else(|| absent("the server does not claim execution (exec_enabled)"))
    }

    /// Goes on only where results may be written into the action cache.
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

    /// The functions that the server lists and this build can compute.
    pub fn functions(&self) -> Vec<DigestFunction> {
        let cache = self.run.capabilities.cache_capabilities.as_ref();
        let listed = cache.map_or(&[][..], |cache| &cache.digest_functions);
        let mut known = DigestFunction::ALL.to_vec();
        known.retain(|function| listed.contains(&(function.wire() as i32)));
        known
    }

    /// The most payload bytes of a batch; where the server states no limit, what clients assume then (CAP-10).
    pub fn batch_limit(&self) -> usize {
        let cache = self.run.capabilities.cache_capabilities.as_ref();
        match cache.map_or(0, |cache| cache.max_batch_total_size_bytes) {
            limit @ 1.. => usize::try_from(limit).unwrap_or(usize::MAX),
            _ => 4_000_000,
        }
    }

    /// The instance name, for requests.
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

    /// The name under which this digest is read.
    pub fn read_name(&self, digest: &reapi::Digest) -> String {
        self.qualify(&format!("blobs/{}", tail(self.function, digest)))
    }

    /// A new name under which this blob is written.
    pub fn write_name(&self, blob: &Blob) -> String {
        self.qualify(&format!("uploads/{}/{}", uuid::Uuid::new_v4(), blob.name()))
    }

    /// A new name under which this blob is written compressed.
    pub fn compressed_write_name(&self, blob: &Blob) -> String {
        self.qualify(&format!("uploads/{}/{}", uuid::Uuid::new_v4(), blob.compressed_name("zstd")))
    }

    /// A blob of these bytes.
    pub fn blob_of(&self, data: impl Into<bytes::Bytes>) -> Blob {
        Blob::new(self.function, data)
    }

    /// A blob that nobody has; incompressible. Unique from 16 bytes on.
    pub fn blob(&self, size: usize) -> Blob {
        self.blob_of(self.run.salt.noise(size))
    }

    /// A blob that nobody has and that compresses well. Unique from 60 bytes on.
    pub fn text(&self, size: usize) -> Blob {
        self.blob_of(self.run.salt.text(size))
    }

    /// The blob of a message.
    pub fn message(&self, message: &impl Message) -> Blob {
        self.blob_of(message.encode_to_vec())
    }

    /// The digest of something that was never stored.
    pub fn unknown(&self) -> reapi::Digest {
        self.blob(100).digest
    }

    /// The blob without bytes.
    pub fn empty(&self) -> Blob {
        self.blob_of(bytes::Bytes::new())
    }

    /// A word that nothing else uses, for file names and arguments.
    pub fn word(&self) -> String {
        self.run.salt.word()
    }

    /// Counts bytes that are sent to be stored.
    pub fn count_written(&self, bytes: usize) {
        self.run.written.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes sent to be stored so far, by the whole run.
    pub fn bytes_written(&self) -> u64 {
        self.run.written.load(Ordering::Relaxed)
    }

    /// What came of the run's first action.
    pub(super) fn first_action(&self) -> &OnceCell<Verdict> {
        &self.run.first_action
    }

    /// Remembers an operation that this run has started, until [`Session::operation_ended`].
    pub fn operation_started(&self, name: &str) {
        self.operations_of_run().insert(name.to_owned());
    }

    /// Forgets an operation that needs no cancelling any more.
    pub fn operation_ended(&self, name: &str) {
        self.operations_of_run().remove(name);
    }

    fn operations_of_run(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.run.operations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cancels the operations that checks have started and not seen to their end.
    pub async fn cancel_what_is_left(&self) {
        let names = std::mem::take(&mut *self.operations_of_run());
        let cancel_all = async {
            for name in names {
                // A server without the call ends them by their timeouts.
                let _ = self.operations().cancel_operation(CancelOperationRequest { name }).await;
            }
        };
        let _ = tokio::time::timeout(CLEAN_UP_LIMIT, cancel_all).await;
    }

    /// The connection, with deadline and identity.
    pub fn service(&self) -> Service {
        self.run.target.service(self.channel.clone())
    }

    /// The connection alone, for checks of what travels beside the messages.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// `Capabilities`.
    pub fn capabilities_client(&self) -> CapabilitiesClient<Service> {
        CapabilitiesClient::new(self.service())
    }

    /// `ContentAddressableStorage`.
    pub fn cas(&self) -> ContentAddressableStorageClient<Service> {
        ContentAddressableStorageClient::new(self.service())
    }

    /// `ByteStream`.
    pub fn byte_stream(&self) -> ByteStreamClient<Service> {
        ByteStreamClient::new(self.service())
    }

    /// `ActionCache`.
    pub fn action_cache(&self) -> ActionCacheClient<Service> {
        ActionCacheClient::new(self.service())
    }

    /// `Execution`.
    pub fn execution(&self) -> ExecutionClient<Service> {
        ExecutionClient::new(self.service())
    }

    /// `Operations`.
    pub fn operations(&self) -> OperationsClient<Service> {
        OperationsClient::new(self.service())
    }

    /// `Fetch` of Remote Asset.
    pub fn fetch(&self) -> FetchClient<Service> {
        FetchClient::new(self.service())
    }

    /// `Push` of Remote Asset.
    pub fn push(&self) -> PushClient<Service> {
        PushClient::new(self.service())
    }

    /// `LogStreamService`.
    pub fn log_streams(&self) -> LogStreamServiceClient<Service> {
        LogStreamServiceClient::new(self.service())
    }
}

/// The function of the run: the one asked for, or SHA256, or the first of the server's that this build can compute.
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

/// A feature that the server lists a name for, such as a compressor.
///
/// # Errors
/// Absent when it is not in the list.
pub fn listed(what: &str, list: &[i32], number: i32) -> Verdict {
    let claimed = list.contains(&number);
    if claimed { Ok(()) } else { Err(Stop::Absent(format!("the server does not list {what}"))) }
}
