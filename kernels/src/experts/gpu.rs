//! Routing by the kernels of `gpu/experts.cu`. What the groups of the products that follow need comes to the host in one
//! copy; the device keeps its own.

use tch::{Device, Kind, Tensor};

use super::RoutingWeights;
use crate::gpu::rows::{Matrix, THREADS};
use crate::gpu::{Arg, Gpu, int};

/// A routing on the device: int32, one after the other in `all`; weights as the bits of floats.
#[derive(Debug)]
pub(super) struct OnGpu {
    gpu: Gpu,
    kind: RoutingWeights,
    top_k: usize,
    tokens: usize,
    experts: usize,
    all: Tensor,
    chosen: Tensor,
    row_of: Tensor,
    choice_of: Tensor,
    weights: Tensor,
}

/// The same on the host.
pub(super) struct OnHost {
    pub chosen: Vec<u32>,
    pub row_of: Vec<u32>,
    pub choice_of: Vec<u32>,
    pub starts: Vec<usize>,
    pub weights: Vec<f32>,
}

impl OnGpu {
    pub fn new(gpu: Gpu, logits: &Tensor, top_k: usize, kind: RoutingWeights) -> OnGpu {
        let (logits, device) = (Matrix::of(&logits.contiguous()), logits.device());
        let (tokens, experts) = (logits.rows, logits.width);
        let n = tokens * top_k;
        let all = Tensor::empty([(4 * n + experts + 1) as i64], (Kind::Int, device));
        let piece = |at: usize, n: usize| all.narrow(0, at as i64, n as i64);
        let starts = piece(4 * n, experts + 1);
        let on_gpu = OnGpu {
            gpu,
            kind,
            top_k,
            tokens,
            experts,
            chosen: piece(0, n),
            row_of: piece(n, n),
            choice_of: piece(2 * n, n),
            weights: piece(3 * n, n),
            all,
        };
        let args = [
            (&logits).into(),
            (&on_gpu.chosen).into(),
            (&on_gpu.weights).into(),
            int(tokens),
            int(experts),
            int(top_k),
            on_gpu.of_all(),
        ];
        gpu.launch("route", on_gpu.by_token(), THREADS, &args);
        let args = [
            (&on_gpu.chosen).into(),
            (&on_gpu.row_of).into(),
            (&on_gpu.choice_of).into(),
            (&starts).into(),
            int(n),
            int(experts),
        ];
        gpu.launch("group_by_expert", [experts, 1, 1], THREADS, &args);
        on_gpu
    }

    pub fn on_host(&self) -> OnHost {
        let all = Vec::<i32>::try_from(self.all.to_device(Device::Cpu)).expect("int32");
        let n = self.tokens * self.top_k;
        let numbers = |at: usize| all[at * n..(at + 1) * n].iter().map(|&i| i as u32);
        OnHost {
            chosen: numbers(0).collect(),
            row_of: numbers(1).collect(),
            choice_of: numbers(2).collect(),
            weights: numbers(3).map(f32::from_bits).collect(),
            starts: all[4 * n..].iter().map(|&start| start as usize).collect(),
        }
    }

    pub fn gather(&self, x: &Tensor) -> Tensor {
        let x = Matrix::of(x);
        let y = Matrix::new(self.tokens * self.top_k, x.width, &self.all);
        let args = [
            (&x).into(),
            x.stride(),
            (&self.choice_of).into(),
            (&y).into(),
            int(self.top_k),
            int(x.width),
        ];
        self.gpu.launch("expert_gather", y.grid(), THREADS, &args);
        y.into_tensor()
    }

    /// The sum of each token's choices, weighted or not.
    pub fn sum_choices(&self, x: &Tensor, weighted: bool) -> Tensor {
        let x = Matrix::of(&x.contiguous());
        let y = Matrix::new(self.tokens, x.width, &self.all);
        let args = [
            (&x).into(),
            (&self.row_of).into(),
            weighted.then_some(&self.weights).into(),
            (&y).into(),
            int(self.top_k),
            int(x.width),
        ];
        self.gpu.launch("expert_combine", y.grid(), THREADS, &args);
        y.into_tensor()
    }

    pub fn combine_backward(&self, outputs: &Tensor, dy: &Tensor) -> (Tensor, Tensor) {
        assert_eq!(
            dy.size(),
            [self.tokens as i64, outputs.size()[1]],
            "dy does not match"
        );
        let (outputs, dy) = (Matrix::of(&outputs.contiguous()), Matrix::of(dy));
        let doutputs = outputs.like();
        let dweights = Matrix::new(self.tokens, self.top_k, &self.all);
        let args = [
            (&outputs).into(),
            (&dy).into(),
            dy.stride(),
            (&self.row_of).into(),
            (&self.weights).into(),
            (&doutputs).into(),
            (&dweights).into(),
            int(self.top_k),
            int(outputs.width),
        ];
        let grid = [self.tokens * self.top_k, 1, 1];
        self.gpu.launch("expert_combine_backward", grid, THREADS, &args);
        (doutputs.into_tensor(), dweights.into_tensor())
    }

    pub fn logits_backward(&self, logits: &Tensor, dweights: &Tensor) -> Tensor {
        let (logits, dweights) = (logits.contiguous(), dweights.contiguous());
        assert_eq!(
            logits.size(),
            [self.tokens as i64, self.experts as i64],
            "logits do not match"
        );
        assert_eq!(
            dweights.numel(),
            self.tokens * self.top_k,
            "dweights do not match"
        );
        let dlogits = logits.empty_like();
        let args = [
            (&logits).into(),
            (&self.chosen).into(),
            (&self.weights).into(),
            (&dweights).into(),
            (&dlogits).into(),
            int(self.tokens),
            int(self.experts),
            int(self.top_k),
            self.of_all(),
        ];
        self.gpu.launch("route_backward", self.by_token(), THREADS, &args);
        dlogits
    }

    /// 32 lanes a token.
    fn by_token(&self) -> [usize; 3] {
        [self.tokens.div_ceil(8), 1, 1]
    }

    fn of_all(&self) -> Arg<'static> {
        int(i32::from(self.kind == RoutingWeights::OfAll))
    }
}
