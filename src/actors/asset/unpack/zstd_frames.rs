//! [`ZstdFrames`]: a zstd stream, frame by frame, so that the first bytes of each are looked at.
//!
//! The library goes on to the next frame by itself, and where it was built for that, frames of the formats before 1.0 are
//! among those it takes: code that nobody looks after any more, and that must not get what an origin sends. (Leaving that
//! feature out is not in our hands alone: whoever else of our dependencies uses the library asks for it as well.)

use super::ZSTD_WINDOW_LOG_MAX;
use gorego_reapi::compression::is_frame_magic;
use std::{
    io::{self, BufRead, Chain, Cursor, Read},
    mem,
};
use zstd::stream::read::Decoder;

/// One frame; its first bytes were taken from the input to look at them.
type Frame<R> = Decoder<'static, Chain<Cursor<[u8; 4]>, R>>;

/// Reads what a stream of zstd frames stands for; see the module documentation.
pub struct ZstdFrames<R: BufRead>(At<R>);

enum At<R: BufRead> {
    Start(R),
    Frame(Box<Frame<R>>),
    End,
}

impl<R: BufRead> ZstdFrames<R> {
    /// A reader of the stream that begins here.
    pub fn new(input: R) -> Self {
        Self(At::Start(input))
    }
}

impl<R: BufRead> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Nothing read would be taken for the end of a frame.
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if let At::Frame(frame) = &mut self.0 {
                let read = frame.read(buffer)?;
                if read > 0 {
                    return Ok(read);
                }
            }
            let input = match mem::replace(&mut self.0, At::End) {
                At::Start(input) => input,
                At::Frame(frame) => frame.into_inner().into_inner().1,
                At::End => return Ok(0),
            };
            match next_frame(input)? {
                Some(frame) => self.0 = At::Frame(Box::new(frame)),
                None => return Ok(0),
            }
        }
    }
}

/// The frame that begins here; `None` at the end of the input.
fn next_frame<R: BufRead>(mut input: R) -> io::Result<Option<Frame<R>>> {
    let mut magic = [0; 4];
    if input.fill_buf()?.is_empty() {
        return Ok(None);
    }
    input.read_exact(&mut magic)?;
    if !is_frame_magic(magic) {
        let message = "no zstd frame begins where one has ended";
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    let mut frame = Decoder::with_buffer(Cursor::new(magic).chain(input))?.single_frame();
    frame.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
    Ok(Some(frame))
}
