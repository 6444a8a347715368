//! Odds ratio preference optimisation (arXiv 2403.07691, as TRL's ORPOTrainer has it): the likelihood of the preferred
//! answer, prompt included, and the ratio of the answers' odds. No reference.

use super::{Beside, Sequence, Weighed, log_sigmoid, pair, pair_metrics, sigmoid};

pub(super) fn weigh(group: &[Sequence], beta: f64, beside: &Beside) -> Weighed {
    let [chosen, rejected] = pair(group);
    // Of a token.
    let means = [chosen, rejected].map(|sequence| sequence.log_prob() / sequence.answer_labels());
    // 1 - p, which is not 0.
    let rest = means.map(|mean| (-mean.exp_m1()).max(f64::EPSILON));
    let log_odds = (means[0] - means[1]) - (rest[0].ln() - rest[1].ln());
    let ratio = log_sigmoid(log_odds);
    let d = -beta * sigmoid(-log_odds);
    // The mean over the micro-batch's labels, as a mean over its groups.
    let share = beside.groups as f64 / beside.likelihood_labels as f64;
    let likelihood: f64 = chosen.log_probs.iter().map(|&log_prob| f64::from(log_prob)).sum();
    let mut dchosen = chosen.spread(d / rest[0] / chosen.answer_labels());
    dchosen.iter_mut().for_each(|d| *d -= share);
    let mut metrics = pair_metrics(means.map(|mean| beta * mean), means);
    metrics.extend([
        ("nll_loss", -share * likelihood),
        ("log_odds_ratio", ratio),
        ("log_odds_chosen", log_odds),
    ]);
    Weighed {
        loss: -share * likelihood - beta * ratio,
        dlogp: vec![dchosen, rejected.spread(-d / rest[1] / rejected.answer_labels())],
        metrics,
    }
}
