//! The table against transformers' numbers, its application against the reference and autograd.

use super::*;
use crate::gpu;

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

fn spec(rotary_dim: i64, layout: RopeLayout, scaling: RopeScaling) -> RopeSpec {
    RopeSpec {
        theta: 500_000.0,
        rotary_dim,
        layout,
        scaling,
    }
}

fn yarn(factor: f64) -> RopeScaling {
    RopeScaling::Yarn {
        factor,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor: None,
        mscale: None,
        mscale_all_dim: None,
        truncate: true,
        original_max_position_embeddings: 4096,
    }
}

fn longrope(factor: f64, attention_factor: Option<f64>) -> RopeScaling {
    RopeScaling::LongRope {
        short_factor: vec![1.0, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 8.0],
        long_factor: vec![1.0, 2.0, 4.0, 8.0, 12.0, 20.0, 40.0, 64.0],
        factor,
        attention_factor,
        original_max_position_embeddings: 4096,
    }
}

/// Both layouts, whole and partial; the backward against autograd through the reference, where the attention factor
/// shows that it is no inverse.
#[test]
fn agrees_with_the_reference_and_its_gradient() {
    gpu::everywhere(judge_by_the_reference);
}

fn judge_by_the_reference() {
    for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
        for (t, heads, head_dim, rotary_dim, scaling) in [
            (1, 1, 2, 2, RopeScaling::None),
            (5, 3, 64, 64, RopeScaling::None),
            (40, 12, 64, 32, yarn(4.0)),
            (9, 2, 80, 20, RopeScaling::None),
            (9, 2, 24, 16, longrope(4.0, None)),
        ] {
            let spec = spec(rotary_dim, layout, scaling);
            let rope = Rope::new(&spec, head_dim, 100, Device::Cpu).expect("valid");
            let positions: Vec<i64> = (0..t).map(|i| (i * 37) % 100).collect();
            let fused = Tensor::randn([t, heads * head_dim + 7], FLOAT);
            let untouched = fused.narrow(1, heads * head_dim, 7).copy();
            let x = fused.narrow(1, 0, heads * head_dim);
            let double = x.copy().to_kind(Kind::Double).set_requires_grad(true);
            let dy = x.randn_like();
            let want = &double * 1.0; // A node that may be written in place.
            rope.turn_reference(&want, &(&positions).into(), Direction::Forward);
            let loss = (&want * &dy).sum(Kind::Double);
            let want_dx = Tensor::run_backward(&[loss], &[&double], false, false).remove(0);

            let off = |got: &Tensor, want: &Tensor| {
                (got.to_kind(Kind::Double) - want).abs().max().double_value(&[])
            };
            rope.apply(&x, &(&positions).into());
            assert!(off(&x, &want.detach()) < 3e-6, "{spec:?}");
            assert_eq!(fused.narrow(1, heads * head_dim, 7), untouched);
            rope.apply_backward(&dy, &(&positions).into());
            assert!(off(&dy, &want_dx) < 3e-6, "{spec:?}");
        }
    }
}

/// Position 1 turns the first pair by one radian: (1, 0) becomes (cos 1, sin 1), each layout in its own places, and
/// dimensions behind rotary_dim stay.
#[test]
fn pairs_stand_where_the_layout_says() {
    gpu::everywhere(judge_layouts);
}

fn judge_layouts() {
    let (cos, sin) = (1f32.cos(), 1f32.sin());
    for (layout, want) in [
        (RopeLayout::Half, [cos, 0.0, sin, 0.0, 7.0, 8.0]),
        (RopeLayout::Interleaved, [cos, sin, 0.0, 0.0, 7.0, 8.0]),
    ] {
        let rope = Rope::new(&spec(4, layout, RopeScaling::None), 6, 2, Device::Cpu).expect("valid");
        let x = Tensor::from_slice(&[1.0f32, 0.0, 0.0, 0.0, 7.0, 8.0]).view([1, 6]);
        rope.apply(&x, &[1][..].into());
        let got = Vec::<f32>::try_from(x.view([6])).expect("floats");
        assert!(
            got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6),
            "{layout:?}: {got:?}"
        );
    }
}

#[rustfmt::skip]
const NONE: [f32; 8] = [1.0, 0.193_922_76, 0.037_606_03, 0.007_292_665, 0.001_414_213_4, 0.000_274_248_2, 5.318_295_7e-5, 1.031_338_5e-5];
#[rustfmt::skip]
const LLAMA3: [f32; 8] = [1.0, 0.193_922_76, 0.037_606_03, 0.007_292_665, 0.000_429_556_7, 8.570_256e-6, 1.661_967_4e-6, 3.222_933e-7];
#[rustfmt::skip]
const YARN: [f32; 8] = [1.0, 0.193_922_76, 0.028_204_523, 0.003_646_332_3, 0.000_353_553_36, 6.856_205e-5, 1.329_574e-5, 2.578_346_3e-6];
#[rustfmt::skip]
const YARN_BETAS: [f32; 8] = [1.0, 0.193_922_76, 0.037_606_03, 0.004_557_915_5, 0.000_353_553_36, 6.856_205e-5, 1.329_574e-5, 2.578_346_3e-6];
#[rustfmt::skip]
const YARN_WHOLE: [f32; 8] = [1.0, 0.193_922_76, 0.034_805_313, 0.003_405_863_2, 4.419_417e-5, 8.570_256e-6, 1.661_967_4e-6, 3.222_933e-7];
#[rustfmt::skip]
const SHORT: [f32; 8] = [1.0, 0.176_293_4, 0.031_338_356, 0.004_861_776_7, 0.000_707_106_7, 9.141_605_6e-5, 1.063_659_1e-5, 1.289_173_2e-6];
#[rustfmt::skip]
const LONG: [f32; 8] = [1.0, 0.096_961_38, 0.009_401_508, 0.000_911_583_1, 0.000_117_851_13, 1.371_240_9e-5, 1.329_574e-6, 1.611_466_4e-7];

/// Values printed by transformers 5.23 (ROPE_INIT_FUNCTIONS) for head_dim 16, theta 500000 and the scalings below.
#[test]
fn frequencies_and_factors_are_those_of_transformers() {
    let llama3 = RopeScaling::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    let with = |change: fn(&mut RopeScaling)| {
        let mut scaling = yarn(4.0);
        change(&mut scaling);
        scaling
    };
    let betas = with(|scaling| {
        if let RopeScaling::Yarn {
            beta_fast,
            beta_slow,
            mscale,
            mscale_all_dim,
            ..
        } = scaling
        {
            (*beta_fast, *beta_slow, *mscale, *mscale_all_dim) = (16.0, 2.0, Some(0.707), Some(1.0));
        }
    });
    let whole = with(|scaling| {
        if let RopeScaling::Yarn { factor, truncate, .. } = scaling {
            (*factor, *truncate) = (32.0, false);
        }
    });
    let given = with(|scaling| {
        if let RopeScaling::Yarn { attention_factor, .. } = scaling {
            *attention_factor = Some(1.5);
        }
    });
    // Scaling, length of the table, frequencies, attention factor.
    let cases: [(RopeScaling, i64, [f32; 8], f64); 10] = [
        (RopeScaling::None, 100, NONE, 1.0),
        (
            RopeScaling::Linear { factor: 4.0 },
            100,
            NONE.map(|x| x / 4.0),
            1.0,
        ),
        (llama3, 100, LLAMA3, 1.0),
        (yarn(4.0), 16384, YARN, 1.138_629_436_111_989),
        (betas, 16384, YARN_BETAS, 0.964_326_914_892_074),
        (whole, 16384, YARN_WHOLE, 1.346_573_590_279_972_7),
        (given, 16384, YARN, 1.5),
        (longrope(4.0, None), 4096, SHORT, 1.080_123_449_734_643_5),
        (longrope(32.0, None), 4097, LONG, 1.190_238_071_423_808_3),
        (longrope(4.0, Some(1.19)), 4097, LONG, 1.19),
    ];
    for (scaling, positions, want, factor) in cases {
        let spec = spec(16, RopeLayout::Half, scaling);
        let got = Vec::<f32>::try_from(spec.inv_freq(positions).expect("valid")).expect("floats");
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() <= 2e-7 * want, "{spec:?}: {got} for {want}");
        }
        assert!((spec.attention_factor() - factor).abs() < 1e-12, "{spec:?}");
    }
}

#[test]
fn a_position_outside_the_table_panics() {
    let new =
        |rotary_dim, scaling| Rope::new(&spec(rotary_dim, RopeLayout::Half, scaling), 4, 8, Device::Cpu);
    let rope = new(4, RopeScaling::None).expect("valid");
    let x = Tensor::zeros([1, 4], FLOAT);
    for position in [-1, 8] {
        assert!(
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(
                || rope.apply(&x, &[position][..].into())
            ))
            .is_err()
        );
    }
    assert!(new(6, RopeScaling::None).is_err());
    assert!(new(4, longrope(4.0, None)).is_err());
}
