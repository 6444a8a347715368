//! Routing against plain tch and autograd, and the promises about bits.

use super::*;

const BOTH: [RoutingWeights; 2] = [RoutingWeights::OfAll, RoutingWeights::OfChosen];

fn close(got: &Tensor, want: &Tensor, tolerance: f64, what: &str) {
    let scale = want.abs().max().double_value(&[]).max(1.0);
    let worst = (got.to_kind(Kind::Double) - want).abs().max().double_value(&[]);
    assert!(worst <= tolerance * scale, "{what}: off by {worst} of {scale}");
}

/// The whole of it (choice, gather, a product that differs by expert, combination) in tch, with its gradients by autograd,
/// as transformers' MixtralSparseMoeBlock (renormalised) and Qwen2MoeSparseMoeBlock (not) do it.
#[test]
fn forward_and_backward_are_those_of_plain_tch() {
    crate::gpu::everywhere(judge_by_plain_tch);
}

fn judge_by_plain_tch() {
    for kind in BOTH {
        for (n_tokens, n_experts, top_k, width) in
            [(1, 4, 1, 3), (5, 4, 4, 16), (70, 8, 2, 33), (40, 60, 4, 64)]
        {
            let what = format!("{kind:?}, {top_k} of {n_experts} for {n_tokens} tokens");
            let double = (Kind::Double, Device::Cpu);
            let float_logits = Tensor::randn([n_tokens, n_experts], FLOAT) * 2.0;
            let float_x = Tensor::randn([n_tokens, width], FLOAT);
            let factors = Tensor::randn([n_experts, width], FLOAT); // Expert e multiplies by factors[e].
            let dy = Tensor::randn([n_tokens, width], FLOAT);

            let logits = float_logits.to_kind(Kind::Double).set_requires_grad(true);
            let x = float_x.to_kind(Kind::Double).set_requires_grad(true);
            let shares = logits.softmax(-1, Kind::Double);
            let (top, chosen) = shares.topk(top_k, -1, true, true);
            let top = match kind {
                RoutingWeights::OfAll => top,
                RoutingWeights::OfChosen => {
                    &top / top.sum_dim_intlist([-1i64].as_slice(), true, Kind::Double)
                }
            };
            let dense = Tensor::zeros([n_tokens, n_experts], double).scatter(1, &chosen, &top);
            let want = dense.mm(&factors.to_kind(Kind::Double)) * &x; // sum over e of w_e factors_e x
            let loss = (&want * &dy).sum(Kind::Double);
            let wants = Tensor::run_backward(&[loss], &[&x, &logits], false, false);

            let routing = Routing::new(&float_logits, top_k as usize, kind);
            let expert_of: Vec<i64> = (0..n_experts as usize)
                .flat_map(|expert| routing.rows(expert).map(move |_| expert as i64))
                .collect();
            let factors = factors.index_select(0, &Tensor::from_slice(&expert_of)); // by row
            let gathered = routing.gather(&float_x);
            assert_eq!(gathered, routing.gather_reference(&float_x), "{what}");
            let outputs = gathered * &factors;
            let y = routing.combine(&outputs);
            close(&y, &want.detach(), 1e-6, &what);
            close(
                &y,
                &routing.combine_reference(&outputs).to_kind(Kind::Double),
                1e-6,
                &what,
            );

            let (doutputs, dweights) = routing.combine_backward(&outputs, &dy);
            let reference = routing.combine_backward_reference(&outputs, &dy);
            close(&doutputs, &reference.0.to_kind(Kind::Double), 1e-6, &what);
            close(&dweights, &reference.1.to_kind(Kind::Double), 2e-6, &what);
            let dgathered = doutputs * &factors;
            let dx = routing.gather_backward(&dgathered);
            close(&dx, &wants[0], 2e-6, &what);
            close(
                &dx,
                &routing
                    .gather_backward_reference(&dgathered)
                    .to_kind(Kind::Double),
                1e-6,
                &what,
            );
            let dlogits = routing.logits_backward(&float_logits, &dweights);
            close(&dlogits, &wants[1], 4e-6, &what);
        }
    }
}

/// Rows are by expert, then by token; a range of tokens is a range of rows within each expert; ties go to the first.
#[test]
fn rows_lie_by_expert_and_token() {
    crate::gpu::everywhere(judge_the_layout);
}

fn judge_the_layout() {
    let logits = Tensor::randn([50, 8], FLOAT).round(); // many ties
    let routing = Routing::new(&logits, 3, RoutingWeights::OfChosen);
    assert_eq!((routing.n_tokens(), routing.n_experts()), (50, 8));
    let tokens: Vec<usize> = routing.tokens().collect();
    let mut seen = 0;
    for expert in 0..8 {
        let rows = routing.rows(expert);
        assert_eq!(rows.start, seen);
        seen = rows.end;
        let of_expert = &tokens[rows.start as usize..rows.end as usize];
        assert!(of_expert.is_sorted_by(|a, b| a < b), "{of_expert:?}");
        for range in [0..50, 0..0, 7..20, 49..50] {
            let among = routing.rows_among(expert, &range);
            let want = of_expert.iter().filter(|token| range.contains(*token)).count();
            assert_eq!((among.end - among.start) as usize, want);
            let all_within = tokens[among.start as usize..among.end as usize]
                .iter()
                .all(|t| range.contains(t));
            assert!(all_within, "expert {expert} {range:?}");
        }
    }
    assert_eq!(seen, 150);
    let equal = Routing::new(&Tensor::zeros([2, 4], FLOAT), 2, RoutingWeights::OfAll);
    assert_eq!(
        (0..4).map(|e| equal.rows(e).count()).collect::<Vec<_>>(),
        [2, 2, 0, 0]
    );
    assert_eq!(equal.weights, [0.25; 4]);
}

/// A token alone has the bits it has among others.
#[test]
fn a_token_alone_is_the_token_in_a_batch() {
    crate::gpu::everywhere(judge_alone);
}

fn judge_alone() {
    let (logits, dweights) = (Tensor::randn([40, 16], FLOAT), Tensor::randn([40, 4], FLOAT));
    for kind in BOTH {
        let all = Routing::new(&logits, 4, kind);
        let outputs = Tensor::randn([160, 48], FLOAT);
        let (y, dx) = (all.combine(&outputs), all.gather_backward(&outputs));
        let dlogits = all.logits_backward(&logits, &dweights);
        let tokens: Vec<usize> = all.tokens().collect();
        for token in 0..40 {
            let one = |x: &Tensor| x.narrow(0, token, 1);
            let alone = Routing::new(&one(&logits), 4, kind);
            let own: Vec<i64> = (0..160)
                .filter(|row| tokens[*row] == token as usize)
                .map(|row| row as i64)
                .collect();
            let own = outputs.index_select(0, &Tensor::from_slice(&own));
            assert_eq!(alone.combine(&own), one(&y));
            assert_eq!(alone.gather_backward(&own), one(&dx));
            assert_eq!(
                alone.logits_backward(&one(&logits), &one(&dweights)),
                one(&dlogits)
            );
        }
    }
}
