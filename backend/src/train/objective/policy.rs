//! The losses of a client that drives training: exact sums over tokens, and their derivatives by each log-probability.
//! Formulas and papers stand at [`Loss`]. In float64; what comes in and goes out is float32.

use tandem_core::learner::{Clip, Datum, Loss};

/// One sequence's part of a loss.
pub struct Weighed {
    pub loss: f64,
    /// d loss / d log p of each target.
    pub dlogp: Vec<f32>,
}

/// `log_probs`: of each target of `datum` as the model has them now.
pub fn weigh(loss: Loss, datum: &Datum, log_probs: &[f32]) -> Weighed {
    let sequence_ratio = match loss {
        Loss::Gspo(_) => sequence_ratio(datum, log_probs),
        _ => 1.0,
    };
    let mut weighed = Weighed {
        loss: 0.0,
        dlogp: Vec::with_capacity(log_probs.len()),
    };
    for (i, &log_prob) in log_probs.iter().enumerate() {
        let p = f64::from(log_prob);
        let weight = datum.weights.get(i).map_or(1.0, |&weight| f64::from(weight));
        let (value, slope) = match loss {
            Loss::CrossEntropy => (-p, -1.0),
            _ => {
                let (q, advantage) = (f64::from(datum.sampled[i]), f64::from(datum.advantages[i]));
                of_policy(loss, p, q, advantage, sequence_ratio)
            }
        };
        // A token that does not count counts nothing, whatever its ratio.
        if weight == 0.0 {
            weighed.dlogp.push(0.0);
            continue;
        }
        weighed.loss += weight * value;
        weighed.dlogp.push((weight * slope) as f32);
    }
    weighed
}

/// A token's loss, and its derivative by p.
fn of_policy(loss: Loss, p: f64, q: f64, advantage: f64, sequence_ratio: f64) -> (f64, f64) {
    let ratio = (p - q).exp();
    match loss {
        Loss::CrossEntropy => (-p, -1.0),
        Loss::ImportanceSampling => (-ratio * advantage, -ratio * advantage),
        Loss::Ppo(clip) => clipped(clip, ratio, advantage),
        Loss::Cispo(clip) => {
            let factor = clip.of(ratio) * advantage;
            (-factor * p, -factor)
        }
        Loss::Dro { beta } => {
            let apart = p - q;
            (
                -(p * advantage - beta / 2.0 * apart * apart),
                -(advantage - beta * apart),
            )
        }
        // Of the value of the sequence's ratio, with the derivative of the token's own.
        Loss::Gspo(clip) => clipped(clip, sequence_ratio, advantage),
    }
}

/// -min(r A, clip(r) A): where the second is smaller, nothing moves.
fn clipped(clip: Clip, ratio: f64, advantage: f64) -> (f64, f64) {
    let (free, bound) = (ratio * advantage, clip.of(ratio) * advantage);
    match free <= bound {
        true => (-free, -free),
        false => (-bound, 0.0),
    }
}

/// exp of the mean of p - q over the tokens that count.
fn sequence_ratio(datum: &Datum, log_probs: &[f32]) -> f64 {
    let counts = |i: usize| datum.ratio_mask.get(i).is_none_or(|&mask| mask != 0.0);
    let apart = |i: usize| f64::from(log_probs[i]) - f64::from(datum.sampled[i]);
    let counted: Vec<f64> = (0..log_probs.len()).filter(|&i| counts(i)).map(apart).collect();
    match counted.len() {
        0 => 1.0,
        n => (counted.iter().sum::<f64>() / n as f64).exp(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datum() -> (Datum, Vec<f32>) {
        let datum = Datum {
            tokens: vec![1; 4],
            columns: 1,
            targets: vec![2; 4],
            weights: vec![1.0, 0.5, 2.0, 0.0],
            sampled: vec![-1.0, -2.0, -0.5, -3.0],
            advantages: vec![1.5, -2.0, 0.25, 9.0],
            ratio_mask: vec![1.0, 1.0, 0.0, 1.0],
        };
        (datum, vec![-0.75, -2.5, -1.25, -0.125])
    }

    #[test]
    fn derivatives_are_those_of_the_loss() {
        let clip = Clip { low: 0.5, high: 4.0 };
        let (datum, log_probs) = datum();
        for loss in [
            Loss::CrossEntropy,
            Loss::ImportanceSampling,
            Loss::Ppo(clip),
            Loss::Cispo(clip),
            Loss::Dro { beta: 0.3 },
            Loss::Gspo(clip),
        ] {
            let Weighed { dlogp, .. } = weigh(loss, &datum, &log_probs);
            for i in 0..log_probs.len() {
                let moved = |by: f32| {
                    let mut moved = log_probs.clone();
                    moved[i] += by;
                    weigh(loss, &datum, &moved).loss
                };
                const H: f32 = 1.0 / 1024.0;
                let slope = (moved(H) - moved(-H)) / (2.0 * f64::from(H));
                let expected = match loss {
                    // CISPO's factor is held fixed.
                    Loss::Cispo(clip) => {
                        let ratio = (f64::from(log_probs[i]) - f64::from(datum.sampled[i])).exp();
                        -f64::from(datum.weights[i]) * clip.of(ratio) * f64::from(datum.advantages[i])
                    }
                    // GSPO's ratio moves with its own token alone, and by all of it.
                    Loss::Gspo(_) => {
                        let ratio = sequence_ratio(&datum, &log_probs);
                        -f64::from(datum.weights[i]) * ratio * f64::from(datum.advantages[i])
                    }
                    _ => slope,
                };
                let got = f64::from(dlogp[i]);
                assert!(
                    (got - expected).abs() < 1e-4 * (1.0 + expected.abs()),
                    "{loss:?} at {i}: {got}, expected {expected}"
                );
            }
        }
    }

    #[test]
    fn what_is_beyond_the_clip_does_not_move() {
        let clip = Clip { low: 0.8, high: 1.2 };
        let one = |advantage: f32, log_prob: f32| {
            let datum = Datum {
                tokens: vec![1],
                columns: 1,
                targets: vec![2],
                sampled: vec![-1.0],
                advantages: vec![advantage],
                ..Datum::default()
            };
            weigh(Loss::Ppo(clip), &datum, &[log_prob]).dlogp[0]
        };
        // Better than it was and good, worse and bad: far enough. The other two are brought back.
        assert_eq!([one(1.0, 0.0), one(-1.0, -2.0)], [0.0, 0.0]);
        assert!(one(1.0, -2.0) < 0.0 && one(-1.0, 0.0) > 0.0);
    }
}
