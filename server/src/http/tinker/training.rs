//! The calls of a model that a client trains. Each is answered by a future as soon as it is read; one that is wrong fails
//! there, in its turn, because the SDK does not send a number again.

use axum::Extension;
use axum::Json as Answer;
use axum::extract::State;
use tandem_core::learner::Moments;
use tandem_openapi::error::Errors;
use tandem_openapi::tinker::{
    CreateModelRequest, GetInfoRequest, GetInfoResponse, LoadWeightsRequest, ModelData, OptimStepRequest,
    SaveWeightsForSamplerRequest, SaveWeightsRequest, UntypedFuture,
};
use tandem_router::tinker::{Call, Learning};

use crate::app::App;
use crate::audit::Object;
use crate::convert::tinker as convert;
use crate::error::{ApiError, invalid};
use crate::extract::{Json, Proto};
use crate::keys::Own;

/// A new model: an adapter beside the base, of the output layer, too, unless `train_unembed` is false.
#[utoipa::path(
    post, path = "/api/v1/create_model", tag = "tinker", request_body = CreateModelRequest,
    responses((status = 200, body = UntypedFuture), Errors)
)]
pub async fn create(
    Own(own): Own,
    Json(body): Json<CreateModelRequest>,
) -> Result<(Extension<Object>, Answer<UntypedFuture>), ApiError> {
    let (session, seq) = (body.session_id.clone(), body.model_seq_id);
    let request_id = own.create_model(&session, seq, convert::new_model(body)?)?;
    let made = Extension(Object(format!("{session}:train:{seq}")));
    Ok((made, Answer(UntypedFuture { request_id })))
}

/// What a model is.
#[utoipa::path(
    post, path = "/api/v1/get_info", tag = "tinker", request_body = GetInfoRequest,
    responses((status = 200, body = GetInfoResponse), Errors)
)]
pub async fn info(
    State(app): State<App>,
    Own(own): Own,
    Json(body): Json<GetInfoRequest>,
) -> Result<Answer<GetInfoResponse>, ApiError> {
    let Learning {
        id, base_model, lora, ..
    } = own.learning(&body.model_id)?;
    Ok(Answer(GetInfoResponse {
        model_id: id,
        model_data: ModelData {
            arch: None,
            model_name: base_model.clone(),
            tokenizer_id: app.router.config().served_model_name.clone(),
        },
        is_lora: true,
        lora_rank: lora.r,
        model_name: base_model,
    }))
}

/// Scores data, and unless `forward_only` adds their gradient to that since the last step. The body is protobuf.
#[utoipa::path(
    post, path = "/api/v1/forward_backward", tag = "tinker",
    request_body(content = Vec<u8>, content_type = "application/x-protobuf"),
    responses((status = 200, body = UntypedFuture), Errors)
)]
pub async fn forward_backward(Own(own): Own, Proto(body): Proto) -> Result<Answer<UntypedFuture>, ApiError> {
    let model = body.model_id.clone();
    let seq = u32::try_from(body.seq_id).map_err(|_| invalid("seq_id", "seq_id must not be negative"))?;
    // Before anything is made of it.
    own.learning(&model)?;
    let call = tokio::task::spawn_blocking(move || convert::batch(body)).await;
    let call = call.map_err(|error| ApiError::Internal(format!("a batch was not read: {error}")))?;
    submit(&own, &model, seq, call)
}

/// One step of AdamW with the gradients since the last, which are cleared.
#[utoipa::path(
    post, path = "/api/v1/optim_step", tag = "tinker", request_body = OptimStepRequest,
    responses((status = 200, body = UntypedFuture), Errors)
)]
pub async fn step(
    Own(own): Own,
    Json(body): Json<OptimStepRequest>,
) -> Result<Answer<UntypedFuture>, ApiError> {
    let (model, seq) = (body.model_id.clone(), body.seq_id);
    submit(&own, &model, seq, convert::step(body))
}

/// Saves numbers and moments, to go on from.
#[utoipa::path(
    post, path = "/api/v1/save_weights", tag = "tinker", request_body = SaveWeightsRequest,
    responses((status = 200, body = UntypedFuture), Errors)
)]
pub async fn save(
    Own(own): Own,
    Json(body): Json<SaveWeightsRequest>,
) -> Result<(Extension<Object>, Answer<UntypedFuture>), ApiError> {
    let (model, seq) = (body.model_id.clone(), body.seq_id);
    let answer = submit(&own, &model, seq, convert::save(body))?;
    Ok((Extension(Object(model)), answer))
}

/// With a name saves an adapter, which is a model's name on all routes; without one it makes a sampler of the numbers as
/// they are, in no file.
#[utoipa::path(
    post, path = "/api/v1/save_weights_for_sampler", tag = "tinker", request_body = SaveWeightsForSamplerRequest,
    responses((status = 200, body = UntypedFuture), Errors)
)]
pub async fn save_for_sampler(
    Own(own): Own,
    Json(body): Json<SaveWeightsForSamplerRequest>,
) -> Result<(Extension<Object>, Answer<UntypedFuture>), ApiError> {
    let (model, seq) = (body.model_id.clone(), body.seq_id);
    let answer = submit(&own, &model, seq, convert::save_for_sampler(body))?;
    Ok((Extension(Object(model)), answer))
}

/// A new model that begins with what was saved, or with any adapter by its name; or the same into one that is there.
#[utoipa::path(
    post, path = "/api/v1/load_weights", tag = "tinker", request_body = LoadWeightsRequest,
    responses((status = 200, body = UntypedFuture), Errors)
)]
pub async fn load(
    Own(own): Own,
    Json(body): Json<LoadWeightsRequest>,
) -> Result<(Extension<Object>, Answer<UntypedFuture>), ApiError> {
    let LoadWeightsRequest {
        model_id,
        seq_id,
        session_id,
        model_seq_id,
        base_model: _,
        user_metadata,
        path,
        optimizer,
        optimizer_config: _,
        weights_access_token: _,
        r#type: _,
    } = body;
    let moments = match optimizer {
        true => Moments::Restored,
        false => Moments::Fresh,
    };
    match (session_id, model_seq_id, model_id, seq_id) {
        (Some(session), Some(seq), None, None) => {
            let wrong = |param| move |message| invalid(param, message);
            let path = convert::path(path).map_err(wrong("path"))?;
            let user_metadata = convert::metadata(user_metadata).map_err(wrong("user_metadata"))?;
            let request_id = own
                .load_model(&session, seq, &path, moments, user_metadata)
                .await?;
            let made = Extension(Object(format!("{session}:train:{seq}")));
            Ok((made, Answer(UntypedFuture { request_id })))
        }
        (None, None, Some(model), Some(seq)) => {
            let call = convert::path(path).map(|path| Call::Load { path, moments });
            let answer = submit(&own, &model, seq, call)?;
            Ok((Extension(Object(model)), answer))
        }
        _ => Err(invalid(
            "session_id",
            "either session_id and model_seq_id (a new model) or model_id and seq_id (one that is there) must be given",
        )),
    }
}

fn submit(
    own: &tandem_router::View,
    model: &str,
    seq: u32,
    call: Result<Call, String>,
) -> Result<Answer<UntypedFuture>, ApiError> {
    let request_id = own.submit(model, seq, call)?;
    Ok(Answer(UntypedFuture { request_id }))
}
