//! Connections: admitted by [`Connections`], served one request at a time, and closed so that the last response arrives.
//!
//! Handshakes are done by the task of the connection. Every wait for a client is limited: for the head of a request here, for its body by the mounts, and for an unread
//! response in the kernel.

use crate::{
    acknowledge::Prompt,
    call::ConnectionInfo,
    connections::{Admitted, Connections},
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
    net::{IpAddr, Ipv4Addr},
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    select,
    sync::watch,
    time::timeout,
};

/// Time limit for the head of a request, counted from the previous response. It also closes idle connections.
const HEAD_LIMIT: Duration = Duration::from_secs(60);
/// Size of the read buffer, which also limits the head of a request. Browsers and proxies send far less. Bodies pass
/// through it in any size.
const READ_MAX_BYTES: usize = 64 * 1024;
/// How long a client may leave sent bytes unread before the kernel drops the connection.
const UNREAD_LIMIT: Duration = Duration::from_secs(60);
/// How long the rest of a request is read and discarded, if it was answered before its end. An immediate close would reset
/// the connection, and the client might never see the response.
const LINGER: Duration = Duration::from_secs(2);
/// Number of bytes that are discarded at a time.
const LINGER_BYTES: usize = 16 * 1024;

/// Both ends of a connection.
#[derive(Debug, Clone)]
pub(super) struct Ends {
    /// The connection to the client.
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
            accepted = listener.accept() => accepted,
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
            let answer = move |request: Request| answer(ends.clone(), request);
            // A connection is asked to close if it is idle, or if its client does not read the responses. So a request that
            // is dropped here waits for its client.
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

/// Sets TCP_NODELAY, because small responses would otherwise wait for delayed acknowledgements, and a time limit for unread
/// data. If an option cannot be set, the connection works without it.
fn prepare(stream: &mut TcpStream) {
    let _ = stream.set_nodelay(true);
    let limit = u32::try_from(UNREAD_LIMIT.as_millis()).unwrap_or(u32::MAX);
    let _ = rustix::net::sockopt::set_tcp_user_timeout(&*stream, limit);
}

/// Does the handshake, where the port has one. `None` when it failed.
async fn establish(stream: TcpStream, admitted: &Admitted, tls: Option<TlsPort>) -> Option<Socket> {
    let stream = Prompt::new(stream);
    match tls {
        Some(tls) => tls.shake_hands(stream, admitted).await,
        None => Some(Socket::Plain(stream)),
    }
}

async fn serve_one(
    stream: Socket,
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
        .header_read_timeout(HEAD_LIMIT)
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
async fn linger(mut stream: Socket) {
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
        let stream = Socket::Plain(Prompt::new(stream));
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
        // A client that keeps the connection open is not waited for either.
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
}
