//! [`listen()`]: the sockets that the server accepts connections on.

use gorego_reapi::error::{Error, Result};
use std::{io::ErrorKind, net::SocketAddr};
use tokio::net::TcpListener;

/// Listens on the socket that the supervisor passed, or else on the address of this configuration key.
pub(super) async fn listen(
    inherited: Option<std::net::TcpListener>,
    address: SocketAddr,
    key: &str,
) -> Result<TcpListener> {
    if let Some(listener) = inherited {
        return TcpListener::from_std(listener).map_err(|error| {
            Error::io(&format!("serve on the socket that the supervisor passed for {key}"), &error)
        });
    }
    TcpListener::bind(address).await.map_err(|error| match error.kind() {
        ErrorKind::AddrInUse => Error::Precondition(format!(
            "could not listen on {address}: another process listens there, perhaps another goREgo; stop it, or set {key} to \
             another address"
        )),
        ErrorKind::AddrNotAvailable => Error::Precondition(format!(
            "could not listen on {address}: this machine does not have that address; set {key} to one that it has"
        )),
        _ => Error::io(&format!("listen on {address} ({key})"), &error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_that_is_taken_is_named_with_its_key() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let first = listen(None, taken, "listen_addr").await.unwrap();
        let error = listen(None, taken, "http.listen_addr").await.unwrap_err().to_string();
        for part in [taken.to_string().as_str(), "another goREgo", "http.listen_addr"] {
            assert!(error.contains(part), "{part} is not in {error}");
        }
        drop(first);
        let error =
            listen(None, "192.0.2.1:1".parse().unwrap(), "listen_addr").await.unwrap_err().to_string();
        assert!(error.contains("does not have that address"), "{error}");
    }
}
