//! How a gradient becomes a step: the rule that a run asks for over the parameters of a flat buffer, and what the rule
//! remembers from step to step. Not here: the gradient's norm and its sum (learner), the rate's course (core's job).

use std::collections::BTreeMap;
use std::ops::Range;

use tandem_core::job;
use tandem_kernels::adafactor::{Adafactor, Squares};
use tandem_kernels::adamw::AdamW;
use tandem_kernels::adamw8bit::{self, BLOCK, LEAST, Moment};
use tandem_kernels::lion::Lion;
use tandem_kernels::sgd::Sgd;
use tch::{Device, Kind, Tensor};

/// Some numbers of the buffer that are one tensor in torch.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameter {
    pub range: Range<i64>,
    /// Numbers of a row, where it is a matrix.
    pub columns: Option<i64>,
    pub role: Role,
}

/// What sets a parameter apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Plain,
    /// It may learn faster: an adapter's B.
    B,
    /// It does not decay: norms and biases of a model.
    Undecayed,
    /// Its moments stay in 32 bits.
    Embedding,
}

/// One step's numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    pub learning_rate: f64,
    /// Other rules take from it what they have, too: the decay, and Lion its betas.
    pub adamw: AdamW,
    /// Of the learning rate of a [`Role::B`] over the others'.
    pub b_ratio: f64,
    /// From 1.
    pub number: u64,
}

impl Step {
    /// Learning rate and decay.
    fn of(&self, parameter: &Parameter) -> (f64, f64) {
        match parameter.role {
            Role::Plain | Role::Embedding => (self.learning_rate, self.adamw.weight_decay),
            Role::B => (self.learning_rate * self.b_ratio, self.adamw.weight_decay),
            Role::Undecayed => (self.learning_rate, 0.0),
        }
    }
}

pub struct Optimizer {
    rule: job::Optimizer,
    /// The whole buffer, in order, each with its part of the memory, in the order of [`needs`].
    parameters: Vec<(Parameter, Vec<Tensor>)>,
    /// Flat, by the names that they have in a state's file.
    memory: BTreeMap<&'static str, Tensor>,
}

/// What the rule remembers of a parameter.
fn needs(rule: job::Optimizer, parameter: &Parameter) -> Vec<(&'static str, Kind, i64)> {
    let n = parameter.range.end - parameter.range.start;
    let moments = vec![("moment1", Kind::Float, n), ("moment2", Kind::Float, n)];
    match rule {
        job::Optimizer::AdamW => moments,
        job::Optimizer::AdamW8bit if n < LEAST || parameter.role == Role::Embedding => moments,
        job::Optimizer::AdamW8bit => {
            let blocks = (n + BLOCK as i64 - 1) / BLOCK as i64;
            vec![
                ("codes1", Kind::Uint8, n),
                ("scales1", Kind::Float, blocks),
                ("codes2", Kind::Uint8, n),
                ("scales2", Kind::Float, blocks),
            ]
        }
        job::Optimizer::Sgd { momentum: 0.0, .. } => vec![],
        job::Optimizer::Sgd { .. } => vec![("velocity", Kind::Float, n)],
        job::Optimizer::Lion => vec![("moment1", Kind::Float, n)],
        job::Optimizer::Adafactor { .. } => match parameter.columns {
            Some(columns) => vec![
                ("rows", Kind::Float, n / columns),
                ("columns", Kind::Float, columns),
            ],
            None => vec![("squares", Kind::Float, n)],
        },
    }
}

impl Optimizer {
    pub fn new(rule: job::Optimizer, parameters: Vec<Parameter>) -> Optimizer {
        let mut lengths: BTreeMap<&str, (Kind, i64)> = BTreeMap::new();
        let mut place = |(name, kind, n)| {
            let (_, length) = lengths.entry(name).or_insert((kind, 0));
            *length += n;
            (name, *length - n, n)
        };
        let placed: Vec<(Parameter, Vec<_>)> = parameters
            .into_iter()
            .map(|parameter| {
                let places = needs(rule, &parameter).into_iter().map(&mut place).collect();
                (parameter, places)
            })
            .collect();
        let memory: BTreeMap<&str, Tensor> = lengths
            .into_iter()
            .map(|(name, (kind, n))| (name, Tensor::zeros([n], (kind, Device::Cpu))))
            .collect();
        let view = |(name, start, n): (&str, i64, i64)| memory[name].narrow(0, start, n);
        Optimizer {
            rule,
            parameters: placed
                .into_iter()
                .map(|(parameter, places)| (parameter, places.into_iter().map(view).collect()))
                .collect(),
            memory,
        }
    }

    /// What is remembered, shared storage.
    pub fn memory(&self) -> Vec<(String, Tensor)> {
        let memory = self.memory.iter();
        memory
            .map(|(name, tensor)| ((*name).to_owned(), tensor.shallow_clone()))
            .collect()
    }

    /// Goes on with what was kept.
    pub fn resume(&mut self, kept: &[(String, Tensor)]) -> Result<(), String> {
        let rule = self.rule.name();
        for (name, tensor) in &mut self.memory {
            let Some((_, found)) = kept.iter().find(|(other, _)| other == name) else {
                return Err(format!("its state has no {name}, which {rule} remembers"));
            };
            if found.kind() != tensor.kind() || found.numel() != tensor.numel() {
                let (there, here) = (found.numel(), tensor.numel());
                return Err(format!(
                    "its state has {there} numbers of {name}, this model makes it {here}"
                ));
            }
            tensor.copy_(found);
        }
        Ok(())
    }

    /// As at the start.
    pub fn forget(&mut self) {
        for tensor in self.memory.values_mut() {
            let _ = tensor.zero_();
        }
    }

    /// One step of all numbers, `[P]` float32 on the CPU, in place.
    pub fn step(&self, params: &Tensor, gradient: &Tensor, step: &Step) {
        if self.rule.is_of_numbers() {
            self.step_numbers(params, gradient, step);
            return;
        }
        for (parameter, memory) in &self.parameters {
            let range = &parameter.range;
            let part = |tensor: &Tensor| tensor.narrow(0, range.start, range.end - range.start);
            let numbers = step.of(parameter);
            self.step_one(&part(params), &part(gradient), memory, step, numbers);
        }
    }

    /// Each number goes by itself: neighbours of one rate and decay go together.
    fn step_numbers(&self, params: &Tensor, gradient: &Tensor, step: &Step) {
        let mut ranges: Vec<(Range<i64>, (f64, f64))> = vec![];
        for (parameter, _) in &self.parameters {
            let numbers = step.of(parameter);
            match ranges.last_mut() {
                Some((range, of)) if *of == numbers => range.end = parameter.range.end,
                _ => ranges.push((parameter.range.clone(), numbers)),
            }
        }
        for (range, numbers) in ranges {
            let part = |tensor: &Tensor| tensor.narrow(0, range.start, range.end - range.start);
            // All of it is as long as the buffer, and in its order.
            let memory: Vec<Tensor> = self.memory.values().map(part).collect();
            self.step_one(&part(params), &part(gradient), &memory, step, numbers);
        }
    }

    fn step_one(
        &self,
        params: &Tensor,
        gradient: &Tensor,
        memory: &[Tensor],
        step: &Step,
        (learning_rate, weight_decay): (f64, f64),
    ) {
        let adamw = AdamW {
            weight_decay,
            ..step.adamw
        };
        let AdamW { beta1, beta2, .. } = adamw;
        match (self.rule, memory) {
            (job::Optimizer::AdamW | job::Optimizer::AdamW8bit, [m, v]) => {
                adamw.step(params, gradient, m, v, learning_rate, step.number);
            }
            (job::Optimizer::AdamW8bit, [codes1, scales1, codes2, scales2]) => {
                let [m, v] =
                    [(codes1, scales1), (codes2, scales2)].map(|(codes, scales)| Moment { codes, scales });
                adamw8bit::step(&adamw, params, gradient, &m, &v, learning_rate, step.number);
            }
            (job::Optimizer::Sgd { momentum, nesterov }, velocity) => Sgd {
                momentum,
                nesterov,
                weight_decay,
            }
            .step(params, gradient, velocity.first(), learning_rate, step.number),
            (job::Optimizer::Lion, [m]) => Lion {
                beta1,
                beta2,
                weight_decay,
            }
            .step(params, gradient, m, learning_rate),
            (job::Optimizer::Adafactor { scale_parameter }, memory) => {
                let squares = match memory {
                    [rows, columns] => Squares::OfMatrix { rows, columns },
                    [squares] => Squares::Each(squares),
                    memory => unreachable!("adafactor remembers {} tensors", memory.len()),
                };
                Adafactor {
                    scale_parameter,
                    weight_decay,
                }
                .step(params, gradient, &squares, learning_rate, step.number);
            }
            (rule, memory) => unreachable!("{rule:?} remembers {} tensors", memory.len()),
        }
    }
}
