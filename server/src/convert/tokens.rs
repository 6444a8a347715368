//! Tokens with log-probabilities in the three shapes clients know: chat's, completions', vLLM's for prompts.

use std::collections::BTreeMap;

use tandem_openapi::chat::{ChatLogprobs, TokenLogprob, TopLogprob};
use tandem_openapi::completions::{CompletionLogprobs, PromptLogprob, PromptLogprobs, TopLogprobs};
use tandem_router::api::TokenText;

/// JSON has no infinity; OpenAI and vLLM send this instead.
const LOWEST: f32 = -9999.0;

pub fn json_safe(logprob: f32) -> f32 {
    // NaN too becomes LOWEST.
    f32::max(logprob, LOWEST)
}

/// `top`: how many alternatives were asked.
pub fn chat(tokens: &[TokenText], top: u32) -> ChatLogprobs {
    let one = |token: &TokenText| TokenLogprob {
        token: token.text.clone(),
        logprob: json_safe(token.logprob),
        bytes: token.bytes.clone(),
        top_logprobs: token
            .top
            .iter()
            .take(top as usize)
            .map(|(_, text, bytes, logprob)| TopLogprob {
                token: text.clone(),
                logprob: json_safe(*logprob),
                bytes: bytes.clone(),
            })
            .collect(),
    };
    ChatLogprobs {
        content: tokens.iter().map(one).collect(),
        refusal: None,
    }
}

/// A completion's four lists, which go on from chunk to chunk of a stream.
#[derive(Debug, Default)]
pub struct Offsets {
    /// Of the text so far.
    characters: u64,
    /// The first token's text begins with a space that the text has not: sentencepiece's decoders leave it away.
    lacks_space: bool,
}

impl Offsets {
    /// Of a prompt that comes back as `text`.
    pub fn of_echo(text: &str) -> Offsets {
        Offsets {
            lacks_space: !text.starts_with(' '),
            ..Offsets::default()
        }
    }

    /// Adds tokens to `out`. The first token of a prompt is text without a log-probability.
    pub fn completion(
        &mut self,
        out: &mut CompletionLogprobs,
        tokens: impl Iterator<Item = Entry>,
        top: u32,
    ) {
        let all_tops = match top {
            0 => None,
            _ => Some(out.top_logprobs.get_or_insert_default()),
        };
        let mut tops = Vec::new();
        for entry in tokens {
            let (text, is_hidden, logprob, alternatives) = match entry {
                Entry::First { text, is_hidden } => (text, is_hidden, None, None),
                Entry::Scored(token) => {
                    let alternatives = alternatives(&token, top);
                    let logprob = json_safe(token.logprob);
                    (token.text, token.is_hidden, Some(logprob), Some(alternatives))
                }
            };
            out.text_offset.push(self.characters);
            if !is_hidden {
                let left_away = text.starts_with(' ') && std::mem::take(&mut self.lacks_space);
                self.characters += text.chars().count() as u64 - u64::from(left_away);
                self.lacks_space &= text.is_empty();
            }
            out.tokens.push(text);
            out.token_logprobs.push(logprob);
            tops.push(alternatives);
        }
        if let Some(all) = all_tops {
            all.extend(tops);
        }
    }
}

pub enum Entry {
    First { text: String, is_hidden: bool },
    Scored(TokenText),
}

/// The most likely tokens and the one that stands there. Two ids may share a text (half characters do): the likelier
/// one keeps it, so that the greatest value is always the most likely token's own number.
fn alternatives(token: &TokenText, top: u32) -> TopLogprobs {
    let mut entries: Vec<(String, f32)> = Vec::with_capacity(top as usize + 1);
    let best = token
        .top
        .iter()
        .take(top as usize)
        .map(|(_, text, _, logprob)| (text, *logprob));
    for (text, logprob) in best.chain([(&token.text, token.logprob)]) {
        if !entries.iter().any(|(known, _)| known == text) {
            entries.push((text.clone(), json_safe(logprob)));
        }
    }
    TopLogprobs(entries)
}

pub fn prompt(tokens: &[Option<TokenText>], top: u32) -> PromptLogprobs {
    let entries = |token: &TokenText| {
        let alternatives =
            token
                .top
                .iter()
                .take(top as usize)
                .enumerate()
                .map(|(i, (id, text, _, logprob))| {
                    let rank = Some(i as u32 + 1);
                    (
                        id.to_string(),
                        PromptLogprob {
                            logprob: json_safe(*logprob),
                            rank,
                            decoded_token: text.clone(),
                        },
                    )
                });
        let mut entries: BTreeMap<_, _> = alternatives.collect();
        entries
            .entry(token.id.to_string())
            .or_insert_with(|| PromptLogprob {
                logprob: json_safe(token.logprob),
                rank: None,
                decoded_token: token.text.clone(),
            });
        entries
    };
    tokens.iter().map(|token| token.as_ref().map(entries)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32, text: &str, logprob: f32, top: &[(u32, &str, f32)]) -> TokenText {
        let top = top
            .iter()
            .map(|&(id, text, logprob)| (id, text.to_owned(), text.into(), logprob))
            .collect();
        TokenText {
            id,
            text: text.to_owned(),
            is_hidden: false,
            bytes: text.into(),
            logprob,
            top,
        }
    }

    #[test]
    fn lists_stay_aligned_over_chunks_and_offsets_count_characters() {
        let mut offsets = Offsets::default();
        let mut first = CompletionLogprobs::default();
        let tokens = [
            Entry::First {
                text: "<s>".to_owned(),
                is_hidden: true,
            },
            Entry::Scored(token(1, "é", -0.1, &[])),
            Entry::Scored(token(2, " b", -0.5, &[(1, " a", -0.25), (2, " b", -0.5)])),
            Entry::Scored(token(3, "", f32::NEG_INFINITY, &[(4, "x", -0.1)])),
        ];
        offsets.completion(&mut first, tokens.into_iter(), 2);
        assert_eq!(first.tokens, ["<s>", "é", " b", ""]);
        assert_eq!(first.token_logprobs, [None, Some(-0.1), Some(-0.5), Some(LOWEST)]);
        assert_eq!(first.text_offset, [0, 0, 1, 3]);
        let tops = first.top_logprobs.unwrap();
        assert_eq!(tops[0], None);
        assert_eq!(
            tops[2],
            Some(TopLogprobs(vec![(" a".into(), -0.25), (" b".into(), -0.5)]))
        );
        assert_eq!(
            tops[3],
            Some(TopLogprobs(vec![("x".into(), -0.1), (String::new(), LOWEST)]))
        );

        let mut second = CompletionLogprobs::default();
        offsets.completion(
            &mut second,
            [Entry::Scored(token(5, "c", -1.0, &[]))].into_iter(),
            0,
        );
        assert_eq!(second.text_offset, [3]);
        assert!(second.top_logprobs.is_none());
    }

    #[test]
    fn a_prompt_token_below_the_alternatives_has_no_rank() {
        let tokens = [None, Some(token(7, "t", -3.0, &[(1, "a", -0.1), (2, "b", -0.2)]))];
        let shaped = prompt(&tokens, 1);
        assert_eq!(shaped[0], None);
        let entries = shaped[1].as_ref().unwrap();
        assert_eq!(entries["1"].rank, Some(1));
        assert_eq!((entries["7"].rank, entries["7"].logprob), (None, -3.0));
        assert_eq!(entries.len(), 2);
    }
}
