//! Loading and unloading adapters at run time, as vLLM spells it. Success is plain text there, and here.

use serde::Deserialize;
use utoipa::ToSchema;

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"lora_name": "support", "lora_path": "/models/support", "load_inplace": true}))]
pub struct LoadLoraAdapter {
    /// The name to ask for as `model`.
    pub lora_name: String,
    /// A PEFT folder on the server's machine (adapter_config.json and adapter_model.safetensors), or an adapter's name on
    /// the hub, ORG/NAME.
    pub lora_path: String,
    /// Replace what the name stood for. Without it a name that is taken is a conflict.
    pub load_inplace: Option<bool>,
}

#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"lora_name": "support"}))]
pub struct UnloadLoraAdapter {
    pub lora_name: String,
}

/// What a base with an adapter in it is written as.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[schema(example = json!({"format": "safetensors"}))]
pub struct MergeAdapter {
    /// `safetensors` (a folder in Hugging Face layout, as a tar archive) or `gguf` (one file)
    pub format: Option<String>,
}
