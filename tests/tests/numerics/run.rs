//! Sequences through a decoder, packed side by side or through pages of a cache: the two ways it is used.

use tandem_backend::lora::adapter::{Adapter, AdapterRows};
use tandem_backend::model::{Batch, Context, Decoder};
use tandem_core::TokenId;
use tandem_kernels::attention::{BLOCK_SIZE, KvCache, PagedSeq};
use tch::{Device, Kind, Tensor};

/// Tokens and who answers (`None`: the base).
#[derive(Clone, Copy)]
pub struct Sequence<'a> {
    pub tokens: &'a [TokenId],
    pub adapter: Option<&'a Adapter>,
}

pub fn base(tokens: &[TokenId]) -> Sequence<'_> {
    Sequence {
        tokens,
        adapter: None,
    }
}

/// Logits `[T, V]` of each sequence, all in one packed batch.
pub fn packed(decoder: &Decoder, sequences: &[Sequence]) -> Vec<Tensor> {
    let tokens: Vec<TokenId> = sequences
        .iter()
        .flat_map(|sequence| sequence.tokens)
        .copied()
        .collect();
    let positions: Vec<i64> = sequences
        .iter()
        .flat_map(|sequence| 0..sequence.tokens.len() as i64)
        .collect();
    let mut cu_seqlens = vec![0];
    let mut lora = vec![];
    for Sequence { tokens, adapter } in sequences {
        let start = cu_seqlens[cu_seqlens.len() - 1];
        cu_seqlens.push(start + tokens.len());
        lora.extend(adapter.map(|adapter| AdapterRows {
            rows: start..start + tokens.len(),
            adapter,
        }));
    }
    let context = Context::Packed {
        cu_seqlens: &cu_seqlens,
    };
    let hidden = decoder.forward(&Batch {
        tokens: &tokens,
        positions: &positions,
        context,
        lora: &lora,
    });
    let logits = decoder.head(&hidden, &lora).to_device(Device::Cpu);
    cu_seqlens
        .windows(2)
        .map(|range| logits.narrow(0, range[0] as i64, (range[1] - range[0]) as i64))
        .collect()
}

/// Logits of each sequence through a paged cache, all sequences advancing together by `chunk` tokens at most.
pub fn paged(decoder: &Decoder, sequences: &[Sequence], chunk: usize) -> Vec<Tensor> {
    let longest = sequences
        .iter()
        .map(|sequence| sequence.tokens.len())
        .max()
        .unwrap_or(0);
    let mut pages = Pages::new(decoder, sequences.len(), longest);
    let mut logits: Vec<Vec<Tensor>> = sequences.iter().map(|_| vec![]).collect();
    let mut done = 0;
    while done < longest {
        let parts: Vec<(usize, Sequence)> = sequences
            .iter()
            .enumerate()
            .filter(|(_, sequence)| done < sequence.tokens.len())
            .map(|(i, sequence)| {
                let end = sequence.tokens.len().min(done + chunk);
                (
                    i,
                    Sequence {
                        tokens: &sequence.tokens[done..end],
                        ..*sequence
                    },
                )
            })
            .collect();
        for ((i, _), part) in parts.iter().zip(pages.append(decoder, &parts, done)) {
            logits[*i].push(part);
        }
        done += chunk;
    }
    logits.iter().map(|parts| Tensor::cat(parts, 0)).collect()
}

/// A cache whose sequences own scattered blocks, as after some hours of serving.
pub struct Pages {
    cache: KvCache,
    tables: Vec<Vec<u32>>,
}

impl Pages {
    pub fn new(decoder: &Decoder, sequences: usize, longest: usize) -> Pages {
        let blocks = longest.div_ceil(BLOCK_SIZE);
        let shape = decoder.layout().cache_shape(&decoder.spec, sequences * blocks);
        let cache = KvCache::new(shape, decoder.precision(), decoder.device()).expect("a small cache fits");
        // Sequence i takes every `sequences`-th block, from the end.
        let table = |i| {
            (0..blocks)
                .rev()
                .map(|block| (block * sequences + i) as u32)
                .collect()
        };
        Pages {
            cache,
            tables: (0..sequences).map(table).collect(),
        }
    }

    /// Logits `[T, V]` of each part, which stands behind `done` tokens of its sequence.
    pub fn append(&mut self, decoder: &Decoder, parts: &[(usize, Sequence)], done: usize) -> Vec<Tensor> {
        let (mut tokens, mut positions, mut slots, mut seqs, mut lora) =
            (vec![], vec![], vec![], vec![], vec![]);
        for (
            i,
            Sequence {
                tokens: part,
                adapter,
            },
        ) in parts
        {
            let table = &self.tables[*i];
            let rows = tokens.len()..tokens.len() + part.len();
            let places = done..done + part.len();
            tokens.extend_from_slice(part);
            positions.extend(places.clone().map(|place| place as i64));
            let slot = |place: usize| table[place / BLOCK_SIZE] as usize * BLOCK_SIZE + place % BLOCK_SIZE;
            slots.extend(places.clone().map(|place| slot(place) as i64));
            lora.extend(adapter.map(|adapter| AdapterRows {
                rows: rows.clone(),
                adapter,
            }));
            seqs.push(PagedSeq {
                rows,
                table,
                kv_len: places.end,
            });
        }
        let context = Context::Paged {
            cache: &self.cache,
            slots: &slots,
            seqs: &seqs,
        };
        let hidden = decoder.forward(&Batch {
            tokens: &tokens,
            positions: &positions,
            context,
            lora: &lora,
        });
        let logits = decoder.head(&hidden, &lora).to_device(Device::Cpu);
        seqs.iter()
            .map(|seq| logits.narrow(0, seq.rows.start as i64, seq.rows.len() as i64))
            .collect()
    }
}

/// Log-probabilities `[T - 1]` of the tokens after the first, from logits `[T, V]`.
pub fn logprobs(logits: &Tensor, tokens: &[TokenId]) -> Tensor {
    let targets: Vec<i64> = tokens[1..].iter().map(|&token| i64::from(token)).collect();
    let predicting = logits.narrow(0, 0, targets.len() as i64);
    predicting
        .log_softmax(-1, Kind::Double)
        .gather(1, &Tensor::from_slice(&targets).unsqueeze(1), false)
        .squeeze_dim(1)
}
