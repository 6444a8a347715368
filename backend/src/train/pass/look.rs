//! Forward only.

use tandem_kernels::loss::LogProbs;
use tch::Tensor;

use super::labels::{Labels, rows_at_once};
use crate::lora::adapter::{Adapter, AdapterRows};
use crate::model::{Batch, Context as Attention, Decoder, HeadHere};
use crate::train::slice::Slice;

/// A slice on its way to the log-probabilities of its labels and no further: validation, references. No dropout.
pub struct Look {
    hidden: Tensor,
    /// Sublayers it went through.
    sublayers: usize,
    /// Behind the last of them.
    head: Option<HeadHere>,
    found: LogProbs,
}

impl Look {
    /// With the adapter that it will advance with.
    pub fn enter(slice: &Slice, decoder: &Decoder, adapter: Option<&Adapter>) -> Look {
        let lora = adapter.map(|adapter| AdapterRows {
            rows: 0..slice.tokens.len(),
            adapter,
        });
        Look {
            hidden: decoder.embed(&slice.tokens, lora.as_slice()),
            sublayers: 0,
            head: None,
            found: LogProbs::default(),
        }
    }

    /// A sublayer, or some labels, further, under `adapter` or the base. The log-probabilities of all labels, in order,
    /// when it is through.
    pub fn advance(
        self,
        slice: &Slice,
        decoder: &Decoder,
        adapter: Option<&Adapter>,
    ) -> Result<LogProbs, Look> {
        let Look {
            hidden,
            sublayers,
            head,
            mut found,
        } = self;
        if sublayers < decoder.n_sublayers() {
            let lora = adapter.map(|adapter| AdapterRows {
                rows: 0..slice.tokens.len(),
                adapter,
            });
            let batch = Batch {
                tokens: &slice.tokens,
                positions: &(&slice.positions).into(),
                context: Attention::Packed {
                    cu_seqlens: &slice.cu_seqlens,
                },
                lora: lora.as_slice(),
            };
            return Err(Look {
                hidden: decoder.sublayer(sublayers, hidden, &batch),
                sublayers: sublayers + 1,
                head,
                found,
            });
        }
        let head = head.unwrap_or_else(|| decoder.head_here());
        if found.log_probs.len() == slice.labels.len() {
            return Ok(found);
        }
        let done = found.log_probs.len();
        let next = done..slice.labels.len().min(done + rows_at_once(decoder));
        let labels = Labels::of(&slice.labels[next], decoder.device());
        let lora = adapter.map(|adapter| AdapterRows {
            rows: 0..labels.tokens.len(),
            adapter,
        });
        let branches = decoder.served_head(lora.as_slice());
        let normed = labels.normed(&hidden, decoder);
        found.extend(decoder.log_probs(&normed, &labels.tokens, &head, &branches));
        Err(Look {
            hidden,
            sublayers,
            head: Some(head),
            found,
        })
    }
}
