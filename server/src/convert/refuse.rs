//! Fields that other servers know and this one has not built. A value that would change the answer is refused by name;
//! one that changes nothing (null, an empty list, the default) passes. Every other unknown field is ignored.

use serde_json::Value;
use tandem_openapi::common::Unknown;

use crate::error::ApiError;

/// The field and the values of it that are harmless here.
type Rule = (&'static str, fn(&Value) -> bool);

const BOTH: &[Rule] = &[
    ("allowed_token_ids", empty),
    ("bad_words", empty),
    ("cache_salt", never),
    ("documents", empty),
    ("guided_choice", never),
    ("guided_decoding_backend", never),
    ("guided_grammar", never),
    ("guided_json", never),
    ("guided_regex", never),
    ("guided_whitespace_pattern", never),
    ("length_penalty", |value| value.as_f64() == Some(1.0)),
    ("logprob_token_ids", empty),
    ("priority", |value| value.as_i64() == Some(0)),
    ("repetition_detection", never),
    ("response_format", |value| value["type"] == "text"),
    ("return_tokens_as_token_ids", no),
    ("spaces_between_special_tokens", |value| value == true),
    ("structured_outputs", never),
    ("thinking_token_budget", never),
    ("truncate_prompt_tokens", never),
    ("use_beam_search", no),
];

const CHAT: &[Rule] = &[
    ("add_special_tokens", no),
    ("audio", never),
    ("chat_template", never),
    ("echo", no),
    ("function_call", |value| value == "none" || value == "auto"),
    ("functions", empty),
    ("modalities", |value| {
        value
            .as_array()
            .is_some_and(|all| all.iter().all(|one| one == "text"))
    }),
    ("prediction", never),
    ("tool_choice", |value| value == "none" || value == "auto"),
    ("tools", empty),
    ("web_search_options", never),
];

const COMPLETIONS: &[Rule] = &[("suffix", |value| value == "")];

fn never(_: &Value) -> bool {
    false
}

fn no(value: &Value) -> bool {
    value == false
}

fn empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

pub fn chat(unknown: &Unknown, n: u32) -> Result<(), ApiError> {
    check(unknown, CHAT, n)
}

pub fn completions(unknown: &Unknown, n: u32) -> Result<(), ApiError> {
    check(unknown, COMPLETIONS, n)
}

fn check(unknown: &Unknown, rules: &[Rule], n: u32) -> Result<(), ApiError> {
    let refused = |(name, harmless): &&Rule| {
        unknown
            .get(*name)
            .is_some_and(|value| !value.is_null() && !harmless(value))
    };
    if let Some((name, _)) = BOTH.iter().chain(rules).find(refused) {
        return Err(ApiError::NotBuilt {
            param: (*name).to_owned(),
            hint: String::new(),
        });
    }
    match unknown.get("best_of") {
        Some(value) if !value.is_null() && value.as_u64() != Some(u64::from(n)) => {
            let hint = format!(", unless it equals n, which is {n}");
            Err(ApiError::NotBuilt {
                param: "best_of".to_owned(),
                hint,
            })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_would_change_the_answer_is_refused() {
        let unknown = |value: Value| value.as_object().expect("cases are objects").clone();
        for case in [
            json!({"tools": [{"type": "function"}]}),
            json!({"tool_choice": "required"}),
            json!({"response_format": {"type": "json_object"}}),
            json!({"guided_json": {}}),
            json!({"modalities": ["text", "audio"]}),
            json!({"best_of": 2}),
        ] {
            assert!(chat(&unknown(case.clone()), 1).is_err(), "{case}");
        }
        for case in [
            json!({"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}),
            json!({"tools": null, "user": "me", "modalities": ["text"], "best_of": 1}),
        ] {
            assert!(chat(&unknown(case.clone()), 1).is_ok(), "{case}");
        }
        assert!(completions(&unknown(json!({"suffix": "end"})), 1).is_err());
        assert!(completions(&unknown(json!({"suffix": null})), 1).is_ok());
    }
}
