//! [`Workspace`]: the exec directory of one run.

use super::{
    BuildRoot, RootDirectory, names,
    removal::{Job, RemovalTicket},
    staged_trees::Base,
};
use crate::{
    actors::worker::{
        checkpoint::Checkpoint,
        dir::{self, FileIdentity},
        layer,
        store::Inputs,
    },
    instance::InstanceId,
    sandbox::layers::Layers,
};
use gorego_reapi::{
    digest::Digest,
    error::{Error, Result},
    tree::InputTree,
};
use rustix::fs::{self as rfs, Mode};
use std::{
    ffi::OsString,
    fs::File,
    io,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

/// An exec directory. It is removed on drop.
#[derive(Debug)]
pub struct Workspace {
    build_root: BuildRoot,
    place: Arc<RootDirectory>,
    name: OsString,
    path: PathBuf,
    /// Name of the directory that holds the input root, if that is not the run's own directory.
    for_action: Option<OsString>,
    root_path: PathBuf,
    opened: Option<OpenDirectories>,
    ticket: Option<RemovalTicket>,
    removes_itself: bool,
}

#[derive(Debug)]
struct OpenDirectories {
    top: File,
    /// The directory that holds the input root, if that is not `top`.
    for_action: Option<File>,
    root: File,
}

impl OpenDirectories {
    fn around_root(&self) -> &File {
        self.for_action.as_ref().unwrap_or(&self.top)
    }
}

impl Workspace {
    /// Opens the directory `name` of the build root as the exec directory of a run, and creates the input root in it or
    /// in a directory for the action. If a step fails, everything that was created is removed.
    pub(super) fn open(
        build_root: &BuildRoot,
        place: Arc<RootDirectory>,
        name: OsString,
        ticket: RemovalTicket,
        action: Option<&Digest>,
    ) -> io::Result<Self> {
        let mut workspace = Self {
            path: build_root.0.path.join(&name),
            root_path: PathBuf::new(),
            build_root: build_root.clone(),
            place,
            name,
            for_action: None,
            opened: None,
            ticket: Some(ticket),
            removes_itself: false,
        };
        workspace.lay_out(action)?;
        Ok(workspace)
    }

    fn lay_out(&mut self, action: Option<&Digest>) -> io::Result<()> {
        let top = dir::open_dir(&self.place.handle, &self.name)?;
        let for_action = match action {
            Some(action) => {
                let name = self.for_action.insert(names::make_for_action(&self.place.handle, action)?);
                self.root_path = self.build_root.0.path.join(&*name).join("root");
                Some(dir::open_dir(&self.place.handle, name)?)
            }
            None => {
                self.root_path = self.path.join("root");
                None
            }
        };
        let root = layer::make_directory(for_action.as_ref().unwrap_or(&top), "root")?;
        self.opened = Some(OpenDirectories { top, for_action, root });
        Ok(())
    }

    fn opened(&self) -> Result<&OpenDirectories> {
        self.opened.as_ref().ok_or_else(|| Error::internal("the exec directory is not open"))
    }

    /// The run's own directory, which holds the logs.
    ///
    /// # Errors
    /// None in practice: every workspace that was returned is open.
    pub fn top(&self) -> Result<&File> {
        self.opened().map(|opened| &opened.top)
    }

    /// The input root.
    ///
    /// # Errors
    /// The errors of [`Workspace::top`].
    pub fn root(&self) -> Result<&File> {
        self.opened().map(|opened| &opened.root)
    }

    /// Finds or makes a base for the input root, to lie below the layer of this run; see [`BuildRoot::stage`].
    ///
    /// # Errors
    /// As [`BuildRoot::stage`].
    pub(in crate::actors::worker) fn stage<'a>(
        &self,
        inputs: &mut dyn Inputs,
        wanted: &'a InputTree,
        instance: InstanceId,
        checkpoint: &Checkpoint,
    ) -> Result<Option<Base<'a>>> {
        self.build_root.stage(&self.place, inputs, wanted, instance, checkpoint)
    }

    /// Creates the work directory of the overlay and returns the layers to mount: the tree at `below` in the build
    /// root, and the layer of this run above it.
    ///
    /// # Errors
    /// The errors of the file system.
    pub(in crate::actors::worker) fn layers(&self, below: &Path) -> Result<Layers> {
        rfs::mkdirat(self.opened()?.around_root(), "work", Mode::RWXU)
            .map_err(|error| Error::io("make an exec directory", &error.into()))?;
        let work = self.root_path.with_file_name("work");
        let bytes = |path: &Path| path.as_os_str().as_bytes().to_vec();
        Ok(Layers {
            below: bytes(&self.build_root.0.path.join(below)),
            own: bytes(&self.root_path),
            work: bytes(&work),
            is_trial: false,
        })
    }

    /// Absolute path of the run's own directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Absolute path of the input root.
    pub fn root_path(&self) -> &Path {
        &self.root_path
    }

    /// Checks that both directories are still in place. Commands have no reason to remove them, so a loss counts as a
    /// failure of the server.
    ///
    /// # Errors
    /// `Unavailable` if one of them was removed or replaced.
    pub fn check_in_place(&self) -> Result<()> {
        let opened = self.opened()?;
        let around_root = self.root_path.parent().unwrap_or(&self.root_path);
        // Both may be the same directory.
        for (handle, path) in [(&opened.top, self.path.as_path()), (opened.around_root(), around_root)] {
            if !rfs::fstat(handle).is_ok_and(|stat| is_at(path, dir::file_id(&stat))) {
                return Err(Error::Unavailable(format!(
                    "the exec directory {} was removed while the action ran",
                    path.display()
                )));
            }
        }
        Ok(())
    }

    /// Removes it on this thread, so that its space is free on return.
    pub fn remove_now(mut self) {
        self.removes_itself = true;
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if let Some(OpenDirectories { top, for_action, .. }) = self.opened.take() {
            // The command may have removed their permissions, and moving needs write permission on both.
            let _ = rfs::fchmod(top, Mode::RWXU);
            let _ = for_action.map(|for_action| rfs::fchmod(for_action, Mode::RWXU));
        }
        let (place, remover) = (&self.place, &self.build_root.0.remover);
        if let Some(name) = self.for_action.take() {
            let inside = Path::new(&self.name).join("a");
            if rfs::renameat(&place.handle, &*name, &place.handle, &inside).is_err() {
                remover.remove_here(Job { place: place.clone(), name, ticket: None });
            }
        }
        let job =
            Job { place: place.clone(), name: std::mem::take(&mut self.name), ticket: self.ticket.take() };
        if self.removes_itself {
            remover.remove_here(job);
        } else {
            remover.remove(job);
        }
    }
}

/// Whether the file or directory with this identity is at a path.
fn is_at(path: &Path, id: FileIdentity) -> bool {
    rfs::lstat(path).is_ok_and(|stat| dir::file_id(&stat) == id)
}
