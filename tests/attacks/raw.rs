//! HTTP/2 of a hostile client: frames without a library that would enforce the rules (RFC 9113, RFC 7541).

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration,
};

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;
pub(crate) const ACK: u8 = 0x1;
pub(crate) const END_STREAM: u8 = 0x1;
pub(crate) const END_HEADERS: u8 = 0x4;
pub(crate) const ENHANCE_YOUR_CALM: u32 = 0xb;

/// The largest possible window.
const WINDOW_MAX: u32 = (1 << 31) - 1;

/// A frame.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The opening frames of a client that accepts everything.
pub(crate) fn preface() -> Vec<u8> {
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    let mut window = 4u16.to_be_bytes().to_vec();
    window.extend(WINDOW_MAX.to_be_bytes());
    bytes.extend(frame(SETTINGS, 0, 0, &window));
    bytes.extend(frame(WINDOW_UPDATE, 0, 0, &(WINDOW_MAX - 65_535).to_be_bytes()));
    bytes
}

/// The header block of a call of this method.
pub(crate) fn header_block(path: &str) -> Vec<u8> {
    let text = |text: &str| {
        let mut bytes = vec![u8::try_from(text.len()).unwrap()];
        bytes.extend(text.as_bytes());
        bytes
    };
    // POST and http, from the static table; then literals without indexing.
    let mut block = vec![0x83, 0x86, 0x04];
    block.extend(text(path));
    block.push(0x01);
    block.extend(text("localhost"));
    for (name, value) in [("content-type", "application/grpc"), ("te", "trailers")] {
        block.push(0);
        block.extend(text(name));
        block.extend(text(value));
    }
    block
}

/// The HEADERS frame of a call.
pub(crate) fn headers(stream: u32, path: &str) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &header_block(path))
}

/// A whole call with this message.
pub(crate) fn call(stream: u32, path: &str, message: &impl prost::Message) -> Vec<u8> {
    let mut payload = vec![0];
    payload.extend((message.encoded_len() as u32).to_be_bytes());
    payload.extend(message.encode_to_vec());
    let mut bytes = headers(stream, path);
    bytes.extend(frame(DATA, END_STREAM, stream, &payload));
    bytes
}

/// The ids of the streams that a client may open, in order.
pub(crate) fn streams() -> impl Iterator<Item = u32> {
    (1..).step_by(2)
}

/// A socket that is connected from this address.
pub(crate) fn connect_from(address: &str, server: SocketAddr) -> TcpStream {
    let from: IpAddr = address.parse().unwrap();
    let socket =
        rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &SocketAddr::new(from, 0)).unwrap();
    rustix::net::connect(&socket, &server).unwrap();
    TcpStream::from(socket)
}

/// Reads frames until the server closes, and returns the code of its GOAWAY, if it sent one. Panics when it does not
/// close.
pub(crate) fn goodbye(socket: &mut TcpStream) -> Option<u32> {
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => bytes.extend(&buffer[..read]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
            Err(error) => panic!("the server does not close: {error}"),
        }
    }
    let mut rest = bytes.as_slice();
    let mut code = None;
    while rest.len() >= 9 {
        let length = u32::from_be_bytes([0, rest[0], rest[1], rest[2]]) as usize;
        if rest[3] == GOAWAY && rest.len() >= 17 {
            code = Some(u32::from_be_bytes(rest[13..17].try_into().unwrap()));
        }
        rest = rest.get(9 + length..).unwrap_or_default();
    }
    code
}

/// Writes until the server closes. Panics when the server accepts everything.
pub(crate) fn write_until_closed(socket: &mut TcpStream, pieces: impl Iterator<Item = Vec<u8>>) {
    for piece in pieces {
        if socket.write_all(&piece).is_err() {
            return;
        }
    }
    panic!("the server took all of it");
}

/// Makes a whole call and reads until it is answered. The server accepts streams in order, so all earlier ones have
/// been accepted by then.
pub(crate) fn call_and_wait(socket: &mut TcpStream, stream: u32, path: &str, message: &impl prost::Message) {
    socket.write_all(&call(stream, path, message)).unwrap();
    read_until(socket, |kind, flags, of| of == stream && kind == HEADERS && flags & END_STREAM != 0);
}

/// Reads frames until one has this type, flags and stream.
pub(crate) fn read_until(socket: &mut TcpStream, is_it: impl Fn(u8, u8, u32) -> bool) {
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    try_read_until(socket, is_it).unwrap();
}

fn try_read_until(socket: &mut TcpStream, is_it: impl Fn(u8, u8, u32) -> bool) -> std::io::Result<()> {
    let mut unread: Vec<u8> = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        while let Some(head) = unread.first_chunk::<9>() {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            if unread.len() < 9 + length {
                break;
            }
            if is_it(head[3], head[4], stream) {
                return Ok(());
            }
            unread.drain(..9 + length);
        }
        let read = socket.read(&mut buffer)?;
        assert!(read > 0, "the server closed the connection");
        unread.extend(&buffer[..read]);
    }
}

/// Sends a PING and reads until it is answered. By then the HTTP/2 library has read all earlier frames, but may not
/// have accepted them.
pub(crate) fn ping(socket: &mut TcpStream) {
    socket.write_all(&frame(PING, 0, 0, b"are you?")).unwrap();
    read_until(socket, |kind, flags, _| kind == PING && flags & ACK != 0);
}

/// The same, unless it is not answered for so long.
pub(crate) fn ping_within(socket: &mut TcpStream, patience: Duration) -> std::io::Result<()> {
    socket.set_read_timeout(Some(patience))?;
    socket.write_all(&frame(PING, 0, 0, b"are you?"))?;
    try_read_until(socket, |kind, flags, _| kind == PING && flags & ACK != 0)
}
