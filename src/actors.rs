//! The actors, and who sends what to whom.
//!
//! ```text
//! grpc ──Admit, Watch, Cancel, Inspect, ...───▶ SchedulerActor ──RunAction──▶ WorkerActor (SyncArbiter pool)
//!   │                                             │      ◀──StageReached──        │
//!   └──────────── Cas (client) ───────────────────┴──────────▶ CasActor ◀─────────┘ Cas (client)
//! ```
//!
//! In addition, grpc asks AssetActor through [`asset::client::Assets`]; its downloads write to CasActor.
//!
//! Waits go in one direction only (grpc > scheduler > worker > cas, grpc > asset > cas), so the actors cannot deadlock.
//! Mailboxes carry decisions. Bytes bypass them, through the handles of [`cas::blob`]. No actor thread blocks on IO.
//! [`mail`] counts the messages.

pub mod asset;
pub mod cas;
pub mod mail;
pub mod scheduler;
pub mod worker;
