//! One client against all others: the cost that a hostile or broken client may cause for the server and other clients.
//!
//! Each attack is bounded in number and time. It comes from 127.0.0.1; the bystander comes from 127.0.0.2, which is
//! another peer. During and after each attack, the server's peak resident memory stays under
//! [`harness::MEMORY_MAX_BYTES`], and the bystander is answered within [`harness::BYSTANDER_LIMIT`].

#![allow(clippy::unwrap_used)]

mod connections;
mod decoding;
mod fairness;
mod find_missing;
mod handshakes;
mod harness;
mod heads;
mod log_streams;
mod open_requests;
#[allow(dead_code)]
mod raw;
mod reservations;
mod resets;
mod sent_ahead;
mod shared_places;
#[path = "../support/mod.rs"]
mod support;
mod unread_answers;
mod windows;

/// The attack that does nothing: the harness works, and the server is idle.
#[tokio::test]
async fn a_bystander_alone_is_answered_at_once() {
    let server = support::Server::start().await;
    let bystander = harness::Bystander::beside(&server).await;
    let verdict = bystander.leave().await;
    assert!(verdict.answers > 0);
    harness::assert_memory_is_bounded(&server);
}
