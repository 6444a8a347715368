//! One sublayer in a pass, `x + scale * post(body(pre(x)))`: the unit in which the decoder runs and trains. Its backward
//! recomputes what is cheap from its input and keeps what is not.

use tandem_kernels::attention::Heads;
use tandem_kernels::places::Ints;
use tandem_kernels::rope::Rope;
use tch::Tensor;

use super::attention::{self, Attention};
use super::experts::{self, Experts};
use super::linear::{Backward, Saving, Serving, Shrunk};
use super::mlp::{self, Mlp};
use super::norm::Norm;
use super::{Batch, Context, Decoder, TrainPass, scaled};

pub(super) struct Sublayer {
    pub pre: Option<Norm>,
    pub bodies: Vec<Body>,
    pub post: Option<Norm>,
    pub scale: f64,
}

pub(super) enum Body {
    Attention(Box<Attention>),
    Mlp(Box<Mlp>),
    Experts(Box<Experts>),
}

/// What the backward of a sublayer reads; everything else is recomputed from these.
pub struct Saved {
    /// `[T, H]`
    input: Tensor,
    bodies: Vec<SavedBody>,
    /// The bodies' sum `[T, H]`, where a norm stands behind it.
    sum: Option<Tensor>,
    shrunk: Shrunk,
}

enum SavedBody {
    Attention(attention::Saved),
    Mlp(mlp::Saved),
    Experts(Box<experts::Saved>),
}

impl Sublayer {
    fn normed(&self, input: &Tensor) -> Tensor {
        match &self.pre {
            Some(norm) => norm.apply(input),
            None => input.shallow_clone(),
        }
    }

    /// Whether the bodies' products can be added to the input as they are made.
    fn adds_as_it_is(&self) -> bool {
        self.post.is_none() && self.scale == 1.0
    }

    /// `input + scale * post(sum)`
    fn joined(&self, input: Tensor, sum: &Tensor) -> Tensor {
        let sum = match &self.post {
            Some(norm) => norm.apply(sum),
            None => sum.shallow_clone(),
        };
        input + scaled(&sum, self.scale)
    }
}

impl Decoder {
    /// Heads of the attentions that keep their keys in a group of layers, each shape once.
    pub fn heads_of(&self, group: usize) -> Vec<Heads> {
        let mut shapes = vec![];
        for body in self.sublayers.iter().flat_map(|sublayer| &sublayer.bodies) {
            match body {
                Body::Attention(attn) if attn.place.group == group && !shapes.contains(&attn.heads) => {
                    shapes.push(attn.heads);
                }
                _ => {}
            }
        }
        shapes
    }

    pub fn n_sublayers(&self) -> usize {
        self.sublayers.len()
    }

    /// Hidden states `[T, H]` through sublayer `i`.
    pub fn sublayer(&self, i: usize, hidden: Tensor, batch: &Batch) -> Tensor {
        let sublayer = &self.sublayers[i];
        let x = sublayer.normed(&hidden);
        let mut pass = Serving { lora: batch.lora };
        let (mut sum, input) = self.residual(sublayer, hidden);
        for body in &sublayer.bodies {
            sum = Some(match body {
                Body::Attention(attn) => {
                    let rows = self.rows(attn, batch.positions, &batch.context);
                    attn.forward(&x, sum, &rows, &mut pass)
                }
                Body::Mlp(mlp) => mlp.forward(&x, sum, &mut pass).0,
                Body::Experts(experts) => experts.forward(&x, sum, &mut pass).0,
            });
        }
        let sum = self.summed(sum.expect(A_BODY));
        match input {
            Some(input) => sublayer.joined(input, &sum),
            None => sum,
        }
    }

    /// The same, keeping what [`Decoder::sublayer_backward`] reads.
    pub fn sublayer_saving(&self, i: usize, input: Tensor, pass: &TrainPass) -> (Tensor, Saved) {
        let sublayer = &self.sublayers[i];
        let x = sublayer.normed(&input);
        let mut saving = Saving {
            decoder: self,
            trainable: pass.trainable,
            shrunk: Shrunk::default(),
        };
        let (mut sum, apart) = self.residual(sublayer, input.shallow_clone());
        let mut bodies = vec![];
        for body in &sublayer.bodies {
            let (output, saved) = match body {
                Body::Attention(attn) => {
                    let context = Context::Packed {
                        cu_seqlens: pass.cu_seqlens,
                    };
                    let rows = self.rows(attn, pass.positions, &context);
                    let (output, saved) = attn.forward_saving(&x, sum, &rows, pass.cu_seqlens, &mut saving);
                    (output, SavedBody::Attention(saved))
                }
                Body::Mlp(mlp) => {
                    let (output, saved) = mlp.forward(&x, sum, &mut saving);
                    (output, SavedBody::Mlp(saved))
                }
                Body::Experts(experts) => {
                    let (output, saved) = experts.forward(&x, sum, &mut saving);
                    (output, SavedBody::Experts(Box::new(saved)))
                }
            };
            sum = Some(output);
            bodies.push(saved);
        }
        let sum = self.summed(sum.expect(A_BODY));
        let output = match apart {
            Some(input) => sublayer.joined(input, &sum),
            None => sum.shallow_clone(),
        };
        let saved = Saved {
            input,
            bodies,
            sum: sublayer.post.is_some().then_some(sum),
            shrunk: saving.shrunk,
        };
        (output, saved)
    }

    /// `doutput [T, H]` of sublayer `i` to `dinput [T, H]`; adds the gradient of what is trained.
    pub fn sublayer_backward(&self, i: usize, saved: Saved, doutput: Tensor, pass: &TrainPass) -> Tensor {
        let sublayer = &self.sublayers[i];
        let Saved {
            input,
            bodies,
            sum,
            shrunk,
        } = saved;
        let dsum = scaled(&doutput, sublayer.scale);
        let dsum = match (&sublayer.post, sum) {
            (Some(norm), Some(sum)) => norm.backward(&sum, &dsum, pass.trainable),
            _ => dsum,
        };
        let back = Backward {
            decoder: self,
            pass,
            shrunk,
        };
        let x = || sublayer.normed(&input);
        let dx = sublayer
            .bodies
            .iter()
            .zip(bodies)
            .map(|(body, saved)| match (body, saved) {
                (Body::Attention(attn), SavedBody::Attention(saved)) => {
                    attn.backward(saved, &dsum, x, self.rope(attn), &back)
                }
                (Body::Mlp(mlp), SavedBody::Mlp(saved)) => mlp.backward(saved, &dsum, x, &back),
                (Body::Experts(experts), SavedBody::Experts(saved)) => {
                    experts.backward(*saved, &dsum, x, &back)
                }
                _ => unreachable!("what was saved is of the same sublayer"),
            });
        let dx = self.summed(dx.reduce(|a, b| a + b).expect(A_BODY));
        drop(dsum);
        match &sublayer.pre {
            Some(norm) => norm.backward_add(&input, &dx, doutput, pass.trainable),
            None => doutput + dx,
        }
    }

    /// Numbers per token that [`Decoder::sublayer_saving`] keeps, in all sublayers.
    pub fn saved_numbers(&self) -> usize {
        let body = |body: &Body| match body {
            Body::Attention(attn) => attn.saved_numbers(),
            Body::Mlp(mlp) => mlp.saved_numbers(),
            Body::Experts(experts) => experts.saved_numbers(),
        };
        let sublayer = |sublayer: &Sublayer| {
            let rows = 1 + usize::from(sublayer.post.is_some());
            rows * self.spec.hidden as usize + sublayer.bodies.iter().map(body).sum::<usize>()
        };
        self.sublayers.iter().map(sublayer).sum()
    }

    /// What the bodies' products are added to as they are made, and what waits for their sum. Where ranks sum, one of them
    /// brings the input.
    fn residual(&self, sublayer: &Sublayer, input: Tensor) -> (Option<Tensor>, Option<Tensor>) {
        match (sublayer.adds_as_it_is(), self.comm.rank()) {
            (true, 0) => (Some(input), None),
            (true, _) => (None, None),
            (false, _) => (None, Some(input)),
        }
    }

    fn rows<'a>(
        &'a self,
        attn: &Attention,
        positions: &'a Ints<'a>,
        context: &'a Context<'a>,
    ) -> attention::Rows<'a> {
        attention::Rows {
            positions,
            context,
            rope: self.rope(attn),
            precision: self.precision,
        }
    }

    fn rope(&self, attn: &Attention) -> Option<&Rope> {
        attn.rope.map(|rope| &self.ropes[rope])
    }
}

const A_BODY: &str = "a sublayer has a body";
