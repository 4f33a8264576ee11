//! Connections: let in by [`Connections`], served one request after the other, and closed so that the last answer arrives.
//!
//! No client is waited for without a limit: for the head of a request it is here, for its body in [`super::body`], and for
//! one that does not read its answer in the kernel.

use crate::{
    acknowledge::Prompt,
    connections::{ConnectionState, Connections},
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

/// How long a client may take for the head of a request, counted from the answer before: idle connections end by it too.
const HEAD_LIMIT: Duration = Duration::from_secs(60);
/// Bytes of a connection that are read ahead, which bounds the head of a request too; browsers and proxies stop far below. Bodies of
/// any size pass through it.
const READ_MAX_BYTES: usize = 64 * 1024;
/// How long a client may leave what we send unread before the kernel gives the connection up.
const UNREAD_LIMIT: Duration = Duration::from_secs(60);
/// How long the rest of a request is thrown away that was answered before its end. Closing at once would reset the
/// connection, and the client might never see the answer.
const LINGER: Duration = Duration::from_secs(2);
/// Bytes that are thrown away at a time.
const LINGER_BYTES: usize = 16 * 1024;

/// The two ends of a connection.
#[derive(Debug, Clone)]
pub struct Ends {
    /// The client's.
    pub client: Arc<ConnectionState>,
    /// The address of ours that the client has connected to.
    pub here: IpAddr,
}

/// Accepts connections until `shutdown` ends, then waits for the end of those that there are.
pub async fn serve(
    listener: TcpListener,
    connections: Connections,
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
        // Without an address of ours, only requests for loopback and for listed names are answered.
        let here = stream.local_addr().map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |address| address.ip());
        let Some(admitted) = connections.admit(peer) else { continue };
        let ends = Ends { client: admitted.state().clone(), here };
        let (answer, closed) = (answer.clone(), closing.subscribe());
        tokio::spawn(async move {
            let state = admitted.state();
            let answer = move |mut request: Request| {
                request.extensions_mut().insert(state.caller);
                answer(ends.clone(), request)
            };
            // A connection is told to close when it is idle, or when its client does not read the answers that it has asked for. So
            // a request that is dropped here is one that its client keeps waiting.
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

/// Small answers would wait for the client's delayed acknowledgement, and large ones for ever for a client that does not
/// read. Where an option cannot be set, the connection works without it.
fn prepare(stream: &mut TcpStream) {
    let _ = stream.set_nodelay(true);
    let limit = u32::try_from(UNREAD_LIMIT.as_millis()).unwrap_or(u32::MAX);
    let _ = rustix::net::sockopt::set_tcp_user_timeout(&*stream, limit);
}

async fn serve_one(
    stream: TcpStream,
    mut closing: watch::Receiver<bool>,
    answer: impl Fn(Request) -> BoxFuture<'static, Response> + Send + Sync + Unpin,
) {
    let service = service_fn(|request: hyper::Request<Incoming>| {
        let unread = Arc::new(AtomicBool::new(!request.body().is_end_stream()));
        let request = request.map(|body| Body::new(Watched { body, unread: unread.clone() }));
        answer(request).map(move |mut response| {
            if unread.load(Ordering::Relaxed) {
                // What is left of the body is in the way of another request: a client that is not told would send one.
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        })
    });
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(READ_MAX_BYTES)
        .serve_connection(TokioIo::new(Prompt::new(stream)), service);
    // What went wrong is in the line of the request, if there was one.
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

/// The body of a request, of which it is known whether its end was read.
struct Watched {
    body: Incoming,
    unread: Arc<AtomicBool>,
}

impl hyper::body::Body for Watched {
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

/// Says that nothing more comes from here, and waits a little for the client to say the same.
async fn linger(mut stream: Prompt) {
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
    use crate::http_cache::status;
    use axum::http::StatusCode;

    /// A client of a server that answers everything without reading bodies.
    async fn connect() -> (TcpStream, watch::Sender<bool>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        prepare(&mut stream);
        assert_eq!(rustix::net::sockopt::tcp_user_timeout(&stream), Ok(60_000));
        let closing = watch::Sender::new(false);
        let refuse = |_| std::future::ready(status::plain(StatusCode::BAD_REQUEST, "no")).boxed();
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
        // Nor is one that keeps its connection for later.
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
