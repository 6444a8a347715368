//! Samplers and samples.

use axum::Json as Answer;
use tandem_openapi::error::Errors;
use tandem_openapi::tinker::{
    CreateSamplingSessionRequest, CreateSamplingSessionResponse, SamplePromise, SampleRequest, Sampler,
};
use tandem_router::tinker::SamplerInfo;

use crate::convert;
use crate::convert::files::missing;
use crate::error::ApiError;
use crate::extract::{Json, Segment};
use crate::keys::Own;

/// A sampler of the base, or of what save_weights_for_sampler saved by a name.
#[utoipa::path(
    post, path = "/api/v1/create_sampling_session", tag = "tinker", request_body = CreateSamplingSessionRequest,
    responses((status = 200, body = CreateSamplingSessionResponse), Errors)
)]
pub async fn create(
    Own(own): Own,
    Json(body): Json<CreateSamplingSessionRequest>,
) -> Result<Answer<CreateSamplingSessionResponse>, ApiError> {
    let CreateSamplingSessionRequest {
        session_id,
        sampling_session_seq_id,
        base_model,
        model_path,
        r#type: _,
    } = body;
    let sampling_session_id = own
        .create_sampler(
            &session_id,
            sampling_session_seq_id,
            base_model.as_deref(),
            model_path.as_deref(),
        )
        .await?;
    Ok(Answer(CreateSamplingSessionResponse { sampling_session_id }))
}

/// What a sampler is.
#[utoipa::path(
    get, path = "/api/v1/samplers/{id}", tag = "tinker", params(("id" = String, Path)),
    responses((status = 200, body = Sampler), Errors)
)]
pub async fn retrieve(Own(own): Own, Segment(id): Segment) -> Result<Answer<Sampler>, ApiError> {
    let SamplerInfo { id, base_model, path } = own.sampler(&id)?;
    Ok(Answer(Sampler {
        sampler_id: id,
        base_model,
        model_path: path,
    }))
}

/// Samples of one prompt, with the log-probability of every token.
#[utoipa::path(
    post, path = "/api/v1/asample", tag = "tinker", request_body = SampleRequest,
    responses((status = 200, body = SamplePromise), Errors)
)]
pub async fn sample(
    Own(own): Own,
    Json(body): Json<SampleRequest>,
) -> Result<Answer<SamplePromise>, ApiError> {
    let sampler = body
        .sampling_session_id
        .clone()
        .ok_or_else(|| missing("sampling_session_id"))?;
    let seq = body.seq_id.ok_or_else(|| missing("seq_id"))?;
    // More are refused, through the future.
    let n = body.num_samples.unwrap_or(1).min(convert::tinker::MAX_SAMPLES);
    let ask = convert::tinker::ask(body);
    let (request_id, sample_sequence_ids) = own.sample(&sampler, seq, n, ask).await?;
    Ok(Answer(SamplePromise {
        request_id,
        sample_sequence_ids,
    }))
}
