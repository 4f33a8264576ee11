//! [`KeyServer`]: the key set of an issuer, served by HTTP on loopback.

#![allow(dead_code, clippy::unwrap_used)]

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

/// The server; see the top of this file. It ends with the process of the test.
pub(crate) struct KeyServer {
    address: SocketAddr,
    answer: Arc<Mutex<String>>,
    requests: Arc<AtomicUsize>,
}

impl KeyServer {
    /// A server that answers every request with this document.
    pub(crate) fn start(document: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            answer: Arc::default(),
            requests: Arc::default(),
        };
        server.publish(document);
        let (answer, requests) = (server.answer.clone(), server.requests.clone());
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (answer, requests) = (answer.clone(), requests.clone());
                thread::spawn(move || serve(&stream, &answer, &requests));
            }
        });
        server
    }

    /// The URL of the key set.
    pub(crate) fn url(&self) -> String {
        format!("http://{}/jwks", self.address)
    }

    /// Answers with this document from now on.
    pub(crate) fn publish(&self, document: &str) {
        self.answer_with("200 OK", "", document);
    }

    /// Answers with this status, these lines of the header, and this body from now on.
    pub(crate) fn answer_with(&self, status: &str, header: &str, body: &str) {
        let length = body.len();
        *self.answer.lock().unwrap() = format!(
            "HTTP/1.1 {status}\r\n{header}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        );
    }

    /// The number of requests so far.
    pub(crate) fn requests(&self) -> usize {
        self.requests.load(SeqCst)
    }
}

fn serve(mut stream: &TcpStream, answer: &Mutex<String>, requests: &AtomicUsize) {
    let lines = BufReader::new(stream).lines().map_while(Result::ok);
    if lines.take_while(|line| !line.is_empty()).count() > 0 {
        requests.fetch_add(1, SeqCst);
        let answer = answer.lock().unwrap().clone();
        // A client may leave as soon as it has read enough.
        let _ = stream.write_all(answer.as_bytes());
    }
}
