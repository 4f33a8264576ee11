//! The messages between a worker and its runner process, and between a runner and a cell: length-prefixed protobuf
//! messages over a socket.
//!
//! Both ends are always the same binary, so there is no versioning. Each [`Run`] is answered by one [`FromRunner`]. A
//! [`Kill`] ends the command early; it is ignored if no command runs. If there is a sandbox, a [`Sandbox`] is the first
//! order. A cell uses the same protocol: it sends [`CellReady`], receives one [`Run`], and reports how the command
//! ended. The pipes of a command that talks to the server are sent as open files after its [`Run`].

use crate::sandbox::{full::FullMount, kind::CellKind, layers::Layers, settings::Sandbox};
use gorego_reapi::proto::gorego;
use prost::Message;
use std::io::{self, Read, Write};

/// Maximum size of a message. Linux allows at most 6 MiB of arguments and environment for a process, and requests are
/// smaller than this limit.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024 * 1024;

/// An order to the runner.
#[derive(Clone, PartialEq, Message)]
pub struct ToRunner {
    /// The order; `None` only in a malformed message.
    #[prost(oneof = "Order", tags = "1, 2, 3")]
    pub order: Option<Order>,
}

/// An order to the runner.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Order {
    /// Run a command, and answer when all its processes are gone.
    #[prost(message, tag = "1")]
    Run(Run),
    /// Kill the running command.
    #[prost(message, tag = "2")]
    Kill(Kill),
    /// Run all later commands in this sandbox.
    #[prost(message, tag = "3")]
    UseSandbox(Sandbox),
}

/// The order to kill the running command.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Kill {}

/// A command; see [`Launch`](super::super::command::Launch) for the fields.
#[derive(Clone, PartialEq, Message)]
pub struct Run {
    /// Files to try as the program, in order.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub programs: Vec<Vec<u8>>,
    /// The arguments, including argv\[0\].
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub arguments: Vec<Vec<u8>>,
    /// All environment variables of the command, as `NAME=value`.
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub environment: Vec<Vec<u8>>,
    /// Path of the input root.
    #[prost(bytes = "vec", tag = "4")]
    pub root: Vec<u8>,
    /// Working directory, relative to the input root.
    #[prost(bytes = "vec", tag = "5")]
    pub working_directory: Vec<u8>,
    /// Path of the log of stdout. The runner creates it for the first bytes.
    #[prost(bytes = "vec", tag = "6")]
    pub stdout: Vec<u8>,
    /// Path of the log of stderr. The runner creates it for the first bytes.
    #[prost(bytes = "vec", tag = "7")]
    pub stderr: Vec<u8>,
    /// Maximum size in bytes of a file that the command may write, and of each log.
    #[prost(uint64, tag = "8")]
    pub max_file_bytes: u64,
    /// The layers of the input root. Without layers, the input root is the directory at `root`.
    #[prost(message, optional, tag = "9")]
    pub layers: Option<Layers>,
    /// The kind of cell that the command needs.
    #[prost(message, optional, tag = "20")]
    pub kind: Option<CellKind>,
    /// Path of a terminal that the command gets instead of `/dev/null` and the logs.
    #[prost(bytes = "vec", optional, tag = "10")]
    pub terminal: Option<Vec<u8>>,
    /// Whether the command talks to the server. Its standard input and output are then pipes that are sent after this
    /// message ([`Pipes`](super::tool::Pipes)).
    #[prost(bool, tag = "11")]
    pub has_pipes: bool,
    /// Maximum number of processes and threads of the user of the cell; 0 for the limit that the cell has already.
    #[prost(uint64, tag = "12")]
    pub processes: u64,
}

/// The answer to a [`Run`].
#[derive(Clone, PartialEq, Message)]
pub struct FromRunner {
    /// The result; `None` only in a malformed message.
    #[prost(oneof = "Reply", tags = "1, 2")]
    pub reply: Option<Reply>,
}

/// The result of a [`Run`].
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Reply {
    /// A process was started and has ended, or the program could not be executed.
    #[prost(message, tag = "1")]
    Ended(Ended),
    /// A step before that failed, through no fault of the command.
    #[prost(message, tag = "2")]
    Failed(Failed),
}

/// How a command ended.
#[derive(Clone, PartialEq, Message)]
pub struct Ended {
    /// The exit code, if no signal ended it.
    #[prost(int32, tag = "1")]
    pub exit_code: i32,
    /// The signal that ended it; otherwise 0.
    #[prost(int32, tag = "2")]
    pub signal: i32,
    /// Errno if no program could be executed; otherwise 0.
    #[prost(int32, tag = "3")]
    pub not_started: i32,
    /// Monotonic time of the start, in nanoseconds.
    #[prost(uint64, tag = "4")]
    pub started_nanos: u64,
    /// Monotonic time of the end, in nanoseconds.
    #[prost(uint64, tag = "5")]
    pub ended_nanos: u64,
    /// Resource usage of all its processes together.
    #[prost(message, optional, tag = "6")]
    pub usage: Option<gorego::ResourceUsage>,
    /// Whether some process could not be killed in time.
    #[prost(bool, tag = "7")]
    pub survivors: bool,
    /// The output whose log is incomplete, for which the command was killed.
    #[prost(message, optional, tag = "8")]
    pub incomplete_log: Option<IncompleteLog>,
    /// The private file systems of the cell that were full when the command failed.
    #[prost(message, repeated, tag = "9")]
    pub full_mounts: Vec<FullMount>,
    /// The number of processes and threads in the cell when the command failed.
    #[prost(uint64, tag = "10")]
    pub processes: u64,
}

/// An output whose log is incomplete.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct IncompleteLog {
    /// Whether it is stderr; otherwise it is stdout.
    #[prost(bool, tag = "1")]
    pub is_stderr: bool,
    /// Errno of the write to the log; 0 if the log would have become too long.
    #[prost(int32, tag = "2")]
    pub errno: i32,
}

/// Why the runner could not start the command.
#[derive(Clone, PartialEq, Message)]
pub struct Failed {
    /// A message for people.
    #[prost(string, tag = "1")]
    pub message: String,
    /// Errno of the system call that failed; 0 if there is none.
    #[prost(int32, tag = "2")]
    pub errno: i32,
}

/// A message from the first process of a cell.
#[derive(Clone, PartialEq, Message)]
pub struct FromCell {
    /// The message; `None` only if it is malformed.
    #[prost(oneof = "CellEvent", tags = "1, 2, 3")]
    pub event: Option<CellEvent>,
}

/// A message from the first process of a cell.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum CellEvent {
    /// The cell waits for its order.
    #[prost(message, tag = "1")]
    Ready(CellReady),
    /// The command and all other processes of the cell have ended.
    #[prost(message, tag = "2")]
    Ended(Ended),
    /// A step failed, through no fault of the command.
    #[prost(message, tag = "3")]
    Failed(Failed),
}

/// The cell waits for its order.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct CellReady {}

/// Sends a message.
///
/// # Errors
/// The errors of the socket; `InvalidInput` if the message is too large.
pub fn write(mut socket: impl Write, message: &impl Message) -> io::Result<()> {
    let length = message.encoded_len();
    let prefix = u32::try_from(length).ok().filter(|_| length <= MAX_MESSAGE_BYTES);
    let Some(prefix) = prefix else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the command is too large to be started"));
    };
    let mut frame = Vec::with_capacity(length + size_of::<u32>());
    frame.extend_from_slice(&prefix.to_le_bytes());
    message.encode(&mut frame).map_err(io::Error::other)?;
    socket.write_all(&frame)
}

/// Receives a message; `None` if the other end is closed.
///
/// # Errors
/// The errors of the socket; `InvalidData` for anything that is not a valid message.
pub fn read<M: Message + Default>(mut socket: impl Read) -> io::Result<Option<M>> {
    let mut prefix = [0; size_of::<u32>()];
    match socket.read_exact(&mut prefix) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let length = u32::from_le_bytes(prefix) as usize;
    if length > MAX_MESSAGE_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut frame = vec![0; length];
    socket.read_exact(&mut frame)?;
    M::decode(&*frame).map(Some).map_err(|_| io::ErrorKind::InvalidData.into())
}
