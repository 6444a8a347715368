//! Sequences through a decoder, packed side by side or through pages of a cache: the two ways it is used.

use tandem_backend::family::LayerGroups;
use tandem_backend::lora::adapter::{Adapter, AdapterRows};
use tandem_backend::model::{Batch, Context, Decoder};
use tandem_core::TokenId;
use tandem_core::blocks::{BlockPool, Table};
use tandem_kernels::attention::{BLOCK_SIZE, KvCache, PagedSeq};
use tandem_kernels::places::{PagedGroup, Places};
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
        positions: &(&positions).into(),
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
    let mut pages = Pages::new(decoder, sequences.len(), longest, chunk);
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

/// A cache whose sequences own scattered blocks, as after some hours of serving. It has no more of them than they need: what a
/// window leaves behind is written to by others.
pub struct Pages {
    cache: KvCache,
    pool: BlockPool,
    /// Of each sequence, of each group of layers.
    tables: Vec<Vec<Table>>,
}

impl Pages {
    /// Sequences of `longest` tokens, appended to by `chunk` at a time.
    pub fn new(decoder: &Decoder, sequences: usize, longest: usize, chunk: usize) -> Pages {
        let groups = LayerGroups::of(&decoder.spec).blocks(chunk.min(longest));
        let blocks = sequences * groups.most(longest);
        let shape = decoder.layout().cache_shape(&decoder.spec, blocks);
        let cache = KvCache::new(shape, decoder.precision(), decoder.device()).expect("a small cache fits");
        let mut pool = BlockPool::new(blocks as u32, groups);
        let empty = |_| {
            let nothing = pool.lookup(&[]);
            pool.allocate(nothing, 0, 0).expect("nothing is asked")
        };
        Pages {
            cache,
            tables: (0..sequences).map(empty).collect(),
            pool,
        }
    }

    /// Logits `[T, V]` of each part, which stands behind `done` tokens of its sequence.
    pub fn append(&mut self, decoder: &Decoder, parts: &[(usize, Sequence)], done: usize) -> Vec<Tensor> {
        let (mut tokens, mut positions, mut lora, mut rows) = (vec![], vec![], vec![], vec![]);
        for (
            i,
            Sequence {
                tokens: part,
                adapter,
            },
        ) in parts
        {
            let places = done..done + part.len();
            self.pool.slide(&mut self.tables[*i], done);
            // A block at a time, in turns with the others.
            assert!(self.pool.extend(&mut self.tables[*i], done, places.end));
            rows.push(tokens.len()..tokens.len() + part.len());
            tokens.extend_from_slice(part);
            positions.extend(places.map(|place| place as i64));
            lora.extend(adapter.map(|adapter| AdapterRows {
                rows: rows[rows.len() - 1].clone(),
                adapter,
            }));
        }
        // From the end.
        let last = self.cache.shape().blocks as u32 - 1;
        let blocks: Vec<Vec<Vec<u32>>> = (0..self.pool.groups().count())
            .map(|group| {
                let of = |(i, _): &(usize, Sequence)| &self.tables[*i][group].blocks;
                let ids = parts.iter().map(of);
                ids.map(|ids| ids.iter().map(|id| last - id).collect()).collect()
            })
            .collect();
        let slots: Vec<Vec<i64>> = (0..blocks.len())
            .map(|group| {
                let of = |(part, (i, sequence)): (usize, &(usize, Sequence))| {
                    let first = self.tables[*i][group].first;
                    let blocks = &blocks[group][part];
                    let slot = move |place: usize| {
                        let block = blocks[place / BLOCK_SIZE - first] as usize;
                        (block * BLOCK_SIZE + place % BLOCK_SIZE) as i64
                    };
                    (done..done + sequence.tokens.len()).map(slot)
                };
                parts.iter().enumerate().flat_map(of).collect()
            })
            .collect();
        let group = |group: usize| {
            let seqs = parts
                .iter()
                .enumerate()
                .map(|(part, (i, sequence))| PagedSeq {
                    rows: rows[part].clone(),
                    table: &blocks[group][part],
                    first_block: self.tables[*i][group].first,
                    kv_len: done + sequence.tokens.len(),
                })
                .collect();
            let shapes = decoder.heads_of(group).into_iter();
            PagedGroup::new(&slots[group], seqs).attended(shapes.map(|heads| (heads, self.cache.dtype())))
        };
        let groups = (0..blocks.len()).map(group).collect();
        let places = Places::new(decoder.device(), &tokens, &positions, groups);
        let context = Context::Paged {
            cache: &self.cache,
            groups: &places.groups,
        };
        let hidden = decoder.forward(&Batch {
            tokens: &tokens,
            positions: &places.positions,
            context,
            lora: &lora,
        });
        let logits = decoder.head(&hidden, &lora).to_device(Device::Cpu);
        rows.iter()
            .map(|rows| logits.narrow(0, rows.start as i64, rows.len() as i64))
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
