//! Adapters at run time, vLLM's two routes. Success is plain text.

use std::path::Path;

use axum::Extension;
use axum::extract::State;
use tandem_openapi::adapters::{LoadLoraAdapter, UnloadLoraAdapter};
use tandem_openapi::error::Errors;
use tandem_router::LoadMode;

use super::to_the_end;
use crate::app::App;
use crate::audit::Object;
use crate::error::ApiError;
use crate::extract::Json;
use crate::hub::{self, Content, Found};
use crate::keys::Own;

/// Serve a PEFT folder of the server's machine, or an adapter's name on the hub, under a name.
#[utoipa::path(
    post, path = "/v1/load_lora_adapter", tag = "adapters", request_body = LoadLoraAdapter,
    responses((status = 200, body = String, content_type = "text/plain"), Errors)
)]
pub async fn load(
    State(app): State<App>,
    Own(own): Own,
    Json(body): Json<LoadLoraAdapter>,
) -> Result<(Extension<Object>, String), ApiError> {
    let LoadLoraAdapter {
        lora_name,
        lora_path,
        load_inplace,
    } = body;
    let mode = match load_inplace {
        Some(true) => LoadMode::Replace,
        _ => LoadMode::New,
    };
    let (roots, name) = (app.lora_roots.clone(), lora_name.clone());
    to_the_end(async move {
        let find = move || match hub::find(Path::new(&lora_path), None, Content::Adapter)? {
            Found {
                folder,
                name: Some(_),
            } => Ok(folder),
            Found { folder, name: None } => roots.resolve(&folder),
        };
        let found = tokio::task::spawn_blocking(find).await;
        let folder = found.map_err(|panic| ApiError::Internal(panic.to_string()))??;
        Ok::<_, ApiError>(own.load_adapter(&name, &folder, mode).await?)
    })
    .await?;
    let said = format!("Success: LoRA adapter '{lora_name}' added successfully.");
    Ok((Extension(Object(lora_name)), said))
}

/// Forget a name. Requests that run keep what they started with.
#[utoipa::path(
    post, path = "/v1/unload_lora_adapter", tag = "adapters", request_body = UnloadLoraAdapter,
    responses((status = 200, body = String, content_type = "text/plain"), Errors)
)]
pub async fn unload(
    Own(own): Own,
    Json(body): Json<UnloadLoraAdapter>,
) -> Result<(Extension<Object>, String), ApiError> {
    let UnloadLoraAdapter { lora_name } = body;
    let name = lora_name.clone();
    to_the_end(async move { own.unload_adapter(&name).await }).await?;
    let said = format!("Success: LoRA adapter '{lora_name}' removed successfully.");
    Ok((Extension(Object(lora_name)), said))
}
