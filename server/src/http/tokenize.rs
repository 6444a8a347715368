//! Token ids to text and back.

use std::sync::Arc;

use axum::extract::State;
use axum::{Extension, Json as Answer};
use tandem_openapi::error::Errors;
use tandem_openapi::tokenize::{
    DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse, TokenizerInfo,
};
use tandem_router::api::Prompt;
use tandem_text::SpecialTokens;

use crate::app::App;
use crate::convert;
use crate::convert::chat::Conversation;
use crate::convert::files::missing;
use crate::convert::tools::definitions;
use crate::error::{ApiError, invalid};
use crate::extract::Json;
use crate::keys::Own;
use crate::shares::Held;

/// Of a token's text in an answer, in memory, until it is JSON.
const SPELLED_BYTES: usize = 100;

/// The token ids of a prompt, or of a conversation as the chat template renders it.
#[utoipa::path(
    post, path = "/tokenize", tag = "tokens", request_body = TokenizeRequest,
    responses((status = 200, body = TokenizeResponse), Errors)
)]
pub async fn tokenize(
    State(app): State<App>,
    Own(own): Own,
    Extension(held): Extension<Arc<Held>>,
    Json(body): Json<TokenizeRequest>,
) -> Result<Answer<TokenizeResponse>, ApiError> {
    let TokenizeRequest {
        model,
        prompt,
        messages,
        add_special_tokens,
        add_generation_prompt,
        continue_final_message,
        tools,
        documents,
        reasoning_effort,
        chat_template_kwargs,
        return_token_strs,
    } = body;
    model.map(|model| own.clone().model(&model)).transpose()?;
    let prompt = match (prompt, messages) {
        (Some(text), None) => {
            let given = [("tools", tools.is_some()), ("documents", documents.is_some())];
            if let Some((field, _)) = given.into_iter().find(|(_, given)| *given) {
                return Err(invalid(
                    field,
                    format!("{field} go with messages, not with prompt"),
                ));
            }
            Prompt::Text(text)
        }
        (None, Some(messages)) => convert::chat::prompt(Conversation {
            messages,
            add_generation_prompt,
            continue_final_message,
            tools: definitions(tools)?.into_iter().map(|tool| tool.given).collect(),
            documents,
            reasoning_effort,
            chat_template_kwargs,
        })?,
        (None, None) => return Err(missing("prompt")),
        (Some(_), Some(_)) => return Err(invalid("prompt", "prompt and messages exclude each other")),
    };
    let special = match add_special_tokens {
        Some(false) => SpecialTokens::Omit,
        _ => SpecialTokens::Add,
    };
    let tokens = own.tokenize(prompt, special).await?;
    let token_strs = match return_token_strs {
        Some(true) => {
            held.reach(tokens.len() * SPELLED_BYTES)?;
            Some(own.spell(tokens.clone()).await)
        }
        Some(false) | None => None,
    };
    let max_model_len = app.router.info().max_model_len;
    Ok(Answer(TokenizeResponse {
        count: tokens.len(),
        max_model_len,
        tokens,
        token_strs,
    }))
}

/// The text of token ids.
#[utoipa::path(
    post, path = "/detokenize", tag = "tokens", request_body = DetokenizeRequest,
    responses((status = 200, body = DetokenizeResponse), Errors)
)]
pub async fn detokenize(
    Own(own): Own,
    Json(body): Json<DetokenizeRequest>,
) -> Result<Answer<DetokenizeResponse>, ApiError> {
    let DetokenizeRequest { model, tokens } = body;
    model.map(|model| own.clone().model(&model)).transpose()?;
    let prompt = own.detokenize(convert::token_ids("tokens", tokens)?).await?;
    Ok(Answer(DetokenizeResponse { prompt }))
}

/// What lm-eval's remote tokenizer asks.
#[utoipa::path(
    get, path = "/tokenizer_info", tag = "tokens", responses((status = 200, body = TokenizerInfo), Errors)
)]
pub async fn info(State(app): State<App>) -> Answer<TokenizerInfo> {
    let tokenizer = app.router.tokenizer();
    let text = |special: Option<(u32, &str)>| special.map(|(_, text)| text.to_owned());
    Answer(TokenizerInfo {
        bos_token: text(tokenizer.bos()),
        eos_token: text(tokenizer.eos()),
        chat_template: tokenizer.chat_template_source().map(str::to_owned),
        vocab_size: tokenizer.vocab_size(),
    })
}
