//! The actor's part of uploads: it starts and ends them, and discards broken ones. [`super::uploads`] has the table.

use super::{
    CasActor,
    guards::{DiscardPartials, UploadRoom},
    settings,
    uploads::{
        Attempt, Begin, EndUpload, Partial,
        begin::{Began, BeginUpload, QueryUpload, UploadStatus},
    },
};
use crate::actors::mail::Receive;
use actix::{AsyncContext as _, Context, MessageResult};
use gorego_reapi::error::Error;
use std::time::Instant;

impl CasActor {
    /// Removes an upload from the table. Its bytes are kept for its client, or discarded.
    pub(super) fn end_upload(&mut self, ended: EndUpload, ctx: &Context<Self>) {
        if let Some(partial) = self.uploads.end(ended, Instant::now()) {
            self.discard(partial, ctx);
        }
        let (_, partials) = self.uploads.counts();
        if partials > settings::MAX_PARTIAL_UPLOADS {
            self.discard_excess(ctx);
        }
    }
}

impl Receive<BeginUpload> for CasActor {
    type Answer = MessageResult<BeginUpload>;

    fn receive(&mut self, message: BeginUpload, ctx: &mut Self::Context) -> Self::Answer {
        let BeginUpload { name, blob, offset, .. } = message;
        if self.renew(&blob).is_some() {
            return MessageResult(Ok(Began::Present));
        }
        if let Err(full) = self.shared.disk.check() {
            return MessageResult(Err(full));
        }
        match self.uploads.begin(name, blob, offset) {
            Begin::Busy(progress) => MessageResult(Ok(Began::Busy(progress))),
            Begin::Elsewhere(committed) => MessageResult(Err(Error::Invalid(format!(
                "the upload of blob {} has {committed} bytes so far; write_offset is {offset} and must be equal to that",
                blob.digest
            )))),
            Begin::Resume(entered, Partial { sink, room }) => {
                let mut attempt = Attempt::new(ctx.address(), name, blob, entered, room);
                attempt.sink = Some(sink);
                MessageResult(Ok(Began::Start(Box::new(attempt))))
            }
            Begin::Fresh(entered, leftover) => {
                if let Some(partial) = leftover {
                    self.discard(partial, ctx);
                }
                // An upload that cannot fit is refused before its first byte. Any other upload reserves room as its
                // bytes arrive.
                let twin = self.uploads.twin(&blob, &entered).filter(|_| !message.beside);
                let size = self.shared.volume.charge(blob.digest.size());
                let of_twins =
                    if message.beside { 0 } else { self.uploads.left_to_twins(&blob, &entered, size) };
                let wanted = size.saturating_add(of_twins);
                self.ease_leases(wanted, None);
                let fits = self.change(|index| index.check_fit(wanted, self.uploads.parked_bytes()));
                let attempt = Attempt::new(
                    ctx.address(),
                    name,
                    blob,
                    entered,
                    UploadRoom::for_blob(ctx.address(), blob),
                );
                MessageResult(match (fits, twin) {
                    (Ok(()), _) => Ok(Began::Start(Box::new(attempt))),
                    (Err(_), Some(twin)) => Ok(Began::NoRoomBeside(twin)),
                    (Err(shortage), None) => Err(shortage.into()),
                })
            }
        }
    }
}

impl Receive<DiscardPartials> for CasActor {
    type Answer = ();

    fn receive(&mut self, message: DiscardPartials, ctx: &mut Self::Context) {
        let DiscardPartials { caller, bound, bytes } = message;
        let mut freed = 0;
        while freed < bytes
            && let Some(partial) = self.uploads.pop_oldest_of(caller, bound)
        {
            freed += partial.room.bytes();
            self.discard(partial, ctx);
        }
    }
}

impl Receive<EndUpload> for CasActor {
    type Answer = ();

    fn receive(&mut self, ended: EndUpload, ctx: &mut Self::Context) {
        self.end_upload(ended, ctx);
    }
}

impl Receive<QueryUpload> for CasActor {
    type Answer = MessageResult<QueryUpload>;

    fn receive(&mut self, message: QueryUpload, _: &mut Self::Context) -> Self::Answer {
        MessageResult(match self.renew(&message.blob) {
            Some(_) => UploadStatus { committed: message.blob.digest.size(), complete: true },
            None => UploadStatus { committed: self.uploads.committed(message.name), complete: false },
        })
    }
}
