//! The actors, and who sends what to whom.
//!
//! ```text
//! grpc ──Admit, Watch, Cancel, Inspect, ...───▶ SchedulerActor ──RunAction──▶ WorkerActor (SyncArbiter pool)
//!   │                                             │      ◀──StageReached──        │
//!   └──────────── Cas (client) ───────────────────┴──────────▶ CasActor ◀─────────┘ Cas (client)
//! ```
//!
//! Beside that, grpc asks AssetActor through [`asset::client::Assets`], whose downloads write to CasActor.
//!
//! Waits go one way only (grpc > scheduler > worker > cas, grpc > asset > cas), so the actors cannot deadlock. Mailboxes carry
//! decisions; bytes go round them through the handles of [`cas::blob`]. No actor thread ever blocks on IO. How many messages there
//! are is counted ([`mail`]).

pub mod asset;
pub mod cas;
pub mod mail;
pub mod scheduler;
pub mod worker;
