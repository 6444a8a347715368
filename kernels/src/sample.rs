//! Chooses tokens from logits on a device with kernels of ours, and what their log-probabilities are made of: the logits
//! themselves never come to the host. The same choice on the host, and what the numbers of an [`Ask`] mean, is the sampler's
//! (`backend/src/sample`).

use tch::{Kind, Tensor};

use crate::gpu::{self, Gpu};

/// Tokens of one block of the kernels (`SPLIT` of `gpu/logits.cu`).
const SPLIT: usize = 4096;
/// What a block sums up (`MASSES` there).
const MASSES: usize = 6;
/// Of 2^20 tokens: the mass of more does not fit 64 bits.
const MAX_SPLITS: usize = 256;

/// A change of one logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Edit {
    pub token: u32,
    /// Added first. Minus infinity: the token is forbidden.
    pub bias: f32,
    /// Divides what is above 0 then, multiplies the rest.
    pub repetition: f32,
    /// Subtracted last.
    pub penalty: f32,
}

impl Edit {
    /// That changes nothing yet.
    pub fn of(token: u32) -> Edit {
        Edit {
            token,
            bias: 0.0,
            repetition: 1.0,
            penalty: 0.0,
        }
    }

    pub fn apply(&self, logit: f32) -> f32 {
        let logit = match self.bias == f32::NEG_INFINITY {
            true => f32::NEG_INFINITY,
            false => logit + self.bias,
        };
        let logit = match logit > 0.0 {
            true => logit / self.repetition,
            false => logit * self.repetition,
        };
        logit - self.penalty
    }
}

/// What is asked of one row.
#[derive(Clone, Debug)]
pub struct Ask<'a> {
    /// The token, whatever the logits say.
    pub given: Option<u32>,
    /// Whether its log-probability is wanted, and with how many alternatives.
    pub n_top: Option<u32>,
    /// Random bits.
    pub draw: u64,
    /// Of the temperature. 0: the most likely token.
    pub inverse: f32,
    /// What weighs less beside the heaviest is never drawn.
    pub least: f32,
    pub top_k: Option<u32>,
    /// In units of 2^-64.
    pub top_p: Option<u64>,
    /// By token, each once.
    pub edits: Vec<Edit>,
    /// A bit for each token that may come, 32 a word.
    pub mask: Option<&'a [u32]>,
}

/// What a row said.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    pub token: u32,
    /// Where it was asked for.
    pub likelihood: Option<Likelihood>,
}

/// What log-probabilities are made of: logits as the mask left them, before edits.
#[derive(Clone, Debug, PartialEq)]
pub struct Likelihood {
    pub logit: f32,
    pub maximum: f32,
    /// Of exp(logit - maximum), in units of 2^-44.
    pub mass: u64,
    /// The best tokens with their logits, best first.
    pub top: Vec<(u32, f32)>,
}

/// The token of each row of `logits [S, V]`; none where they are not finite. The logits are overwritten.
///
/// # Panics
/// When there is not one ask a row, or the vocabulary has more than 2^20 tokens.
pub fn sample(gpu: Gpu, logits: &Tensor, asks: &[Ask]) -> Vec<Option<Chosen>> {
    let logits = logits.contiguous();
    let (rows, vocab) = logits.size2().expect("logits are [S, V]");
    let (rows, vocab) = (rows as usize, vocab as usize);
    let splits = vocab.div_ceil(SPLIT);
    assert_eq!(asks.len(), rows, "one ask for each row");
    assert!(splits <= MAX_SPLITS, "a vocabulary of {vocab} tokens");
    if rows == 0 {
        return vec![];
    }
    let n_top = asks.iter().filter_map(|ask| ask.n_top).max();
    let alternatives = n_top.unwrap_or(0) as usize;
    let draws = asks.iter().any(|ask| ask.given.is_none() && ask.inverse > 0.0);

    let staged = Staged::of(asks, splits);
    let there = gpu::told::send(&Tensor::from_slice(&staged.words), logits.device()); // the one copy to the device
    let part = |first: usize| there.narrow(0, first as i64, (staged.words.len() - first) as i64);
    let (asked, edits, starts, masks) = (
        part(0),
        part(staged.edits),
        part(staged.starts),
        part(staged.masks),
    );
    let scratch = |n: usize, kind| Tensor::empty([n.max(1) as i64], (kind, logits.device()));
    let best = scratch(rows * splits * 2, Kind::Int64);
    let top = scratch(rows * splits * alternatives, Kind::Int64);
    let masses = scratch(rows * splits * MASSES, Kind::Int64);
    let unedited = scratch((staged.starts - staged.edits) / 4, Kind::Float);
    let width = 4 + 2 * alternatives;
    let said = scratch(rows * (1 + width), Kind::Int); // [S] tokens, then [S, width] records
    let records = said.narrow(0, rows as i64, (rows * width) as i64);

    let args = [
        (&logits).into(),
        (&asked).into(),
        (&edits).into(),
        (&starts).into(),
        (&masks).into(),
        (&best).into(),
        (&top).into(),
        gpu::int(vocab),
        gpu::int(splits),
        gpu::int(staged.mask_words),
        gpu::int(alternatives),
    ];
    gpu.launch("logit_maxima", [splits, rows, 1], 256, &args);
    if draws || n_top.is_some() {
        let args = [
            (&logits).into(),
            (&asked).into(),
            (&edits).into(),
            (&starts).into(),
            (&best).into(),
            (&unedited).into(),
            (&masses).into(),
            gpu::int(vocab),
            gpu::int(splits),
        ];
        gpu.launch("logit_masses", [splits, rows, 1], 256, &args);
    }
    let args = [
        (&logits).into(),
        (&asked).into(),
        (&best).into(),
        (&masses).into(),
        (&said).into(),
        gpu::int(vocab),
        gpu::int(splits),
    ];
    gpu.launch("sample", [rows, 1, 1], 1024, &args);
    if n_top.is_some() {
        let args = [
            (&logits).into(),
            (&asked).into(),
            (&edits).into(),
            (&starts).into(),
            (&unedited).into(),
            (&best).into(),
            (&masses).into(),
            (&top).into(),
            (&said).into(),
            (&records).into(),
            gpu::int(vocab),
            gpu::int(splits),
            gpu::int(alternatives),
        ];
        gpu.launch("logprobs", [rows, 1, 1], 256, &args);
    }
    // Tokens alone, where nothing else was asked.
    let said = match n_top {
        Some(_) => said,
        None => said.narrow(0, 0, rows as i64),
    };
    gpu::launches::launched(gpu::WAIT);
    let said = Vec::<i32>::try_from(&said).expect("integers");
    let (tokens, records) = said.split_at(rows);
    let of_row = |(row, ask): (usize, &Ask)| {
        let token = u32::try_from(tokens[row]).ok()?;
        let likelihood = ask
            .n_top
            .map(|n_top| Likelihood::read(&records[row * width..][..width], n_top));
        Some(Chosen { token, likelihood })
    };
    asks.iter().enumerate().map(of_row).collect()
}

impl Likelihood {
    fn read(record: &[i32], n_top: u32) -> Likelihood {
        let float = |word: i32| f32::from_bits(word as u32);
        let &[logit, maximum, low, high, ref top @ ..] = record else {
            unreachable!("a record has four words at least");
        };
        let top = top.as_chunks::<2>().0.iter().take(n_top as usize);
        Likelihood {
            logit: float(logit),
            maximum: float(maximum),
            mass: u64::from(high as u32) << 32 | u64::from(low as u32),
            top: top
                .map_while(|&[token, logit]| Some((u32::try_from(token).ok()?, float(logit))))
                .collect(),
        }
    }
}

/// All asks of a step as the kernels read them, in one piece: asks, edits, where the edits of each split begin, masks.
struct Staged {
    words: Vec<i32>,
    edits: usize,
    starts: usize,
    masks: usize,
    mask_words: usize,
}

impl Staged {
    fn of(asks: &[Ask], splits: usize) -> Staged {
        let mut words = vec![];
        let mut n_masks = 0;
        for ask in asks {
            let halves = |number: u64| [number as u32 as i32, (number >> 32) as i32];
            let [draw_low, draw_high] = halves(ask.draw);
            let [top_p_low, top_p_high] = halves(ask.top_p.unwrap_or(0));
            words.extend([
                ask.given.map_or(-1, |token| token as i32),
                ask.n_top.map_or(-1, |n| n as i32),
                draw_low,
                draw_high,
                ask.inverse.to_bits() as i32,
                ask.least.to_bits() as i32,
                ask.top_k.map_or(0, |k| k.min(i32::MAX as u32) as i32),
                ask.mask.map_or(-1, |_| n_masks),
                top_p_low,
                top_p_high,
                0,
                0,
            ]);
            n_masks += i32::from(ask.mask.is_some());
        }
        let edits = words.len();
        for edit in asks.iter().flat_map(|ask| &ask.edits) {
            words.extend([
                edit.token as i32,
                edit.bias.to_bits() as i32,
                edit.repetition.to_bits() as i32,
                edit.penalty.to_bits() as i32,
            ]);
        }
        let starts = words.len();
        let mut before = 0;
        for ask in asks {
            words.extend((0..=splits).map(|split| {
                let of_earlier = ask
                    .edits
                    .partition_point(|edit| (edit.token as usize) < split * SPLIT);
                (before + of_earlier) as i32
            }));
            before += ask.edits.len();
        }
        let masks = words.len();
        let mask_words = asks.iter().filter_map(|ask| ask.mask).map(<[u32]>::len).max();
        let mask_words = mask_words.unwrap_or(0);
        for mask in asks.iter().filter_map(|ask| ask.mask) {
            words.extend(mask.iter().map(|&word| word as i32));
            words.resize(words.len() + mask_words - mask.len(), 0);
        }
        Staged {
            words,
            edits,
            starts,
            masks,
            mask_words,
        }
    }
}
