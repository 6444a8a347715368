//! Which trials of a sweep go on, by successive halving (Jamieson and Talwalkar, arXiv 1502.07943): at a rung, a part of the
//! run, the best of the trials that came so far go on, and of n trials by a factor f one in f each time. What is decided is a
//! function of the numbers that trials report at the rungs, whenever they report them, so it is the same after any stop.
//! Not here: training, files, who starts and stops a trial.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::selection::LOSS;
use crate::settings::Settings;

/// Without a setting: the worse half stops.
const FACTOR: u32 = 2;
/// The training loss of a trial is the mean of so long a part of its run up to there: one step's is noise.
const RECENT: u64 = 4;

/// How trials are compared.
#[derive(Clone, Debug, PartialEq)]
pub struct Sweep {
    /// As in [`super::selection::Selection`].
    pub metric: String,
    pub greater_is_better: bool,
    pub factor: u32,
    trials: usize,
    /// By validations, else by what training reports.
    validates: bool,
    /// A trial stands where its best validation does, because that becomes its result.
    load_best: bool,
}

/// What one trial has reported.
#[derive(Clone, Debug, Default)]
pub struct Course {
    pub total_steps: Option<u64>,
    trained: BTreeMap<u64, f64>,
    validated: BTreeMap<u64, f64>,
    pub end: Option<End>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    Succeeded,
    /// It diverged, or somebody cancelled it.
    Failed,
}

impl Course {
    /// Of a run that has reported nothing.
    pub fn of(total_steps: u64) -> Course {
        Course {
            total_steps: Some(total_steps),
            ..Course::default()
        }
    }

    /// A step that is reported again counts once.
    pub fn trained(&mut self, step: u64, value: f64) {
        self.trained.insert(step, value);
    }

    pub fn validated(&mut self, step: u64, value: f64) {
        self.validated.insert(step, value);
    }

    /// The last step that was reported.
    pub fn step(&self) -> u64 {
        let last = |values: &BTreeMap<u64, f64>| values.keys().next_back().copied();
        last(&self.trained).max(last(&self.validated)).unwrap_or(0)
    }
}

/// What is to be done now.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// By trial.
    pub calls: Vec<Call>,
    /// Those at which it is known who goes on.
    pub rungs: Vec<Rung>,
    /// By trial, where it stood last: at a rung, or at its end.
    pub values: Vec<Option<f64>>,
    /// `Some`: the sweep is over. `Some(None)`: no trial came to a good end.
    pub winner: Option<Option<usize>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    GoesOn,
    /// At the rung before others: what it does until they are there is lost if it loses.
    Waits,
    /// Stopped, and goes on only if all who were better fail.
    Lost,
    /// It has ended.
    Over,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Rung {
    /// From 1.
    pub number: u32,
    /// Part of each trial's run.
    pub part: f64,
    /// Trials with their values, the best first.
    pub ranking: Vec<(usize, f64)>,
    /// How many of them go on.
    pub kept: usize,
}

impl Sweep {
    /// Of `trials` that have these settings in common.
    pub fn new(settings: &Settings, trials: usize, has_validation_file: bool) -> Sweep {
        let selection = settings.selection();
        let metric = selection.as_ref().map_or(LOSS, |selection| &selection.metric);
        Sweep {
            metric: metric.to_owned(),
            greater_is_better: selection
                .as_ref()
                .is_some_and(|selection| selection.greater_is_better),
            factor: settings.reduction_factor.unwrap_or(FACTOR),
            trials,
            validates: has_validation_file,
            load_best: selection.is_some_and(|selection| selection.load_best),
        }
    }

    /// By name, as it is reported.
    pub fn shown_metric(&self) -> String {
        let of = if self.validates { "validation" } else { "training" };
        format!("{of} {}", self.metric.replace('_', " "))
    }

    /// As many as leave one trial, or fewer than a factor of them.
    pub fn rungs(&self) -> u32 {
        match self.factor {
            0 | 1 => 0,
            factor => (self.trials.max(1) as u64).ilog(u64::from(factor)),
        }
    }

    /// The step of a run of `total` steps at which its value at a rung is due.
    fn due(&self, rung: u32, total: u64) -> u64 {
        let parts = u64::from(self.factor.max(1)).saturating_pow(self.rungs() - rung + 1);
        total.div_ceil(parts).max(1)
    }

    /// How many go on, rounded up: few trials are compared where few are asked for.
    fn kept(&self, rung: u32) -> usize {
        self.trials.div_ceil((self.factor as usize).saturating_pow(rung))
    }

    /// `eval_steps` of a trial that was not asked for any: such that it is validated at each rung and at its end.
    pub fn eval_steps(&self, asked: Option<u64>, has_max_steps: bool, total: u64) -> u64 {
        match asked {
            asked if !self.validates => asked.unwrap_or(0),
            Some(steps @ 1..) => steps,
            _ if self.rungs() > 0 => self.due(1, total),
            _ if has_max_steps => total,
            // Each epoch's end, of which the last is the run's.
            asked => asked.unwrap_or(0),
        }
    }

    pub fn decide(&self, courses: &[Course]) -> Decision {
        let ended = |i: usize| courses[i].end;
        let mut decision = Decision {
            calls: vec![Call::Lost; courses.len()],
            rungs: vec![],
            values: vec![None; courses.len()],
            winner: None,
        };
        let mut standing: Vec<usize> = (0..courses.len()).collect();
        // Who lost, the best of the last rung first.
        let mut lost: Vec<usize> = vec![];
        for number in 1..=self.rungs() {
            let at_rung = |i: &usize| Some((*i, self.at(&courses[*i], number)?));
            let mut ranking: Vec<(usize, f64)> = standing.iter().filter_map(at_rung).collect();
            let is_there = |i: usize| ranking.iter().any(|(there, _)| *there == i);
            let awaited = standing.iter().any(|&i| !is_there(i) && ended(i).is_none());
            for &(i, value) in &ranking {
                decision.values[i] = Some(value);
            }
            if awaited {
                for &i in &standing {
                    decision.calls[i] = if is_there(i) { Call::Waits } else { Call::GoesOn };
                }
                return decision.without_ended(courses);
            }
            if ranking.is_empty() {
                standing.clear();
                break;
            }
            self.rank(&mut ranking);
            let kept = self.kept(number).min(ranking.len());
            standing = ranking.iter().map(|(i, _)| *i).collect();
            lost.splice(0..0, standing.split_off(kept));
            decision.rungs.push(Rung {
                number,
                part: 1.0 / f64::from(self.factor).powf(f64::from(self.rungs() - number + 1)),
                ranking,
                kept,
            });
        }
        for &i in &standing {
            decision.calls[i] = Call::GoesOn;
            if ended(i) == Some(End::Succeeded) {
                decision.values[i] = self.at_end(&courses[i]).or(decision.values[i]);
            }
        }
        let is_running = |i: &usize| ended(*i).is_none();
        if !standing.iter().any(is_running) {
            let good = standing.iter().filter(|&&i| ended(i) == Some(End::Succeeded));
            let mut good: Vec<(usize, f64)> = good
                .map(|&i| (i, decision.values[i].unwrap_or(f64::NAN)))
                .collect();
            self.rank(&mut good);
            // Where all who came so far failed, the best of the others has its turn.
            let next = lost.into_iter().find(|&i| ended(i) != Some(End::Failed));
            match (good.first(), next) {
                (Some((best, _)), _) => decision.winner = Some(Some(*best)),
                (None, Some(next)) if is_running(&next) => decision.calls[next] = Call::GoesOn,
                (None, next) => {
                    decision.winner = Some(next);
                    if let Some(next) = next {
                        decision.values[next] = self.at_end(&courses[next]).or(decision.values[next]);
                    }
                }
            }
        }
        decision.without_ended(courses)
    }

    /// The best first; of equals the first trial.
    fn rank(&self, trials: &mut [(usize, f64)]) {
        trials.sort_by(|(i, a), (j, b)| self.order(*a, *b).then(i.cmp(j)));
    }

    /// `Less`: `a` is better. What is no number is worse than any.
    fn order(&self, a: f64, b: f64) -> Ordering {
        match (a.is_nan() || b.is_nan(), self.greater_is_better) {
            (true, _) => a.is_nan().cmp(&b.is_nan()),
            (false, false) => a.total_cmp(&b),
            (false, true) => b.total_cmp(&a),
        }
    }

    /// `None`: not there yet, or never.
    fn at(&self, course: &Course, rung: u32) -> Option<f64> {
        let due = self.due(rung, course.total_steps?);
        let there = match self.validates {
            // The first validation from there on.
            true => course.validated.range(due..).next().map(|(step, _)| *step),
            false => course.trained.contains_key(&due).then_some(due),
        };
        match (there, course.end) {
            (Some(step), _) => self.up_to(course, step),
            // It ended before that by itself.
            (None, Some(End::Succeeded)) => self.at_end(course),
            (None, _) => None,
        }
    }

    fn at_end(&self, course: &Course) -> Option<f64> {
        self.up_to(course, course.step())
    }

    fn up_to(&self, course: &Course, step: u64) -> Option<f64> {
        if self.validates {
            let mut validated = course.validated.range(..=step).map(|(_, value)| *value);
            return match self.load_best {
                false => validated.next_back(),
                true => validated.min_by(|a, b| self.order(*a, *b)),
            };
        }
        let from = step - step.div_ceil(RECENT);
        let recent = course.trained.range(from + 1..=step).map(|(_, value)| value);
        let (n, sum) = recent.fold((0, 0.0), |(n, sum), value| (n + 1, sum + value));
        (n > 0).then(|| sum / f64::from(n))
    }
}

impl Decision {
    fn without_ended(mut self, courses: &[Course]) -> Decision {
        for (call, course) in self.calls.iter_mut().zip(courses) {
            if course.end.is_some() {
                *call = Call::Over;
            }
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a trial that nobody has run yet: its validation losses at steps 1, 2, ... of 16, and where it fails.
    struct Nature {
        losses: Vec<f64>,
        fails_after: Option<u64>,
    }

    const STEPS: u64 = 16;

    fn sweep(trials: usize, factor: u32) -> Sweep {
        let settings = Settings {
            reduction_factor: Some(factor),
            ..Settings::default()
        };
        Sweep::new(&settings, trials, true)
    }

    /// One step further, or the end.
    fn advance(course: &mut Course, nature: &Nature) {
        let step = course.step() + 1;
        if nature.fails_after.is_some_and(|last| step > last) {
            course.end = Some(End::Failed);
            return;
        }
        course.validated(step, nature.losses[step as usize - 1]);
        if step == STEPS {
            course.end = Some(End::Succeeded);
        }
    }

    /// Runs to the end, whoever goes on or waits being drawn by `seed`. The winner, the steps that were taken, the rungs.
    fn run(sweep: &Sweep, natures: &[Nature], seed: u64) -> (Option<usize>, u64, Vec<Rung>) {
        let mut courses: Vec<Course> = natures.iter().map(|_| Course::of(STEPS)).collect();
        let mut draw = seed;
        for _ in 0..10_000 {
            let decision = sweep.decide(&courses);
            if let Some(winner) = decision.winner {
                return (winner, courses.iter().map(Course::step).sum(), decision.rungs);
            }
            // Seed 0: nobody moves who waits.
            let may = |call: Call| call == Call::GoesOn || seed > 0 && call == Call::Waits;
            let movers: Vec<usize> = (0..courses.len()).filter(|&i| may(decision.calls[i])).collect();
            draw = draw
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let i = movers[(draw >> 33) as usize % movers.len()];
            advance(&mut courses[i], &natures[i]);
        }
        panic!("it never ends");
    }

    #[test]
    fn losers_stop_and_the_winner_does_not_depend_on_who_is_first() {
        let mut draw = 7_u64;
        let mut number = move || {
            draw = draw
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            draw >> 33
        };
        for (trials, factor, fails) in [
            (4, 2, 0),
            (8, 2, 0),
            (9, 3, 0),
            (5, 2, 2),
            (4, 2, 4),
            (6, 2, 5),
            (3, 1, 1),
            (2, 5, 1),
        ] {
            for _ in 0..30 {
                let natures: Vec<Nature> = (0..trials)
                    .map(|i| Nature {
                        losses: (0..STEPS).map(|_| number() as f64).collect(),
                        fails_after: (i < fails).then(|| number() % STEPS),
                    })
                    .collect();
                let sweep = sweep(trials, factor);
                let (winner, steps, rungs) = run(&sweep, &natures, 0);
                let best = winner.map(|i| &natures[i]);
                assert_eq!(best.is_none(), fails == trials);
                assert!(best.is_none_or(|best| best.fails_after.is_none()));
                if (trials, factor, fails) == (4, 2, 0) {
                    // 4 run a quarter, 2 half, 1 all of it.
                    assert_eq!(steps, 2 * STEPS);
                    assert_eq!(
                        rungs
                            .iter()
                            .map(|rung| (rung.part, rung.kept))
                            .collect::<Vec<_>>(),
                        [(0.25, 2), (0.5, 1)]
                    );
                    let first = natures
                        .iter()
                        .map(|nature| nature.losses[3])
                        .fold(f64::MAX, f64::min);
                    assert_eq!(rungs[0].ranking[0].1, first);
                }
                for seed in 1..6 {
                    let other = run(&sweep, &natures, seed);
                    assert_eq!(
                        (other.0, other.2),
                        (winner, rungs.clone()),
                        "{trials} by {factor}"
                    );
                }
            }
        }
    }

    #[test]
    fn where_all_who_came_so_far_fail_the_best_loser_has_its_turn() {
        let flat = |loss: f64, fails_after| Nature {
            losses: vec![loss; STEPS as usize],
            fails_after,
        };
        let natures = [
            flat(4.0, None),
            flat(3.0, None),
            flat(2.0, Some(9)),
            flat(1.0, Some(12)),
        ];
        // The last rung's loser fails, too; then comes the better one of the first rung.
        assert_eq!(run(&sweep(4, 2), &natures, 0).0, Some(1));
    }

    #[test]
    fn trials_are_compared_by_what_there_is() {
        let mut early = Course::of(STEPS);
        for step in 1..=16 {
            early.trained(step, 17.0 - step as f64);
        }
        let by_training = Sweep::new(&Settings::default(), 4, false);
        // Of the rung at step 4 the last step, of the end the last four.
        assert_eq!(by_training.at(&early, 1), Some(13.0));
        assert_eq!(by_training.at_end(&early), Some(2.5));
        assert_eq!(by_training.shown_metric(), "training loss");
        let settings = Settings {
            metric_for_best_model: Some("eval_mean_token_accuracy".to_owned()),
            load_best_model_at_end: Some(true),
            ..Settings::default()
        };
        let best = Sweep::new(&settings, 4, true);
        for (step, value) in [(3, 0.9), (5, 0.5), (6, f64::NAN), (7, 0.6)] {
            early.validated(step, value);
        }
        assert_eq!((best.at(&early, 1), best.at_end(&early)), (Some(0.9), Some(0.9)));
        assert_eq!(best.shown_metric(), "validation mean token accuracy");
        let mut ranking = [(0, 0.5), (1, f64::NAN), (2, 0.7), (3, 0.7)];
        best.rank(&mut ranking);
        assert_eq!(ranking.map(|(i, _)| i), [2, 3, 0, 1]);
        // A trial that nobody asked for validations has one at each rung.
        assert_eq!(
            [(None, false), (Some(0), true), (Some(3), false)]
                .map(|(asked, most)| best.eval_steps(asked, most, 30)),
            [8, 8, 3]
        );
        let all = sweep(4, 1);
        assert_eq!(
            [(None, false), (Some(0), true)].map(|(asked, most)| all.eval_steps(asked, most, 30)),
            [0, 30]
        );
    }
}
