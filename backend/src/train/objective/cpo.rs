//! Contrastive preference optimisation (arXiv 2401.08417) and SimPO (arXiv 2405.14734), as TRL's CPOTrainer has them: the
//! margin between the answers' likelihoods, and the likelihood of the preferred one. No reference.

use tandem_core::job::CpoLoss;

use super::{Beside, Sequence, Weighed, log_sigmoid, pair, pair_metrics, sigmoid};

/// What is asked of the margin.
pub(super) struct Margin {
    pub loss: CpoLoss,
    pub beta: f64,
    pub label_smoothing: f64,
    pub simpo_gamma: f64,
}

pub(super) fn weigh(group: &[Sequence], margin: &Margin, cpo_alpha: f64, beside: &Beside) -> Weighed {
    let [chosen, rejected] = pair(group);
    let is_mean = matches!(margin.loss, CpoLoss::Ipo | CpoLoss::Simpo);
    let lengths = [chosen, rejected].map(|sequence| if is_mean { sequence.answer_labels() } else { 1.0 });
    let log_probs = [chosen.log_prob() / lengths[0], rejected.log_prob() / lengths[1]];
    let (loss, d) = margin.of(log_probs[0] - log_probs[1]);
    // The mean over the micro-batch's labels, as a mean over its groups.
    let share = beside.groups as f64 / beside.likelihood_labels as f64;
    let mut metrics = pair_metrics(log_probs.map(|log_prob| margin.beta * log_prob), log_probs);
    if cpo_alpha != 0.0 {
        metrics.push(("nll_loss", -share * chosen.log_prob()));
    }
    Weighed {
        loss: loss - cpo_alpha * share * chosen.log_prob(),
        dlogp: vec![
            chosen.spread(d / lengths[0] - cpo_alpha * share),
            rejected.spread(-d / lengths[1]),
        ],
        metrics,
    }
}

impl Margin {
    /// The loss of a difference of log-probabilities, and its derivative.
    fn of(&self, difference: f64) -> (f64, f64) {
        let Margin {
            loss,
            beta,
            label_smoothing: e,
            simpo_gamma,
        } = *self;
        match loss {
            CpoLoss::Sigmoid | CpoLoss::Simpo => {
                let asked = if loss == CpoLoss::Simpo { simpo_gamma } else { 0.0 };
                let x = beta * difference - asked;
                (
                    -(1.0 - e) * log_sigmoid(x) - e * log_sigmoid(-x),
                    beta * (e * sigmoid(x) - (1.0 - e) * sigmoid(-x)),
                )
            }
            CpoLoss::Hinge => {
                let rest = 1.0 - beta * difference;
                (rest.max(0.0), if rest > 0.0 { -beta } else { 0.0 })
            }
            CpoLoss::Ipo => {
                let far = difference - 1.0 / (2.0 * beta);
                (far * far, 2.0 * far)
            }
        }
    }
}
