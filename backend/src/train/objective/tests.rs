//! Derivatives against differences. That the losses are TRL's is tests/numerics' to say.

use tandem_core::job::{CpoLoss, DpoLoss};

use super::*;

#[test]
fn derivatives_are_those_of_the_losses() {
    let dpo = DpoLoss::NAMES.iter().map(|name| Objective::Dpo {
        loss: DpoLoss::named(name).expect("a name of the table"),
        beta: 0.3,
        label_smoothing: 0.1,
    });
    let cpo = CpoLoss::NAMES.iter().map(|name| Objective::Cpo {
        loss: CpoLoss::named(name).expect("a name of the table"),
        beta: 0.3,
        label_smoothing: 0.1,
        simpo_gamma: 0.4,
        cpo_alpha: 0.7,
    });
    let kto = Objective::Kto {
        beta: 0.3,
        desirable_weight: 1.5,
        undesirable_weight: 0.5,
    };
    for objective in dpo.chain(cpo).chain([Objective::Orpo { beta: 0.3 }, kto]) {
        for value in [0.0, 1.0] {
            check(&objective, value);
        }
    }
}

fn check(objective: &Objective, value: f32) {
    let labels: [&[Label]; 2] = [
        &[(0, 3, 0.0), (1, 4, 1.0), (2, 5, 1.0)],
        &[(0, 3, 0.0), (1, 6, 1.0), (2, 7, 1.0), (3, 8, 1.0)],
    ];
    let reference: [&[f32]; 2] = [&[-1.5, -1.0, -2.0], &[-1.5, -0.5, -2.5, -1.0]];
    let beside = Beside {
        groups: 2,
        likelihood_labels: 9,
        divergence: 0.2,
    };
    let sequences = match objective {
        Objective::Kto { .. } => 1,
        _ => 2,
    };
    let weighed = |log_probs: &[Vec<f32>; 2]| {
        let group: Vec<Sequence> = (0..sequences)
            .map(|i| Sequence {
                labels: labels[i],
                log_probs: &log_probs[i],
                reference: reference[i],
            })
            .collect();
        weigh(objective, &group, value, &beside)
    };
    let at = [vec![-1.25, -0.75, -1.5], vec![-1.25, -1.0, -1.75, -1.25]];
    let step = 1.0 / 1024.0;
    let got = weighed(&at);
    assert_eq!(got.dlogp.len(), sequences);
    for (i, derivatives) in got.dlogp.iter().enumerate() {
        for (j, derivative) in derivatives.iter().enumerate() {
            let [mut more, mut less] = [at.clone(), at.clone()];
            more[i][j] += step;
            less[i][j] -= step;
            let expected = (weighed(&more).loss - weighed(&less).loss) / f64::from(2.0 * step);
            assert!(
                (derivative - expected).abs() < 1e-5,
                "{objective:?}, sequence {i}, label {j}: {derivative} for {expected}"
            );
        }
    }
}

#[test]
fn rewards_weigh_rows() {
    let factors = factors(&[1.0, 3.0, -500.0], 2.0);
    assert!((factors.iter().sum::<f64>() - 3.0).abs() < 1e-12);
    assert!((factors[1] / factors[0] - 1f64.exp()).abs() < 1e-12 && factors[2] < 1e-9);
}
