//! Follows a log stream: sends all of its bytes as they appear (EXE-64, LOG-03).

use super::{Client, backoff, status::from_status};
use bytes::Bytes;
use gorego_reapi::error::Result;
use tokio::sync::mpsc;

impl Client {
    /// Sends the bytes of a log stream to `sink` until the stream ends or the receiver is dropped. A broken stream is
    /// resumed at the same offset. There is no idle limit, because a command may print nothing for as long as it runs.
    ///
    /// # Errors
    /// Errors of the server. The bytes sent before an error are the start of the stream.
    pub async fn follow_log(&self, name: &str, sink: &mpsc::Sender<Bytes>) -> Result<()> {
        let (mut received, mut tries) = (0u64, 0);
        loop {
            let before = received;
            let Err(error) = self.follow_log_from(name, &mut received, sink).await else { return Ok(()) };
            tries = if received > before { 1 } else { tries + 1 };
            match backoff(&error, tries) {
                Some(wait) => tokio::time::sleep(wait).await,
                None => return Err(error),
            }
        }
    }

    async fn follow_log_from(
        &self,
        name: &str,
        received: &mut u64,
        sink: &mpsc::Sender<Bytes>,
    ) -> Result<()> {
        let call = format!("log stream {name}");
        let failed = |status: tonic::Status| from_status(&call, &status);
        let mut stream = self.open_stream(name.to_owned(), *received, &call).await?;
        while let Some(message) = stream.message().await.map_err(failed)? {
            *received += message.data.len() as u64;
            if sink.send(message.data).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }
}
