//! Who may do what: credentials become a [`Principal`](principal::Principal), its roles give it permissions, and the
//! [`Policy`](policy::Policy) decides.
//!
//! - [`permission`], [`role`], [`principal`], [`policy`]: the rules. Pure.
//! - [`credential`]: what the `authorization` header of a request brings, parsed once. Pure.
//! - [`certificate`]: what a client certificate says; [`grants`]: which roles it gives. Pure.
//! - [`authenticator`]: credential, certificate and time become a principal. It owns the rules in force, which are immutable
//!   values behind an `ArcSwap`, and are replaced as a whole.
//! - [`tokens`]: static tokens; [`basic`]: users with passwords. Immutable values, made from files.
//! - [`loader`]: makes the rules from the [`settings`] and the files that they name, and again when these change.
//! - [`audit`]: a log event for each refusal.
//! - [`rejection`]: why a credential is refused.
//!
//! A request is authenticated once, where it comes in, before its body is read: by `grpc/request_log.rs` and by
//! `http.rs`. Both put the principal into the [`Call`](crate::call::Call). Whether the principal may do what it asks for is
//! decided by the [`gate`](crate::gate) alone.
//!
//! How the other kinds of credentials plug in:
//!
//! - **Signed tokens** (`access/jwt`) implement [`SignedTokens`](authenticator::SignedTokens): `verify` gets the token and the
//!   time, and returns issuer, subject, the names of the roles that the claims map to, and the expiry. It is asked for every
//!   bearer token that is not a static one, off the fast path, and may wait. The authenticator caches what it returns until the
//!   token expires, keyed by a hash. It makes the principal, and looks up the roles in the policy. The implementation is a field
//!   of [`CredentialSources`](authenticator::CredentialSources).
//! - **Client certificates**: the state of a connection has the certificate that its handshake has proved, and
//!   [`Presented`](authenticator::Presented) passes it on. An `authorization` header goes before a certificate.
//!
//! Invariants: a credential that cannot be verified is refused, also where anonymous clients may do what it asks for. A token or a
//! password is never logged or shown; the name of a principal may be. Nothing here waits on the actors' thread.

pub(crate) mod audit;
pub mod authenticator;
pub mod basic;
pub(crate) mod certificate;
pub mod credential;
#[cfg(test)]
pub(crate) mod documented;
pub mod grants;
pub mod jwt;
mod loader;
pub mod permission;
pub mod policy;
pub mod principal;
pub mod rejection;
pub mod role;
pub mod settings;
pub mod tokens;

pub(crate) use loader::{AccessLoader, check_files};
