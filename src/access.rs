//! Authentication and authorization. A credential becomes a [`Principal`](principal::Principal), whose roles give it
//! permissions. The [`Policy`](policy::Policy) decides whether they are sufficient.
//!
//! - [`permission`], [`role`], [`principal`], [`policy`]: the rules.
//! - [`credential`]: the credential in the `authorization` header of a request, parsed once.
//! - [`certificate`]: the content of a client certificate; [`grants`]: the roles that it gives.
//! - [`authenticator`]: turns credential, certificate and time into a principal. It owns the rules in force. These are
//!   immutable values behind an `ArcSwap` and are replaced as a whole.
//! - [`tokens`]: static tokens; [`basic`]: users with passwords. Both are immutable values, read from files.
//! - [`loader`]: builds the rules from the [`settings`] and their files, and rebuilds them when these change.
//! - [`audit`]: a log event for each refusal.
//! - [`rejection`]: why a credential is refused.
//!
//! A request is authenticated once, when it arrives and before its body is read: by `grpc/request_log.rs` and by
//! `http.rs`. Both put the principal into the [`Call`](crate::call::Call). Only the [`gate`](crate::gate) decides
//! whether the principal has the necessary permissions.
//!
//! The other kinds of credentials:
//!
//! - **Signed tokens** (`access/jwt`) implement [`SignedTokens`](authenticator::SignedTokens): `verify` gets the token
//!   and the time, and returns the issuer, the subject, the names of the roles, and the expiry. It is called for every
//!   bearer token that is not a static token, outside of the fast path, and may wait. The authenticator caches the
//!   result under a hash of the token until the token expires. It creates the principal and looks up its roles in the
//!   policy. The implementation is a field of [`CredentialSources`](authenticator::CredentialSources).
//! - **Client certificates**: the state of a connection has the certificate that was verified in its handshake, and
//!   [`Presented`](authenticator::Presented) passes it on. An `authorization` header takes precedence over a
//!   certificate.
//!
//! Invariants: a credential that cannot be verified is refused, even for requests that anonymous clients may make. A
//! token or a password is never logged or shown; the name of a principal may be. Nothing here blocks the actors'
//! thread.

pub(crate) mod audit;
pub mod authenticator;
pub mod basic;
pub(crate) mod certificate;
pub mod claim_pattern;
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

pub(crate) use loader::{AccessLoader, NOTICE_TIME, check_files};
