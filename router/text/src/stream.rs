//! Text while it is generated: each token gives the characters it completes. Not here: where to stop (`stop`).

use std::collections::BTreeSet;

use crate::tokenizer::{Skip, Tokenizer};

/// All that was returned, `flush` included, equals `Tokenizer::decode` of all tokens.
pub struct TextStream {
    tokenizer: Tokenizer,
    skip: Skip,
    /// Tokens that are shown though they are special: who reads the text needs them.
    shown: BTreeSet<u32>,
    /// The next byte is the first of the text, where a decoder may drop a space.
    at_start: bool,
    /// Less than one character: the beginning of a UTF-8 sequence.
    pending: Vec<u8>,
}

impl TextStream {
    /// Text that stands alone.
    pub fn new(tokenizer: Tokenizer, skip: Skip) -> TextStream {
        TextStream {
            tokenizer,
            skip,
            shown: BTreeSet::new(),
            at_start: true,
            pending: Vec::new(),
        }
    }

    /// Text that goes on after `prompt`: its leading space is kept, and a character that the prompt left unfinished
    /// is finished.
    pub fn after(tokenizer: Tokenizer, prompt: &[u32], skip: Skip) -> TextStream {
        let mut tail = Vec::new();
        for &token in prompt.iter().rev() {
            tail.splice(
                0..0,
                tokenizer
                    .visible_bytes(token, skip)
                    .unwrap_or_default()
                    .iter()
                    .copied(),
            );
            if tail.len() >= 4 {
                break; // a UTF-8 sequence has 4 bytes at most
            }
        }
        let mut stream = TextStream {
            tokenizer,
            skip,
            shown: BTreeSet::new(),
            at_start: tail.is_empty(),
            pending: tail,
        };
        // A tail cut inside a character gives U+FFFDs here, which nobody sees.
        stream.take_complete();
        stream
    }

    /// These, even if they are special.
    pub fn showing(mut self, tokens: BTreeSet<u32>) -> TextStream {
        self.shown = tokens;
        self
    }

    /// Text that `token` completes; often empty inside a multi-byte character. Ids outside the vocabulary (a padded
    /// model can sample one) have no text.
    pub fn push(&mut self, token: u32) -> String {
        let skip = match self.shown.contains(&token) {
            true => Skip::Nothing,
            false => self.skip,
        };
        let mut bytes = self.tokenizer.visible_bytes(token, skip).unwrap_or_default();
        if self.at_start && !bytes.is_empty() {
            self.at_start = false;
            if self.tokenizer.bytes().strips_leading_space {
                bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            }
        }
        self.pending.extend_from_slice(bytes);
        self.take_complete()
    }

    /// The rest at the end of the generation: half a character becomes U+FFFD.
    pub fn flush(&mut self) -> String {
        let half = std::mem::take(&mut self.pending);
        self.tokenizer.bytes().replacement(half.len())
    }

    fn take_complete(&mut self) -> String {
        let (text, half) = self.tokenizer.bytes().text(&self.pending);
        let half = half.len();
        self.pending.drain(..self.pending.len() - half);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{self, Random};
    use crate::tokenizer::SpecialTokens;

    fn tokenizers() -> Vec<Tokenizer> {
        vec![fixture::pieces(""), fixture::byte_level(""), fixture::demo()]
    }

    fn streamed(mut stream: TextStream, ids: &[u32]) -> String {
        let mut text = String::new();
        for &id in ids {
            let piece = stream.push(id);
            assert!(stream.pending.len() < 4, "less than a character is held back");
            text.push_str(&piece);
        }
        text + &stream.flush()
    }

    #[test]
    fn what_was_streamed_is_what_is_decoded() {
        for tokenizer in tokenizers() {
            let mut random = Random(11);
            let mut cases: Vec<Vec<u32>> = (0..2000)
                .map(|_| {
                    (0..random.below(24))
                        .map(|_| random.below(tokenizer.vocab_size()) as u32)
                        .collect()
                })
                .collect();
            cases.extend(
                fixture::CORPUS
                    .iter()
                    .map(|text| tokenizer.encode(text, SpecialTokens::Add).unwrap()),
            );
            for ids in cases {
                for skip in [Skip::Nothing, Skip::Special] {
                    let whole = tokenizer.decode(&ids, skip).unwrap();
                    assert_eq!(
                        streamed(TextStream::new(tokenizer.clone(), skip), &ids),
                        whole,
                        "{ids:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn text_after_a_prompt_goes_on_with_it() {
        for tokenizer in tokenizers() {
            for text in fixture::CORPUS {
                let ids = tokenizer.encode(text, SpecialTokens::Add).unwrap();
                for cut in 0..=ids.len() {
                    let (prompt, rest) = ids.split_at(cut);
                    let mut whole = TextStream::new(tokenizer.clone(), Skip::Special);
                    let shown: String = prompt.iter().map(|&id| whole.push(id)).collect();
                    let expected = tokenizer.decode(&ids, Skip::Special).unwrap();
                    let after = streamed(TextStream::after(tokenizer.clone(), prompt, Skip::Special), rest);
                    assert_eq!(shown + &after, expected, "{text:?} cut at {cut}");
                }
            }
        }
    }

    #[test]
    fn some_special_tokens_are_shown() {
        let tokenizer = fixture::demo();
        let special = tokenizer.special_tokens();
        let (first, second) = (&special[0], &special[1]);
        let ids = [first.1, second.1];
        let stream = || TextStream::new(tokenizer.clone(), Skip::Special);
        assert_eq!(streamed(stream(), &ids), "");
        assert_eq!(streamed(stream().showing([second.1].into()), &ids), second.0);
    }

    #[test]
    fn characters_come_when_they_are_complete() {
        let tokenizer = fixture::pieces("");
        let byte = |byte: u8| 3 + u32::from(byte);
        let mut stream = TextStream::new(tokenizer, Skip::Nothing);
        let pushed: Vec<String> = "é🦀".bytes().map(|b| stream.push(byte(b))).collect();
        assert_eq!(pushed, ["", "é", "", "", "", "🦀"]);
        // A broken sequence is shown as soon as it is known to be broken.
        assert_eq!(
            (stream.push(byte(0xE4)), stream.push(byte(b'x'))),
            (String::new(), "\u{FFFD}x".to_owned())
        );
        // As the library's byte fallback: one sign for each byte.
        assert_eq!(
            [0xE4, 0xB8, b'x'].map(|b| stream.push(byte(b))),
            ["", "", "\u{FFFD}\u{FFFD}x"]
        );
        assert_eq!(
            (stream.push(byte(0xF0)), stream.flush()),
            (String::new(), "\u{FFFD}".to_owned())
        );
        assert_eq!(stream.push(u32::MAX), "");
    }
}
