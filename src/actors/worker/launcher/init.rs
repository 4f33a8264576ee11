//! The first process of a cell. It sets the cell up, runs one command in it, reports how the command ended, and exits.
//!
//! It is a fork of the runner and shares no memory with it. As the first process of a pid namespace it adopts every
//! orphan in the cell, and no process in the cell can kill it. When it exits, the kernel kills the whole cell. It exits
//! when the command has ended or when the runner is gone, which it notices because its socket is closed.

use super::{
    children::{ChildExits, Children},
    exhausted,
    open_files::receive_open,
    protocol::{self, CellEvent, CellReady, Ended, Failed, FromCell, Run},
    spawn::Stack,
    sys,
};
use crate::sandbox::{
    SetupFailure, confine, layers,
    world::{CellSetup, World},
};
use rustix::{
    event::{PollFd, PollFlags},
    fs::{self as rfs, Mode, OFlags},
};
use std::{
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

/// The byte with which the runner reports that the user of the cell is mapped.
pub(super) const USER_MAPPED: u8 = 1;

/// Main function of the first process; returns its exit code. It uses no inherited descriptors except `setup` and
/// `socket`.
pub(super) fn init_main(socket: &UnixStream, world: &World, setup: CellSetup) -> i32 {
    i32::from(live(socket, world, setup).is_err())
}

fn live(socket: &UnixStream, world: &World, setup: CellSetup) -> io::Result<()> {
    let kept: Vec<_> = setup.descriptors().chain([0, 1, 2, socket.as_raw_fd()]).collect();
    sys::close_all_but(&kept)?;
    sys::die_with_parent()?;
    // If the runner dies, the server recognises the orphaned process by its session (see `reap`).
    rustix::process::setsid()?;
    let mut user_mapped = [0];
    if (&*socket).read(&mut user_mapped)? == 0 || user_mapped != [USER_MAPPED] {
        return Ok(());
    }
    let cell = match world.enter(&setup) {
        Ok(cell) => cell,
        Err(failure) => return tell(socket, CellEvent::Failed(in_words(&failure))),
    };
    let _gateway = setup.into_gateway();
    // The change of user has cleared the parent death signal.
    sys::die_with_parent()?;
    let null = rfs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    sys::become_stdin(&null)?;
    tell(socket, CellEvent::Ready(CellReady {}))?;
    let Some(files) = receive_open(socket)? else { return Ok(()) };
    let [root, stdout, stderr, stdin @ ..] = &*files else { return Err(io::ErrorKind::InvalidData.into()) };
    let Some(run) = protocol::read::<Run>(socket)? else { return Ok(()) };
    match run_one(socket, || world.finish(cell, root), run, (stdin.first(), stdout, stderr)) {
        Ok(Some(ended)) => tell(socket, CellEvent::Ended(ended)),
        Ok(None) => Ok(()),
        Err(failed) => tell(socket, CellEvent::Failed(failed)),
    }
}

/// Runs the command; `None` if the runner is gone.
fn run_one(
    socket: &UnixStream,
    close: impl FnOnce() -> Result<&'static Path, SetupFailure>,
    run: Run,
    (stdin, stdout, stderr): (Option<&OwnedFd>, &OwnedFd, &OwnedFd),
) -> Result<Option<Ended>, Failed> {
    let root = close().map_err(|failure| Failed {
        message: format!("could not set up the sandbox: {failure}"),
        errno: 0,
    })?;
    if run.layers.as_ref().is_some_and(|layers| layers.is_trial) {
        let failed = |failure: SetupFailure| Failed { message: failure.to_string(), errno: 0 };
        layers::try_out(root).map_err(failed)?;
    }
    let failed = |error: io::Error| Failed {
        message: format!("could not start a command in the sandbox: {error}"),
        errno: 0,
    };
    let outputs = (stdout.as_fd(), stderr.as_fd());
    if run.processes > 0 {
        // The limit of the cell is the largest of all pools, because a cell is made before its command is known.
        confine::limit_processes(run.processes).map_err(failed)?;
    }
    // This must come before the command is started, because the command can lower the limit on open files of this
    // process.
    let child_exits = ChildExits::watch().map_err(failed)?;
    let stdin = stdin.map(|stdin| stdin.as_fd());
    let children = Children::start(run, root, stdin, outputs, &mut Stack::new()).map_err(failed)?;
    let mut children = children.examining_failure(exhausted::examine);
    loop {
        let reaped = children.reap_ended().map_err(failed)?;
        if reaped.first_ended {
            break;
        }
        let mut fds = vec![PollFd::new(socket, PollFlags::IN)];
        child_exits.wait(&mut fds, reaped.pause()).map_err(failed)?;
        if !fds[0].revents().is_empty() {
            return Ok(None);
        }
    }
    children.clear(&child_exits, sys::kill_all_others).map_err(failed)?;
    Ok(Some(children.report()))
}

fn in_words(failure: &SetupFailure) -> Failed {
    match failure.error.raw_os_error() {
        Some(errno) => Failed { message: failure.step.clone(), errno },
        None => Failed { message: failure.to_string(), errno: 0 },
    }
}

fn tell(socket: &UnixStream, event: CellEvent) -> io::Result<()> {
    protocol::write(socket, &FromCell { event: Some(event) })
}
