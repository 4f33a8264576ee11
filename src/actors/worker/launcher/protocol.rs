//! What a worker and its runner process say to each other: length-prefixed protobuf messages over a socket.
//!
//! Both ends are always the same binary, so there is no versioning. One [`Run`] is answered by one [`FromRunner`]; a [`Kill`]
//! hurries that answer and is ignored when nothing runs. A [`Sandbox`] is the first order, if it comes at all. A runner and a
//! cell speak in the same way: a cell says [`CellReady`], gets one [`Run`], and says how it ended. The pipes of a command that talks
//! with the server go the way of its [`Run`], as open files.

use crate::sandbox::{kind::CellKind, layers::Layers, settings::Sandbox};
use gorego_reapi::proto::gorego;
use prost::Message;
use std::io::{self, Read, Write};

/// Largest message. Arguments and environment of one process are at most 6 MiB on Linux; requests are smaller than this.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024 * 1024;

/// An order to the runner.
#[derive(Clone, PartialEq, Message)]
pub struct ToRunner {
    /// What to do.
    #[prost(oneof = "Order", tags = "1, 2, 3")]
    pub order: Option<Order>,
}

/// What to do.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Order {
    /// Run a command and answer when nothing of it is left.
    #[prost(message, tag = "1")]
    Run(Run),
    /// Kill what runs.
    #[prost(message, tag = "2")]
    Kill(Kill),
    /// Run all commands in this sandbox.
    #[prost(message, tag = "3")]
    Enclose(Sandbox),
}

/// Kills what runs.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Kill {}

/// A command; see [`Launch`](super::super::command::Launch) for the fields.
#[derive(Clone, PartialEq, Message)]
pub struct Run {
    /// Files to try as the program.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub programs: Vec<Vec<u8>>,
    /// argv.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub arguments: Vec<Vec<u8>>,
    /// The whole environment.
    #[prost(bytes = "vec", repeated, tag = "3")]
    pub environment: Vec<Vec<u8>>,
    /// The input root.
    #[prost(bytes = "vec", tag = "4")]
    pub root: Vec<u8>,
    /// Where to run, relative to the input root.
    #[prost(bytes = "vec", tag = "5")]
    pub working_directory: Vec<u8>,
    /// Log of stdout, made by the runner.
    #[prost(bytes = "vec", tag = "6")]
    pub stdout: Vec<u8>,
    /// Log of stderr, made by the runner.
    #[prost(bytes = "vec", tag = "7")]
    pub stderr: Vec<u8>,
    /// Largest file that the command may write, and longest log.
    #[prost(uint64, tag = "8")]
    pub max_file_bytes: u64,
    /// The layers of the input root, which is at `root` as it is without them.
    #[prost(message, optional, tag = "9")]
    pub layers: Option<Layers>,
    /// What kind of cell it needs.
    #[prost(message, optional, tag = "20")]
    pub kind: Option<CellKind>,
    /// A terminal that the command gets in place of `/dev/null` and the logs.
    #[prost(bytes = "vec", optional, tag = "10")]
    pub terminal: Option<Vec<u8>>,
    /// The command talks with the server: its standard input and output are pipes that follow this message
    /// ([`Pipes`](super::tool::Pipes)).
    #[prost(bool, tag = "11")]
    pub has_pipes: bool,
}

/// The answer to a [`Run`].
#[derive(Clone, PartialEq, Message)]
pub struct FromRunner {
    /// How it went.
    #[prost(oneof = "Reply", tags = "1, 2")]
    pub reply: Option<Reply>,
}

/// How a [`Run`] went.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Reply {
    /// There was a process, or a program that could not be started.
    #[prost(message, tag = "1")]
    Ended(Ended),
    /// It did not come to that, through no fault of the command.
    #[prost(message, tag = "2")]
    Failed(Failed),
}

/// The end of a command.
#[derive(Clone, PartialEq, Message)]
pub struct Ended {
    /// When it exited by itself.
    #[prost(int32, tag = "1")]
    pub exit_code: i32,
    /// The signal that ended it; 0 for none.
    #[prost(int32, tag = "2")]
    pub signal: i32,
    /// Errno when no program could be started; 0 for none.
    #[prost(int32, tag = "3")]
    pub not_started: i32,
    /// Monotonic time of the start.
    #[prost(uint64, tag = "4")]
    pub started_nanos: u64,
    /// Monotonic time of the end.
    #[prost(uint64, tag = "5")]
    pub ended_nanos: u64,
    /// What all processes used.
    #[prost(message, optional, tag = "6")]
    pub usage: Option<gorego::ResourceUsage>,
    /// Some process could not be killed in time.
    #[prost(bool, tag = "7")]
    pub survivors: bool,
    /// The command was killed because of this.
    #[prost(message, optional, tag = "8")]
    pub unkept: Option<Unkept>,
}

/// An output that is not in its log as a whole.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct Unkept {
    /// Which output: stderr, or else stdout.
    #[prost(bool, tag = "1")]
    pub is_stderr: bool,
    /// Why the log could not be written; 0 when it would have become too long.
    #[prost(int32, tag = "2")]
    pub errno: i32,
}

/// What kept the runner from starting anything.
#[derive(Clone, PartialEq, Message)]
pub struct Failed {
    /// For people.
    #[prost(string, tag = "1")]
    pub message: String,
    /// Errno of the system call that failed; 0 when it was none.
    #[prost(int32, tag = "2")]
    pub errno: i32,
}

/// What the first process of a cell says.
#[derive(Clone, PartialEq, Message)]
pub struct FromCell {
    /// What is new.
    #[prost(oneof = "News", tags = "1, 2, 3")]
    pub news: Option<News>,
}

/// What is new in a cell.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum News {
    /// It waits for its order.
    #[prost(message, tag = "1")]
    Ready(CellReady),
    /// Its command has ended, and so has everything else in it.
    #[prost(message, tag = "2")]
    Ended(Ended),
    /// A step failed, through no fault of the command.
    #[prost(message, tag = "3")]
    Failed(Failed),
}

/// A cell that waits for its order.
#[derive(Clone, Copy, PartialEq, Message)]
pub struct CellReady {}

/// Sends a message.
///
/// # Errors
/// Those of the socket; `InvalidInput` when the message is too large.
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

/// Receives a message; `None` when the other end is gone.
///
/// # Errors
/// Those of the socket; `InvalidData` for anything that is not a message.
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
