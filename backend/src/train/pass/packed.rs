//! The slices of one pass side by side, each with its own adapter, dropout and labels.

use std::ops::Range;

use tandem_kernels::loss::LogProbs;
use tch::Tensor;

use super::labels::rows_at_once;
use super::{Entry, Learns, Trained};
use crate::lora::adapter::AdapterRows;
use crate::model::{Decoder, TrainedRows};
use crate::train::slice::Slice;

pub(super) struct Packed {
    /// All of them as one.
    pub slice: Slice,
    pub parts: Vec<Part>,
}

/// What one slice has of a pass.
pub(super) struct Part {
    pub rows: Range<usize>,
    pub labels: Range<usize>,
    pub rows_before: u64,
    /// Whether the weights of its labels are final.
    pub is_weighed: bool,
    /// Whether no row has several labels.
    pub is_row_once: bool,
}

impl Packed {
    /// All are weighed.
    pub fn new(slices: &[Entry]) -> Packed {
        let mut slice = Slice::default();
        let mut parts = vec![];
        for &(next, rows_before) in slices {
            let (first_row, first_label) = (slice.tokens.len(), slice.labels.len());
            slice.append(next);
            parts.push(Part {
                rows: first_row..slice.tokens.len(),
                labels: first_label..slice.labels.len(),
                rows_before,
                is_weighed: true,
                is_row_once: next.labels.windows(2).all(|pair| pair[0].0 < pair[1].0),
            });
        }
        Packed { slice, parts }
    }

    /// What goes into the first sublayer, `[T, H]`. `slices` are those it was made of.
    pub fn embed(&self, slices: &[Entry], learns: &[Learns], decoder: &Decoder) -> Tensor {
        let adapted = self
            .parts
            .iter()
            .zip(learns)
            .filter_map(|(part, learns)| match learns.trained {
                Trained::Adapter { adapter, .. } => Some(AdapterRows {
                    rows: part.rows.clone(),
                    adapter,
                }),
                Trained::Model { .. } => None,
            });
        let adapted: Vec<AdapterRows> = adapted.collect();
        let embedded = decoder.embed(&self.slice.tokens, &adapted);
        if learns.iter().all(|learns| learns.noise.is_none()) {
            return embedded;
        }
        let noisy = |((entry, part), learns): ((&Entry, &Part), &Learns)| {
            let embedded = embedded.narrow(0, part.rows.start as i64, part.rows.len() as i64);
            match learns.noise {
                Some(noise) => noise.add(embedded, entry.0, entry.1),
                None => embedded,
            }
        };
        let parts = slices.iter().zip(&self.parts).zip(learns);
        Tensor::cat(&parts.map(noisy).collect::<Vec<_>>(), 0)
    }

    pub fn is_weighed(&self) -> bool {
        self.parts.iter().all(|part| part.is_weighed)
    }

    /// Slices that wait for weights, with their numbers.
    pub fn to_be_weighed(&self) -> impl Iterator<Item = (usize, &Part)> {
        self.parts.iter().enumerate().filter(|(_, part)| !part.is_weighed)
    }

    /// The labels that are scored in the next quantum: of slices that lie side by side.
    pub fn next_scored(&self, decoder: &Decoder, found: &LogProbs) -> Option<Range<usize>> {
        let mut before = found.log_probs.len();
        let mut later = self.to_be_weighed().map(|(_, part)| part);
        let first = later.find(|part| match before < part.labels.len() {
            true => true,
            false => {
                before -= part.labels.len();
                false
            }
        })?;
        let start = first.labels.start + before;
        let end = later.fold(first.labels.end, |end, part| match part.labels.start == end {
            true => part.labels.end,
            false => end,
        });
        Some(start..end.min(start + rows_at_once(decoder)))
    }

    /// The labels that are done in the next quantum. None reaches over the end of a slice where the head is adapted, because
    /// gradients of the adapter are sums over rows, or where a row has several labels: these sums must be the same alone and beside
    /// others.
    pub fn next_labels(&self, learns: &[Learns], decoder: &Decoder, found: &LogProbs) -> Range<usize> {
        let done = found.log_probs.len();
        let all = self.slice.labels.len();
        let adapts_head = |learns: &Learns| match learns.trained {
            Trained::Adapter { adapter, .. } => decoder.adapts_head(adapter),
            Trained::Model { .. } => false,
        };
        let has_sums = learns.iter().any(adapts_head) || !self.parts.iter().all(|part| part.is_row_once);
        let mut ends = self.parts.iter().map(|part| part.labels.end);
        let end = match has_sums {
            true => ends.find(|&end| end > done),
            false => None,
        };
        done..end.unwrap_or(all).min(done + rows_at_once(decoder))
    }

    /// Whether no row has several of `labels`.
    pub fn is_row_once(&self, labels: &Range<usize>) -> bool {
        let is_within = |part: &&Part| part.labels.start < labels.end && labels.start < part.labels.end;
        self.parts.iter().filter(is_within).all(|part| part.is_row_once)
    }

    /// None where the model itself is trained.
    pub fn trained_rows<'a>(&self, learns: &[Learns<'a>]) -> Vec<TrainedRows<'a>> {
        let rows =
            |(part, learns): (&Part, &Learns<'a>)| learns.trained_rows(part.rows.clone(), part.rows_before);
        self.parts.iter().zip(learns).filter_map(rows).collect()
    }

    /// The same of the rows before the head, one for each of `labels`. A slice has no more labels than rows where something drops
    /// out, so these are numbered as its rows are.
    pub fn trained_labels<'a>(&self, learns: &[Learns<'a>], labels: &Range<usize>) -> Vec<TrainedRows<'a>> {
        let rows = |(part, learns): (&Part, &Learns<'a>)| {
            let own = part.labels.start.max(labels.start)..part.labels.end.min(labels.end);
            if own.is_empty() {
                return None;
            }
            let before = part.rows_before + (own.start - part.labels.start) as u64;
            learns.trained_rows(own.start - labels.start..own.end - labels.start, before)
        };
        self.parts.iter().zip(learns).filter_map(rows).collect()
    }
}
