//! Connections: admitted by [`Connections`], served one request at a time, and closed so that the last response
//! arrives.
//!
//! Handshakes are done by the task of the connection. Every wait for a client is limited: for the head of a request
//! here, for its body by the mounts, and for an unread response in the kernel.

use crate::{
    budget::{Budget, Refusal, Share},
    call::ConnectionInfo,
    caller::Caller,
    connections::{Admitted, Connections, UNREAD_LIMIT},
    quick_ack::QuickAck,
    tls::{Socket, TlsPort},
};
use axum::{
    body::Body,
    extract::Request,
    http::{HeaderValue, header},
    response::Response,
    serve::{Listener as _, ListenerExt as _},
};
use futures::future::{BoxFuture, FutureExt as _};
use hyper::{
    body::{Body as _, Frame, Incoming, SizeHint},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    io::{self, IoSlice},
    net::{IpAddr, Ipv4Addr},
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::{TcpListener, TcpStream},
    select,
    sync::watch,
    time::timeout,
};

/// Time limit for the head of a request, counted from the previous response. It also closes idle connections.
const NEXT_HEAD_LIMIT: Duration = Duration::from_secs(60);
/// Size of the read buffer, which also limits the head of a request. Browsers and proxies send far less. Bodies pass
/// through it in any size.
const READ_MAX_BYTES: usize = 64 * 1024;
/// Heads up to this size are not counted. Heads of build clients have a few KB with a token.
const UNCOUNTED_HEAD_BYTES: u64 = 4 * 1024;
/// Larger heads count in steps of this size, by which the read buffer grows.
const HEAD_STEP_BYTES: u64 = 16 * 1024;
/// How long the rest of a request is read and discarded, if it was answered before its end. An immediate close would
/// reset the connection, and the client might never see the response.
const LINGER: Duration = Duration::from_secs(2);
/// Number of bytes that are discarded at a time.
const LINGER_BYTES: usize = 16 * 1024;

/// Both ends of a connection.
#[derive(Debug, Clone)]
pub(super) struct Ends {
    pub client: ConnectionInfo,
    /// The local address to which the client has connected.
    pub here: IpAddr,
}

/// Accepts connections until `shutdown` completes, then waits until all of them are closed.
pub(super) async fn serve(
    listener: TcpListener,
    connections: Connections,
    tls: Option<TlsPort>,
    shutdown: impl Future<Output = ()>,
    answer: impl Fn(Ends, Request) -> BoxFuture<'static, Response> + Clone + Send + Sync + Unpin + 'static,
) {
    let mut listener = listener.tap_io(prepare);
    let closing = watch::Sender::new(false);
    let mut shutdown = pin!(shutdown);
    loop {
        let (stream, peer) = select! {
            () = &mut shutdown => break,
            accepted = async {
                connections.until_few_are_closing().await;
                listener.accept().await
            } => accepted,
        };
        // Without a local address, only requests for loopback and for configured names are answered.
        let here = stream.local_addr().map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |address| address.ip());
        let Some(admitted) = connections.admit(peer) else { continue };
        let ends = Ends { client: ConnectionInfo::of(&admitted), here };
        let (answer, mut closed, tls) = (answer.clone(), closing.subscribe(), tls.clone());
        tokio::spawn(async move {
            let established = select! {
                established = establish(stream, &admitted, tls) => established,
                _ = closed.wait_for(|closing| *closing) => None,
            };
            let Some(stream) = established else { return };
            let state = admitted.state();
            let head = Arc::new(HeadRoom::new(&admitted));
            let stream = HeadMeter { stream, room: head.clone() };
            let answer = move |request: Request| {
                head.begin();
                let head = head.clone();
                answer(ends.clone(), request).inspect(move |_| head.end()).boxed()
            };
            // If a request is open when the connection is closed, its client takes no responses, or the certificate of
            // the client is no longer accepted. So the request can be dropped.
            select! {
                () = serve_one(stream, closed, answer) => {}
                _ = poll_fn(|context| state.poll_closing(context)) => {}
            }
        });
    }
    drop(listener);
    closing.send_replace(true);
    closing.closed().await;
}

/// Sets TCP_NODELAY, because small responses would otherwise wait for delayed acknowledgements, and a time limit for
/// unread data. If an option cannot be set, the connection works without it.
fn prepare(stream: &mut TcpStream) {
    let _ = stream.set_nodelay(true);
    let limit = u32::try_from(UNREAD_LIMIT.as_millis()).unwrap_or(u32::MAX);
    let _ = rustix::net::sockopt::set_tcp_user_timeout(&*stream, limit);
}

/// Does the TLS handshake if the port uses TLS. `None` when it failed.
async fn establish(stream: TcpStream, admitted: &Admitted, tls: Option<TlsPort>) -> Option<Socket> {
    let stream = QuickAck::new(stream);
    match tls {
        Some(tls) => tls.shake_hands(stream, admitted).await,
        None => Some(Socket::Plain(stream)),
    }
}

async fn serve_one(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    mut closing: watch::Receiver<bool>,
    answer: impl Fn(Request) -> BoxFuture<'static, Response> + Send + Sync + Unpin,
) {
    let service = service_fn(|request: hyper::Request<Incoming>| {
        let unread = Arc::new(AtomicBool::new(!request.body().is_end_stream()));
        let request = request.map(|body| Body::new(WatchedBody { body, unread: unread.clone() }));
        answer(request).map(move |mut response| {
            if unread.load(Ordering::Relaxed) {
                // Unread body bytes make another request impossible. Without this header the client would send one.
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        })
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(NEXT_HEAD_LIMIT)
        .max_buf_size(READ_MAX_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    // Errors are in the log line of the request, if there was one.
    let closing = async { drop(closing.wait_for(|closing| *closing).await) };
    let is_over = select! {
        _ = poll_fn(|context| connection.poll_without_shutdown(context)) => true,
        () = closing => false,
    };
    if is_over {
        linger(connection.into_parts().io.into_inner()).await;
    } else {
        Pin::new(&mut connection).graceful_shutdown();
        let _ = connection.await;
    }
}

/// The memory of the request head that a connection sends or that is being answered. Heads of more than
/// [`UNCOUNTED_HEAD_BYTES`] share a budget with the heads of the gRPC port, so that connections that send nothing but
/// heads cannot take all memory.
#[derive(Debug)]
struct HeadRoom {
    heads: Budget,
    caller: Caller,
    state: Mutex<HeadState>,
}

#[derive(Debug, Default)]
struct HeadState {
    /// Whether a request is being answered. Bytes that are read meanwhile belong to its body.
    is_answered: bool,
    bytes: u64,
    share: Option<Share>,
}

impl HeadRoom {
    fn new(admitted: &Admitted) -> Self {
        let (heads, caller) = (admitted.connections().heads().clone(), admitted.state().caller);
        Self { heads, caller, state: Mutex::default() }
    }

    /// Records that the head is complete.
    fn begin(&self) {
        self.state().is_answered = true;
    }

    /// Records that the next head begins.
    fn end(&self) {
        *self.state() = HeadState::default();
    }

    /// Counts bytes that were read.
    fn read(&self, bytes: u64) -> Result<(), Refusal> {
        let mut state = self.state();
        if state.is_answered {
            return Ok(());
        }
        state.bytes += bytes;
        // The library refuses heads that are longer than its buffer.
        let needed = state.bytes.next_multiple_of(HEAD_STEP_BYTES).min(READ_MAX_BYTES as u64);
        let is_small = state.bytes <= UNCOUNTED_HEAD_BYTES;
        match &mut state.share {
            Some(share) => share.grow(needed.saturating_sub(share.amount())),
            None if is_small => Ok(()),
            none => {
                *none = Some(self.heads.take(self.caller, needed)?);
                Ok(())
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, HeadState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream whose heads count. A head for which there is no room ends its connection.
struct HeadMeter<S> {
    stream: S,
    room: Arc<HeadRoom>,
}

impl<S: AsyncRead + Unpin> AsyncRead for HeadMeter<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        let read = buffer.filled().len().saturating_sub(before);
        Poll::Ready(self.room.read(read as u64).map_err(|refusal| io::Error::other(refusal.to_string())))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for HeadMeter<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// A request body that records whether its end was read.
struct WatchedBody {
    body: Incoming,
    unread: Arc<AtomicBool>,
}

impl hyper::body::Body for WatchedBody {
    type Data = <Incoming as hyper::body::Body>::Data;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if frame.is_none() {
            self.unread.store(false, Ordering::Relaxed);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Closes the sending side and waits briefly for the client to do the same.
async fn linger(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let rest = async {
        let mut buffer = vec![0; LINGER_BYTES];
        stream.shutdown().await?;
        while stream.read(&mut buffer).await? > 0 {}
        Ok::<_, std::io::Error>(())
    };
    let _ = timeout(LINGER, rest).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::status;
    use axum::http::StatusCode;

    /// A client of a server that answers every request without reading its body.
    async fn connect() -> (TcpStream, watch::Sender<bool>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        prepare(&mut stream);
        assert_eq!(rustix::net::sockopt::tcp_user_timeout(&stream), Ok(60_000));
        let closing = watch::Sender::new(false);
        let refuse = |_| std::future::ready(status::plain(StatusCode::BAD_REQUEST, "no")).boxed();
        let stream = Socket::Plain(QuickAck::new(stream));
        tokio::spawn(serve_one(stream, closing.subscribe(), refuse));
        (client, closing)
    }

    async fn rest(client: &mut TcpStream) -> String {
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_is_slow_with_the_head_of_a_request_is_not_waited_for() {
        for head in ["", "GET / HTTP/1.1\r\nhost"] {
            let (mut client, _closing) = connect().await;
            client.write_all(head.as_bytes()).await.unwrap();
            assert!(!rest(&mut client).await.contains("200 OK"));
        }
        // The server does not wait for a client that keeps the connection open either.
        let (mut client, _closing) = connect().await;
        client.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        assert!(rest(&mut client).await.starts_with("HTTP/1.1 400"));
    }

    #[tokio::test]
    async fn a_head_without_an_end_is_refused() {
        let (mut client, _closing) = connect().await;
        let head = format!("GET / HTTP/1.1\r\nhost: x\r\nx-long: {}", "a".repeat(READ_MAX_BYTES));
        client.write_all(head.as_bytes()).await.unwrap();
        let answer = rest(&mut client).await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
    }

    #[tokio::test]
    async fn an_answer_before_the_end_of_the_body_arrives() {
        let (mut client, _closing) = connect().await;
        let head = "PUT / HTTP/1.1\r\nhost: x\r\ncontent-length: 8000000\r\n\r\n";
        client.write_all(head.as_bytes()).await.unwrap();
        client.write_all(&vec![7; 8_000_000]).await.unwrap();
        let answer = rest(&mut client).await;
        assert!(
            answer.starts_with("HTTP/1.1 400") && answer.contains("\r\nconnection: close\r\n"),
            "{answer}"
        );
    }

    #[tokio::test]
    async fn idle_connections_end_at_shutdown() {
        let (mut client, closing) = connect().await;
        closing.send_replace(true);
        assert_eq!(rest(&mut client).await, "");
        closing.closed().await;
    }

    #[tokio::test]
    async fn heads_that_do_not_end_share_a_budget_and_those_of_others_still_come_in() {
        use tokio::io::AsyncWriteExt as _;
        let connections = Connections::default();
        let open = |last: u8| {
            let admitted = connections.admit(([127, 0, 0, last], 1).into()).unwrap();
            let (client, stream) = tokio::io::duplex(READ_MAX_BYTES);
            let room = Arc::new(HeadRoom::new(&admitted));
            (client, HeadMeter { stream, room: room.clone() }, room, admitted)
        };
        let budget = connections.heads().bounds().total;
        let (mut kept, mut refused) = (Vec::new(), 0);
        for _ in 0..2 * budget / READ_MAX_BYTES as u64 {
            let (mut client, mut stream, room, admitted) = open(1);
            client.write_all(&[b'a'; READ_MAX_BYTES]).await.unwrap();
            let read = stream.read_exact(&mut [0; READ_MAX_BYTES]).await;
            refused += u64::from(read.is_err());
            kept.push((stream, room, admitted));
        }
        assert!(connections.heads().held() < budget && refused > 0, "{refused}");
        let (mut client, mut stream, room, _admitted) = open(2);
        client.write_all(&[b'a'; READ_MAX_BYTES]).await.unwrap();
        stream.read_exact(&mut [0; READ_MAX_BYTES]).await.unwrap();
        // Bytes after a head are not counted, and the room of the head is free again after the answer.
        room.begin();
        let held = connections.heads().held();
        client.write_all(&[b'a'; READ_MAX_BYTES]).await.unwrap();
        stream.read_exact(&mut [0; READ_MAX_BYTES]).await.unwrap();
        assert_eq!(connections.heads().held(), held);
        room.end();
        assert_eq!(connections.heads().held(), held - READ_MAX_BYTES as u64);
        drop(kept);
        assert_eq!(connections.heads().held(), 0);
    }
}
