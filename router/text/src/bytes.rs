//! The bytes each token stands for, in one table made at load. Not here: joining them into text (`stream`).
//!
//! Decoding through bytes makes every token independent of its neighbours, so streaming costs O(1) per token and what
//! was streamed equals what would have been decoded at once. The decoder of tokenizer.json is read as a rule for one
//! token; a decoder that is not such a rule (WordPiece, CTC, BPE suffixes) is refused by name.

use std::sync::LazyLock;

use serde_json::Value;
use tokenizers::Model;

use crate::error::TextError;

pub(crate) struct TokenBytes {
    bytes: Vec<u8>,
    /// Token `id` is `bytes[ends[id - 1]..ends[id]]`.
    ends: Vec<usize>,
    /// The decoder takes one space off the beginning of the whole text (it belongs to SentencePiece's dummy prefix).
    pub strips_leading_space: bool,
    /// Each byte of a broken character becomes a U+FFFD of its own, as the library's byte fallback has it. Else the whole
    /// broken sequence becomes one, as for `bytes.decode(errors="replace")`.
    replaces_each_byte: bool,
}

impl TokenBytes {
    pub fn new(library: &tokenizers::Tokenizer, vocab_size: usize) -> Result<TokenBytes, TextError> {
        let unreadable = |error: serde_json::Error| TextError::Unsupported(format!("decoder: {error}"));
        let decoder = serde_json::to_value(library.get_decoder()).map_err(unreadable)?;
        let Rule {
            spelling,
            strips_leading_space,
        } = Rule::of(&decoder)?;
        let added = library.get_added_tokens_decoder();
        let mut table = TokenBytes {
            bytes: Vec::new(),
            ends: Vec::with_capacity(vocab_size),
            strips_leading_space,
            replaces_each_byte: matches!(
                spelling,
                Spelling::Pieces {
                    byte_fallback: true,
                    ..
                }
            ),
        };
        for id in 0..vocab_size as u32 {
            match (added.get(&id), library.get_model().id_to_token(id), &spelling) {
                // Plain text even under the byte-level alphabet. The library would show it as its normalizer spells it,
                // with SentencePiece's dummy prefix.
                (Some(token), _, Spelling::ByteLevel) => table.bytes.extend(token.content.bytes()),
                (Some(token), _, spelling) => spelling.append(&token.content, &mut table.bytes),
                (None, Some(token), spelling) => spelling.append(&token, &mut table.bytes),
                (None, None, _) => {}
            }
            table.ends.push(table.bytes.len());
        }
        Ok(table)
    }

    /// `None`: not in the vocabulary. Ids that no token has are empty.
    pub fn get(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let end = *self.ends.get(id)?;
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        Some(&self.bytes[start..end])
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// The text of bytes, and those at the end that may still become a character.
    pub fn text<'a>(&self, mut bytes: &'a [u8]) -> (String, &'a [u8]) {
        let mut text = String::new();
        loop {
            let error = match std::str::from_utf8(bytes) {
                Ok(valid) => return (text + valid, &[]),
                Err(error) => error,
            };
            let (valid, broken) = bytes.split_at(error.valid_up_to());
            text.push_str(std::str::from_utf8(valid).expect("valid up to here"));
            let Some(length) = error.error_len() else {
                return (text, broken);
            };
            text.push_str(&self.replacement(length));
            bytes = &broken[length..];
        }
    }

    /// What stands for this many bytes of a broken character.
    pub fn replacement(&self, n_bytes: usize) -> String {
        let signs = if self.replaces_each_byte {
            n_bytes
        } else {
            n_bytes.min(1)
        };
        String::from(char::REPLACEMENT_CHARACTER).repeat(signs)
    }
}

struct Rule {
    spelling: Spelling,
    strips_leading_space: bool,
}

enum Spelling {
    /// GPT-2: each character of a token is one byte.
    ByteLevel,
    /// SentencePiece: UTF-8 with replacements, and `<0x0A>` for a single byte where there is byte fallback.
    Pieces {
        replace: Vec<(String, String)>,
        byte_fallback: bool,
    },
}

impl Rule {
    fn of(decoder: &Value) -> Result<Rule, TextError> {
        let refused = |what: &str| Err(TextError::Unsupported(format!("decoder {what}")));
        let steps = match decoder.get("type").and_then(Value::as_str) {
            None => return refused("is missing in tokenizer.json"),
            Some("Sequence") => decoder["decoders"].as_array().map_or(&[][..], Vec::as_slice),
            Some(_) => std::slice::from_ref(decoder),
        };
        let (mut byte_level, mut byte_fallback, mut fused, mut strips_leading_space) =
            (false, false, false, false);
        let mut replace = Vec::new();
        for step in steps {
            let text = |name: &str| step[name].as_str().unwrap_or_default();
            match text("type") {
                "ByteLevel" => byte_level = true,
                "ByteFallback" => byte_fallback = true,
                "Fuse" => fused = true,
                "Replace" => match step["pattern"]["String"].as_str() {
                    Some(from) => replace.push((from.to_owned(), text("content").to_owned())),
                    None => return refused(&format!("Replace with pattern {}", step["pattern"])),
                },
                "Metaspace" => {
                    replace.push((text("replacement").to_owned(), " ".to_owned()));
                    strips_leading_space = text("prepend_scheme") != "never";
                }
                // Before Fuse it would strip every token.
                "Strip" if fused && text("content") == " " && step["start"] == 1 && step["stop"] == 0 => {
                    strips_leading_space = true;
                }
                _ => return refused(&format!("step {step}")),
            }
        }
        match (byte_level, replace.is_empty() && !byte_fallback) {
            (true, true) => Ok(Rule {
                spelling: Spelling::ByteLevel,
                strips_leading_space,
            }),
            (true, false) => refused("mixes ByteLevel with other steps"),
            (false, _) => Ok(Rule {
                spelling: Spelling::Pieces {
                    replace,
                    byte_fallback,
                },
                strips_leading_space,
            }),
        }
    }
}

impl Spelling {
    fn append(&self, token: &str, bytes: &mut Vec<u8>) {
        match self {
            Spelling::ByteLevel => {
                let spelled: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
                bytes.extend(spelled.unwrap_or_else(|| token.as_bytes().to_vec()));
            }
            Spelling::Pieces {
                replace,
                byte_fallback,
            } => match fallback_byte(token).filter(|_| *byte_fallback) {
                Some(byte) => bytes.push(byte),
                None => {
                    let text = replace
                        .iter()
                        .fold(token.to_owned(), |text, (from, to)| text.replace(from, to));
                    bytes.extend(text.into_bytes());
                }
            },
        }
    }
}

/// `<0x0A>` is 10.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// The alphabet of github.com/openai/gpt-2 `encoder.py`: printable Latin-1 bytes are themselves, the other 68 are the
/// characters from U+0100 on, in order.
fn byte_of_char(c: char) -> Option<u8> {
    static SHIFTED: LazyLock<Vec<u8>> =
        LazyLock::new(|| (0..=255).filter(|&byte| !is_itself(byte)).collect());
    match u32::from(c) {
        code @ 0..=255 => Some(code as u8).filter(|&byte| is_itself(byte)),
        code => SHIFTED.get(code as usize - 256).copied(),
    }
}

fn is_itself(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn decoders_that_are_no_rule_for_one_token_are_refused_by_name() {
        let cases = [
            (json!(null), "missing"),
            (json!({"type": "WordPiece", "prefix": "##"}), "WordPiece"),
            (json!({"type": "Sequence", "decoders": [{"type": "CTC"}]}), "CTC"),
            (
                json!({"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""}),
                "Regex",
            ),
            (
                json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}),
                "Strip",
            ),
            (
                json!({"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "ByteFallback"}]}),
                "mixes",
            ),
        ];
        for (decoder, named) in cases {
            let refusal = Rule::of(&decoder).err().expect("must be refused").to_string();
            assert!(refusal.contains(named), "{refusal}");
        }
    }

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let mut bytes: Vec<u8> = alphabet
            .into_iter()
            .map(|c| byte_of_char(c).expect("in the alphabet"))
            .collect();
        bytes.sort();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(
            (byte_of_char('Ġ'), byte_of_char('Ċ'), byte_of_char('▁')),
            (Some(b' '), Some(b'\n'), None)
        );
    }
}
