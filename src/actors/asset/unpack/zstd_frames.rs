//! [`ZstdFrames`]: decodes a zstd stream frame by frame and checks the magic number of each frame.
//!
//! By itself, the library continues with the next frame. If it is built with legacy support, it also decodes frames of
//! the formats before 1.0, with code that is no longer maintained and must not get untrusted input. (This crate cannot
//! disable that feature alone, because other dependencies enable it too.)

use super::ZSTD_WINDOW_LOG_MAX;
use gorego_reapi::compression::is_frame_magic;
use std::{
    io::{self, BufRead, Chain, Cursor, Read},
    mem,
};
use zstd::stream::read::Decoder;

/// The decoder of one frame. Its magic number was already read from the input.
type ZstdFrame<R> = Decoder<'static, Chain<Cursor<[u8; 4]>, R>>;

/// Decodes a stream of zstd frames; see the module documentation.
pub(crate) struct ZstdFrames<R: BufRead>(At<R>);

enum At<R: BufRead> {
    Start(R),
    Frame(Box<ZstdFrame<R>>),
    End,
}

impl<R: BufRead> ZstdFrames<R> {
    /// A decoder of the stream that begins here.
    pub(crate) fn new(input: R) -> Self {
        Self(At::Start(input))
    }
}

impl<R: BufRead> Read for ZstdFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Reading nothing would look like the end of a frame.
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

/// Begins the next frame; `None` at the end of the input.
fn next_frame<R: BufRead>(mut input: R) -> io::Result<Option<ZstdFrame<R>>> {
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
