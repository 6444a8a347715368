//! Grammars over a vocabulary: compiled, and followed token by token. Pure computing, bounded by fuel; whoever calls it
//! chooses the thread.

use std::sync::Arc;

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{Matcher, ParserFactory};
use toktrie::{
    ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, SimpleVob, TokEnv, TokRxInfo, TokTrie,
};

use super::{BadGrammar, Grammar, Kind, MAX_BYTES, place};
use crate::TokenId;

/// Of a thread that compiles: schemas and grammars nest, and are read by recursion.
pub const STACK_BYTES: usize = 256 << 20;

/// Of an error's text.
const MESSAGE_CHARS: usize = 300;

/// What tokens stand for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vocabulary {
    /// Empty: no token, or one without text.
    pub tokens: Vec<Vec<u8>>,
    /// Not made of characters: never part of what a grammar describes, unless it names the token.
    pub special: Vec<bool>,
    /// Ends of texts.
    pub ends: Vec<TokenId>,
}

impl Vocabulary {
    /// With the ends that the model's own files name.
    pub fn with_ends(mut self, ends: &[TokenId]) -> Vocabulary {
        let known = self.tokens.len();
        self.ends
            .extend(ends.iter().filter(|&&end| (end as usize) < known));
        self.ends.sort_unstable();
        self.ends.dedup();
        self
    }

    /// Those of a request's stop tokens that stand for an end, not for text.
    pub fn ends_among(&self, stop_tokens: &[TokenId]) -> Vec<TokenId> {
        let is_end = |token: &&TokenId| {
            self.ends.contains(token) || self.special.get(**token as usize).copied().unwrap_or(false)
        };
        stop_tokens.iter().filter(is_end).copied().collect()
    }
}

/// Makes guides. Cheap to share; costs the build of a trie of all tokens.
pub struct Compiler {
    factory: ParserFactory,
    ends: Arc<[TokenId]>,
}

/// One sequence's place in its grammar.
pub struct Guide {
    // 1.4 KB, and guides are handed from thread to thread.
    matcher: Box<Matcher>,
    /// Tokens that end a text.
    ends: Arc<[TokenId]>,
}

/// The grammar cannot be followed any further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the grammar cannot be followed any further: {0}")]
pub struct GuideError(String);

/// Which tokens may come.
#[derive(Clone, Debug)]
pub struct Mask(SimpleVob);

/// What follows a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    Open,
    /// Nothing can.
    Complete,
}

impl Compiler {
    pub fn new(vocabulary: &Vocabulary) -> Result<Compiler, String> {
        let Vocabulary {
            tokens,
            special,
            ends,
        } = vocabulary;
        const MARK: u8 = TokTrie::SPECIAL_TOKEN_MARKER;
        let words: Vec<Vec<u8>> = tokens
            .iter()
            .zip(special)
            .map(|(bytes, &special)| match (special, bytes.first()) {
                (_, None) => vec![],
                (true, Some(_)) => [&[MARK], bytes.as_slice()].concat(),
                // A byte that is in no text, and marks special tokens in the trie.
                (false, Some(&MARK)) => vec![],
                (false, Some(_)) => bytes.clone(),
            })
            .collect();
        let first_end = ends.first().copied().unwrap_or(INVALID_TOKEN);
        let mut trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, first_end), &words);
        if !ends.is_empty() {
            trie = trie.with_eos_tokens(ends);
        }
        // Not "canonical": the model chooses among the tokens that spell a text, nothing is forced.
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::json_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
            .map_err(|error| error.to_string())?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Compiler {
            factory,
            ends: ends.as_slice().into(),
        })
    }

    /// A guide at the beginning. The refusal of a schema says where in it.
    pub fn compile(&self, grammar: &Grammar) -> Result<Guide, BadGrammar> {
        let length = grammar.text().len();
        if length > MAX_BYTES {
            return Err(BadGrammar(format!(
                "it has {length} bytes, {MAX_BYTES} are taken at most"
            )));
        }
        match grammar.kind() {
            Kind::Lark => self.guide(TopLevelGrammar::from_lark(grammar.text().to_owned())),
            Kind::JsonSchema => {
                let schema = serde_json::from_str(grammar.text())
                    .map_err(|error| BadGrammar(format!("it is not JSON: {error}")))?;
                self.schema(&schema)
                    .map_err(|error| place::located(&schema, error, |part| self.schema(part).err()))
            }
        }
    }

    fn schema(&self, schema: &serde_json::Value) -> Result<Guide, BadGrammar> {
        self.guide(TopLevelGrammar::from_json_schema(schema.clone()))
    }

    fn guide(&self, grammar: TopLevelGrammar) -> Result<Guide, BadGrammar> {
        let mut matcher = Matcher::new(self.factory.create_parser(grammar));
        let failed = |error: String| BadGrammar(plain(&error));
        if let Some(error) = matcher.get_error() {
            return Err(failed(error));
        }
        // A grammar without a sentence is only found out by asking it; and the first mask fills the lexer's tables.
        matcher
            .compute_mask_or_eos()
            .map_err(|error| failed(error.to_string()))?;
        Ok(Guide {
            matcher: Box::new(matcher),
            ends: self.ends.clone(),
        })
    }
}

impl Guide {
    /// Another one at the same place. It shares nothing that grows.
    pub fn fork(&self) -> Guide {
        Guide {
            matcher: Box::new(self.matcher.deep_clone()),
            ends: self.ends.clone(),
        }
    }

    /// Another one at the same place, for a look at what may follow. It shares tables with this one: both are of one thread.
    pub fn ahead(&self) -> Guide {
        Guide {
            matcher: self.matcher.clone(),
            ends: self.ends.clone(),
        }
    }

    /// Tokens that may come next. `ends` may, exactly where the text may end.
    pub fn mask(&mut self, ends: &[TokenId]) -> Result<Mask, GuideError> {
        let failed = |error: &dyn std::fmt::Display| GuideError(plain(&error.to_string()));
        let mut mask = self
            .matcher
            .compute_mask_or_eos()
            .map_err(|error| failed(&error))?;
        let accepts =
            self.matcher.is_stopped() || self.matcher.is_accepting().map_err(|error| failed(&error))?;
        for &end in self.ends.iter() {
            mask.disallow_token(end);
        }
        for &end in ends {
            if (end as usize) < mask.len() {
                mask.set(end as usize, accepts);
            }
        }
        match mask.is_zero() {
            true => Err(GuideError("no token can go on".to_owned())),
            false => Ok(Mask(mask)),
        }
    }

    /// Takes a token that the mask allowed and that is no end.
    pub fn advance(&mut self, token: TokenId) -> Result<Next, GuideError> {
        let taken = self.matcher.consume_token(token);
        taken.map_err(|error| GuideError(plain(&error.to_string())))?;
        Ok(match self.matcher.is_stopped() {
            true => Next::Complete,
            false => Next::Open,
        })
    }
}

impl Mask {
    pub fn allows(&self, token: TokenId) -> bool {
        (token as usize) < self.0.len() && self.0.is_allowed(token)
    }

    /// A bit for each token that may come, 32 a word.
    pub fn words(&self) -> &[u32] {
        self.0.as_slice()
    }

    /// The logits, minus infinity where a token may not come. Tokens beyond the vocabulary (a padded model has some) may not.
    pub fn apply(&self, logits: &[f32]) -> Vec<f32> {
        let mut masked = vec![f32::NEG_INFINITY; logits.len()];
        let words = masked
            .chunks_mut(32)
            .zip(logits.chunks(32))
            .zip(self.0.as_slice());
        for ((to, from), &word) in words {
            match word {
                0 => {}
                u32::MAX => to.copy_from_slice(from),
                _ => {
                    for (bit, (to, &from)) in to.iter_mut().zip(from).enumerate() {
                        if word >> bit & 1 == 1 {
                            *to = from;
                        }
                    }
                }
            }
        }
        masked
    }

    /// Whether something else may come than these.
    pub fn allows_beside(&self, tokens: &[TokenId]) -> bool {
        let listed = tokens.iter().filter(|&&token| self.allows(token)).count();
        self.0.num_set() > listed
    }
}

/// An error of the library without what it adds for its own developers, nor long pieces of what the client sent.
fn plain(error: &str) -> String {
    error
        .lines()
        .next()
        .unwrap_or_default()
        .trim()
        .chars()
        .take(MESSAGE_CHARS)
        .collect()
}
