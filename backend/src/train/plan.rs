//! Which examples make which optimizer step. A function of the dataset, the seed and the step alone: a resumed job
//! needs no cursor, and the pace of training cannot change what is learned. Not here: how examples go through the layers (slice).

use tandem_core::job::{Hyper, steps_of};
use tandem_core::rng;

/// Keeps the draws of shuffling apart from those of initialisation and dropout.
const SHUFFLE_STREAM: u64 = 0x5_f1e0_0000;

/// The schedule of a run.
pub struct DataPlan {
    lengths: Vec<usize>,
    /// Of the orders of epochs; `None`: that of the data.
    seed: Option<u64>,
    batch_size: usize,
    /// Tokens that a micro-batch is filled to when short examples are packed.
    pack_tokens: Option<usize>,
    accumulation: usize,
    /// Optimizer steps of an epoch at most.
    most_of_epoch: u64,
    /// Optimizer steps before each epoch that was counted, and before the one after the last of these. Epochs count
    /// whole: the run may end within the last.
    steps_before: Vec<u64>,
    /// Of the run.
    total: u64,
    /// The epoch whose micro-batches were listed last: walking forward lists each epoch once.
    listed: Option<(u64, Vec<Vec<usize>>)>,
}

impl DataPlan {
    /// `lengths`: tokens of each group, of which there is one.
    pub fn new(lengths: Vec<usize>, hyper: &Hyper) -> DataPlan {
        assert!(!lengths.is_empty(), "a plan needs data");
        let mut plan = DataPlan {
            lengths,
            seed: hyper.shuffle.then_some(hyper.seed),
            batch_size: hyper.batch_size.max(1) as usize,
            pack_tokens: hyper
                .packing
                .then(|| hyper.batch_size.max(1) as usize * hyper.max_seq_length as usize),
            accumulation: hyper.gradient_accumulation_steps.max(1) as usize,
            most_of_epoch: hyper.max_steps_per_epoch.unwrap_or(u64::MAX).max(1),
            steps_before: vec![0],
            total: 0,
            listed: None,
        };
        // With max_steps the others are counted when they are reached: packed rows are laid out to be counted.
        let counted = match hyper.max_steps {
            Some(_) => 1,
            None => hyper.n_epochs.ceil() as u64,
        };
        for _ in 0..counted {
            plan.count_epoch();
        }
        plan.total = hyper
            .max_steps
            .unwrap_or_else(|| plan.steps_of_run(hyper.n_epochs));
        plan
    }

    /// Optimizer steps of the run.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Counts epochs up to that of optimizer step `step` (0-based). [`DataPlan::step`] does so by itself.
    pub fn reach(&mut self, step: u64) {
        let last = self.total.saturating_sub(1);
        while self.counted() <= step.min(last) {
            self.count_epoch();
        }
    }

    /// Epochs completed after `step` optimizer steps, with a fraction. The step before was reached.
    pub fn epoch(&self, step: u64) -> f64 {
        let epoch = self.epoch_of(step);
        let (start, end) = (self.steps_before[epoch], self.steps_before[epoch + 1]);
        epoch as f64 + (step - start) as f64 / (end - start) as f64
    }

    /// Does an epoch, or the run, end with optimizer step number `step` (1-based), which was reached?
    pub fn ends_epoch(&self, step: u64) -> bool {
        step == self.total || self.steps_before[1..].binary_search(&step).is_ok()
    }

    /// Numbers of the groups of optimizer step `step` (0-based), by micro-batch.
    pub fn step(&mut self, step: u64) -> Vec<Vec<usize>> {
        self.reach(step);
        let epoch = self.epoch_of(step);
        if self
            .listed
            .as_ref()
            .is_none_or(|(listed, _)| *listed != epoch as u64)
        {
            self.listed = Some((epoch as u64, self.micro_batches(epoch as u64)));
        }
        let (_, batches) = self.listed.as_ref().expect("it was just listed");
        let first = (step - self.steps_before[epoch]) as usize * self.accumulation;
        batches[first..batches.len().min(first + self.accumulation)].to_vec()
    }

    /// Optimizer steps of the epochs that were counted.
    fn counted(&self) -> u64 {
        *self.steps_before.last().expect("it begins with 0")
    }

    /// Those before the last epoch, and the part of the last that is run. Epochs of unpacked rows are alike: then it is
    /// [`steps_of`] all.
    fn steps_of_run(&self, n_epochs: f64) -> u64 {
        let last = self.steps_before.len() - 2;
        let before = self.steps_before[last];
        let steps = self.counted() - before;
        before + steps_of(n_epochs, steps) - last as u64 * steps
    }

    fn count_epoch(&mut self) {
        let epoch = self.steps_before.len() as u64 - 1;
        let end = self.counted() + self.steps_of(epoch);
        self.steps_before.push(end);
    }

    /// The epoch in which `step` (0-based) lies; the last one, after the end.
    fn epoch_of(&self, step: u64) -> usize {
        let begun = self.steps_before.partition_point(|&before| before <= step);
        begun.min(self.steps_before.len() - 1) - 1
    }

    /// Optimizer steps of an epoch. Only packed rows have to be laid out to count them.
    fn steps_of(&self, epoch: u64) -> u64 {
        let micro_batches = match self.pack_tokens {
            Some(_) => self.micro_batches(epoch).len(),
            None => self.lengths.len().div_ceil(self.batch_size),
        };
        (micro_batches.div_ceil(self.accumulation) as u64).min(self.most_of_epoch)
    }

    fn micro_batches(&self, epoch: u64) -> Vec<Vec<usize>> {
        let n = self.lengths.len();
        let order = match self.seed {
            Some(seed) => rng::permutation(n, seed, SHUFFLE_STREAM.wrapping_add(epoch)),
            None => (0..n).collect(),
        };
        let Some(pack_tokens) = self.pack_tokens else {
            return order.chunks(self.batch_size).map(<[usize]>::to_vec).collect();
        };
        let mut batches: Vec<Vec<usize>> = vec![];
        let mut room = 0;
        for example in order {
            let length = self.lengths[example];
            match batches.last_mut() {
                Some(batch) if length <= room => batch.push(example),
                _ => {
                    batches.push(vec![example]);
                    room = pack_tokens.max(length);
                }
            }
            room -= length;
        }
        batches
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_core::job::{Lora, Method, Objective, SaveStrategy, Schedule};

    fn hyper() -> Hyper {
        Hyper {
            n_epochs: 3.0,
            max_steps: None,
            max_steps_per_epoch: None,
            batch_size: 4,
            gradient_accumulation_steps: 2,
            learning_rate: 1e-3,
            lr_scheduler: Schedule::Linear,
            warmup_steps: 0,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            optimizer: Default::default(),
            max_grad_norm: 1.0,
            loraplus_lr_ratio: None,
            neftune_noise_alpha: None,
            seed: 7,
            max_seq_length: 64,
            packing: false,
            shuffle: true,
            save_strategy: SaveStrategy::Steps,
            save_steps: 0,
            eval_steps: 0,
            selection: None,
            objective: Objective::default(),
            frozen_layers: 0,
            method: Method::Lora(Lora {
                r: 4,
                alpha: 8.0,
                dropout: 0.0,
                target_modules: vec![],
                use_rslora: false,
                use_dora: false,
            }),
        }
    }

    #[test]
    fn without_shuffling_every_epoch_has_the_order_of_the_data() {
        for packing in [false, true] {
            let hyper = Hyper {
                packing,
                shuffle: false,
                ..hyper()
            };
            let mut plan = DataPlan::new(lengths(21), &hyper);
            let seen: Vec<usize> = (0..plan.total())
                .flat_map(|step| plan.step(step).into_iter().flatten().collect::<Vec<_>>())
                .collect();
            let expected: Vec<usize> = (0..3).flat_map(|_| 0..21).collect();
            assert_eq!(seen, expected);
        }
    }

    fn lengths(n: usize) -> Vec<usize> {
        (0..n).map(|i| 5 + i % 30).collect()
    }

    #[test]
    fn every_epoch_visits_every_example_once_in_a_new_order() {
        for (packing, n) in [(false, 21), (true, 21), (true, 1), (false, 8)] {
            let mut plan = DataPlan::new(lengths(n), &Hyper { packing, ..hyper() });
            let mut seen: Vec<Vec<usize>> = vec![vec![]; 3];
            for step in 0..plan.total() {
                let epoch = plan.epoch(step) as usize;
                seen[epoch].extend(plan.step(step).into_iter().flatten());
            }
            for epoch in &seen {
                let mut sorted = epoch.clone();
                sorted.sort();
                assert_eq!(
                    sorted,
                    (0..n).collect::<Vec<_>>(),
                    "packing {packing}, {n} examples"
                );
            }
            assert!(n < 5 || seen[0] != seen[1]);
            assert!(plan.ends_epoch(plan.total()) && plan.epoch(plan.total()) == 3.0);
        }
    }

    #[test]
    fn max_steps_says_how_long_the_run_is() {
        // 21 examples by 8 are 3 steps an epoch; n_epochs is 3. max_steps, epochs after steps 3 and the last.
        for (max_steps, after_three, after_all) in
            [(4, 1.0, 4.0 / 3.0), (9, 1.0, 3.0), (100, 1.0, 100.0 / 3.0)]
        {
            for packing in [false, true] {
                let hyper = Hyper {
                    max_steps: Some(max_steps),
                    packing,
                    ..hyper()
                };
                let mut plan = DataPlan::new(lengths(21), &hyper);
                assert_eq!(plan.total(), max_steps);
                assert!(plan.ends_epoch(max_steps) && !plan.step(max_steps - 1).is_empty());
                if !packing {
                    assert_eq!((plan.epoch(3), plan.epoch(max_steps)), (after_three, after_all));
                }
            }
        }
        // Many steps on few examples are counted, not laid out; epochs of packed rows when they are reached.
        let hyper = |packing| Hyper {
            max_steps: Some(10_000_000),
            batch_size: 1000,
            packing,
            ..hyper()
        };
        let mut plan = DataPlan::new(lengths(1), &hyper(false));
        assert_eq!(plan.step(9_999_999), [[0]]);
        assert_eq!(plan.epoch(9_999_999), 9_999_999.0);
        let mut plan = DataPlan::new(lengths(1000), &hyper(true));
        assert_eq!((plan.total(), plan.steps_before.len()), (10_000_000, 2));
        plan.reach(2);
        assert_eq!((plan.steps_before.len(), plan.epoch(3)), (4, 3.0));
        assert!(plan.ends_epoch(3));
    }

    /// transformers: ceil(num_train_epochs x steps of an epoch); of packed rows, whose epochs differ, the last one's part.
    #[test]
    fn a_run_may_end_within_an_epoch() {
        for (n_epochs, total, epoch) in [
            (1.5, 5, 5.0 / 3.0),
            (0.5, 2, 2.0 / 3.0),
            (0.01, 1, 1.0 / 3.0),
            (2.7, 9, 3.0),
            (2.0, 6, 2.0),
        ] {
            let hyper = Hyper { n_epochs, ..hyper() };
            let mut plan = DataPlan::new(lengths(21), &hyper);
            assert_eq!(plan.total(), total);
            assert!((plan.epoch(total) - epoch).abs() < 1e-12, "{}", plan.epoch(total));
            assert!(plan.ends_epoch(total) && !plan.step(total - 1).is_empty());
            // The first steps of the run that goes on to the end.
            let mut whole = DataPlan::new(lengths(21), &self::hyper());
            assert!((0..total).all(|step| plan.step(step) == whole.step(step)));
        }
        let packed = |n_epochs| {
            let hyper = Hyper {
                n_epochs,
                packing: true,
                ..hyper()
            };
            DataPlan::new(lengths(300), &hyper).total()
        };
        let (one, two, half) = (packed(1.0), packed(2.0), packed(1.5));
        assert_eq!(half, one + (two - one).div_ceil(2));
    }

    #[test]
    fn an_epoch_may_have_fewer_steps_than_rows() {
        for (shuffle, packing) in [(true, false), (false, false), (true, true)] {
            let whole = Hyper {
                shuffle,
                packing,
                ..hyper()
            };
            let cut = Hyper {
                max_steps_per_epoch: Some(2),
                ..whole.clone()
            };
            let (mut whole, mut plan) = (
                DataPlan::new(lengths(210), &whole),
                DataPlan::new(lengths(210), &cut),
            );
            let epoch = whole.total() / 3;
            assert_eq!((plan.total(), plan.epoch(3), plan.epoch(6)), (6, 1.5, 3.0));
            let ends: Vec<u64> = (1..=6).filter(|&step| plan.ends_epoch(step)).collect();
            assert_eq!(ends, [2, 4, 6]);
            // The first steps of each epoch of the whole run (packed ones differ in length).
            let first = |step: u64| step / 2 * epoch + step % 2;
            for step in 0..if packing { 2 } else { 6 } {
                assert_eq!(plan.step(step), whole.step(first(step)), "step {step}");
            }
        }
        // More than there is changes nothing.
        let hyper = Hyper {
            max_steps_per_epoch: Some(1000),
            ..hyper()
        };
        assert_eq!(DataPlan::new(lengths(21), &hyper).total(), 9);
    }
}
