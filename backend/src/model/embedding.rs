//! The embedding under adapters that change it: a row for each token, the base's and on it what the adapter of the row adds, of
//! the token alone (lookup, then B). Whole on every rank. Not here: how the base's table lies (mod, weight).

use tandem_core::TokenId;
use tandem_kernels::linear::{linear, linear_backward};
use tandem_kernels::matmul;
use tch::{Kind, Tensor};

use super::gradient::{add, narrow_rows};
use super::{Decoder, TrainPass, Trainable, TrainedRows, scaled};
use crate::family::ParamId;
use crate::lora::adapter::AdapterRows;

impl Decoder {
    /// `[T, H]` of a batch's tokens; rows of no adapter, or of one that leaves the embedding alone, are the base's.
    pub fn embed(&self, tokens: &[TokenId], lora: &[AdapterRows]) -> Tensor {
        let embedded = self.embedded(tokens);
        for AdapterRows { rows, adapter } in lora {
            let Some(branch) = adapter.embedding() else {
                continue;
            };
            let shrunk = branch.a.gather(&tokens[rows.clone()]);
            let added = linear(&shrunk, &branch.b, None, &[]) * branch.scale;
            let _ = narrow_rows(&embedded, rows.start as i64..rows.end as i64).g_add_(&added);
        }
        scaled(&embedded, self.embed_scale)
    }

    /// Adds the gradient of the embedding, or of its adapters, where they are trained: the last of a pass.
    pub fn embed_backward(&self, dhidden: &Tensor, pass: &TrainPass) {
        match pass.trainable {
            Trainable::Full(gradients) => {
                let embedded = scaled(dhidden, self.embed_scale);
                gradients.add_rows(ParamId::Embed, &indices(pass.tokens), &embedded);
                gradients.settle();
            }
            Trainable::Lora(trained) => {
                // It is whole on every rank, and gradients are summed.
                if self.layout.is_first() {
                    for rows in trained {
                        self.embedding_branch(dhidden, pass.tokens, rows);
                    }
                }
            }
        }
    }

    fn embedding_branch(&self, dhidden: &Tensor, tokens: &[TokenId], rows: &TrainedRows) {
        let Some(branch) = rows.adapter.embedding() else {
            return;
        };
        let shape = rows.gradient.shape.linear(self.layout.embed_id());
        let shape = shape.expect("a gradient has its adapter's shape");
        let tokens = &tokens[rows.rows.clone()];
        let dy = scaled(&rows.of(dhidden), self.embed_scale * branch.scale);
        add(
            &rows.gradient.b(&shape.parts[0]),
            matmul::tn(&dy, &branch.a.gather(tokens)),
        );
        let dshrunk = linear_backward(&dy, &branch.b).to_kind(Kind::Float);
        let a = rows.gradient.a(shape); // [r, V]
        let dshrunk = dshrunk.tr().contiguous().to_device(a.device());
        let _ = a
            .shallow_clone()
            .index_add_(1, &indices(tokens).to_device(a.device()), &dshrunk);
    }
}

fn indices(tokens: &[TokenId]) -> Tensor {
    Tensor::from_slice(&tokens.iter().map(|&token| i64::from(token)).collect::<Vec<_>>())
}
