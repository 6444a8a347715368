//! Model cards to the wire.

use tandem_openapi::models::Model;
use tandem_router::api::{AdapterSource, ModelCard, ModelKind};

pub fn model(card: ModelCard) -> Model {
    let ModelCard {
        name,
        created_at,
        kind,
        max_model_len,
    } = card;
    let mut model = Model {
        root: name.clone(),
        id: name,
        object: "model",
        created: created_at,
        owned_by: "tandem".to_owned(),
        parent: None,
        max_model_len,
        lora_rank: None,
        fine_tuning_job_id: None,
        step_number: None,
        permission: Vec::new(),
    };
    if let ModelKind::Adapter {
        digest,
        parent,
        source,
        rank,
    } = kind
    {
        model.root = digest.to_string();
        model.parent = Some(parent);
        model.lora_rank = Some(rank);
        if let AdapterSource::Job { job, step } = source {
            model.fine_tuning_job_id = Some(job);
            model.step_number = step;
        }
    }
    model
}
