//! The Admin service of goREgo.

use super::{
    Client, MAX_MESSAGE_BYTES, Service, retrying, status::from_status, stubs::AdminClient, timed,
    within_limit,
};
use gorego_reapi::{error::Result, proto::gorego};

impl Client {
    /// The numbers of the store.
    ///
    /// # Errors
    /// Errors of the server.
    pub async fn store_stats(&self) -> Result<gorego::StoreStats> {
        let answer = retrying(async || {
            let answer = self.admin().get_store_stats(timed(gorego::GetStoreStatsRequest {})).await;
            answer.map_err(|status| from_status("GetStoreStats", &status))
        });
        Ok(answer.await?.into_inner())
    }

    /// Asks the server to read its configuration again.
    ///
    /// # Errors
    /// `Invalid` if the server refuses the configuration; other errors of the server.
    pub async fn reload_config(&self, dry_run: bool) -> Result<gorego::ReloadConfigResponse> {
        let answer = within_limit(async {
            let answer = self.admin().reload_config(timed(gorego::ReloadConfigRequest { dry_run })).await;
            answer.map_err(|status| from_status("ReloadConfig", &status))
        });
        Ok(answer.await?.into_inner())
    }

    /// A page of a purge.
    ///
    /// # Errors
    /// `Invalid` also if the page token belongs to a server that was restarted since; other errors of the server.
    pub async fn purge_results(
        &self,
        request: &gorego::PurgeResultsRequest,
    ) -> Result<gorego::PurgeResultsResponse> {
        let answer = retrying(async || {
            let answer = self.admin().purge_results(timed(request.clone())).await;
            answer.map_err(|status| from_status("PurgeResults", &status))
        });
        Ok(answer.await?.into_inner())
    }

    /// A page of the reports of actions with different outputs.
    ///
    /// # Errors
    /// Errors of the server.
    pub async fn list_non_determinism(
        &self,
        request: &gorego::ListNonDeterminismRequest,
    ) -> Result<gorego::ListNonDeterminismResponse> {
        let answer = retrying(async || {
            let answer = self.admin().list_non_determinism(timed(request.clone())).await;
            answer.map_err(|status| from_status("ListNonDeterminism", &status))
        });
        Ok(answer.await?.into_inner())
    }

    /// Asks the server to revoke static tokens.
    ///
    /// # Errors
    /// `NotFound` if an id is unknown, in which case no token is revoked; other errors of the server.
    pub async fn revoke_tokens(&self, ids: Vec<String>) -> Result<gorego::RevokeTokensResponse> {
        let answer = within_limit(async {
            let answer = self.admin().revoke_tokens(timed(gorego::RevokeTokensRequest { ids })).await;
            answer.map_err(|status| from_status("RevokeTokens", &status))
        });
        Ok(answer.await?.into_inner())
    }

    fn admin(&self) -> AdminClient<Service> {
        AdminClient::new(self.service.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }
}
