//! The output layer in a pass: logits of chosen rows, log-probabilities of their labels, and the loss with its gradients,
//! under the adapters that change it. Its weight may be the embedding's; an adapter of it changes logits alone. Not here: which
//! rows are wanted (batch, pass).

use std::ops::Range;

use tandem_core::TokenId;
use tandem_kernels::cap::soft_cap;
use tandem_kernels::linear::{LoraRows, linear};
use tandem_kernels::loss::{
    Head, LogProbs, LossOut, Vocabulary, linear_cross_entropy, linear_log_probs, sharded_cross_entropy,
    sharded_log_probs,
};
use tandem_kernels::matmul;
use tandem_kernels::weight::Weight;
use tch::Tensor;

use super::gradient::{add, narrow_rows};
use super::linear::Own;
use super::stored::{Stored, Whole};
use super::{Decoder, Dropout, Trainable, TrainedRows};
use crate::family::shard::Layout;
use crate::family::{self, LinearId, ParamId};
use crate::lora::adapter::{Adapter, AdapterRows};

/// What changes the head for some of its rows.
pub struct HeadBranches<'a> {
    lora: Vec<LoraRows<'a>>,
    /// The head's rows after dropout, where some are dropped.
    input: Option<Tensor>,
}

/// The head's weight while it is multiplied with, some rows at a time: ranks that share it have unlike numbers of rows.
pub enum HeadHere {
    Resident,
    Gathered(Box<Weight>),
}

impl Decoder {
    /// Logits `[S, V]` of selected hidden rows `[S, H]`, on every rank. `lora` is of these rows.
    pub fn head(&self, hidden: &Tensor, lora: &[AdapterRows]) -> Tensor {
        let HeadBranches { lora, .. } = self.served_head(lora);
        let here = self.head_here();
        let mut logits = linear(&self.final_norm(hidden), self.head_weight(&here), None, &lora);
        if let Some(cap) = self.spec.logits.cap {
            soft_cap(&mut logits, cap);
        }
        let Layout { widest, .. } = *self.layout;
        if self.comm.world() == 1 {
            return logits;
        }
        // Shares of one width: the last one's may be smaller.
        let padded = logits.constant_pad_nd([0, widest - logits.size()[1]]);
        let all = self.comm.all_gather(&padded).permute([1, 0, 2]); // [S, world, widest]
        let all = all.reshape([logits.size()[0], -1]);
        all.narrow(1, 0, self.spec.vocab).contiguous()
    }

    /// Of adapters that answer.
    pub fn served_head<'a>(&self, lora: &[AdapterRows<'a>]) -> HeadBranches<'a> {
        let rows = lora.iter().map(|rows| (rows.rows.clone(), rows.adapter));
        HeadBranches {
            lora: self.head_rows(rows),
            input: None,
        }
    }

    /// Of what is trained, by rows of `normed [R, H]`.
    pub fn trained_head<'a>(&self, normed: &Tensor, trainable: Trainable<'a>) -> HeadBranches<'a> {
        let trained = trainable.adapted();
        let lora = self.head_rows(trained.iter().map(|rows| (rows.rows.clone(), rows.adapter)));
        let drops = !lora.is_empty() && trained.iter().any(|rows| rows.dropout.is_some());
        let id = self.layout.head_id();
        let dropped = |rows: &TrainedRows| self.dropped(&rows.of(normed), rows.dropout, id);
        HeadBranches {
            input: drops.then(|| Tensor::cat(&trained.iter().map(dropped).collect::<Vec<_>>(), 0)),
            lora,
        }
    }

    pub fn adapts_head(&self, adapter: &Adapter) -> bool {
        adapter.module(self.layout.head_id()).is_some()
    }

    fn head_rows<'a>(&self, rows: impl Iterator<Item = (Range<usize>, &'a Adapter)>) -> Vec<LoraRows<'a>> {
        let id = self.layout.head_id();
        let of_module = |(rows, adapter): (Range<usize>, &'a Adapter)| {
            let module = adapter.module(id)?;
            let rows = rows.start as i64..rows.end as i64;
            Some(LoraRows { rows, module })
        };
        rows.filter_map(of_module).collect()
    }

    /// log p(label) of rows `[R, H]` behind the final norm, the same on every rank.
    pub fn log_probs(
        &self,
        normed: &Tensor,
        labels: &[TokenId],
        here: &HeadHere,
        branches: &HeadBranches,
    ) -> LogProbs {
        let head = self.loss_head(here, branches);
        match self.vocabulary() {
            None => linear_log_probs(normed, head, labels),
            Some(vocabulary) => sharded_log_probs(normed, head, &vocabulary, labels),
        }
    }

    /// Loss and gradient of rows `[R, H]` behind the final norm, the same on every rank. Adds the gradients of the head, or of
    /// its adapters, where they are trained. (The head itself with one rank only.)
    pub fn cross_entropy(
        &self,
        normed: &Tensor,
        labels: &[TokenId],
        weights: &[f32],
        here: &HeadHere,
        trainable: Trainable,
    ) -> LossOut {
        let branches = self.trained_head(normed, trainable);
        let backward = |rows: Range<usize>, dlogits: &Tensor| {
            self.head_backward(normed, rows.start as i64..rows.end as i64, dlogits, trainable)
        };
        let head = self.loss_head(here, &branches);
        match self.vocabulary() {
            None => linear_cross_entropy(normed, head, labels, weights, backward),
            Some(vocabulary) => {
                let is_whole = matches!(trainable, Trainable::Full(_));
                assert!(!is_whole, "the base is trained by one rank alone");
                sharded_cross_entropy(normed, head, &vocabulary, labels, weights, backward)
            }
        }
    }

    /// Adds the gradients of what is trained of the head by `dlogits [r, v]` of `rows`; what goes through adapters to these.
    fn head_backward(
        &self,
        normed: &Tensor,
        rows: Range<i64>,
        dlogits: &Tensor,
        trainable: Trainable,
    ) -> Option<Tensor> {
        let own = match self.spec.head {
            family::Head::Own => ParamId::Head,
            family::Head::Tied => ParamId::Embed,
        };
        trainable.add(own, || matmul::tn(dlogits, &narrow_rows(normed, rows.clone())));
        let id = self.layout.head_id();
        let mut through = None;
        for trained in trainable.adapted() {
            let (first, end) = (trained.rows.start as i64, trained.rows.end as i64);
            let both = first.max(rows.start)..end.min(rows.end);
            if both.is_empty() || trained.adapter.module(id).is_none() {
                continue;
            }
            let here = both.start - rows.start..both.end - rows.start;
            let of_rows = TrainedRows {
                rows: both.start as usize..both.end as usize,
                dropout: trained.dropout.map(|dropout| Dropout {
                    row0: dropout.row0 + (both.start - first) as u64,
                    ..dropout
                }),
                ..*trained
            };
            let of_branch = self.head_branch(
                id,
                &of_rows,
                of_rows.of(normed),
                narrow_rows(dlogits, here.clone()),
            );
            let through = through.get_or_insert_with(|| narrow_rows(normed, rows.clone()).zeros_like());
            add(&narrow_rows(through, here), of_branch);
        }
        through
    }

    fn head_branch(&self, id: LinearId, rows: &TrainedRows, x: Tensor, dy: Tensor) -> Tensor {
        let module = rows.adapter.module(id).expect("it is adapted");
        let shrunk = linear(&self.dropped(&x, rows.dropout, id), &module.a, None, &[]);
        let own = Own { rows, x, dy, shrunk };
        self.branch(id, own).expect("it is adapted")
    }

    fn loss_head<'a>(&'a self, here: &'a HeadHere, branches: &'a HeadBranches) -> Head<'a> {
        Head {
            weight: self.head_weight(here),
            cap: self.spec.logits.cap,
            lora: &branches.lora,
            lora_x: branches.input.as_ref(),
        }
    }

    /// `[v, H]`: this rank's rows.
    fn head_weight<'a>(&'a self, here: &'a HeadHere) -> &'a Weight {
        match (here, self.stored_head()) {
            (HeadHere::Gathered(weight), _) => weight,
            (HeadHere::Resident, Stored::Here(weight)) => weight,
            (HeadHere::Resident, _) => unreachable!("a shared head is brought together first"),
        }
    }

    /// For the labels of a pass.
    pub fn head_here(&self) -> HeadHere {
        match self.stored_head().whole() {
            Whole::Here(_) => HeadHere::Resident,
            Whole::Gathered(weight) => HeadHere::Gathered(weight),
        }
    }

    fn stored_head(&self) -> &Stored {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    fn vocabulary(&self) -> Option<Vocabulary<'_>> {
        (self.comm.world() > 1).then(|| Vocabulary {
            comm: &self.comm,
            start: self.layout.vocabulary.start,
            widest: self.layout.widest,
            total: self.spec.vocab,
        })
    }
}
