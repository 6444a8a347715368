//! Prompt lookup (Saxena 2023; vLLM's "ngram"): what followed the last tokens where they stood before is a guess at what
//! follows now. The step computes the guesses beside the token that is due, and each guess that the sampler would have
//! chosen, too, is a token for nothing. Not here: which guesses hold (the engine), what they cost.

use crate::TokenId;

/// Fields and defaults of vLLM's `speculative_config` with `"method": "ngram"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lookup {
    /// Tokens guessed at most in a step, `num_speculative_tokens`.
    pub tokens: usize,
    /// So many last tokens must be found again, `prompt_lookup_min`.
    pub min: usize,
    /// More are not compared, `prompt_lookup_max`.
    pub max: usize,
    /// With more sequences decoding than this nobody guesses: rows are free only while weights are all that a step
    /// waits for. `disable_by_batch_size`.
    pub max_sequences: usize,
}

impl Lookup {
    /// What followed the longest match of the end of `prompt` and `output`, the latest of equally long ones; at most
    /// `n` tokens. Where the match reaches into the end itself, the guess repeats: a period goes on.
    pub fn guess(&self, prompt: &[TokenId], output: &[TokenId], n: usize) -> Vec<TokenId> {
        let len = prompt.len() + output.len();
        let at = |i: usize| match i.checked_sub(prompt.len()) {
            None => prompt[i],
            Some(i) => output[i],
        };
        let (mut best, mut follows) = (0, 0);
        // `end`: the token after a match.
        for end in (1..len).rev() {
            let longest = self.max.min(end);
            let same = (0..longest)
                .take_while(|&back| at(end - 1 - back) == at(len - 1 - back))
                .count();
            if same > best {
                (best, follows) = (same, end);
            }
            if best == self.max {
                break;
            }
        }
        if best < self.min {
            return vec![];
        }
        let period = len - follows;
        (0..n).map(|i| at(follows + i % period)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_before_is_guessed() {
        let lookup = Lookup {
            tokens: 4,
            min: 2,
            max: 3,
            max_sequences: 8,
        };
        let guess = |prompt: &[TokenId], output: &[TokenId]| lookup.guess(prompt, output, 4);
        let nothing: [TokenId; 0] = [];
        for (prompt, output, expected) in [
            (&[1, 2, 3, 4, 5, 6, 7, 1][..], &[2, 3][..], &[4, 5, 6, 7][..]),
            // The latest of equal matches, and the longest of all.
            (&[1, 2, 8, 1, 2, 9, 5], &[1, 2], &[9, 5, 1, 2]),
            (&[7, 1, 2, 8, 1, 2, 9, 7, 1], &[2], &[8, 1, 2, 9]),
            // A period goes on.
            (&[5, 6, 7], &[6, 7, 6, 7], &[6, 7, 6, 7]),
            (&[3], &[3, 3], &[3, 3, 3, 3]),
            // One token alone says too little.
            (&[1, 2, 3], &[9, 1], &[]),
            (&[1], &nothing, &[]),
        ] {
            assert_eq!(guess(prompt, output), expected, "{prompt:?} {output:?}");
        }
    }
}
