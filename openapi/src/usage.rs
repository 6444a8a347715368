//! Token counts of a reply.

use serde::Serialize;
use utoipa::ToSchema;

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Usage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub total_tokens: u64,
    pub prompt_tokens_details: PromptTokensDetails,
    pub completion_tokens_details: CompletionTokensDetails,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Prompt tokens whose keys and values were found in the prefix cache.
    pub cached_tokens: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct CompletionTokensDetails {
    /// Tokens of the answer that are reasoning, whether it is shown or not: those between its marks. A mark's own tokens are not
    /// counted.
    pub reasoning_tokens: u64,
    /// Tokens of the answer that were guessed before they were computed (--speculative-config), and guesses that were wrong.
    /// Unknown, and 0, of an answer that a stop string ended.
    pub accepted_prediction_tokens: u64,
    pub rejected_prediction_tokens: u64,
}

impl Usage {
    pub fn new(prompt_tokens: u64, completion_tokens: u64, cached_tokens: u64) -> Usage {
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
            completion_tokens_details: CompletionTokensDetails::default(),
        }
    }

    /// So many tokens were guessed, and so many of the guesses were right.
    pub fn guessing(self, guessed: u64, accepted: u64) -> Usage {
        let completion_tokens_details = CompletionTokensDetails {
            accepted_prediction_tokens: accepted,
            rejected_prediction_tokens: guessed - accepted,
            ..self.completion_tokens_details
        };
        Usage {
            completion_tokens_details,
            ..self
        }
    }

    /// So many tokens of the answer are reasoning.
    pub fn reasoning(mut self, tokens: u64) -> Usage {
        self.completion_tokens_details.reasoning_tokens = tokens;
        self
    }
}

/// What a stream tells besides text.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Deserialize, ToSchema)]
pub struct StreamOptions {
    /// One more chunk at the end, with no choices and the usage.
    pub include_usage: Option<bool>,
    /// The usage so far in every chunk.
    pub continuous_usage_stats: Option<bool>,
}
