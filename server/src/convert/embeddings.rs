//! A request for embeddings to one call per text, and vectors as they were asked for.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use tandem_core::pooling::Pooling;
use tandem_core::sampling::RawSampling;
use tandem_openapi::embeddings::{EmbeddingRequest, Vector};
use tandem_router::api::{Call, Client, Prompt};

use super::completions::{self, Calls};
use super::natural;
use crate::error::{ApiError, invalid};

/// OpenAI's limit.
const MAX_INPUTS: usize = 2048;

pub struct Embeddings {
    pub calls: Calls,
    pub shape: Shape,
}

/// What becomes of a prompt's vector.
#[derive(Clone, Copy)]
pub struct Shape {
    encoding: Encoding,
    /// The model's width at most.
    dimensions: Option<usize>,
    normalize: bool,
}

#[derive(Clone, Copy)]
enum Encoding {
    Float,
    Base64,
}

pub fn calls(request: EmbeddingRequest) -> Result<Embeddings, ApiError> {
    let EmbeddingRequest {
        model,
        input,
        encoding_format,
        dimensions,
        pooling,
        normalize,
        add_special_tokens,
        priority,
    } = request;
    let encoding = match encoding_format.as_deref() {
        None | Some("float") => Encoding::Float,
        Some("base64") => Encoding::Base64,
        Some(other) => {
            let message = format!("encoding_format must be 'float' or 'base64', got {other:?}");
            return Err(invalid("encoding_format", message));
        }
    };
    let pooling = pooling.unwrap_or_else(|| Pooling::Last.name().to_owned());
    let pooling = Pooling::named(&pooling).ok_or_else(|| {
        let names = Pooling::ALL
            .map(|pooling| format!("'{}'", pooling.name()))
            .join(", ");
        invalid(
            "pooling",
            format!("pooling must be one of {names}, got {pooling:?}"),
        )
    })?;
    let dimensions = dimensions
        .map(|n| natural("dimensions", n, 1, u32::MAX))
        .transpose()?;
    let prompts = completions::prompts("input", input)?;
    if prompts.len() > MAX_INPUTS {
        let message = format!(
            "input has {} texts, at most {MAX_INPUTS} are allowed",
            prompts.len()
        );
        return Err(invalid("input", message));
    }
    let template = Call {
        client: Client::default(),
        earlier: 0,
        model,
        prompt: Prompt::Tokens(Vec::new()),
        n: 1,
        max_tokens: Some(0),
        pooling: Some(pooling),
        sampling: RawSampling::default(),
        priority: priority.unwrap_or(0),
        cache_salt: None,
        constraint: None,
        answer: None,
        stop: vec![],
        stop_token_ids: vec![],
        include_stop_str_in_output: false,
        ignore_eos: false,
        skip_special_tokens: true,
        add_special_tokens: add_special_tokens.unwrap_or(true),
    };
    Ok(Embeddings {
        calls: Calls::new(template, prompts),
        shape: Shape {
            encoding,
            dimensions: dimensions.map(|n| n as usize),
            normalize: normalize.unwrap_or(true),
        },
    })
}

impl Shape {
    pub fn apply(&self, mut vector: Vec<f32>) -> Result<Vector, ApiError> {
        let Shape {
            encoding,
            dimensions,
            normalize,
        } = *self;
        if let Some(n) = dimensions {
            if n > vector.len() {
                let message = format!(
                    "dimensions must be at most {}, the model's width, got {n}",
                    vector.len()
                );
                return Err(invalid("dimensions", message));
            }
            vector.truncate(n);
        }
        if normalize {
            let length = vector.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            // A vector of zeros has no direction.
            let length = length.max(f64::MIN_POSITIVE);
            vector
                .iter_mut()
                .for_each(|x| *x = (f64::from(*x) / length) as f32);
        }
        Ok(match encoding {
            Encoding::Float => Vector::Float(vector),
            Encoding::Base64 => {
                let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
                Vector::Base64(BASE64_STANDARD.encode(bytes))
            }
        })
    }
}
