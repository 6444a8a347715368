//! Direct preference optimisation (arXiv 2305.18290) and its relatives, as TRL's DPOTrainer has them: each a function of
//! the two answers' log-ratios to the reference.

use tandem_core::job::DpoLoss;

use super::{Sequence, Weighed, log_sigmoid, pair, pair_metrics, sigmoid};

pub(super) fn weigh(group: &[Sequence], loss: DpoLoss, beta: f64, label_smoothing: f64) -> Weighed {
    let [chosen, rejected] = pair(group);
    let ratios = [chosen, rejected].map(Sequence::log_ratio);
    let lengths = [chosen, rejected].map(Sequence::answer_labels);
    let (loss, [dchosen, drejected]) = of_ratios(loss, beta, label_smoothing, ratios, lengths);
    Weighed {
        loss,
        dlogp: vec![chosen.spread(dchosen), rejected.spread(drejected)],
        metrics: pair_metrics(
            ratios.map(|ratio| beta * ratio),
            [chosen, rejected].map(Sequence::log_prob),
        ),
    }
}

/// The loss and its derivative by each log-ratio. `e`: the share of pairs that may be the wrong way round.
fn of_ratios(
    loss: DpoLoss,
    beta: f64,
    e: f64,
    [chosen, rejected]: [f64; 2],
    lengths: [f64; 2],
) -> (f64, [f64; 2]) {
    // Of a function of beta * (chosen - rejected), by its argument.
    let of_margin = |loss: f64, d: f64| (loss, [beta * d, -beta * d]);
    let margin = beta * (chosen - rejected);
    let slope = |x: f64| sigmoid(x) * sigmoid(-x);
    match loss {
        DpoLoss::Sigmoid => of_margin(
            -(1.0 - e) * log_sigmoid(margin) - e * log_sigmoid(-margin),
            -(1.0 - e) * sigmoid(-margin) + e * sigmoid(margin),
        ),
        // arXiv 2403.00409
        DpoLoss::Robust => of_margin(
            (-(1.0 - e) * log_sigmoid(margin) + e * log_sigmoid(-margin)) / (1.0 - 2.0 * e),
            (-(1.0 - e) * sigmoid(-margin) - e * sigmoid(margin)) / (1.0 - 2.0 * e),
        ),
        // SLiC, arXiv 2305.10425
        DpoLoss::Hinge => of_margin((1.0 - margin).max(0.0), if margin < 1.0 { -1.0 } else { 0.0 }),
        // arXiv 2402.00856
        DpoLoss::ExoPair => {
            let (here, there) = (log_sigmoid(margin) - (-e).ln_1p(), log_sigmoid(-margin) - e.ln());
            of_margin(
                sigmoid(margin) * here + sigmoid(-margin) * there,
                slope(margin) * (here - there),
            )
        }
        // arXiv 2310.12036, of ratios a token, as TRL confirmed with its authors.
        DpoLoss::Ipo => {
            let far = chosen / lengths[0] - rejected / lengths[1] - 1.0 / (2.0 * beta);
            (far * far, [2.0 * far / lengths[0], -2.0 * far / lengths[1]])
        }
        DpoLoss::SigmoidNorm => {
            let margin = beta * (chosen / lengths[0] - rejected / lengths[1]);
            let d = -beta * sigmoid(-margin);
            (-log_sigmoid(margin), [d / lengths[0], -d / lengths[1]])
        }
        // arXiv 2402.05369
        DpoLoss::NcaPair => {
            let [chosen, rejected] = [beta * chosen, beta * rejected];
            (
                -log_sigmoid(chosen) - 0.5 * log_sigmoid(-chosen) - 0.5 * log_sigmoid(-rejected),
                [
                    beta * (0.5 * sigmoid(chosen) - sigmoid(-chosen)),
                    beta * 0.5 * sigmoid(rejected),
                ],
            )
        }
        // arXiv 2404.04656, without its shift.
        DpoLoss::BcoPair => {
            let [chosen, rejected] = [beta * chosen, beta * rejected];
            (
                -log_sigmoid(chosen) - log_sigmoid(-rejected),
                [-beta * sigmoid(-chosen), beta * sigmoid(rejected)],
            )
        }
        // arXiv 2405.00675
        DpoLoss::SppoHard => {
            let (won, lost) = (chosen - 0.5 / beta, rejected + 0.5 / beta);
            (won * won + lost * lost, [2.0 * won, 2.0 * lost])
        }
        // arXiv 2408.06266
        DpoLoss::ApoZero => {
            let [chosen, rejected] = [beta * chosen, beta * rejected];
            (
                sigmoid(-chosen) + sigmoid(rejected),
                [-beta * slope(chosen), beta * slope(rejected)],
            )
        }
        DpoLoss::ApoDown => (
            sigmoid(beta * chosen) + sigmoid(-margin),
            [
                beta * (slope(beta * chosen) - slope(margin)),
                beta * slope(margin),
            ],
        ),
    }
}
