//! Responses that clients may name later. Not here: what is in them (the edge's), who may see them (`view`).

use tandem_store::{Keep, ResponseRow};

use crate::Router;
use crate::api::{KeptResponse, RouterError, Tenant};

/// Of a conversation that is gone on with: as much as a request may have.
const MAX_CONVERSATION_BYTES: u64 = 32 << 20;

impl Router {
    pub(crate) async fn keep_response(
        &self,
        response: KeptResponse,
        tenant: &Tenant,
    ) -> Result<bool, RouterError> {
        let KeptResponse {
            id,
            created_at,
            previous,
            input,
            response,
        } = response;
        let row = ResponseRow {
            id,
            tenant: tenant.to_string(),
            created_at,
            previous,
            input,
            response,
        };
        Ok(self.0.store.keep_response(&row, self.keep()).await?)
    }

    pub(crate) async fn response_row(&self, id: &str) -> Result<ResponseRow, RouterError> {
        let row = self.0.store.response(id, self.keep()).await?;
        row.ok_or_else(|| RouterError::UnknownResponse(id.to_owned()))
    }

    /// The oldest first.
    pub(crate) async fn conversation_rows(&self, id: &str) -> Result<Vec<ResponseRow>, RouterError> {
        let rows = self
            .0
            .store
            .conversation(id, MAX_CONVERSATION_BYTES, self.keep())
            .await?;
        let Some(first) = rows.first() else {
            return Err(RouterError::UnknownResponse(id.to_owned()));
        };
        let Some(earlier) = &first.previous else {
            return Ok(rows);
        };
        match self.0.store.response(earlier, self.keep()).await? {
            None => Err(RouterError::UnknownResponse(earlier.clone())),
            Some(_) => {
                let message = format!(
                    "the conversation that this response goes on with has more than {MAX_CONVERSATION_BYTES} bytes; send its \
                     end as input"
                );
                Err(RouterError::invalid("previous_response_id", message))
            }
        }
    }

    pub(crate) async fn delete_response(&self, id: &str) -> Result<(), RouterError> {
        match self.0.store.delete_response(id).await? {
            true => Ok(()),
            false => Err(RouterError::UnknownResponse(id.to_owned())),
        }
    }

    fn keep(&self) -> Keep {
        self.config().keep_responses
    }
}

pub(crate) fn kept(row: ResponseRow) -> KeptResponse {
    let ResponseRow {
        id,
        tenant: _,
        created_at,
        previous,
        input,
        response,
    } = row;
    KeptResponse {
        id,
        created_at,
        previous,
        input,
        response,
    }
}
